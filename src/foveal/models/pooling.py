"""Sequence pooling: one number per token says how much the token counts for the image.

    w = softmax_t(x_t . a + a0),    z = sum_t w_t x_t        Hassani et al., 2021

It is attention with one head and one learned query a whose keys and values are the tokens themselves, and it is written
that way: w is the row that `foveal.read(model, layers="seq_pool")` reads. a0 is the same for all tokens, so it changes
nothing and gets no gradient; it is kept for the checkpoints that have it.
"""

from __future__ import annotations

from torch import Tensor, nn


class SequencePool(nn.Module):
    """Tokens (B, N, D) to one vector per image (B, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D).  Returns (B, D), which lies among the tokens: the weights are a mean's."""
        logits = self.score(x).transpose(1, 2).unsqueeze(1)  # (B, 1, 1, N): heads, queries, tokens
        pooled: Tensor = logits.softmax(-1) @ x.unsqueeze(1)  # (B, 1, 1, D)
        return pooled.flatten(1)
