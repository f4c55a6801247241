"""Guided reconstruction: errors on the object cost more than errors on the background.

    L = gamma sum_bi m_bi w_bi l_bi / sum_bi m_bi,    w = exp(M / tau)        Sick, Engel, Hermosilla, Ropinski, 2025

l is MAE's error of a patch (mean over its P numbers), m is 1 on removed patches, M in [0, 1] says how much of it is
object. Background, M = 0, keeps weight 1; where M is 0 everywhere this is MAE. The masking stays random.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.maps import on_grid

Normalise = Literal["none", "batch", "image"]
NORMALISE = ("none", "batch", "image")
COLDEST = 1 / 88  # exp(1 / tau) still fits float32


@dataclass(frozen=True)
class Guided:
    """A guided loss and what to log beside it.

    loss: scalar, to train on.  plain: scalar without gradient, MAE's own loss of the same predictions.
    blank: (B,) bool, images whose weights are all 1: there is no map, or it says nothing of these patches.
    """

    loss: Tensor
    plain: Tensor
    blank: Tensor


def guided_reconstruction(
    prediction: Tensor,
    target: Tensor,
    removed: Tensor,
    map: Tensor | None = None,
    temperature: float = 0.75,
    gamma: float = 1.0,
    normalise: Normalise = "none",
    *,
    scaled: bool = False,
    grid: tuple[int, int] | None = None,
) -> Guided:
    """The loss of a reconstruction, in float32 also under autocast (float64 stays).

    prediction, target: (B, N, P).  removed: (B, N), 1 where the patch counts; ones for a loss over all patches.
    map: (B, N), or (B, h, w) of any size, higher is more object; None is MAE's loss.  temperature: tau > 0.
    scaled: the map already lies in [0, 1] by the whole image, as a map store gives it for a crop; it is taken as it is.
    Otherwise each map is brought to [0, 1] by its own least and greatest value.
    normalise: "none" divides by the number of removed patches, so objects weigh more than elsewhere; "batch" by the sum
    of their weights; "image" takes the mean of each image's weighted mean.
    grid: (h, w) of the patches, for maps that are not on it.

    A constant map, and one with a value that is not finite, gives weights of 1. No removed patch gives 0.
    The map gets no gradient. Raises ValueError for shapes that do not fit and settings that are not there.
    """
    if normalise not in NORMALISE:
        raise ValueError(f"normalise={normalise!r}; use one of {', '.join(NORMALISE)}")
    if prediction.shape != target.shape or prediction.shape[:2] != removed.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)}, target {tuple(target.shape)} and removed {tuple(removed.shape)} do "
            "not fit: (B, N, P) twice and (B, N) are needed"
        )
    with torch.autocast(prediction.device.type, enabled=False):
        exact = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
        error = (prediction.to(exact) - target.to(exact)).square().mean(-1)  # (B, N)
        removed = removed.to(exact)
        plain = _share((removed * error).sum(), removed.sum())
        if map is None:
            blank = torch.ones(len(error), dtype=torch.bool, device=error.device)
            return Guided(gamma * plain, plain.detach(), blank)
        weights = object_weights(_on_patches(map, error.shape[1], grid, scaled), temperature).to(exact)
        weighted = removed * weights
        if normalise == "image":
            sums = (weighted * error).sum(1), weighted.sum(1)
            loss = _share(_share(*sums).sum(), (sums[1] > 0).sum())
        else:
            total = weighted.sum() if normalise == "batch" else removed.sum()
            loss = _share((weighted * error).sum(), total)
        return Guided(gamma * loss, plain.detach(), (weights == 1).all(1))


def object_weights(map: Tensor, temperature: float = 0.75) -> Tensor:
    """(B, N) weights exp(M / tau) of maps (B, N) or (B, h, w) in [0, 1]; float32, without gradient.

    A map with a value that is not finite gives 1 everywhere.
    """
    if not temperature >= COLDEST:
        raise ValueError(
            f"temperature={temperature}: exp(1 / temperature) must be a float32, so use at least {COLDEST:.4f}; 0.75 "
            "is the published value"
        )
    flat = _float(map.detach()).flatten(1)
    flat = flat.masked_fill(~flat.isfinite().all(1, keepdim=True), 0.0)
    return (flat / temperature).exp()


def unit(map: Tensor) -> Tensor:
    """Each map from its least to its greatest value as 0 to 1: (B, ...) to (B, ...), float32.

    A constant map, or one with a value that is not finite, is 0 everywhere: it prefers nothing.
    """
    flat = _float(map.detach()).flatten(1)
    low, high = flat.aminmax(dim=1, keepdim=True)
    width = high - low
    says = (width > 0) & width.isfinite()  # not true of NaN
    return torch.where(says, (flat - low) / width, 0.0).view(map.shape)


def temperature_at(epoch: float, epochs: float, start: float, end: float) -> float:
    """tau at a fractional epoch of a run of `epochs`: half a cosine from `start` to `end`. Equal ends: constant."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def to_patches(map: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map (B, h', w') on the patch grid (B, h, w): the mean over each patch where finer, bilinear where coarser."""
    finer = max(map.shape[1], grid[0]), max(map.shape[2], grid[1])
    if finer != tuple(map.shape[1:]):
        map = F.interpolate(map[:, None], size=finer, mode="bilinear", align_corners=False)[:, 0]
    return on_grid(map, grid)


def _on_patches(map: Tensor, patches: int, grid: tuple[int, int] | None, scaled: bool) -> Tensor:
    """Maps on their scale and on the patches: (B, N)."""
    map = _float(map.detach()) if scaled else unit(map)
    if map.dim() == 3 and grid is not None:
        map = to_patches(map, grid)
    flat = map.flatten(1)
    if flat.shape[1] != patches:
        raise ValueError(
            f"a map {tuple(map.shape)} for {patches} patches: give it on the patch grid, or (B, h, w) of any size and "
            "grid=(h, w) of the patches (autoencoder.grid)"
        )
    return flat


def _float(map: Tensor) -> Tensor:
    return map.to(torch.promote_types(map.dtype, torch.float32))


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, 0 for 0 / 0: nothing was removed."""
    return part / torch.where(whole > 0, whole, 1)
