"""Spectral residual: what is left of an image when its spectrum is made as smooth as those of all images.

    A e^{iP} = DFT(grey)      R = log A - (3 x 3 mean of log A)      map = G * |DFT^-1(exp(R) e^{iP})|^2

Hou & Zhang, 2007. The image is brought to a width of 64 pixels (mean over areas; smaller ones stay) and a height in
proportion, and G is a Gaussian of 2.5 of these pixels, both as in the authors' code. The 3 x 3 mean wraps around, as a
spectrum does, so that the inverse is real; G goes on with the edge's values at the border. float32.

B batch, H x W pixels, h x w of the small image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.maps.found import Found, found, on_grid
from foveal.maps.pixels import pixels_of

WIDTH = 64
SIGMA = 2.5
GREY = (0.299, 0.587, 0.114)  # of red, green, blue
# of grey in [0, 1]: above the rounding of a float32 transform, below every frequency of a photograph
FLOOR = 1e-3


def spectral_residual(pixels: Tensor) -> Tensor:
    """The map (B, h, w) float32 of images (B, 3, H, W) uint8, RGB; w = min(64, W), h = round(H w / W), at least 1.

    Zero or more, any scale; an image of one grey has a map of zeros.
    Raises TypeError for pixels that are not bytes, ValueError for another shape.
    """
    if pixels.dtype != torch.uint8:
        raise TypeError(f"pixels of type {pixels.dtype}: give bytes, uint8 from 0 to 255")
    if pixels.dim() != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels of shape {tuple(pixels.shape)}: RGB images (B, 3, H, W) are needed")
    red, green, blue = pixels.float().unbind(1)
    grey = (GREY[0] * red + GREY[1] * green + GREY[2] * blue) / 255
    flat = grey.amax((1, 2), keepdim=True) == grey.amin((1, 2), keepdim=True)
    H, W = grey.shape[1:]
    w = min(WIDTH, W)
    energy = residual_energy(on_grid(grey, (max(1, round(H * w / W)), w)))
    return gaussian_blur(energy, SIGMA).masked_fill(flat, 0.0)


def residual_energy(grey: Tensor) -> Tensor:
    """|DFT^-1(exp(R) e^{iP})|^2 of grey images (B, h, w) float in [0, 1]: (B, h, w), not yet smoothed.

    Frequencies that the image does not have (below the floor) keep next to nothing of their random phase.
    """
    spectrum = torch.fft.fft2(grey)
    amplitude = spectrum.abs().clamp_min(FLOOR)
    log = amplitude.log()
    residual = log - wrapped_mean(log)
    back: Tensor = torch.fft.ifft2(residual.exp() * spectrum / amplitude).real
    return back.square()


def wrapped_mean(values: Tensor) -> Tensor:
    """Mean over 3 x 3 neighbours on a torus: (B, h, w) to (B, h, w)."""
    for dim in (1, 2):
        values = (values.roll(1, dim) + values + values.roll(-1, dim)) / 3
    return values


def gaussian_blur(values: Tensor, sigma: float) -> Tensor:
    """Smoothed by a Gaussian cut at 4 sigma, the border's values going on outside. (B, h, w) float32."""
    radius = math.ceil(4 * sigma)
    at = torch.arange(-radius, radius + 1, device=values.device, dtype=values.dtype)
    kernel = torch.exp(-0.5 * (at / sigma) ** 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(values[:, None], (radius, radius, radius, radius), mode="replicate")
    with torch.autocast(values.device.type, enabled=False):  # a convolution in bfloat16 keeps two digits
        blurred = F.conv2d(F.conv2d(padded, kernel[None, None, :, None]), kernel[None, None, None, :])
    return blurred[:, 0]


@dataclass(kw_only=True)
class SpectralResidual:
    """The source `spectral_residual`: label-free, without a model, on a grid of its own, 64 wide.

    mean, std: what the images were normalised with (ImageConfig has them).
    """

    mean: Sequence[float]
    std: Sequence[float]
    model: nn.Module | None = field(default=None, init=False, repr=False)

    def __call__(self, images: Tensor, labels: Tensor | None = None, given: Tensor | None = None) -> Found:
        """Maps (B, h, w) of normalised images (B, 3, H, W)."""
        return found(spectral_residual(pixels_of(images.detach(), self.mean, self.std)))
