"""Vertical TokenMixup: a block also looks at the most salient tokens that entered the blocks before it.

    T^l = x^l at the kappa largest S^l,  l = 0 .. V-1        x^l enters block l, S^l is that block's own attention
    K   = [x^V ; T^0 ; ... ; T^{V-1}]                        N + V kappa tokens
    out = softmax(q(x^V) k(K)^T / sqrt(d)) v(K)              the block's own norm and projections for all

Choi et al., 2022 (TokenMixup, arXiv 2210.07562), section 3.3, as its experiments compute it. In training only: nothing
is added at evaluation and no parameter is. The number of tokens stays; prefix tokens are never selected.

B batch, T tokens of which P prefix and N patches, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.attention.attended import Attended
from foveal.mix.saliency import Rows, attention_saliency


def most_salient(saliency: Tensor, kappa: int, prefix: int) -> Tensor:
    """Places of the kappa largest, most salient first, counted over all tokens: (B, kappa) int64.

    saliency: (B, N).  prefix: P.  Raises ValueError for a kappa above N.
    """
    N = saliency.shape[-1]
    if not 0 <= kappa <= N:
        raise ValueError(f"kappa={kappa} but an image has {N} patches: use a value in [0, {N}]")
    return saliency.topk(kappa, dim=-1).indices + prefix


def gather(tokens: Tensor, places: Tensor) -> Tensor:
    """Tokens (B, T, D) at places (B, kappa): (B, kappa, D)."""
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))


class Memory:
    """The tokens that one forward keeps for its vertical block.

    kappa: of every block.  stop_gradient: tokens are values only.  rows: see saliency.py.
    """

    def __init__(self, kappa: int, stop_gradient: bool, rows: Rows) -> None:
        self.kappa, self.stop_gradient, self.rows = kappa, stop_gradient, rows
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # block -> tokens (B, T, D), places (B, kappa)

    def keep(self, block: int, tokens: Tensor, attended: Attended) -> None:
        """Remember what entered a block, with the places that its attention found salient."""
        saliency = attention_saliency([attended], self.rows)
        self._kept[block] = tokens, most_salient(saliency, self.kappa, attended.layout.prefix)

    def tokens(self) -> Tensor:
        """All kept tokens, block after block: (B, V kappa, D)."""
        kept = (self._kept[block] for block in sorted(self._kept))
        parts = [gather(x.detach() if self.stop_gradient else x, places) for x, places in kept]
        return torch.cat(parts, dim=1)

    def clear(self) -> None:
        """Let go of the forward's tokens."""
        self._kept = {}
