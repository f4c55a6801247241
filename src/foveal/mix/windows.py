"""Windows of whole cells: their sums, the least and the most looked at, and copying one over another.

    W(r, c) = sum of the map over the k_h x k_w cells whose first is (r, c)        r = 0 ... h - k_h, c = 0 ... w - k_w

Sums come from a summed-area table (Crow, 1984), four reads per window. Windows that a map cannot tell apart are tied,
and a number in [0, 1) per image picks among the tied ones, each with the same chance; 0 picks the first in row-major
order. Thresholded maps are zero nearly everywhere: without such a pick most pastes would land in the top rows.

B batch, h x w cells, H x W pixels. Nothing here draws, computes a gradient, or asks the device for a number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def window_sums(map: Tensor, size: tuple[int, int]) -> Tensor:
    """Sum of every window: (B, h - k_h + 1, w - k_w + 1), float64 where the device has it.

    map: (B, h, w) zero or more.  size: (k_h, k_w) cells, from (1, 1) to (h, w).
    """
    (h, w), (k_h, k_w) = map.shape[1:], size
    if not (1 <= k_h <= h and 1 <= k_w <= w):
        raise ValueError(f"a window of {k_h} x {k_w} cells does not fit a grid of {h} x {w}")
    wide = torch.float32 if map.device.type == "mps" else torch.float64
    table = F.pad(map.to(wide).cumsum(1).cumsum(2), (1, 0, 1, 0))
    return table[:, k_h:, k_w:] - table[:, :-k_h, k_w:] - table[:, k_h:, :-k_w] + table[:, :-k_h, :-k_w]


def tied(sums: Tensor, total: Tensor, largest: bool) -> Tensor:
    """Which window sums are the largest (or the least), as far as the map can tell: (B, h', w') bool.

    sums: (B, h', w') of `window_sums`.  total: (B,) sum of each map.
    """
    # Each cell of a float32 map is known to 2^-23 of itself, so a window's sum is too: closer than that to the extreme
    # sum, the map does not say which is larger. The table adds some ulps of the total, which windows of zeros then
    # have in place of 0; 128 ulps cover tables of 14 x 14 cells with much to spare.
    total = total[:, None, None]
    best = sums.amax((1, 2), keepdim=True) if largest else sums.amin((1, 2), keepdim=True)
    slack = best.abs() * torch.finfo(torch.float32).eps + total * (128 * torch.finfo(sums.dtype).eps)
    return sums >= best - slack if largest else sums <= best + slack


def pick(among: Tensor, tie: Tensor) -> Tensor:
    """One of the true places of each row, all with the same chance: (B,) int64.

    among: (B, n) bool.  tie: (B,) in [0, 1); 0 takes the first.
    """
    rank = (tie * among.sum(1)).long()
    before = (among.cumsum(1, dtype=torch.int32) <= rank[:, None]).sum(1)
    return before.clamp_max(among.shape[1] - 1)  # a row without a true place, as NaN gives, stays inside too


def extreme_window(sums: Tensor, total: Tensor, tie: Tensor, largest: bool) -> Tensor:
    """First cell (row, column) of the window with the largest or the least sum: (B, 2) int64.

    sums: (B, h', w') of `window_sums`.  total: (B,) sum of each map.  tie: (B,) in [0, 1), picks among tied windows.
    """
    columns = sums.shape[2]
    index = pick(tied(sums, total, largest).flatten(1), tie)
    return torch.stack([index.div(columns, rounding_mode="floor"), index % columns], dim=-1)


def at(sums: Tensor, place: Tensor) -> Tensor:
    """The sum of one window of each image: (B,). sums: (B, h', w').  place: (B, 2) int64 row and column."""
    return sums.flatten(1).gather(1, (place[:, :1] * sums.shape[2] + place[:, 1:])).squeeze(1)


def move_windows(images: Tensor, perm: Tensor, paste: Tensor, cut: Tensor, size: tuple[int, int]) -> Tensor:
    """Each image with a window of its partner pasted in: out_i[paste_i] = images_perm(i)[cut_i], pixel for pixel.

    images: (B, channels, H, W).  perm: (B,).  paste, cut: (B, 2) first pixel (row, column), the one in the image, the
    other in the partner.  size: pixels of the window, all alike.
    """
    y, x = (torch.arange(n, device=images.device) for n in size)
    image = torch.arange(len(images), device=images.device)[:, None, None]
    out = images.clone()
    here = (image, slice(None), paste[:, 0, None, None] + y[:, None], paste[:, 1, None, None] + x)
    there = (perm[:, None, None], slice(None), cut[:, 0, None, None] + y[:, None], cut[:, 1, None, None] + x)
    out[here] = images[there]
    return out


def scaled(place: Tensor, patch: tuple[int, int]) -> Tensor:
    """First cells as first pixels: (B, 2). place: (B, 2).  patch: pixels of a cell."""
    return torch.stack([place[:, 0] * patch[0], place[:, 1] * patch[1]], dim=-1)


def window_boxes(place: Tensor, size: tuple[int, int]) -> Tensor:
    """Windows as boxes (B, 4): top, left, bottom, right, the last two exclusive. place: (B, 2).  size: one for all."""
    return torch.stack([place[:, 0], place[:, 1], place[:, 0] + size[0], place[:, 1] + size[1]], dim=-1)


def at_pixels(cells: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Values of cells, at every pixel: (B, h, w) to (B, H, W). Sides of the image are multiples of the grid's."""
    rows, columns = image_size[0] // cells.shape[1], image_size[1] // cells.shape[2]
    return cells.repeat_interleave(rows, dim=1).repeat_interleave(columns, dim=2)


def check_grid(grid: Sequence[int], image_size: tuple[int, int]) -> tuple[int, int]:
    """The grid, unless its cells are not whole pixels. Raises ValueError that names the nearest grid that fits."""
    h, w = grid
    if h < 1 or w < 1 or image_size[0] % h or image_size[1] % w:
        fits = tuple(_divisor(side, cells) for side, cells in zip(image_size, (h, w), strict=True))
        raise ValueError(
            f"images of {image_size[0]} x {image_size[1]} pixels do not split into {h} x {w} cells of whole pixels: "
            f"use another image size, or cells={fits}"
        )
    return h, w


def _divisor(side: int, cells: int) -> int:
    """The number of equal parts nearest to `cells` (the larger of two) that a side of whole pixels splits into."""
    return min((n for n in range(1, side + 1) if side % n == 0), key=lambda n: (abs(n - cells), -n))


def window_size(share: tuple[float, float], grid: tuple[int, int], u: float) -> tuple[int, int]:
    """Cells (k_h, k_w) of the window that a number u in [0, 1) picks from the allowed ones.

    share: least and largest side as shares of the grid's; k is uniform over floor(share_0 g) ... floor(share_1 g), at
    least 1. Both sides follow the same u, so windows on other than square grids keep the grid's shape.
    """
    sides = []
    for g in grid:
        # a share such as 0.29 of 100 cells is 28.999...: rounding must not take a cell away
        low, high = (max(1, math.floor(one * g + 1e-9)) for one in share)
        sides.append(low + int(u * (high - low + 1)))
    return sides[0], sides[1]
