"""What a block's attention sees, met at its call: the class token's row, the column mean, attention rollout.

    r A_top ... A_lower        tokens at the top look at tokens entering the lowest block through A_upper A_lower,

a row vector r times the maps from the uppermost down, mean over heads each, no identity added, no map stored.

B batch, H heads, T tokens (prefix and patches).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from foveal.attention import rows
from foveal.attention.capture import SDPA, SOFTMAX, Caught, caught_mha, caught_sdpa
from foveal.attention.errors import ReadError
from foveal.attention.layout import TokenLayout

MHA = F.multi_head_attention_forward


@dataclass(frozen=True)
class AttentionCall:
    """One call of what computes attention: the function and its arguments, as the module gave them."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def caught(self, attention: nn.Module) -> Caught:
        """Queries and keys (or logits) of the call."""
        if self.func is SDPA:
            return caught_sdpa(*self.args, **self.kwargs)
        if self.func is MHA:
            assert isinstance(attention, nn.MultiheadAttention)
            tokens_first = tuple(x.transpose(0, 1) for x in self.args[:3])
            masks = {name: self.kwargs.get(name) for name in ("key_padding_mask", "attn_mask")}
            return caught_mha(attention, tokens_first, masks)
        return Caught(logits=self.args[0] if self.args else self.kwargs["input"])


class Meet(TorchFunctionMode):
    """While entered, hands every attention call to `met`, whose result takes the call's place."""

    def __init__(self, met: Callable[[AttentionCall], Any]) -> None:
        super().__init__()
        self.met = met

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is SDPA or func is MHA or (func in SOFTMAX and (args[0] if args else kwargs["input"]).dim() == 4):
            return self.met(AttentionCall(func, args, kwargs))
        return func(*args, **kwargs)


class Attended:
    """What one block's attention sees: probabilities over all tokens, mean over heads, in float32 or wider.

    Nothing of it has gradient.  caught: queries and keys, or logits.  row: logits of the class token (B, H, T), where
    no more than that is known.
    """

    def __init__(self, caught: Caught, layout: TokenLayout, row: Tensor | None = None) -> None:
        self.layout = layout
        self._row = None if row is None else row.detach()
        q, k, mask, logits = (
            None if x is None else x.detach() for x in (caught.q, caught.k, caught.mask, caught.logits)
        )
        self._caught = Caught(q, k, None, mask, caught.scale, logits)

    def class_row(self) -> Tensor:
        """Attention of the class token: (B, T). Raises ValueError for a model without one."""
        index = self.layout.class_index
        if index is None:
            raise ValueError("this model has no class token, so there is no class row: use the attention received")
        if self._row is not None:
            return rows.widen(self._row).softmax(-1).mean(1)
        with self._plainly() as (q, k, mask, logits):
            if logits is not None:
                return logits[:, :, index].softmax(-1).mean(1)
            row_mask = None if mask is None else mask[:, :, index if mask.shape[2] > 1 else 0]
            return rows.query_row(q[:, :, index], k, self._caught.scale, row_mask).softmax(-1).mean(1)

    def received(self) -> Tensor:
        """Attention that each token receives, mean over the queries of all tokens: (B, T), rows sum to 1."""
        with self._plainly() as (q, k, mask, logits):
            if logits is not None:
                return logits.softmax(-1).mean((1, 2))
            return rows.received(q, k, self._caught.scale, mask).mean(1)

    def carried(self, weight: Tensor) -> Tensor:
        """The row vectors `weight` (B, T) times the map: (B, T)."""
        with self._plainly() as (q, k, mask, logits):
            if logits is not None:
                return torch.einsum("bi,bhit->bht", weight.to(logits.dtype), logits.softmax(-1)).mean(1)
            return rows.carried(weight, q, k, self._caught.scale, mask).mean(1)

    @contextmanager
    def _plainly(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
        c = self._caught
        some = c.q if c.q is not None else c.logits
        if some is None:
            raise ReadError("only the class token's row was looked at: peek with by_class=False for the whole")
        with torch.no_grad(), torch.autocast(some.device.type, enabled=False):
            logits = None if c.logits is None else rows.widen(c.logits)
            yield c.q, c.k, c.mask, logits  # type: ignore[misc]  # q and k are there unless the logits are


def rollout(attended: Sequence[Attended], by_class: bool) -> Tensor:
    """Attention to the tokens that enter the lowest block, seen from the highest: (B, T).

    attended: from the lowest block to the highest.  by_class: the class token's row, else the mean over all queries.
    """
    *lower, top = attended
    row = top.class_row() if by_class else top.received()
    for one in reversed(lower):
        row = one.carried(row)
    return row
