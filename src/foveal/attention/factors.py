"""A layer's attention logits, not multiplied out: the whole T x T map at the size of two activations.

logits = scale q k^T + mask          attention = softmax(logits)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.attention import rows
from foveal.attention.capture import Caught


@dataclass(frozen=True)
class Factors:
    """Either q and k, or the logits of a model that computes its attention unfused.

    q, k: (B, H, T, d) as they meet: after their norms and rotation.  mask: additive (mask or position bias), 4
    dimensions, broadcastable to (B, H, T, T), or None.  logits: (B, H, T, T), before softmax.
    valid: (B, T) bool, False for NaFlex's padding; None where nothing is padded.
    """

    q: Tensor | None = None
    k: Tensor | None = None
    mask: Tensor | None = None
    scale: float = 1.0
    logits: Tensor | None = None
    valid: Tensor | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(B, H, T)."""
        some = self.q if self.logits is None else self.logits
        assert some is not None
        return some.shape[0], some.shape[1], some.shape[2]

    def multiplied(self) -> Tensor:
        """The logits themselves, (B, H, T, T) in float32 or wider: quadratic in tokens."""
        if self.logits is not None:
            return rows.widen(self.logits)
        assert self.q is not None
        assert self.k is not None
        logits = torch.matmul(rows.widen(self.q) * self.scale, rows.widen(self.k).transpose(-1, -2))
        return logits if self.mask is None else logits + self.mask.to(logits.dtype)

    def map(self) -> Tensor:
        """Probabilities, (B, H, T, T) in float32 or wider: quadratic in tokens."""
        return self.multiplied().softmax(-1)


def factors_of(caught: Caught, valid: Tensor | None) -> Factors:
    """Of what was caught. Without gradient q and k are copied, so that the values they share memory with can go."""
    q, k = caught.q, caught.k
    if q is not None and k is not None and not caught.requires_grad:
        q, k = q.contiguous(), k.contiguous()
    return Factors(q, k, caught.mask, caught.scale, caught.logits, valid)


def cross_entropy(target: Factors, source: Factors) -> Tensor:
    """Cross entropy of the source's map with the target's, mean over all rows; see `rows.map_cross_entropy`.

    Padding does not count. A scalar, float32 or wider; no gradient to the source. Raises ValueError where images, heads
    or tokens differ.
    """
    if target.sizes != source.sizes:
        raise ValueError(
            f"the model's maps are {target.sizes}, the source's {source.sizes} (images, heads, tokens); both need the "
            "same heads, patch size, input size and prefix tokens, and no patch dropout"
        )
    valid = target.valid
    if target.q is not None and target.k is not None and source.q is not None and source.k is not None:
        return rows.map_cross_entropy(
            target.q, target.k, target.scale, target.mask, source.q, source.k, source.scale, source.mask, valid
        )
    with torch.autocast(_device(target), enabled=False):  # one is unfused: its map is there anyway
        t, s = target.multiplied(), source.multiplied().detach()
        counts = (t.amax(-1) > float("-inf")) & (s.amax(-1) > float("-inf"))  # a row of -inf alone has no softmax
        if valid is not None:
            counts = counts & valid[:, None]
        t, s = t.masked_fill(~counts[..., None], 0.0), s.masked_fill(~counts[..., None], 0.0)
        attn = s.softmax(-1)
        each = -(attn * t.log_softmax(-1).masked_fill(attn == 0, 0.0)).sum(-1)
        return each.masked_fill(~counts, 0.0).sum() / counts.sum().clamp(min=1)


def _device(factors: Factors) -> str:
    some = factors.q if factors.logits is None else factors.logits
    assert some is not None
    return some.device.type
