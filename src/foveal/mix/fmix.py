"""FMix: masks of any shape, cut from random images of low frequency.

    S = Z / max(f, 1/max(H, W))^decay,  Z ~ N(0, 1)        grey = inverse FFT of S
    mask = the n brightest pixels, n = lam H W rounded up or down by a coin        y = lam y_i + (1 - lam) y_p

Harris et al., 2020. lam ~ Beta(alpha, alpha); f is the frequency in cycles per pixel.

The released code takes the first two rows of S for the real and imaginary part of the spectrum, where the paper's
text takes the two parts of Z. Only the two lowest columns of frequencies survive: from left to right an image is one
wave, and no row of a mask has more than two edges. All published numbers are of that form, so it is the default;
`form="intended"` is the text's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from foveal.mix.cutmix import paste
from foveal.mix.draws import (
    Mode,
    check_alpha,
    check_mode,
    check_share,
    draw_beta,
    draw_mixes,
    draw_uniform,
    reversed_partners,
    sharing,
)
from foveal.mix.mixed import LabelWeights, Mixed
from foveal.mix.mixer import Draw, Mixer, check_images
from foveal.mix.smoothmix import fade

FORMS = ("released", "intended")


def attenuation(image_size: tuple[int, int], decay: float) -> Tensor:
    """1 / max(f, 1/max(H, W))^decay: (H, F) float64, with F = W//2 + 1 columns (one more if W is odd, as released)."""
    H, W = image_size
    rows = torch.fft.fftfreq(H, dtype=torch.float64)
    columns = torch.fft.fftfreq(W, dtype=torch.float64)[: W // 2 + 1 + W % 2]
    f = torch.hypot(rows[:, None], columns[None, :])
    return f.clamp_min(1.0 / max(H, W)).pow(-decay)


def grey_images(noise: Tensor, image_size: tuple[int, int], decay: float, form: str = "released") -> Tensor:
    """Random smooth images: (K, H, W) float64.

    noise: (K, rows, F, 2) float64, standard normal; `released` uses the first two rows only, `intended` needs all H.
    """
    scaled = noise * attenuation(image_size, decay)[: noise.shape[1], :, None]
    if form == "released":
        spectrum = torch.complex(scaled[:, 0], scaled[:, 1])  # (K, F, 2)
    else:
        spectrum = torch.complex(scaled[..., 0], scaled[..., 1])  # (K, H, F)
    columns = torch.fft.ifft(spectrum, n=image_size[0], dim=1)  # irfft2 in two steps: 2 columns here, not W//2 + 1
    grey: Tensor = torch.fft.irfft(columns, n=image_size[1], dim=2)
    return grey


def brightest(grey: Tensor, count: Tensor, soft: Tensor | None = None) -> Tensor:
    """The `count` brightest pixels of each image as a mask: (K, H, W) bool, or float64 with a soft edge.

    grey: (K, H, W).  count: (K,) int64.  soft: (K,) int64, the mask falls from 1 to 0 from the rank count - soft to
    the rank count + soft.
    """
    flat = grey.flatten(1)
    if soft is None:
        mask = torch.zeros_like(flat, dtype=torch.bool)
        for row, values, n in zip(mask, flat, count.tolist(), strict=True):
            row[values.topk(n, sorted=False).indices] = True  # a tenth of the time of a sort
        return mask.view_as(grey)
    order = flat.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order)).view_as(grey)
    count, soft = count[:, None, None], soft[:, None, None]
    ramp = 1.0 - (rank - (count - soft)) / (2 * soft - 1).clamp_min(1).double()
    return torch.where(soft > 0, ramp.clamp(0.0, 1.0), (rank < count).double())


@dataclass(frozen=True)
class MaskDraw(Draw):
    """A weight per image and a mask per draw, as many of them as `mode` asks for."""

    lam: Tensor  # (B,) float32 in [0, 1], weight of the first label; 1 leaves the image alone
    mask: Tensor  # (K, H, W) bool or float32, 1 where the first image is
    shared: Tensor  # (B,) int64 below K, the mask of each image


@dataclass(kw_only=True)
class FMix(Mixer[MaskDraw]):
    """Cut and paste along the borders of a random smooth image.

    alpha: of Beta(alpha, alpha), above 0.  decay: how much high frequencies are damped; more gives simpler shapes.
    form: `released` or `intended`, see above.  max_soft: share of the pixels over which the mask fades, in [0, 0.5].
    prob: probability that a draw mixes at all.
    mode: what shares a draw, `batch`, `pair` or `elem`. Masks are made on the CPU, about a millisecond each at 224.
    """

    alpha: float = 1.0
    decay: float = 3.0
    max_soft: float = 0.0
    form: Literal["released", "intended"] = "released"
    prob: float = 1.0
    mode: Mode = "batch"

    def __post_init__(self) -> None:
        check_alpha("alpha", self.alpha, zero="use mix 'none'")
        if not 0.0 <= self.decay < float("inf"):
            raise ValueError(f"decay={self.decay} is a power: use a number of 0 or more; 3 is usual")
        if not 0.0 <= self.max_soft <= 0.5:
            raise ValueError(f"max_soft={self.max_soft} is a share of the pixels: use a value in [0, 0.5]")
        if self.form not in FORMS:
            raise ValueError(f"form={self.form!r} is not known; use one of {', '.join(FORMS)}")
        check_share("prob", self.prob)
        check_mode(self.mode)

    def draw(
        self, batch: int, image_size: tuple[int, int], grid: tuple[int, int] | None = None, *, rng: torch.Generator
    ) -> MaskDraw:
        """Partners, weights and masks."""
        if min(image_size) < 2:
            raise ValueError(f"an image of {image_size[0]} x {image_size[1]} pixels has no frequencies to cut along")
        perm = reversed_partners(batch)
        mixes = draw_mixes(self.prob, perm, self.mode, rng)
        lam = draw_beta(self.alpha, batch, self.mode, rng)
        up = draw_uniform(batch, self.mode, rng) < 0.5
        shared = sharing(batch, self.mode)
        K = int(shared.max()) + 1  # draw k is the one of image k
        mask = self._masks(lam[:K], up[:K], image_size, rng)
        return MaskDraw(perm, torch.where(mixes, lam, 1.0).float(), mask, shared)

    def _masks(self, lam: Tensor, up: Tensor, image_size: tuple[int, int], rng: torch.Generator) -> Tensor:
        """Masks (K, H, W) of random images. lam: (K,).  up: (K,) bool, whether the number of pixels is rounded up."""
        H, W = image_size
        pixels = H * W
        rows = 2 if self.form == "released" else H
        noise = torch.randn(len(lam), rows, W // 2 + 1 + W % 2, 2, generator=rng, dtype=torch.float64)
        grey = grey_images(noise, image_size, self.decay, self.form)
        count = torch.where(up, (lam * pixels).ceil(), (lam * pixels).floor()).long()
        if self.max_soft == 0.0:
            return brightest(grey, count)
        edge = torch.minimum(lam, 1.0 - lam).clamp_max(self.max_soft)
        return brightest(grey, count, (edge * pixels).long()).float()

    def apply(self, images: Tensor, draw: MaskDraw) -> Mixed:
        """Cut and paste, or fade, by the drawn masks."""
        check_images(images, len(draw.perm))
        if draw.mask.shape[1:] != images.shape[2:]:
            raise ValueError(
                f"a draw for images of {tuple(draw.mask.shape[1:])} pixels given {tuple(images.shape[2:])}: draw anew"
            )
        is_hard = draw.mask.dtype == torch.bool
        draw = draw.to(images.device)
        alone = (draw.lam == 1.0)[:, None, None, None]
        keep = torch.where(alone, 1.0, draw.mask[draw.shared][:, None].float())
        partners = images[draw.perm]
        out = paste(images, partners, keep == 0) if is_hard else fade(images, partners, keep)
        return Mixed(out, draw.perm, keep, (LabelWeights(draw.lam, draw.perm, 1.0 - draw.lam),))
