"""Horizontal TokenMixup: easy images get the more salient tokens of other images, and a share of their labels.

    easy_i   cross-entropy of a small classifier at this depth <= tau
    R_it     = 1 where S_jt - S_it > rho, for the partner j = sigma(i) (assignment.py); 0 for images that are not easy
    x'_it    = x_jt where R_it, else x_it                       prefix tokens stay
    y'_i     = (a_i y_i + g_i y_j) / (a_i + g_i),  a_i = sum_t (1 - R_it) S_it,  g_i = sum_t R_it S_jt

Choi et al., 2022 (TokenMixup, arXiv 2210.07562), equations 5 to 11, in the original order of the batch. The released
code compares the partner with the first easy image of the batch where equation 9 compares it with image i itself;
`reference` reproduces that.

B batch, T tokens of which P prefix and N patches, D width, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.mix.mixed import LabelWeights


@dataclass(frozen=True)
class Exchange:
    """What one horizontal mixing did to a batch."""

    easy: Tensor  # (B,) bool
    difficulty: Tensor | None  # (B,) float32 nats; None where nothing judged it
    saliency: Tensor  # (B, N) float32, of the unmixed tokens
    partner: Tensor  # (B,) int64, the image itself where it is not easy
    replaced: Tensor  # (B, N) bool
    weights: LabelWeights  # of the image's and its partner's label
    any: bool  # False: nothing is replaced, known without asking the device

    @property
    def gain(self) -> Tensor:
        """Saliency that each image won, (B,): that of the tokens it got less that of those it gave up."""
        return (self.replaced * (self.saliency[self.partner] - self.saliency)).sum(-1)


def chosen(saliency: Tensor, partner: Tensor, easy: Tensor, rho: float, reference: Tensor | None = None) -> Tensor:
    """R: which tokens are replaced by the partner's, (B, N) bool.

    saliency: (B, N).  partner: (B,).  easy: (B,) bool.  reference: (B, N) saliency that the partner's must exceed,
    None for the image's own.
    """
    own = saliency if reference is None else reference
    return (saliency[partner] - own - rho > 0) & easy[:, None]


def first_easy(saliency: Tensor, easy: Tensor) -> Tensor:
    """The saliency of the first easy image for all images, (B, N): what the released code compares with."""
    return saliency[easy.long().argmax()].expand_as(saliency)


def as_many(replaced: Tensor, noise: Tensor) -> Tensor:
    """As many tokens of each image as in `replaced`, anywhere: (B, N) bool. noise: (B, N), its smallest are taken."""
    return noise.argsort(-1).argsort(-1) < replaced.sum(-1, keepdim=True)


def saliency_weights(saliency: Tensor, partner: Tensor, replaced: Tensor) -> LabelWeights:
    """Labels by the saliency that is left of the image and that which came from the partner."""
    kept = (saliency * ~replaced).sum(-1)
    gained = (saliency[partner] * replaced).sum(-1)
    own = torch.where(gained > 0, kept / (kept + gained), 1.0)
    return LabelWeights(own, partner, 1.0 - own)


def count_weights(partner: Tensor, replaced: Tensor) -> LabelWeights:
    """Labels by the number of tokens."""
    given = replaced.float().mean(-1)
    return LabelWeights(1.0 - given, partner, given)


def exchange(tokens: Tensor, partner: Tensor, replaced: Tensor) -> Tensor:
    """x': one gather, with gradient to own and partner's tokens.

    tokens: (B, T, D), prefix tokens first.  partner: (B,).  replaced: (B, N).  Returns (B, T, D).
    """
    B, T, D = tokens.shape
    own = torch.arange(B, device=tokens.device)[:, None]
    row = own.expand(B, T).clone()  # (B, T), from which image each token comes
    row[:, T - replaced.shape[1] :] = torch.where(replaced, partner[:, None], own)
    flat = row * T + torch.arange(T, device=tokens.device)
    return tokens.reshape(B * T, D).index_select(0, flat.flatten()).view(B, T, D)
