"""Mixup and CutMix in turn: the joint policy of DeiT's recipe.

A coin per draw with probability `switch_prob` picks CutMix, else Mixup (Touvron et al., 2021; the names of the settings
and modes are timm's). With one alpha at 0 the other is always used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.mix.cutmix import BoxDraw, box_share, draw_boxes, inside, paste
from foveal.mix.draws import (
    Mode,
    check_alpha,
    check_mode,
    check_share,
    draw_beta,
    draw_mixes,
    draw_uniform,
    reversed_partners,
)
from foveal.mix.mixed import LabelWeights, Mixed
from foveal.mix.mixer import Mixer, check_images
from foveal.mix.mixup import blend


@dataclass(frozen=True)
class BlendBoxDraw(BoxDraw):
    """A weight and a box per image, of which one does nothing: lam = 1, or a box of zeros."""

    lam: Tensor  # (B,) float32 in [0, 1], weight of the first image outside the box


@dataclass(kw_only=True)
class MixupCutMix(Mixer[BlendBoxDraw]):
    """Mixup or CutMix, by a coin.

    mixup_alpha, cutmix_alpha: of Beta(alpha, alpha); 0 turns that one off, not both.
    prob: probability that a draw mixes at all.  switch_prob: probability of CutMix where both are on.
    mode: what shares a draw and a coin, `batch`, `pair` or `elem`.
    """

    mixup_alpha: float = 0.8
    cutmix_alpha: float = 1.0
    prob: float = 1.0
    switch_prob: float = 0.5
    mode: Mode = "batch"

    def __post_init__(self) -> None:
        check_alpha("mixup_alpha", self.mixup_alpha, zero="")
        check_alpha("cutmix_alpha", self.cutmix_alpha, zero="")
        if self.mixup_alpha == 0.0 and self.cutmix_alpha == 0.0:
            raise ValueError("mixup_alpha=0 and cutmix_alpha=0 never mix: set one above 0, or use mix 'none'")
        check_share("prob", self.prob)
        check_share("switch_prob", self.switch_prob)
        check_mode(self.mode)

    def draw(
        self, batch: int, image_size: tuple[int, int], grid: tuple[int, int] | None = None, *, rng: torch.Generator
    ) -> BlendBoxDraw:
        """Partners, weights and boxes. With mixup_alpha = 0 the same as CutMix's draw from the same generator."""
        perm = reversed_partners(batch)
        mixes = draw_mixes(self.prob, perm, self.mode, rng)
        box = torch.zeros(batch, 4, dtype=torch.int64)
        lam = torch.ones(batch, dtype=torch.float64)
        if self.cutmix_alpha > 0.0:
            box = draw_boxes(self.cutmix_alpha, batch, image_size, self.mode, rng)
        if self.mixup_alpha > 0.0:
            lam = draw_beta(self.mixup_alpha, batch, self.mode, rng)
        if self.cutmix_alpha > 0.0 and self.mixup_alpha > 0.0:
            cuts = draw_uniform(batch, self.mode, rng) < self.switch_prob
            box, lam = box * cuts[:, None], torch.where(cuts, 1.0, lam)
        return BlendBoxDraw(perm, box * mixes[:, None], torch.where(mixes, lam, 1.0).float())

    def apply(self, images: Tensor, draw: BlendBoxDraw) -> Mixed:
        """Blend, then paste."""
        check_images(images, len(draw.perm))
        blends, pastes = bool((draw.lam < 1).any()), bool(draw.box.any())  # asks the draw, which is on the CPU
        draw = draw.to(images.device)
        size = (images.shape[-2], images.shape[-1])
        partners, pasted = images[draw.perm], inside(draw.box, size)
        out = blend(images, partners, draw.lam) if blends else images
        out = paste(out, partners, pasted) if pastes else out
        keep = torch.where(pasted, 0.0, draw.lam[:, None, None, None])
        own = draw.lam * (1.0 - box_share(draw.box, size))
        return Mixed(out, draw.perm, keep, (LabelWeights(own, draw.perm, 1.0 - own),))
