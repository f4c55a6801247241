"""Put what was computed inside Swin's shifted windows back on the image grid.

Liu et al., 2021, section 3.2: the map is rolled by -shift, padded to whole windows and cut; so it is joined, cropped
and rolled back.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def merge_windows(per_window: Tensor, block: nn.Module, grid: tuple[int, int], batch: int) -> Tensor:
    """Attention received inside windows, as attention received on the whole grid.

    per_window: (B n, H, window area), mean over the queries of the window.  grid: (h, w) of the block.
    Queries of other windows give nothing, so a window's mean counts by its share of the windows: the map of an unpadded
    grid sums to 1 like that of global attention.  Returns (B, H, h w) in row-major order.
    """
    swin: Any = block
    (h, w), (wh, ww) = grid, tuple(int(n) for n in swin.window_size)
    rows, columns = -(-h // wh), -(-w // ww)
    H = per_window.shape[1]
    x = per_window / (rows * columns)
    x = x.view(batch, rows, columns, H, wh, ww)
    x = x.permute(0, 3, 1, 4, 2, 5).reshape(batch, H, rows * wh, columns * ww)[:, :, :h, :w]
    if any(swin.shift_size):
        x = x.roll(shifts=tuple(int(n) for n in swin.shift_size), dims=(2, 3))
    return x.reshape(batch, H, h * w)
