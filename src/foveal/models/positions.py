"""Position tables: made from sines, and brought from one grid to another.

    table[p, i] = f(p / 10000^(2 floor(i / 2) / D)),  f = sin for even i, cos for odd i        Vaswani et al., 2017

p counts the tokens row by row, a class token first: the table is one-dimensional, not 2-D.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sine_table(tokens: int, width: int) -> Tensor:
    """(1, tokens, width) in [-1, 1], float32."""
    place = torch.arange(tokens, dtype=torch.float64)[:, None]
    i = torch.arange(width)
    angle = place / 10000.0 ** (2 * (i // 2) / width)
    return torch.where(i % 2 == 0, angle.sin(), angle.cos()).float()[None]


def resize_table(table: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int = 0) -> Tensor:
    """A position table for another grid: bilinear between the patches' rows, prefix rows (class token) kept.

    table: (1, prefix + h w, D) for the grid `old`, (h, w); `new` need not be square either.
    Returns (1, prefix + h' w', D) in the table's type. Raises ValueError for a table that does not fill `old`.
    """
    if table.dim() != 3 or table.shape[1] != prefix + old[0] * old[1]:
        raise ValueError(
            f"a position table {tuple(table.shape)} is not that of a {old[0]} x {old[1]} grid with {prefix} prefix "
            f"tokens: it must be (1, {prefix + old[0] * old[1]}, width)"
        )
    if old == new:
        return table
    kept, patches = table[:, :prefix], table[:, prefix:]
    picture = patches.transpose(1, 2).unflatten(2, old).float()  # (1, D, h, w)
    resized = F.interpolate(picture, size=new, mode="bilinear", align_corners=False)
    return torch.cat([kept, resized.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)
