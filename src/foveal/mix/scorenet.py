"""ScoreNet: how difficult an image still is for a small classifier on the tokens that enter a block.

    z = sum_t u_t x_t,  u = softmax_t(x_t . w + b)       or the mean of the patches, or the class token
    CE_i = - sum_k y_ik log softmax(W z_i + c)_k          in nats; the paper's code has 1/10 of it as its difficulty

Choi et al., 2022 (TokenMixup, arXiv 2210.07562), section 3.1. Its input is not normalised. Its own loss is the mean of
CE with the labels as they enter the block, for every image in every step.

B batch, T tokens of which P prefix and N patches, D width, C classes.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from foveal import chance
from foveal.attention import TokenLayout

Pool = Literal["auto", "mean", "attention", "class"]


class ScoreNet(nn.Module):
    """Pooling and one linear layer.

    width: D.  classes: C.  pool: `mean` of the patches, `attention` (a learnt weight per patch), `class` (the class
    token); `auto` is `class` where there is one, else `attention`.  seed: of the initial weights; attention and mean
    start from a truncated normal of deviation 0.02 and zeros, class from PyTorch's default, as the released code does.

    Raises ValueError for a pooling that the tokens do not have.
    """

    def __init__(self, width: int, classes: int, layout: TokenLayout, pool: Pool = "auto", seed: int = 0) -> None:
        super().__init__()
        if pool not in get_args(Pool):
            raise ValueError(f"score_pool={pool!r} is not known; use one of {', '.join(get_args(Pool))}")
        if pool == "class" and layout.class_index is None:
            raise ValueError("score_pool='class' but the model has no class token: use 'attention' or 'mean'")
        self.layout = layout
        self.pool = pool if pool != "auto" else "class" if layout.class_index is not None else "attention"
        with chance.seeded(seed, "init"):
            self.attend = nn.Linear(width, 1) if self.pool == "attention" else None
            self.head = nn.Linear(width, classes)
            if self.pool != "class":
                for layer in (self.attend, self.head):
                    if layer is not None:
                        nn.init.trunc_normal_(layer.weight, std=0.02)
                        nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, T, D).  Returns logits (B, C)."""
        if self.pool == "class":
            pooled = tokens[:, self.layout.class_index]
        else:
            prefix = self.layout.prefix
            patches = tokens[:, prefix:] if prefix else tokens  # a slice costs its backward two more passes
            if self.attend is None:
                pooled = patches.mean(1)
            else:
                weight = self.attend(patches).softmax(1)  # (B, N, 1)
                pooled = (weight.transpose(1, 2) @ patches.to(weight.dtype)).squeeze(1)
        logits: Tensor = self.head(pooled)
        return logits


def difficulty(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every image in nats: (B,), float32 or wider.

    logits: (B, C).  targets: (B, C), rows of class weights, soft where the labels are mixed or smoothed.
    """
    wide = torch.promote_types(torch.float32, logits.dtype)
    return -(targets * logits.to(wide).log_softmax(-1)).sum(-1)
