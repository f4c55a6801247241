"""SmoothMix: fade the partner in under a Gaussian blob, so that no edge gives the paste away.

    M(r, c) = exp(-(r - c_r)^2 / (2 s_r^2) - (c - c_c)^2 / (2 s_c^2))        x = (1 - M) x_i + M x_p
    lam = 1 - mean(M)        c_r = (H-1)/2 + d_r,  d_r = trunc(U{0..H-1} - H/2),  s_r = (u/4 + 1/4) H,  u ~ U(0, 1)

Lee et al., 2020. The columns alike with W and the same u: on images that are not square the blob takes their shape.
A widely used implementation gives mean(M) to the first label, which is the partner's; here labels follow the pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.mix.draws import Mode, check_mode, check_share, draw_mixes, draw_uniform, reversed_partners
from foveal.mix.mixed import LabelWeights, Mixed
from foveal.mix.mixer import Draw, Mixer, check_images


def fade(images: Tensor, partners: Tensor, keep: Tensor) -> Tensor:
    """keep x_i + (1 - keep) x_p, pixel by pixel, computed in float32 or wider and returned in the images' type.

    images, partners: (B, channels, H, W).  keep: (B, 1, H, W) in [0, 1]; 1 and 0 copy. Or any that fit one another.
    """
    wide = torch.promote_types(images.dtype, torch.float32)
    return torch.lerp(partners.to(wide), images.to(wide), keep.to(wide)).to(images.dtype)


def bump(centre: Tensor, sigma: Tensor, pixels: int) -> Tensor:
    """A Gaussian along one side, 1 at its centre: (B, pixels) float32. centre, sigma: (B,); zeros where sigma is 0."""
    distance = torch.arange(pixels, device=centre.device) - centre[:, None]
    height = torch.exp(-0.5 * (distance / sigma[:, None]) ** 2)
    return torch.where(sigma[:, None] > 0, height, 0.0)


@dataclass(frozen=True)
class BlobDraw(Draw):
    """A blob per image, in pixels."""

    centre: Tensor  # (B, 2) float32, row and column
    sigma: Tensor  # (B, 2) float32, along rows and columns; 0 where nothing is mixed


@dataclass(kw_only=True)
class SmoothMix(Mixer[BlobDraw]):
    """Fade the partner in under a Gaussian blob.

    prob: probability that a draw mixes at all.  mode: what shares a draw, `batch`, `pair` or `elem`.
    """

    prob: float = 1.0
    mode: Mode = "batch"

    def __post_init__(self) -> None:
        check_share("prob", self.prob)
        check_mode(self.mode)

    def draw(
        self, batch: int, image_size: tuple[int, int], grid: tuple[int, int] | None = None, *, rng: torch.Generator
    ) -> BlobDraw:
        """Partners and blobs."""
        perm = reversed_partners(batch)
        mixes = draw_mixes(self.prob, perm, self.mode, rng)
        size = torch.tensor(image_size)
        place = torch.stack([draw_uniform(batch, self.mode, rng), draw_uniform(batch, self.mode, rng)], dim=-1)
        width = draw_uniform(batch, self.mode, rng)[:, None] / 4 + 0.25
        offset = ((place * size).floor() - size / 2).trunc()
        centre, sigma = (size - 1) / 2 + offset, width * size * mixes[:, None]
        return BlobDraw(perm, centre.float(), sigma.float())

    def apply(self, images: Tensor, draw: BlobDraw) -> Mixed:
        """Fade in by the drawn blobs."""
        check_images(images, len(draw.perm))
        draw = draw.to(images.device)
        (y, x), (height, width) = draw.centre.unbind(1), draw.sigma.unbind(1)
        rows, columns = bump(y, height, images.shape[-2]), bump(x, width, images.shape[-1])  # (B, H), (B, W)
        keep = 1.0 - (rows[:, :, None] * columns[:, None, :])[:, None]
        faded = rows.mean(1) * columns.mean(1)  # the mean of M, which is a product
        weights = LabelWeights(1.0 - faded, draw.perm, faded)
        return Mixed(fade(images, images[draw.perm], keep), draw.perm, keep, (weights,))
