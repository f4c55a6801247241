"""Images as rows of patches, and what a masked autoencoder is to predict of them.

    target = (patch - mean) / sqrt(variance + 1e-6)   per patch, where pixels are normalised        He et al., 2022

Patches run row by row; the P = p q C numbers of one run row, column, channel (channel last), as in released decoders.
The variance is the unbiased one, over P - 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-6


def patchify(images: Tensor, patch: int | tuple[int, int]) -> Tensor:
    """(B, C, H, W) as (B, N, P): N = H/p W/q patches, P = p q C numbers. Raises ValueError where they do not fit."""
    p, q = (patch, patch) if isinstance(patch, int) else patch
    B, C, H, W = images.shape
    if H % p or W % q:
        raise ValueError(f"images of {H} x {W} pixels are not whole patches of {p} x {q}; resize or crop them first")
    cut = images.reshape(B, C, H // p, p, W // q, q).permute(0, 2, 4, 3, 5, 1)  # (B, h, w, p, q, C)
    return cut.reshape(B, (H // p) * (W // q), p * q * C)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch: int | tuple[int, int]) -> Tensor:
    """The way back, bit for bit: (B, N, P) as (B, C, H, W). Raises ValueError where patches do not fill the grid."""
    p, q = (patch, patch) if isinstance(patch, int) else patch
    (h, w), (B, N, P) = grid, patches.shape
    if h * w != N or P % (p * q):
        raise ValueError(f"{N} patches of {P} numbers do not fill a {h} x {w} grid of patches of {p} x {q} pixels")
    cut = patches.reshape(B, h, w, p, q, P // (p * q)).permute(0, 5, 1, 3, 2, 4)  # (B, C, h, p, w, q)
    return cut.reshape(B, P // (p * q), h * p, w * q)


def normalise(patches: Tensor) -> Tensor:
    """Each patch with mean 0 and deviation 1 over its own numbers: (B, N, P) to (B, N, P). A constant patch gives 0."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + EPSILON).sqrt()


def denormalise(prediction: Tensor, patches: Tensor) -> Tensor:
    """Pixels of a prediction that was made for normalised patches, by the mean and deviation of the true ones.

    prediction, patches: (B, N, P). Without the true statistics such a prediction looks like noise.
    """
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return prediction * (variance + EPSILON).sqrt() + mean
