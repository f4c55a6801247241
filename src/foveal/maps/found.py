"""What a source of "where to look" gives: a map per image, and whether it says anything.

A source is called with a batch, `source(images, labels)`, and answers with `Found`. It draws nothing, gives no
gradient, and leaves the model that it asks as it was.

B batch, h x w cells of the source's own grid (patches, pixels), C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Found:
    """Maps of a batch."""

    map: Tensor  # (B, h, w) float32, zero or more, any scale; spans the whole image
    blank: Tensor  # (B,) bool: this map prefers no place (constant, zero or not finite); its row of `map` is zero
    logits: Tensor | None = None  # (B, C) float32 of the map's model on these images in evaluation; None without one


class Source(Protocol):
    """Where to look. `model` is None where no network is asked."""

    @property
    def model(self) -> nn.Module | None:
        """The network behind the map."""

    def __call__(self, images: Tensor, labels: Tensor | None = None, given: Tensor | None = None) -> Found:
        """Maps of normalised images (B, 3, H, W).

        labels: class indices (B,) or rows (B, C), for sources that look for the label's class.
        given: (B, H', W') maps or masks of these images in the same frame, for the source `given`.
        """


def found(map: Tensor, logits: Tensor | None = None) -> Found:
    """Maps as `Found`: float32, without gradient, those that prefer no place set to zero and marked.

    map: (B, h, w) not negative, any float type or bool.  logits: (B, C).  Nothing is asked of the device.
    """
    if map.dim() != 3:
        raise ValueError(f"a map of shape {tuple(map.shape)}: one (h, w) map per image, (B, h, w), is needed")
    map = map.detach().float()
    low, high = map.flatten(1).aminmax(dim=1)
    blank = ~(high > low) | ~map.isfinite().flatten(1).all(1)  # `not above` also holds for NaN
    map = map.masked_fill(blank[:, None, None], 0.0)
    return Found(map, blank, None if logits is None else logits.detach().float())


def on_grid(map: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map on another grid, each cell the mean over its area: (B, h, w) to (B, *grid), exact for any sizes.

    The mean of the map stays what it was, so shares of attention do too.
    """
    if tuple(map.shape[1:]) == tuple(grid):
        return map
    rows = _weights(map.shape[1], grid[0], map.device, map.dtype)
    columns = _weights(map.shape[2], grid[1], map.device, map.dtype)
    with torch.autocast(map.device.type, enabled=False):  # it would multiply in half precision
        return rows @ map @ columns.T


@lru_cache(maxsize=64)  # copied to a device once, not in every step
def _weights(pixels: int, cells: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return overlaps(pixels, cells).to(device, dtype)


def overlaps(pixels: int, cells: int) -> Tensor:
    """Share of each of `cells` equal parts of a line that lies in each of its `pixels`: (cells, pixels) float64."""
    edges = torch.arange(cells + 1, dtype=torch.float64) * pixels / cells
    left = torch.arange(pixels, dtype=torch.float64)
    inside = torch.minimum(edges[1:, None], left + 1) - torch.maximum(edges[:-1, None], left)
    return inside.clamp_min(0) * cells / pixels
