"""What an object discovery gives beside its map: masks, boxes, and whether to believe them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foveal.maps.found import Found


@dataclass(frozen=True, kw_only=True)
class Discovered(Found):
    """One object per image. A box is top, left, bottom, right; the last two lie outside."""

    mask: Tensor  # (B, h, w) bool: the object, one connected piece; empty where degenerate
    boxes: Tensor  # (B, 4) int64, in cells; zeros where there is no object
    seed: Tensor  # (B,) int64 cell of the grid, row-major; -1 where degenerate
    degenerate: Tensor  # (B,) bool: the image's features prefer no object
    inverted: Tensor  # (B,) bool: by the method's own rule the object surrounds the picture; see the method
    eigenvector: Tensor | None = None  # (B, h, w) float32 of a cut, above its mean on the object's side
    eigenvalue: Tensor | None = None  # (B,) of the cut: 0 is a clean cut, 1 is none
    gap: Tensor | None = None  # (B,) to the next eigenvalue, at most: near 0 another cut is as good
    pixel_boxes: Tensor | None = None  # (B, 4) int64, in pixels of the images that a source was given
    refined: Tensor | None = None  # (B, H, W) bool mask of pixels, where a refinement was asked for


@dataclass(frozen=True, kw_only=True)
class Objects(Found):
    """Up to K objects per image, in the order in which they were found. `map` counts them all alike."""

    masks: Tensor  # (B, K, h, w) bool, disjoint; empty for an object that was not found
    boxes: Tensor  # (B, K, 4) int64, in cells; zeros for an empty mask
    seeds: Tensor  # (B, K) int64 cell of the grid, row-major; -1 for a round without object
    degenerate: Tensor  # (B, K) bool: nothing was left to prefer in this round
    inverted: Tensor  # (B, K) bool: the corners made this round take the other side
    eigenvectors: Tensor  # (B, K, h, w) float32, above their mean on the object's side
    pixel_boxes: Tensor | None = None  # (B, K, 4) int64, in pixels of the images that a source was given

    @property
    def mask(self) -> Tensor:
        """(B, h, w) bool: all objects."""
        return self.masks.any(1)
