"""TransMix: weigh CutMix labels by where the class token looks.

    lam' = 1/2 (lam + sum_n a_n keep_n / sum_n a_n)        Chen et al., 2022

a is the last block's class-token row over patches, mean over heads, of the training forward on the mixed image itself:
no second pass, no gradient. keep_n is the mask of the first image, sampled at each patch's top-left pixel.

B batch, N patches (no prefix tokens), h x w patch grid, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from foveal.attention import Seen, UnsupportedModelError, attach, read
from foveal.mix.mixed import LabelWeights, Mixed
from foveal.mix.mixer import Relabel
from foveal.mix.mixup_cutmix import BlendBoxDraw, MixupCutMix


def sample_keep(keep: Tensor, grid: tuple[int, int]) -> Tensor:
    """The mask at the patches: cell (r, c) takes the pixel (floor(r H/h), floor(c W/w)).

    keep: (B, 1, H, W).  Returns (B, h w). A box thinner than a patch may fall between the samples.
    """
    H, W = keep.shape[-2:]
    h, w = grid
    y = torch.arange(h, device=keep.device) * H // h
    x = torch.arange(w, device=keep.device) * W // w
    return keep[:, 0, y[:, None], x].flatten(1)


def visible_attention(attn: Tensor, keep: Tensor) -> Tensor:
    """Share of attention that falls on the first image.

    attn: (B, N) non-negative, any scale.  keep: (B, N) in [0, 1].  Returns (B,) in [0, 1].
    A row of zeros has no preference: it falls back to the mean of `keep`.
    """
    mass = attn.sum(-1)
    share = (attn * keep).sum(-1) / mass.clamp_min(torch.finfo(attn.dtype).tiny)
    return torch.where(mass > 0, share, keep.mean(-1))


def relabelled(mixed: Mixed, attn: Tensor, grid: tuple[int, int]) -> Mixed:
    """The same images, labels half by area and half by attention.

    mixed: with the weights by area as its last factor.  attn: (B, N) on the h x w grid.
    Works for any mask: a blended image keeps its weight, since the mask is the same at every patch.
    """
    area = mixed.factors[-1]
    share = visible_attention(attn.detach().float(), sample_keep(mixed.keep, grid))
    own = (area.own + share) / 2
    return replace(mixed, factors=(*mixed.factors[:-1], LabelWeights(own, area.perm, 1.0 - own)))


@dataclass(kw_only=True)
class TransMix(MixupCutMix):
    """CutMix with labels by area and attention; with mixup_alpha above 0 also Mixup steps, whose labels stay ordinary.

    mixup_alpha, cutmix_alpha, prob, switch_prob, mode: as MixupCutMix. By default every step is CutMix, so that
    `cutmix` and `transmix` differ in nothing but the labels; the paper's recipe has mixup_alpha=0.8.
    attention: `class` reads the class token's row; `received` the attention that patches receive from all tokens, for
    models without a class token (not what the paper measured).
    layer: which layer is read; -1 is the last self-attention block, a name picks a class-attention block or a pooling
    head.

    `on` raises ValueError for a model without what is to be read, foveal.UnsupportedModelError for one that cannot be
    read at all; the loss raises foveal.ReadError unless the block saw exactly one forward.
    """

    mixup_alpha: float = 0.0
    attention: Literal["class", "received"] = "class"
    layer: int | str = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention not in ("class", "received"):
            raise ValueError(f"attention={self.attention!r} is not known; use 'class' or 'received'")
        if self.cutmix_alpha == 0.0:
            raise ValueError("cutmix_alpha=0 pastes no box, so there is nothing to relabel: use mix 'mixup'")

    @contextmanager
    def relabelling(self, model: nn.Module, draw: BlendBoxDraw) -> Iterator[Relabel | None]:
        """Read the forward inside the block, unless the draw pastes nothing."""
        if not bool(draw.box.any()):  # asks the draw, which is on the CPU
            self._reader(model)  # a model that does not fit fails at the first step, whatever is drawn
            yield None
            return
        with attach(model), self._reader(model) as seen:  # attached first, so the model is examined once
            yield lambda mixed: relabelled(mixed, self._attention(seen), _grid(seen))

    def _reader(self, model: nn.Module) -> Seen:
        what = "class_logits" if self.attention == "class" else "received"
        try:
            return read(model, layers=self.layer, what=what)
        except UnsupportedModelError:
            raise
        except ValueError as error:
            if self.attention == "received":
                raise
            raise ValueError(
                f"TransMix weighs labels by the class token's attention: {error}. TransMix(attention='received') uses "
                "the attention that patches receive; TransMix(layer=...) reads another layer by name"
            ) from error

    def _attention(self, seen: Seen) -> Tensor:
        """(B, N), mean over heads."""
        attn: Tensor = seen.class_attention() if self.attention == "class" else seen.received()
        return attn.detach().mean(1)


def _grid(seen: Seen) -> tuple[int, int]:
    grid = seen.grid
    if isinstance(grid, list):
        raise ValueError("images with patch grids of their own cannot be mixed: give all images one size")
    return int(grid[0]), int(grid[1])
