"""Which patches are hidden: a random subset per image, from noise that is given.

    K = int(N (1 - ratio)),   keep = the K patches of least noise,   the others are removed        He et al., 2022 (MAE)

`int` cuts off what floating point makes of the product: 10 patches at ratio 0.9 would keep none. All chance is in the
noise, drawn beforehand; nothing here draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Masking:
    """What is kept and what is removed.

    keep: (B, K) places of the kept patches, in the order in which the encoder gets them.  restore: (B, N) where each
    place's patch lies in that order, kept ones first.  removed: (B, N) float32, 1 for a removed patch.
    """

    keep: Tensor
    restore: Tensor
    removed: Tensor


def kept(patches: int, ratio: float) -> int:
    """K, how many of N patches stay at a mask ratio.

    Raises ValueError for a ratio outside [0, 1) and for one that keeps none of so few patches.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"mask_ratio={ratio} is no share of patches to remove; use a value in [0, 1), such as 0.75")
    count = int(patches * (1 - ratio))
    if count < 1:
        raise ValueError(
            f"mask_ratio={ratio} keeps none of {patches} patches (int({patches} x (1 - {ratio})) is 0) and the encoder "
            f"would see nothing; use at most {_highest(patches)}, smaller patches or larger images"
        )
    return count


def _highest(patches: int) -> float:
    """The largest ratio of four decimals that keeps a patch."""
    ratio = int(1e4 * (1 - 1 / patches)) / 1e4
    return ratio if int(patches * (1 - ratio)) else round(ratio - 1e-4, 4)


def random_masking(noise: Tensor, ratio: float) -> Masking:
    """Keep the patches with the least noise.

    noise: (B, N), independent numbers, uniform in [0, 1) for MAE.  ratio: share of patches to remove.
    Raises ValueError where nothing would be kept.
    """
    if noise.dim() != 2:
        raise ValueError(f"noise of shape {tuple(noise.shape)}: one number per patch of each image, (B, N), is needed")
    count = kept(noise.shape[1], ratio)
    order = noise.argsort(dim=1, stable=True)  # (B, N)
    restore = ranks(order)
    return Masking(order[:, :count], restore, (restore >= count).float())


def ranks(order: Tensor) -> Tensor:
    """The inverse of each row's permutation: (B, N) to (B, N). An assignment; no second sort."""
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def mask_by_map(map: Tensor, noise: Tensor) -> Tensor:
    """Noise with which `random_masking` removes the patches of high map first: the control against a guided loss.

    map: (B, h, w) or (B, N) on the patch grid, any scale.  noise: (B, N), decides between patches of equal map.
    Returns (B, N) ranks in [0, 1), each once. A map that is not finite says nothing: its image is masked at random.
    """
    flat = map.detach().flatten(1)
    if flat.shape != noise.shape:
        raise ValueError(
            f"a map {tuple(map.shape)} for noise {tuple(noise.shape)}: give one value per patch; "
            "foveal.maps.on_grid brings a map to the patch grid"
        )
    flat = flat.masked_fill(~flat.isfinite().all(1, keepdim=True), 0.0)
    by_noise = noise.argsort(dim=1, stable=True)
    by_map = flat.gather(1, by_noise).argsort(dim=1, stable=True)  # stable: equal maps stay in the order of the noise
    rank = ranks(by_noise.gather(1, by_map))
    return rank.to(torch.promote_types(noise.dtype, torch.float32)) / noise.shape[1]
