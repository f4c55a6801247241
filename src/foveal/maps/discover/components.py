"""Connected pieces of masks on the patch grid, and their boxes.

Two cells are connected if they share a side (4 neighbours). Boxes are top, left, bottom, right, and the last two lie
outside. Labelling happens on the CPU; what it gives goes back to where the masks were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor


def component_of(side: Tensor, seed: Tensor) -> Tensor:
    """The component that holds the seed: (B, h, w) bool.

    side: (B, h, w) bool.  seed: (B,) cell in row-major order. Empty where the seed is -1 or not in `side`.
    """
    cells = seed.tolist()

    def pick(labels: Any, count: int, i: int) -> Any:
        label = labels.flat[cells[i]] if cells[i] >= 0 else 0
        return (labels == label) & (labels > 0)

    return _pieces(side, pick)


def largest_component(side: Tensor) -> Tensor:
    """The component of most cells, the first in row-major order of several: (B, h, w) bool. Empty where `side` is."""

    def pick(labels: Any, count: int, i: int) -> Any:
        sizes = np.bincount(labels.reshape(-1), minlength=2)[1:]
        return labels == 1 + sizes.argmax() if count else labels > 0

    return _pieces(side, pick)


def _pieces(side: Tensor, pick: Callable[[Any, int, int], Any]) -> Tensor:
    masks = side.cpu().numpy()
    out = np.empty_like(masks)
    for i, mask in enumerate(masks):
        labels, count = ndimage.label(mask)
        out[i] = pick(labels, count, i)
    return torch.from_numpy(out).to(side.device)


def boxes_of(masks: Tensor) -> Tensor:
    """The box around each mask, in cells: (..., h, w) bool to (..., 4) int64. Zeros for an empty mask."""
    edges = []
    for dim in (-1, -2):  # rows that have a cell, then columns
        line = masks.any(dim).byte()
        first, last = line.argmax(-1), line.shape[-1] - line.flip(-1).argmax(-1)
        edges.append(torch.stack([first, last], -1))
    box = torch.stack([edges[0][..., 0], edges[1][..., 0], edges[0][..., 1], edges[1][..., 1]], -1)
    return box * masks.any(-1).any(-1)[..., None]


def in_pixels(
    boxes: Tensor, grid: tuple[int, int], size: tuple[int, int], image_size: tuple[int, int] | None = None
) -> Tensor:
    """Boxes on a grid (..., 4) in pixels, int64; cells that a pixel lies in only partly take all of it.

    size: (H, W) of the input that the grid spans.  image_size: of the image in its top left corner, where the rest was
    added to fill whole patches: boxes are cut off there.
    """
    (h, w), (H, W) = grid, size
    top, left, bottom, right = boxes.long().unbind(-1)
    height, width = size if image_size is None else image_size
    return torch.stack(
        [
            top.mul(H).div(h, rounding_mode="floor").clamp_max(height),
            left.mul(W).div(w, rounding_mode="floor").clamp_max(width),
            bottom.mul(H).add(h - 1).div(h, rounding_mode="floor").clamp_max(height),
            right.mul(W).add(w - 1).div(w, rounding_mode="floor").clamp_max(width),
        ],
        -1,
    )


def corners(side: Tensor) -> Tensor:
    """How many of the grid's four corners lie in each mask: (B, h, w) bool to (B,) int64."""
    return side[:, 0, 0].long() + side[:, 0, -1].long() + side[:, -1, 0].long() + side[:, -1, -1].long()
