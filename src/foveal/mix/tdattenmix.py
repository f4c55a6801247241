"""TdAttenMix: cut what its label looks at, paste where the other label does not, label by area and attention.

    lam_i = beta a + (1 - beta) t_i / (t_i + s_i)            a = 1 - k_h k_w / (h w)
    t_i   = sum of the image's map over its visible cells    s_i = sum of the partner's map over the cut window

Wang, Gu & Lu, AAAI 2025 (arXiv 2501.15409). The map is conditioned on the image's own label (top-down); by default
it is head-cosine of the model being trained, whose one extra forward also serves the consistency loss. The paper's own
is `foveal.maps.TopDown`. Every image has its own ratio, taken from its own and its partner's map.

The released code differs: its ratio is one number for a batch, and it reads the source's attention from the target's
map (`label_ratio="batch"`), and its windows are the first of all that tie (`ties="first"`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from foveal.maps import Source
from foveal.mix.window_mixer import Places, WindowMixer


def attention_share(visible: Tensor, shown: Tensor, area: Tensor) -> Tensor:
    """t / (t + s), and the area where there is nothing to compare: (B,).

    visible, shown, area: (B,) zero or more, alike scaled.
    """
    mass = visible + shown
    share = visible / mass.clamp_min(torch.finfo(mass.dtype).tiny)
    return torch.where(mass > 0, share, area)


def sample_share(places: Places, area: Tensor, normalise: bool = False) -> Tensor:
    """lambda_t of each image: (B,). area: (B,), taken where a map of the two is blank, as it has no scale to compare.

    normalise: each map is divided by its sum first.
    """
    visible, shown = (places.total - places.covered).clamp_min(0), places.shown  # rounding may leave -1e-17
    compared = (places.total > 0) & (places.partner_total > 0)
    if normalise:
        tiny = torch.finfo(visible.dtype).tiny
        visible, shown = visible / places.total.clamp_min(tiny), shown / places.partner_total.clamp_min(tiny)
    return torch.where(compared, attention_share(visible, shown, area), area)


def released_share(places: Places, area: Tensor) -> Tensor:
    """One lambda_t for the batch, source attention read from the target's map, as the release has it: (B,)."""
    visible, aside = (places.total - places.covered).sum(), places.aside.sum()
    return attention_share(visible.expand_as(area), aside.expand_as(area), area)


@dataclass(kw_only=True)
class TdAttenMix(WindowMixer):
    """TdAttenMix; its defaults are the published ones.

    beta: share of area in the label's weight, 1 leaves attention out.
    label_ratio: `sample`, or `batch` for the release's two defects, to reproduce it; not for other use.
    normalise: compare shares of each map instead of sums, for maps whose scale says nothing (input gradients, pixels).
    switch_prob, mixup_alpha, prob, side, consistency, region, ties, map, cells: see WindowMixer. A convolutional
    network works alike, on its last feature map (or `cells`); `region` needs a ViT.
    """

    map: str | Source = "head_cosine"
    beta: float = 0.5
    label_ratio: Literal["sample", "batch"] = "sample"
    normalise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"beta={self.beta} is the share of area in the label's weight: use a value in [0, 1]")
        if self.label_ratio not in ("sample", "batch"):
            raise ValueError(f"label_ratio={self.label_ratio!r} is not known; use 'sample' or 'batch'")
        if self.normalise and self.label_ratio == "batch":
            raise ValueError("normalise=True with label_ratio='batch', but the release compares sums: set one of them")

    def own_share(self, places: Places, area: Tensor) -> Tensor:
        """beta area + (1 - beta) attention."""
        if self.label_ratio == "batch":
            share = released_share(places, area)
        else:
            share = sample_share(places, area, self.normalise)
        return self.beta * area + (1.0 - self.beta) * share
