"""The bilateral solver: a mask made to follow the picture's edges.

    cell of a pixel = floor(x / 16), floor(y / 16), floor(Y / 16), floor(U / 8), floor(V / 8)      YUV of BT.601
    B = 10 I + its two neighbours along each of five axes, where such cells are occupied;  S adds up a cell's pixels
    n <- sqrt(n m / B n),  m = S 1, ten times from 1;   m <- n B n
    ( lambda (diag m - diag n B diag n) + c diag S 1 ) y = c S t,   soft = S' y

Barron & Poole, 2016 (arXiv 1511.03296), with the settings of TokenCut: lambda = 256, confidence c = 0.999, at most 25
steps of conjugate gradients with the diagonal as preconditioner, from the mean of t in each cell.

TokenCut's release then takes the second most frequent label, which is the background where the object is larger than
it; here the largest piece. One image at a time, in float64 on the CPU. MaskCut's other refinement, a dense CRF, is not
offered: pydensecrf has not been released since 2018, and its fork pydensecrf2 has to be compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage, sparse
from torch import Tensor

from foveal.maps.discover.maskcut import iou

Values = Any  # np.ndarray
YUV = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])  # of R, G, B
OFFSET = np.array([0.0, 128.0, 128.0])
SMOOTHNESS = 256.0
CONFIDENCE = 0.999
MIN_DIAGONAL = 1e-5
STEPS, TOLERANCE = 25, 1e-5
MIN_IOU = 0.5


@dataclass(frozen=True)
class Refined:
    """Masks of patches brought to pixels."""

    soft: Tensor  # (B, H, W) float32, about 0 to 1
    mask: Tensor  # (B, H, W) bool, one piece without holes; the patches themselves where not `agrees`
    agrees: Tensor  # (B,) bool: the refined mask overlaps the patches' with IoU of a half or more


def refine(
    pixels: Tensor,
    masks: Tensor,
    *,
    sigma_spatial: float = 16,
    sigma_luma: float = 16,
    sigma_chroma: float = 8,
) -> Refined:
    """The solver's answer for each image and mask.

    pixels: (B, 3, H, W) uint8, RGB.  masks: (B, h, w) bool or values in [0, 1], spanning the image.
    sigmas: sizes of a cell in pixels, steps of brightness and steps of colour.
    Raises TypeError for pixels that are not bytes, ValueError for shapes that do not fit.
    """
    if pixels.dtype != torch.uint8:
        raise TypeError(f"pixels of type {pixels.dtype}: give bytes, uint8 from 0 to 255")
    if pixels.dim() != 4 or pixels.shape[1] != 3 or masks.dim() != 3 or len(masks) != len(pixels):
        raise ValueError(f"pixels {tuple(pixels.shape)} and masks {tuple(masks.shape)} must be (B, 3, H, W), (B, h, w)")
    if not min(sigma_spatial, sigma_luma, sigma_chroma) > 0:
        raise ValueError(f"cells of {sigma_spatial}, {sigma_luma} and {sigma_chroma}: sizes must be above 0")
    H, W = pixels.shape[2:]
    coarse = F.interpolate(masks[:, None].float(), (H, W), mode="nearest")[:, 0]
    soft = torch.zeros(len(pixels), H, W)
    fine = torch.zeros(len(pixels), H, W, dtype=torch.bool)
    for i, (image, target) in enumerate(zip(pixels.cpu(), coarse.cpu().double().numpy(), strict=True)):
        if target.any():
            answer = bilateral_solver(image.permute(1, 2, 0).numpy(), target, sigma_spatial, sigma_luma, sigma_chroma)
            soft[i], fine[i] = torch.from_numpy(answer), torch.from_numpy(largest_piece(answer > 0.5))
    soft, fine = soft.to(masks.device), fine.to(masks.device)
    agrees = iou(fine, coarse > 0.5) >= MIN_IOU
    return Refined(soft, torch.where(agrees[:, None, None], fine, coarse > 0.5), agrees)


def bilateral_solver(
    pixels: Values, target: Values, sigma_spatial: float = 16, sigma_luma: float = 16, sigma_chroma: float = 8
) -> Values:
    """The soft answer (H, W) float64. pixels: (H, W, 3) uint8.  target: (H, W) float."""
    cell, neighbours = occupied_cells(pixels, sigma_spatial, sigma_luma, sigma_chroma)
    size = np.bincount(cell).astype(float)  # S 1

    def blur(x: Values) -> Values:
        return 10 * x + neighbours @ x

    n = np.ones_like(size)
    for _ in range(10):
        n = np.sqrt(n * size / blur(n))
    m = n * blur(n)
    total = np.bincount(cell, target.reshape(-1))  # S t

    def system(y: Values) -> Values:
        return SMOOTHNESS * (m * y - n * blur(n * y)) + CONFIDENCE * size * y

    diagonal = SMOOTHNESS * (m - 10 * n**2) + CONFIDENCE * size
    y = conjugate_gradients(system, CONFIDENCE * total, total / size, np.maximum(diagonal, MIN_DIAGONAL))
    return y[cell].reshape(target.shape)


def occupied_cells(
    pixels: Values, sigma_spatial: float, sigma_luma: float, sigma_chroma: float
) -> tuple[Values, sparse.csr_matrix]:
    """Each pixel's cell (H W,) and which cells are next to each other, (cells, cells) of ones."""
    H, W, _ = pixels.shape
    y, x = np.divmod(np.arange(H * W), W)
    colour = pixels.reshape(-1, 3) @ YUV.T + OFFSET
    size = np.array([sigma_spatial, sigma_spatial, sigma_luma, sigma_chroma, sigma_chroma])
    axes = (np.column_stack([x, y, colour]) / size).astype(np.int64).T  # none is negative
    key, stride = np.zeros(H * W, np.int64), 1
    strides = []
    for values in axes:
        strides.append(stride)
        key += (values + 1) * stride  # one free place at either end: a step never wraps around
        stride *= int(values.max()) + 3
    keys, cell = np.unique(key, return_inverse=True)
    pairs = []
    for step in strides:
        at = np.searchsorted(keys, keys + step).clip(max=len(keys) - 1)
        (low,) = np.nonzero(keys[at] == keys + step)
        pairs += [(low, at[low]), (at[low], low)]
    rows, columns = (np.concatenate(side) for side in zip(*pairs, strict=True))
    shape = (len(keys), len(keys))
    return cell.reshape(-1), sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=shape)


def conjugate_gradients(system: Callable[[Values], Values], b: Values, x: Values, diagonal: Values) -> Values:
    """x with system(x) = b, symmetric and positive, from a first guess; stops at |b - system(x)| <= TOLERANCE |b|."""
    r = b - system(x)
    limit = TOLERANCE * float(np.linalg.norm(b))
    direction, before = np.zeros_like(b), 1.0
    for _ in range(STEPS):
        if np.linalg.norm(r) <= limit:
            break
        z = r / diagonal
        now = float(r @ z)
        direction = z + now / before * direction
        before = now
        image = system(direction)
        step = now / float(direction @ image)
        x = x + step * direction
        r = r - step * image
    return x


def largest_piece(mask: Values) -> Values:
    """The largest piece of a mask (H, W) bool, its holes filled; empty where the mask is."""
    labels, count = ndimage.label(ndimage.binary_fill_holes(mask))
    if count == 0:
        return np.zeros_like(mask)
    return labels == 1 + np.bincount(labels.reshape(-1))[1:].argmax()
