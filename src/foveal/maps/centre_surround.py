"""Centre and surround: how much a pixel differs from the mean of windows around it, lighter (on) or darker (off).

    grey = round(.299 R + .587 G + .114 B), then twice the 3 x 3 kernel [1 2 1]/4 of each side, rounded
    on   = sum_n floor(max(v - m_n, 0))        m_n: mean of rows y-n+1 ... y+n, columns alike, cut at the border,
    off  = sum_n floor(max(m_n - v, 0))             without the centre v;  n in 12, 24, 48, 28, 56, 112
    on, off to 0 ... 255 by their maximum;  map = floor(255 (on + off) / max) mod 256, max over both

The "fine grained" detector of Montabone & Soto (2010) as OpenCV computes it and SaliencyMix uses it, byte for byte:
the weights of grey are OpenCV's 15-bit ones, and a pixel whose on and off together exceed the maximum wraps around.
SaliencyMix's release hands it normalised floats whose bytes are read as pixels, which gives noise; here it gets pixels.

Integers throughout, so all devices agree: window sums come from a summed-area table in int32, in which differences
are right even where the table itself has overflown.

B batch, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from foveal.maps.found import Found, found
from foveal.maps.pixels import pixels_of

NEIGHBOURHOODS = (12, 24, 48, 28, 56, 112)  # n of a window of 2n pixels a side


def centre_surround(pixels: Tensor) -> Tensor:
    """The map (B, H, W) uint8 of images (B, 3, H, W) uint8, RGB, of any size.

    Where nothing is lighter than its surround, or nothing darker, that part is zero (the maximum is 0 and OpenCV's
    0/0 ends as 0 too): an image of one colour, or of one pixel, has a blank map.
    Raises TypeError for pixels that are not bytes, ValueError for another shape.
    """
    if pixels.dtype != torch.uint8:
        raise TypeError(f"pixels of type {pixels.dtype}: this detector reads bytes, uint8 from 0 to 255")
    if pixels.dim() != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels of shape {tuple(pixels.shape)}: RGB images (B, 3, H, W) are needed")
    smooth = smoothed(smoothed(grey(pixels)))
    table = summed_area(smooth)
    on, off = torch.zeros_like(smooth), torch.zeros_like(smooth)
    for n in NEIGHBOURHOODS:
        step = contrast(smooth, table, n)
        on += step.clamp_min(0)
        off -= step.clamp_max(0)
    on, off = stretched(on, most(on)), stretched(off, most(off))
    return (stretched(on + off, torch.maximum(most(on), most(off))) & 255).to(torch.uint8)


def grey(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 to (B, H, W) int32 in 0 ... 255, with the weights in 15 bits, as OpenCV has them."""
    red, green, blue = pixels.to(torch.int32).unbind(1)
    return (9798 * red + 19235 * green + 3735 * blue + (1 << 14)) >> 15


def smoothed(values: Tensor) -> Tensor:
    """3 x 3 kernel [1 2 1]/4 of each side, rounded; the border mirrors, without repeating the edge. (B, H, W) int32."""
    for dim in (1, 2):
        size = values.shape[dim]
        first, last = values.narrow(dim, 0, 1), values.narrow(dim, size - 1, 1)
        if size > 1:
            first, last = values.narrow(dim, 1, 1), values.narrow(dim, size - 2, 1)
        padded = torch.cat([first, values, last], dim)
        values = padded.narrow(dim, 0, size) + 2 * values + padded.narrow(dim, 2, size)
    return (values + 8) >> 4


def summed_area(values: Tensor) -> Tensor:
    """Sums of all above and to the left, with a first row and column of zeros: (B, H, W) to (B, H+1, W+1) int32."""
    table = values.cumsum(2, dtype=torch.int32).cumsum(1, dtype=torch.int32)
    return nn.functional.pad(table, (1, 0, 1, 0))


def contrast(values: Tensor, table: Tensor, n: int) -> Tensor:
    """v less the mean of the rest of its window, cut to a whole number towards 0: (B, H, W) int32."""
    H, W = values.shape[1:]
    y, x = (torch.arange(size, device=values.device) for size in (H, W))
    top, bottom = (y - n + 1).clamp_min(0), (y + n + 1).clamp_max(H)
    left, right = (x - n + 1).clamp_min(0), (x + n + 1).clamp_max(W)
    rows = table.index_select(1, bottom) - table.index_select(1, top)  # (B, H, W+1)
    sums = rows.index_select(2, right) - rows.index_select(2, left)  # (B, H, W), the centre among them
    area = ((bottom - top)[:, None] * (right - left)).to(torch.int32)
    # v - (sum - v) / (area - 1); a window of one pixel is all centre and gives 0
    return torch.div(values * area - sums, (area - 1).clamp_min(1), rounding_mode="trunc")


def most(values: Tensor) -> Tensor:
    """Largest value of each image: (B, H, W) to (B, 1, 1)."""
    return values.amax((1, 2), keepdim=True)


def stretched(values: Tensor, limit: Tensor) -> Tensor:
    """floor(255 values / limit), zero where the limit is. values: (B, H, W) int32, not negative.  limit: (B, 1, 1)."""
    return torch.div(255 * values, limit.clamp_min(1), rounding_mode="trunc")


@dataclass(kw_only=True)
class CentreSurround:
    """The source `centre_surround`: label-free, without a model, on the grid of the pixels.

    mean, std: what the images were normalised with (ImageConfig has them), so that their bytes can be had back.
    """

    mean: Sequence[float]
    std: Sequence[float]
    model: nn.Module | None = field(default=None, init=False, repr=False)

    def __call__(self, images: Tensor, labels: Tensor | None = None, given: Tensor | None = None) -> Found:
        """Maps (B, H, W) of normalised images (B, 3, H, W), each made for itself."""
        return found(centre_surround(pixels_of(images.detach(), self.mean, self.std)))
