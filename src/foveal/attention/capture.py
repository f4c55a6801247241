"""Catch q, k, v (or the logits) of one attention module while it runs.

The door is `torch.nn.functional.scaled_dot_product_attention` inside chosen modules only: a TorchFunctionMode entered
by a pre-hook and left by a forward hook. The fused kernel still runs; its inputs are seen after norms and rotation,
with mask and scale. Models that do not fuse (TIMM_FUSED_ATTN=0, SwinV2, eager transformers) show their logits to
softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from foveal.attention.errors import ReadError
from foveal.attention.rows import additive, as_4d, widen

SDPA = F.scaled_dot_product_attention
SOFTMAX = (torch.softmax, F.softmax, Tensor.softmax)
MATMUL = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)


@dataclass
class Caught:
    """What one attention call computed from. Either q and k (fused), or logits (unfused).

    q: (B, H, Q, d).  k, v: (B, H, T, d).  mask: additive, 4 dimensions, broadcastable to (B, H, Q, T), or None.
    logits: (B, H, Q, T) at the input of the softmax.
    """

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    mask: Tensor | None = None
    scale: float = 1.0
    logits: Tensor | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(B, Q, T)."""
        if self.logits is not None:
            return self.logits.shape[0], self.logits.shape[-2], self.logits.shape[-1]
        assert self.q is not None
        assert self.k is not None
        return self.q.shape[0], self.q.shape[-2], self.k.shape[-2]

    @property
    def requires_grad(self) -> bool:
        return any(t is not None and t.requires_grad for t in (self.q, self.k, self.v, self.mask, self.logits))


def caught_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Caught:
    """The arguments of scaled_dot_product_attention, key heads repeated for grouped-query attention."""
    if is_causal:
        raise ReadError("causal attention is not read: an image model attends in both directions")
    if query.dim() == 5 and query.shape[2] == 1:  # Hiera's global blocks in older timm: one window, written out
        query, key, value = query.squeeze(2), key.squeeze(2), value.squeeze(2)
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return Caught(
        q=query,
        k=key,
        v=value,
        mask=as_4d(additive(attn_mask, like=widen(query))),
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
    )


class Catch(TorchFunctionMode):
    """While entered, hands the attention call it sees to `caught`."""

    def __init__(self) -> None:
        super().__init__()
        self.caught: Caught | None = None
        self.several = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is SDPA:
            self.several = self.several or (self.caught is not None and self.caught.q is not None)
            self.caught = caught_sdpa(*args, **kwargs)
        elif func in SOFTMAX:
            logits = args[0] if args else kwargs["input"]
            if self.caught is None and logits.dim() == 4:
                self.caught = Caught(logits=logits)
        elif func in MATMUL and self.caught is not None and self.caught.logits is not None and len(args) == 2:
            caught = self.caught  # the first product with the map is the one with the values
            if caught.v is None and args[0].shape == self.caught.logits.shape:
                caught.v = args[1]
        return func(*args, **kwargs)


def caught_mha(
    attention: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any], values: bool = False
) -> Caught:
    """What nn.MultiheadAttention computed from, projected once more from its input; values only where asked.

    Inside it no function mode sees the attention, and entering one would leave its fast path; so the module's input is
    what is read. Only for readers that need all queries or keys; see `mha_row` for one row.
    """
    D, H = attention.embed_dim, attention.num_heads

    def project(x: Tensor, part: int) -> Tensor:
        y = _project(attention, x, part)
        return y.reshape(*y.shape[:-1], H, D // H).transpose(1, 2)  # (B, H, T, d)

    query, key, value = _mha_inputs(attention, args, kwargs)
    v = project(value, 2) if values else None
    return Caught(q=project(query, 0), k=project(key, 1), v=v, scale=(D // H) ** -0.5)


def mha_row(attention: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> Tensor:
    """Logits of one query without a second projection of the keys: x_n . (W_k^T q) + b_k . q, (B, H, T)."""
    query, key, _ = _mha_inputs(attention, args, kwargs)
    D, H = attention.embed_dim, attention.num_heads
    d = D // H
    q = _project(attention, query[:, index], 0).reshape(-1, H, d) * d**-0.5  # (B, H, d)
    key_weight = widen(attention.in_proj_weight[D : 2 * D]).reshape(H, d, D)
    asked = torch.einsum("bhd,hde->bhe", q, key_weight)  # (B, H, D): the query seen from the token's side
    row: Tensor = torch.matmul(asked, widen(key).transpose(-1, -2))  # (B, H, T)
    if attention.in_proj_bias is not None:
        row = row + (q * widen(attention.in_proj_bias[D : 2 * D]).reshape(H, d)).sum(-1, keepdim=True)
    return row


def _project(attention: nn.MultiheadAttention, x: Tensor, part: int) -> Tensor:
    """Queries (0), keys (1) or values (2) of x (..., D)."""
    at = slice(part * attention.embed_dim, (part + 1) * attention.embed_dim)
    bias = attention.in_proj_bias
    return F.linear(widen(x), widen(attention.in_proj_weight[at]), None if bias is None else widen(bias[at]))


def _mha_inputs(
    attention: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if not attention.batch_first or attention.in_proj_weight is None or attention.bias_k is not None:
        raise ReadError("nn.MultiheadAttention is read with batch_first=True, one width, and no extra key bias")
    if given.get("key_padding_mask") is not None or given.get("attn_mask") is not None:
        raise ReadError("nn.MultiheadAttention with a mask is not read")
    return given["query"], given["key"], given["value"]
