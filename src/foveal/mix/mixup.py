"""Mixup: blend two images and their labels by the same weight.

    x = lam x_i + (1 - lam) x_p        y = lam y_i + (1 - lam) y_p        lam ~ Beta(alpha, alpha)

Zhang et al., 2018. The partner p of image i is B-1-i.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.mix.draws import Mode, check_alpha, check_mode, check_share, draw_beta, draw_mixes, reversed_partners
from foveal.mix.mixed import LabelWeights, Mixed
from foveal.mix.mixer import Draw, Mixer, check_images


def blend(images: Tensor, partners: Tensor, lam: Tensor) -> Tensor:
    """lam x_i + (1 - lam) x_p, computed in float32 or wider and returned in the images' type.

    images, partners: (B, channels, H, W).  lam: (B,) in [0, 1]; 1 gives the image and 0 the partner, bit for bit.
    """
    wide = torch.promote_types(images.dtype, torch.float32)
    weight = lam.to(wide)[:, None, None, None]
    return torch.lerp(partners.to(wide), images.to(wide), weight).to(images.dtype)


@dataclass(frozen=True)
class MixupDraw(Draw):
    """A weight per image."""

    lam: Tensor  # (B,) float32 in [0, 1], weight of the first image


@dataclass(kw_only=True)
class Mixup(Mixer[MixupDraw]):
    """Blend each image with its partner.

    mixup_alpha: of Beta(alpha, alpha), above 0; the usual values are 1 (CIFAR), 0.2 (ImageNet, ResNet) and 0.8 (DeiT).
    prob: probability that a draw mixes at all.  mode: what shares a draw, `batch`, `pair` or `elem`.
    """

    mixup_alpha: float = 0.8
    prob: float = 1.0
    mode: Mode = "batch"

    def __post_init__(self) -> None:
        check_alpha("mixup_alpha", self.mixup_alpha, zero="use mix 'none'")
        check_share("prob", self.prob)
        check_mode(self.mode)

    def draw(
        self, batch: int, image_size: tuple[int, int], grid: tuple[int, int] | None = None, *, rng: torch.Generator
    ) -> MixupDraw:
        """Partners and weights."""
        perm = reversed_partners(batch)
        mixes = draw_mixes(self.prob, perm, self.mode, rng)
        lam = draw_beta(self.mixup_alpha, batch, self.mode, rng)
        return MixupDraw(perm, torch.where(mixes, lam, 1.0).float())

    def apply(self, images: Tensor, draw: MixupDraw) -> Mixed:
        """Blend by the drawn weights."""
        check_images(images, len(draw.perm))
        draw = draw.to(images.device)
        B, _, H, W = images.shape
        keep = draw.lam[:, None, None, None].expand(B, 1, H, W)
        weights = LabelWeights(draw.lam, draw.perm, 1.0 - draw.lam)
        return Mixed(blend(images, images[draw.perm], draw.lam), draw.perm, keep, (weights,))
