"""CutMix: paste a box of the partner over the same place; labels by the share of pixels that are visible.

    cut_h = floor(H sqrt(1 - lam))    rows cy - floor(cut_h/2) ... cy + ceil(cut_h/2) - 1, clipped to the image
    y = (1 - a) y_i + a y_p           a = pixels in the clipped box / (H W),    lam ~ Beta(alpha, alpha)

Yun et al., 2019; columns alike, the centre uniform over pixels. Odd sides keep all their pixels (the first release lost
one), and the label's share is counted from the box that was pasted, never from the lam that was asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
from foveal.mix.mixer import Draw, Mixer, check_images


def cut_boxes(lam: Tensor, centre: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Boxes that leave about `lam` of the image: (B, 4) int64, top, left, bottom, right; the last two exclusive.

    lam: (B,) in [0, 1].  centre: (B, 2) int64, row and column.  A box without pixels is 0, 0, 0, 0.
    """
    size = torch.tensor(image_size)
    cut = (size * (1.0 - lam.double()).sqrt()[:, None]).long()  # (B, 2)
    first = (centre - cut // 2).clamp_min(0)
    last = torch.minimum(centre + (cut + 1) // 2, size)
    empty = (last <= first).any(-1, keepdim=True)
    return torch.cat([first, last], dim=-1).masked_fill(empty, 0)


def draw_boxes(alpha: float, batch: int, image_size: tuple[int, int], mode: Mode, rng: torch.Generator) -> Tensor:
    """Random boxes (B, 4), equal where a draw is shared."""
    lam = draw_beta(alpha, batch, mode, rng)
    place = torch.stack([draw_uniform(batch, mode, rng), draw_uniform(batch, mode, rng)], dim=-1)
    centre = (place * torch.tensor(image_size)).long()
    return cut_boxes(lam, centre, image_size)


def inside(box: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Which pixels lie in the box: (B, 1, H, W) bool. box: (B, 4)."""
    H, W = image_size
    top, left, bottom, right = box[:, :, None].unbind(1)  # (B, 1) each
    y, x = torch.arange(H, device=box.device), torch.arange(W, device=box.device)
    rows = (y >= top) & (y < bottom)  # (B, H)
    columns = (x >= left) & (x < right)  # (B, W)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def box_share(box: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Share of the image's pixels in the box: (B,) float32. box: (B, 4) within the image."""
    height, width = box[:, 2] - box[:, 0], box[:, 3] - box[:, 1]
    return (height * width).float() / (image_size[0] * image_size[1])


def paste(images: Tensor, partners: Tensor, where: Tensor) -> Tensor:
    """The partner where `where` (B, 1, H, W) is true, the image elsewhere. Pixels are copied, not computed."""
    return torch.where(where, partners, images)


@dataclass(frozen=True)
class BoxDraw(Draw):
    """A box per image."""

    box: Tensor  # (B, 4) int64 top, left, bottom, right in pixels, the last two exclusive; zeros where none is pasted


@dataclass(kw_only=True)
class CutMix(Mixer[BoxDraw]):
    """Paste a box of the partner into each image.

    cutmix_alpha: of Beta(alpha, alpha), above 0; 1 is usual.
    prob: probability that a draw mixes at all; 1 on ImageNet, 0.5 on CIFAR in the paper.
    mode: what shares a draw, `batch`, `pair` or `elem`.
    """

    cutmix_alpha: float = 1.0
    prob: float = 1.0
    mode: Mode = "batch"

    def __post_init__(self) -> None:
        check_alpha("cutmix_alpha", self.cutmix_alpha, zero="use mix 'none'")
        check_share("prob", self.prob)
        check_mode(self.mode)

    def draw(
        self, batch: int, image_size: tuple[int, int], grid: tuple[int, int] | None = None, *, rng: torch.Generator
    ) -> BoxDraw:
        """Partners and boxes."""
        perm = reversed_partners(batch)
        mixes = draw_mixes(self.prob, perm, self.mode, rng)
        box = draw_boxes(self.cutmix_alpha, batch, image_size, self.mode, rng)
        return BoxDraw(perm, box * mixes[:, None])

    def apply(self, images: Tensor, draw: BoxDraw) -> Mixed:
        """Paste the drawn boxes."""
        check_images(images, len(draw.perm))
        draw = draw.to(images.device)
        size = (images.shape[-2], images.shape[-1])
        pasted, area = inside(draw.box, size), box_share(draw.box, size)
        weights = LabelWeights(1.0 - area, draw.perm, area)
        return Mixed(paste(images, images[draw.perm], pasted), draw.perm, (~pasted).float(), (weights,))
