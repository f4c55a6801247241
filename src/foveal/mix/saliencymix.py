"""SaliencyMix: a CutMix box around the partner's most salient point; labels by the share of pixels that are visible.

    centre_i = argmax of the partner's map        cut = floor(side sqrt(1 - lam)),  lam ~ Beta(alpha, alpha)
    rows cy - floor(cut/2) ... cy + floor(cut/2) - 1, columns alike, clipped to the image; cut and pasted at one place

Uddin et al., ICLR 2021. Here every image has its own box, from its own partner's map, and a maximum that several
points share falls on any of them. The released code takes one box for a batch, from the partner of its first image,
always at the first maximum, and finds it in a map of float bytes read as pixels, which is noise: its published numbers
are for boxes at nearly random places.

Odd sides lose a pixel, as in the first release of CutMix, which this method was published with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.maps import Source
from foveal.mix.cutmix import box_share, inside, paste
from foveal.mix.draws import Mode, check_alpha, check_mode, check_share, draw_beta, draw_mixes, reversed_partners
from foveal.mix.guided import MapMixer
from foveal.mix.mixed import LabelWeights, Mixed
from foveal.mix.mixer import Draw, check_images
from foveal.mix.windows import pick


@dataclass(frozen=True)
class SalientDraw(Draw):
    """Sizes of boxes; where they lie is the maps' to say."""

    cut: Tensor  # (B, 2) int64 height and width in pixels before clipping; zeros where none is pasted
    tie: Tensor  # (B,) float32 in [0, 1), picks among maxima of each image's own map


def salient_pixels(map: Tensor, tie: Tensor, image_size: tuple[int, int]) -> Tensor:
    """The pixel in the middle of the largest cell: (B, 2) int64 row and column.

    map: (B, h, w), pixels or coarser cells.  tie: (B,) in [0, 1), picks among equal cells; 0 takes the first.
    """
    _, h, w = map.shape
    index = pick((map == map.amax((1, 2), keepdim=True)).flatten(1), tie)
    row, column = index.div(w, rounding_mode="floor"), index % w
    # floor((r + 1/2) H / h): the pixel itself where cells are pixels
    return torch.stack([(2 * row + 1) * image_size[0] // (2 * h), (2 * column + 1) * image_size[1] // (2 * w)], dim=-1)


def boxes_around(centre: Tensor, cut: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Boxes (B, 4) of about `cut` pixels, clipped: top, left, bottom, right; without pixels 0, 0, 0, 0.

    centre: (B, 2) int64.  cut: (B, 2) int64.
    """
    first = (centre - cut // 2).clamp_min(0)
    last = centre + cut // 2
    last = torch.stack([last[:, 0].clamp_max(image_size[0]), last[:, 1].clamp_max(image_size[1])], dim=-1)
    empty = (last <= first).any(-1, keepdim=True)
    return torch.cat([first, last], dim=-1).masked_fill(empty, 0)


@dataclass(kw_only=True)
class SaliencyMix(MapMixer[SalientDraw]):
    """Paste the surroundings of the partner's most salient point.

    map: by default the centre-surround detector of the paper, on pixels and without a network; any source fits.
    cutmix_alpha, prob, mode: as CutMix; the paper has prob 0.5 on CIFAR and 1 on ImageNet. Boxes that share a draw have
    the same size before clipping, each at its own place.
    """

    map: str | Source = "centre_surround"
    cutmix_alpha: float = 1.0
    prob: float = 1.0
    mode: Mode = "batch"

    def __post_init__(self) -> None:
        check_alpha("cutmix_alpha", self.cutmix_alpha, zero="use mix 'none'")
        check_share("prob", self.prob)
        check_mode(self.mode)

    def draw(
        self, batch: int, image_size: tuple[int, int], grid: tuple[int, int] | None = None, *, rng: torch.Generator
    ) -> SalientDraw:
        """Partners, sizes, and picks among ties."""
        perm = reversed_partners(batch)
        mixes = draw_mixes(self.prob, perm, self.mode, rng)
        lam = draw_beta(self.cutmix_alpha, batch, self.mode, rng)
        cut = (torch.tensor(image_size) * (1.0 - lam).sqrt()[:, None]).long()
        return SalientDraw(perm, cut * mixes[:, None], torch.rand(batch, generator=rng))

    def follows(self, draw: SalientDraw) -> bool:
        """Where a box is pasted."""
        return bool(draw.cut.any())

    def apply(self, images: Tensor, draw: SalientDraw, map: Tensor | None = None) -> Mixed:
        """Paste boxes around the largest values of the maps (B, h, w); None puts them anywhere."""
        check_images(images, len(draw.perm))
        draw = draw.to(images.device)
        size = (images.shape[-2], images.shape[-1])
        if map is None:
            map = images.new_zeros(len(images), *size, dtype=torch.float32)
        centre = salient_pixels(map, draw.tie, size)[draw.perm]
        box = boxes_around(centre, draw.cut, size)
        pasted, area = inside(box, size), box_share(box, size)
        weights = LabelWeights(1.0 - area, draw.perm, area)
        return Mixed(paste(images, images[draw.perm], pasted), draw.perm, (~pasted).float(), (weights,))
