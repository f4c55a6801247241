"""Manifold Mixup: blend the tokens of two images at a random depth.

    k uniform on {0, ..., deepest}        h_i = lam h_i + (1 - lam) h_p(i)  at depth k        lam ~ Beta(alpha, alpha)

Verma et al., 2019 (arXiv 1806.05236). Depth 0 is the image, depth k >= 1 the input of block k, counted from 0:
positions are in the tokens by then, so equal places are blended, prefix tokens too. One k, one lam and one random
permutation p for the batch. The authors' code trains on binary cross-entropy of the softmax: `kind="softmax_bce"` of
the step's loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from foveal.attention import ReadError
from foveal.attention.edit import Change, Edit, Visit, edit
from foveal.mix.draws import check_alpha, draw_beta
from foveal.mix.mixed import LabelWeights, Mixed
from foveal.mix.mixer import Draw, Step, check_images
from foveal.mix.mixup import blend
from foveal.mix.none import NoMix
from foveal.mix.token_mixer import TokenMixer, TokenStep


def blend_tokens(tokens: Tensor, perm: Tensor, lam: Tensor) -> Tensor:
    """lam h_i + (1 - lam) h_p(i) for tokens (B, T, D). perm, lam: (B,)."""
    return blend(tokens[:, None], tokens[perm][:, None], lam)[:, 0]


@dataclass(frozen=True)
class DepthDraw(Draw):
    """A weight and a depth, the same for all."""

    lam: Tensor  # (B,) float32 in [0, 1], weight of the first image
    depth: Tensor  # () int64, 0 is the image


def one_weight(images: Tensor, draw: DepthDraw) -> Mixed:
    """Labels by lam, and at depth 0 the images; deeper they stay, and `keep` says what their tokens will be."""
    check_images(images, len(draw.perm))
    at_image = int(draw.depth) == 0  # asks the draw, which is on the CPU
    draw = draw.to(images.device)
    B, _, H, W = images.shape
    out = blend(images, images[draw.perm], draw.lam) if at_image else images
    weights = LabelWeights(draw.lam, draw.perm, 1.0 - draw.lam)
    return Mixed(out, draw.perm, draw.lam[:, None, None, None].expand(B, 1, H, W), (weights,))


@dataclass(kw_only=True)
class ManifoldMixup(TokenMixer[DepthDraw]):
    """Blend images or the input of a block.

    alpha: of Beta(alpha, alpha), above 0; 2 in the paper's CIFAR runs, 0.2 for Tiny-ImageNet.  deepest: depths 0 to
    this are equally likely; the authors' code has 2.  over: a mixer of the images before, on top of which this did harm
    in the one published test (TokenMixup's table 5).
    """

    alpha: float = 2.0
    deepest: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_alpha("alpha", self.alpha, zero="leave the token mixer out")
        if self.deepest < 0:
            raise ValueError(f"deepest={self.deepest} but depths count from 0, the image: use 0 or more")

    def first_mixed_block(self, model: nn.Module) -> int | None:
        """Block 1 at the earliest: depth 0 mixes the images themselves."""
        return 1 if self.deepest else None

    def draw(
        self, batch: int, image_size: tuple[int, int], grid: tuple[int, int] | None = None, *, rng: torch.Generator
    ) -> DepthDraw:
        """Partners, weight and depth."""
        perm = torch.randperm(batch, generator=rng)
        lam = draw_beta(self.alpha, batch, "batch", rng).float()
        return DepthDraw(perm, lam, torch.randint(self.deepest + 1, (), generator=rng))

    def apply(self, images: Tensor, draw: DepthDraw) -> Mixed:
        """The labels, and at depth 0 the images."""
        return one_weight(images, draw)

    @contextmanager
    def mixing(
        self, model: nn.Module, under: Step, draw: DepthDraw, labels: Tensor, num_classes: int | None
    ) -> Iterator[Step]:
        """Blend at the drawn depth."""
        blocks, change = self.blocks(model), dict[int, Change]()
        if self.deepest >= len(blocks.layers):
            raise ValueError(f"deepest={self.deepest} but the model's {len(blocks.layers)} blocks are counted from 0")
        own = self.apply(under.images, draw)
        if depth := int(draw.depth):
            perm, lam = own.perm, own.factors[0].own

            def blended(visit: Visit) -> Tensor:
                return blend_tokens(visit.tokens, perm, lam)

            change[depth] = blended
        with edit(blocks, change) as edits:
            yield one_partner_step(self, under, own, labels, num_classes, edits)


def one_partner_step(
    mixer: TokenMixer[Any], under: Step, own: Mixed, labels: Tensor, num_classes: int | None, edits: Edit
) -> TokenStep:
    """The step of a token mixer whose pairs and label weights are drawn beforehand.

    own: what it made of the image mixer's images.
    """

    def factors() -> tuple[LabelWeights, ...]:
        if not edits.ran:
            raise ReadError(
                "tokens are mixed by the forward, but none ran in the block: call the model inside it, once, in "
                "training mode, and uncompiled"
            )
        return own.factors

    image = own if isinstance(mixer.over, NoMix) else replace(under.mixed, images=own.images)
    return TokenStep(under, image, labels, num_classes, factors)
