"""Fixed two-dimensional position tables.

    row of patch (r, c) = [sin(c f), cos(c f), sin(r f), cos(r f)],   f_i = 10000^(-i / q),  i = 0 .. q - 1,  q = D / 4

The column comes first, as in He et al., 2022 (MAE). Class, distillation and register tokens have rows of zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sincos_table(grid: tuple[int, int], width: int, prefix: int = 0) -> Tensor:
    """(prefix + N, D) in [-1, 1], float32 of values computed in float64; patches row by row, `grid` is (h, w).

    Raises ValueError for a width that four parts do not share.
    """
    if width % 4:
        raise ValueError(
            f"a position table of width {width}: two sines and two cosines share it, so it must be a multiple of 4"
        )
    h, w = grid
    quarter = width // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    row = torch.arange(h).repeat_interleave(w)[:, None] * frequency  # (N, D / 4)
    column = torch.arange(w).repeat(h)[:, None] * frequency
    table = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)
    return torch.cat([table.new_zeros(prefix, width), table]).float()
