"""An attention map laid over its image: colour begins where a patch gets more than its even share.

    ratio    = map / mean(map)                               1 everywhere when attention is even
    strength = clip((ratio - 1) / (peak - 1), 0, 1)          0 even share or less, 1 at the peak
    pixel    = (1 - alpha) grey(image) + alpha colour(strength),     alpha = 0.85 strength^0.6

The image turns to quiet grey, so that every colour in the picture is attention, and the colours are
matplotlib's inferno from violet up: lightness grows evenly with attention, also in print and for colour-blind
readers.
A map that is the same everywhere has nothing to show and leaves the grey image alone.

H, W image size, h, w patch grid.
"""

from __future__ import annotations

import numpy as np
import torch
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Pixels = NDArray[np.uint8]  # (H, W, 3)

LUMA = torch.tensor([0.299, 0.587, 0.114])  # ITU-R BT.601, what PIL's grey uses
QUIET = 0.25  # share of the image's own colour that stays
LEAST_PEAK = 2.0  # full colour means at least twice the even share: noise on an even map stays pale


def strength(attn: Tensor, peak: float | None = None) -> Tensor:
    """How strongly each patch is coloured.

    attn: (h, w) non-negative, any scale.  peak: multiple of the even share that gets full colour; by default
    the map's own largest, and at least 2.  Give one value to several maps to compare them.
    Returns (h, w) float32 in [0, 1].  A map of zeros, or the same everywhere, gives zeros.
    """
    attn = _map(attn)
    mean = attn.mean()
    ratio = attn / mean if mean > 0 else torch.ones_like(attn)
    top = max(float(ratio.max()), LEAST_PEAK) if peak is None else float(peak)
    if not top > 1:
        raise ValueError(f"peak={peak} must be above 1: it is the multiple of the even share in full colour")
    return ((ratio - 1) / (top - 1)).clamp(0, 1)


def enlarge(attn: Tensor, size: tuple[int, int], smooth: bool = True) -> Tensor:
    """A patch map at the size of its image, (h, w) -> (H, W), float32.

    smooth: between patch centres the value goes from one patch to the next along t^2 (3 - 2t), so each centre
    keeps its own value and nothing overshoots (bicubic invents values below zero, bilinear draws stars).
    Not smooth: every pixel has the value of its patch, which is all that the model knows.
    """
    attn = _map(attn)
    rows = _weights(attn.shape[0], size[0], smooth)
    columns = _weights(attn.shape[1], size[1], smooth)
    return rows @ attn @ columns.T


def overlay(
    image: Tensor | Pixels,
    attn: Tensor,
    *,
    smooth: bool = True,
    peak: float | None = None,
    side: int | None = None,
) -> Pixels:
    """The picture of where a model looks.

    image: (3, H, W) uint8.  attn: (h, w) non-negative, any scale, any grid.
    smooth, peak: see `enlarge` and `strength`.  side: length of the shorter side of the result, by default
    the image's own; colours are computed at that size, so a 32-pixel image gives a crisp large picture.
    Returns (H', W', 3) uint8.
    """
    base = resize(image, side)  # (H, W, 3)
    pixels = torch.from_numpy(base.astype(np.float32))
    grey = (pixels @ LUMA)[..., None]
    quiet = QUIET * pixels + (1 - QUIET) * grey
    quiet = 20 + 0.85 * quiet  # away from black and white: neither hides the colours
    level = enlarge(strength(attn, peak), (base.shape[0], base.shape[1]), smooth)
    alpha = 0.85 * level.pow(0.6)[..., None]
    mixed = (1 - alpha) * quiet + alpha * 255 * colours(level)
    return np.asarray(mixed.round().clamp(0, 255).to(torch.uint8).numpy())


def colours(level: Tensor) -> Tensor:
    """The colour of each strength, (...) in [0, 1] -> (..., 3) float32 in [0, 1]."""
    table = torch.tensor(colormaps["inferno"](np.linspace(0.25, 1.0, 256))[:, :3], dtype=torch.float32)
    return table[(level * 255).round().long().clamp(0, 255)]


def resize(image: Tensor | Pixels, side: int | None = None) -> Pixels:
    """(3, H, W) uint8 -> (H', W', 3) uint8 with the shorter side as asked; bicubic, shape kept."""
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if array.ndim != 3 or array.shape[0] != 3 or array.dtype != np.uint8:
        raise ValueError(f"the image is {tuple(array.shape)} {array.dtype}; it must be (3, H, W) uint8")
    pixels = np.ascontiguousarray(array.transpose(1, 2, 0))
    height, width = pixels.shape[:2]
    if side is None or side == min(height, width):
        return pixels
    scale = side / min(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def _map(attn: Tensor) -> Tensor:
    attn = torch.as_tensor(attn).detach().cpu().to(torch.float32)
    if attn.ndim != 2 or attn.numel() == 0:
        raise ValueError(f"the map is {tuple(attn.shape)}; it must be (h, w): average or pick heads first")
    if not torch.isfinite(attn).all() or (attn < 0).any():
        raise ValueError("the map has negative, infinite or NaN values; an attention map is non-negative")
    return attn


def _weights(cells: int, pixels: int, smooth: bool) -> Tensor:
    """(pixels, cells): how much of each cell a pixel takes; rows sum to 1."""
    place = (torch.arange(pixels, dtype=torch.float32) + 0.5) * cells / pixels  # in cells, 0 is the border
    if not smooth:
        return torch.nn.functional.one_hot(place.long().clamp(0, cells - 1), cells).float()
    place = (place - 0.5).clamp(0, cells - 1)
    left = place.floor().long()
    right = (left + 1).clamp(max=cells - 1)
    t = place - left
    t = t * t * (3 - 2 * t)
    weights = torch.zeros(pixels, cells)
    weights.scatter_add_(1, left[:, None], (1 - t)[:, None])
    return weights.scatter_add_(1, right[:, None], t[:, None])
