"""Maps and masks from what people noted down: where eyes rested, a box around the object.

    fixations:  map(r, c) = sum_k w_k g(r - y_k) g(c - x_k)      g(d) = exp(-d^2 / 2 sigma^2) / (sigma sqrt(2 pi))

A histogram of fixations under a Gaussian, with nothing outside the image: the usual ground truth of saliency (one
degree of visual angle is a common sigma). Beside the sources, below everything that uses maps: they are given to a
mixer as well as measured against.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def fixation_map(
    x: Tensor | Sequence[float],
    y: Tensor | Sequence[float],
    size: tuple[int, int],
    sigma: float,
    weights: Tensor | Sequence[float] | None = None,
) -> Tensor:
    """One image's fixations as a map, (h, w) float32, zero or more, its sum about that of the weights.

    x, y: (n,) columns and rows in pixels of an image of this size (h, w), the first pixel's centre at 0; they are
    rounded to pixels, and those outside the image are left out. A pixel looked at twice counts twice.
    sigma: in pixels; 0 gives the histogram itself.  weights: (n,) zero or more, such as durations; 1 by default.
    Without fixations the map is zero. Raises ValueError for lengths that differ and values that make no sense.
    """
    columns, rows = torch.as_tensor(x).round().double(), torch.as_tensor(y).round().double()
    mass = torch.ones_like(columns) if weights is None else torch.as_tensor(weights).to(columns)
    h, w = size
    if not columns.shape == rows.shape == mass.shape or columns.dim() != 1:
        raise ValueError(f"x {tuple(columns.shape)}, y {tuple(rows.shape)}, weights {tuple(mass.shape)} must be (n,)")
    if not (math.isfinite(sigma) and sigma >= 0) or bool((mass < 0).any()):
        raise ValueError(f"sigma={sigma} in pixels and weights must be zero or more")
    kept = (columns >= 0) & (columns <= w - 1) & (rows >= 0) & (rows <= h - 1)  # not NaN either
    columns, rows, mass = columns[kept], rows[kept], mass[kept]
    down = _bump(torch.arange(h).to(rows)[:, None] - rows, sigma)  # (h, n)
    along = _bump(torch.arange(w).to(columns)[:, None] - columns, sigma)  # (w, n)
    return ((down * mass) @ along.T).float()


def box_mask(box: Tensor | Sequence[int], size: tuple[int, int]) -> Tensor:
    """Which pixels lie in a box: (h, w) bool of one box (4,), (N, h, w) of boxes (N, 4).

    box: top, left, bottom, right in pixels, the last two exclusive; what lies outside the image is cut off.
    """
    boxes = torch.as_tensor(box)
    if boxes.dim() not in (1, 2) or boxes.shape[-1] != 4:
        raise ValueError(f"boxes of shape {tuple(boxes.shape)}: top, left, bottom, right, (4,) or (N, 4)")
    top, left, bottom, right = boxes[..., None].unbind(-2)  # (..., 1) each
    r, c = (torch.arange(side, device=boxes.device) for side in size)
    rows, columns = (r >= top) & (r < bottom), (c >= left) & (c < right)
    return rows[..., :, None] & columns[..., None, :]


def _bump(distance: Tensor, sigma: float) -> Tensor:
    if sigma == 0:
        return (distance == 0).to(distance.dtype)
    return torch.exp(-0.5 * (distance / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
