"""Image-label inconsistency: how far a mixed label is from what can be seen of the two objects.

    G_i = truth_i / sum truth_i        gaze, mask or box of image i, in its own frame
    g_i = sum over visible pixels of image i of G_i        g_p = the same of its partner, over what was cut out of it
    share_i = g_i / (g_i + g_p)        gap_i = |own_i - share_i|

From the gaze metric of TdAttenMix (Wang, Gu, Lu, 2025; its formula was not to be had, this is the reading that fits its
description). Worked: gaze [[.1, .2], [.3, .4]] with its first quarter covered by the first quarter of [[.7, .1],
[.1, .1]]: .9 / (.9 + .7) = .5625; the label by area is .75, so the gap is .1875.

A blend (Mixup) covers nothing: g_i = g_p = 1 and the share is 1/2 whatever is on the images, which tells nothing about
where a mixer cuts. Such rows are marked `blended` and have no gap; |own - share| of theirs is to be told apart.

B batch, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from foveal.maps import on_grid

EPSILON = 1e-6  # least probability in share_divergence


class MixedImages(Protocol):
    """What is needed of a mixed batch: foveal.mix.Mixed."""

    @property
    def perm(self) -> Tensor: ...  # (B,) int64
    @property
    def keep(self) -> Tensor: ...  # (B, 1, H, W)
    @property
    def visible_own(self) -> Tensor: ...  # (B, 1, H, W)
    @property
    def visible_partner(self) -> Tensor: ...  # (B, 1, H, W), in the frame of the partner
    def mix_labels(self, rows: Tensor) -> Tensor: ...  # (B, C) to (B, C)


@dataclass(frozen=True, eq=False)
class Inconsistency:
    """Of each mixed image. An image that meets itself shows itself alone: share 1.

    gap is NaN where nothing of both objects is visible, where one of the two truths is empty, and for blends.
    """

    truth_share: Tensor  # (B,) in [0, 1], NaN as the gap is; 1/2 for blends
    gap: Tensor  # (B,) in [0, 1]
    blended: Tensor  # (B,) bool: both images whole, one through the other

    @property
    def mean(self) -> float:
        """Mean gap over the rows that have one, in [0, 1]; NaN if there are none."""
        return float(self.gap.double().nanmean())

    @property
    def n(self) -> int:
        """Rows that have a gap."""
        return int((~self.gap.isnan()).sum())

    @property
    def skipped(self) -> int:
        """Rows without a gap that are no blends: nothing visible, an empty truth, no label."""
        return int((self.gap.isnan() & ~self.blended).sum())


def own_weight(mixed: MixedImages) -> Tensor:
    """Share of the first image's label in the labels of the pair, (B,) float32 in [0, 1].

    From all the factors of a `Mixed`, by image and not by class, so that partners of one class count like others.
    Weights that do not sum to 1 (TokenMix) are divided by their sum; NaN where both are 0.
    An image that meets itself has its own label: 1.
    """
    perm = mixed.perm
    rows = mixed.mix_labels(torch.eye(len(perm), device=perm.device))  # whose label is in whose
    own = rows.diagonal()
    partner = rows.gather(1, perm[:, None])[:, 0].masked_fill(_alone(perm), 0.0)
    return own / (own + partner)


def inconsistency(own: Tensor, mixed: MixedImages, truth: Tensor) -> Inconsistency:
    """How far the label weights `own` (B,) are from the visible share of the truth.

    own: weight of the first image in [0, 1], as own_weight gives it; NaN gives a NaN gap.
    truth: (B, H', W') gaze maps, masks or boxes of the images before mixing, bool or zero or more, in any scale; each
    spans its whole image, in any size (means over areas bring them to the pixels).
    Raises ValueError for shapes that do not fit and for truths that are negative or not finite.
    """
    B, _, H, W = mixed.keep.shape
    if truth.dim() != 3 or len(truth) != B or own.shape != (B,):
        raise ValueError(f"own {tuple(own.shape)} and truth {tuple(truth.shape)} for {B} images: (B,) and (B, H, W)")
    truth = _wide(truth)
    if not bool(((truth >= 0) & truth.isfinite()).all()):
        raise ValueError("truth must be finite and not negative: a mask, or how much each place was looked at")
    maps = on_grid(truth, (H, W))
    maps = maps / maps.sum((1, 2), keepdim=True)  # NaN where nothing is marked
    seen = (maps * mixed.visible_own[:, 0]).sum((1, 2))
    partner_seen = (maps[mixed.perm] * mixed.visible_partner[:, 0]).sum((1, 2))
    share = seen / (seen + partner_seen)
    valid = share.isfinite()
    blended = _blended(mixed)
    share = torch.where(_alone(mixed.perm), 1.0, torch.where(blended, 0.5, share))
    share = share.masked_fill(~valid, torch.nan)
    gap = (own.to(share) - share).abs().masked_fill(blended, torch.nan)
    return Inconsistency(share, gap, blended)


def share_divergence(probabilities: Tensor, truth_share: Tensor) -> Tensor:
    """What two labels' probabilities lose against the visible share: KL((s, 1 - s) || p), (B,) in nats.

    probabilities: (B, 2) of the first image's label and its partner's, zero or more; divided by their sum.
    truth_share: s, (B,) in [0, 1].  NaN in either, or probabilities that are both 0, gives NaN.
    Probabilities below 1e-6 count as 1e-6 (and those above 1 - 1e-6 as that): at most 13.8 nats are lost.
    """
    if probabilities.dim() != 2 or probabilities.shape[1] != 2 or truth_share.shape != probabilities.shape[:1]:
        raise ValueError(
            f"probabilities {tuple(probabilities.shape)}, truth_share {tuple(truth_share.shape)} must be (B, 2), (B,)"
        )
    p = _wide(probabilities)
    p = (p / p.sum(1, keepdim=True)).clamp(EPSILON, 1 - EPSILON)
    share = torch.stack([truth_share, 1 - truth_share], dim=1).to(p)
    lost: Tensor = -(share * p.log()).sum(1) - torch.special.entr(share).sum(1)
    return lost.clamp_min(0.0)


@dataclass(frozen=True)
class Relation:
    """How two shares go together: correlations in [-1, 1] over n pairs, NaN where one of the two never varies."""

    pearson: float
    spearman: float
    n: int


def relation(share: Any, truth: Any) -> Relation:
    """Correlation of a map's label share with that of the mask or gaze, over the pairs where both are finite.

    share, truth: (n,), whatever torch.as_tensor takes. Fewer than two pairs give NaN. Raises ValueError for shapes.
    """
    from scipy import stats  # takes a second to import

    x, y = (_vector(values) for values in (share, truth))
    if x.shape != y.shape:
        raise ValueError(f"pairs need equal lengths, not {len(x)} and {len(y)}")
    kept = np.isfinite(x) & np.isfinite(y)
    x, y = x[kept], y[kept]
    if len(x) < 2 or _constant(x) or _constant(y):
        return Relation(float("nan"), float("nan"), len(x))
    return Relation(float(stats.pearsonr(x, y).statistic), float(stats.spearmanr(x, y).statistic), len(x))


def _wide(x: Tensor) -> Tensor:
    """float32, float64 where it is already: sums in half precision lose the third digit."""
    return x if x.dtype == torch.float64 else x.float()


def _alone(perm: Tensor) -> Tensor:
    return perm == torch.arange(len(perm), device=perm.device)


def _blended(mixed: MixedImages) -> Tensor:
    """Where every pixel shows the same share of both: (B,) bool."""
    low, high = mixed.keep.flatten(1).aminmax(dim=1)
    return (low == high) & (low > 0) & (high < 1) & ~_alone(mixed.perm)


def _vector(values: Any) -> npt.NDArray[np.float64]:
    x = torch.as_tensor(values).detach().to("cpu", torch.float64).numpy()
    if x.ndim != 1:
        raise ValueError(f"values of shape {x.shape}: one number for each pair, (n,)")
    return x


def _constant(x: npt.NDArray[np.float64]) -> bool:
    """Whether what varies is rounding."""
    return bool(np.ptp(x) <= 1e-12 * np.abs(x).max())
