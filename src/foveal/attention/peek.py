"""Look into a block before it runs: what its attention would see, at the price of a norm and a part of a projection.

A peek runs a block on given tokens up to its attention and stops there: for the plain attention of timm and torchvision
at its input, from which only queries and keys are projected, and for the class token's row not even keys; for any other
at its first attention call. Nothing is drawn, nothing is kept for the backward, and readers from outside see nothing of
it. With further steps the blocks after it are run too, for attention rollout.

B batch, H heads, T tokens (prefix and patches), D width, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal.attention import rows
from foveal.attention.anatomy import Layer
from foveal.attention.attended import Attended, AttentionCall, Meet
from foveal.attention.capture import Caught, caught_mha, mha_row
from foveal.attention.door import unseen
from foveal.attention.errors import ReadError

TOKENS = ("x", "hidden_states", "input")  # what blocks call the argument that holds the tokens
FUSED = ("timm.layers.attention.Attention", "timm.models.vision_transformer.Attention")
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def tokens_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tokens (B, T, D) among a block's arguments."""
    found = args[0] if args else next((kwargs[name] for name in TOKENS if name in kwargs), None)
    if not isinstance(found, Tensor) or found.dim() != 3:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ReadError(f"a block got {shape} where tokens (B, T, D) were expected")
    return found


def with_tokens(args: tuple[Any, ...], kwargs: dict[str, Any], tokens: Tensor | None) -> Arguments:
    """A block's arguments with other tokens."""
    if args:
        return (tokens, *args[1:]), kwargs
    return args, kwargs | {name: tokens for name in TOKENS if name in kwargs}


def attention_call(layer: Layer, tokens: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionCall:
    """The first attention call of a block on these tokens; the block stops there. With the gradient mode that is set.

    args, kwargs: of the block's own call, in which the tokens are replaced.
    """
    args, kwargs = with_tokens(args, kwargs, tokens)
    try:
        with Meet(_stop), _once(layer.block):
            layer.block.forward(*args, **kwargs)  # not __call__: hooks on the block are for its own run
    except _Stopped as stopped:
        return stopped.call
    raise ReadError(
        f"{layer.name} ran but showed no attention call: its attention is neither fused nor a plain softmax"
    )


def attention_input(layer: Layer, tokens: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """What a block would hand to its attention module; the block stops there. Arguments as `attention_call`."""
    args, kwargs = with_tokens(args, kwargs, tokens)
    handle = layer.attention.register_forward_pre_hook(_stop_before, with_kwargs=True, prepend=True)
    try:
        layer.block.forward(*args, **kwargs)
    except _StoppedBefore as stopped:
        return stopped.arguments
    finally:
        handle.remove()
    raise ReadError(f"{layer.name} ran without its attention module")


def is_fused(attention: nn.Module) -> bool:
    """Is this timm's plain attention, one linear layer for queries, keys and values, without adapters or hooks?"""
    if f"{type(attention).__module__}.{type(attention).__qualname__}" not in FUSED:
        return False
    qkv = attention.qkv
    return type(qkv) is nn.Linear and not (qkv._forward_hooks or qkv._forward_pre_hooks)


def projected(attention: Any, x: Tensor, first: int, last: int) -> Tensor:
    """Queries (0), keys (1), values (2) of timm's attention from `first` to `last`: (parts, B, H, T, d), no norms."""
    (B, T, _), H = x.shape, attention.num_heads
    D = attention.qkv.weight.shape[0] // 3
    bias = attention.qkv.bias
    at = slice(first * D, (last + 1) * D)
    y = F.linear(x, attention.qkv.weight[at], None if bias is None else bias[at])
    return y.view(B, T, -1, H, D // H).permute(2, 0, 3, 1, 4)


def fused_row(attention: Any, x: Tensor, index: int) -> Tensor:
    """Logits of one query of timm's attention, (B, H, T), without projecting keys where keys have no norm:

    (W_k x_t + b) . q = x_t . (W_k^T q) + b . q
    """
    q = attention.q_norm(projected(attention, x[:, index : index + 1], 0, 0)[0])[:, :, 0]  # (B, H, d)
    if not isinstance(attention.k_norm, nn.Identity):
        return rows.query_row(q, attention.k_norm(projected(attention, x, 1, 1)[0]), attention.scale)
    _, H, d = q.shape
    D, bias = H * d, attention.qkv.bias
    with torch.autocast(x.device.type, enabled=False):
        q = rows.widen(q) * attention.scale
        weight = rows.widen(attention.qkv.weight[D : 2 * D]).view(H, d, -1)
        row = torch.einsum("bhd,hde->bhe", q, weight) @ rows.widen(x).transpose(-1, -2)
        if bias is not None:
            row = row + (q * rows.widen(bias[D : 2 * D]).view(H, d)).sum(-1, keepdim=True)
        return row


def glimpse(layer: Layer, tokens: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], by_class: bool) -> Attended:
    """What one block's attention would see on `tokens`, by the shortest way there is; see `peek`."""
    attention, layout = layer.attention, layer.layout
    index = layout.class_index if by_class else None
    if isinstance(attention, nn.MultiheadAttention):
        given, named = attention_input(layer, tokens, args, kwargs)
        if index is not None:
            return Attended(Caught(), layout, mha_row(attention, given, named, index))
        return Attended(caught_mha(attention, given, named), layout)
    if is_fused(attention):
        given, named = attention_input(layer, tokens, args, kwargs)
        if len(given) == 1 and named.get("attn_mask") is None and not named.get("is_causal"):
            if index is not None:
                return Attended(Caught(), layout, fused_row(attention, given[0], index))
            q, k = projected(attention, given[0], 0, 1).unbind(0)
            timms: Any = attention
            return Attended(Caught(timms.q_norm(q), timms.k_norm(k), scale=float(timms.scale)), layout)
    return Attended(attention_call(layer, tokens, args, kwargs).caught(attention), layout)


def peek(
    layers: Sequence[Layer], tokens: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], by_class: bool = False
) -> list[Attended]:
    """What the attention of these consecutive blocks would see on `tokens` (B, T, D); the last one stops there.

    by_class: only the class token's row is asked of the last.
    Without gradient and in evaluation: dropout and drop path stay out, and nothing is drawn.
    """
    seen: list[Attended] = []
    with _aside(layers):
        tokens = tokens.detach()
        for layer in layers[:-1]:
            inner = with_tokens(args, kwargs, tokens)
            calls: list[AttentionCall] = []

            def note(call: AttentionCall, calls: list[AttentionCall] = calls) -> Any:
                calls.append(call)
                return call.func(*call.args, **call.kwargs)

            with Meet(note):
                out = layer.block.forward(*inner[0], **inner[1])
            if not calls:
                raise ReadError(f"{layer.name} ran but showed no attention call")
            seen.append(Attended(calls[0].caught(layer.attention), layer.layout))
            tokens = out[0] if isinstance(out, tuple | list) else out
        seen.append(glimpse(layers[-1], tokens, args, kwargs, by_class))
    return seen


@contextmanager
def _aside(layers: Sequence[Layer]) -> Iterator[None]:
    """Blocks in evaluation, no gradient, unseen; everything as it was afterwards."""
    modes = [(module, module.training) for layer in layers for module in layer.block.modules()]
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(unseen(layer.block))
        stack.enter_context(torch.no_grad())
        stack.enter_context(uncached_casts(layers[0].block))
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode


@contextmanager
def uncached_casts(module: nn.Module) -> Iterator[None]:
    """Autocast as it is outside, but without its cache.

    A weight that is cast here has no gradient; in older torch (2.6) a training run inside the same autocast block would
    find that cast in the cache and train nothing.
    """
    kind = next((p.device.type for p in module.parameters()), "cpu")
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        yield
        return
    with torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=False):
        yield


@contextmanager
def _once(block: nn.Module) -> Iterator[None]:
    """transformers checkpoints inside a block's forward: not in a run that is part of another."""
    known = block.__dict__.get("gradient_checkpointing")
    if known:
        block.__dict__["gradient_checkpointing"] = False
    try:
        yield
    finally:
        if known:
            block.__dict__["gradient_checkpointing"] = known


class _Stopped(Exception):  # not an error: it ends a peek where it has seen enough
    def __init__(self, call: AttentionCall) -> None:
        super().__init__()
        self.call = call


def _stop(call: AttentionCall) -> Any:
    raise _Stopped(call)


class _StoppedBefore(Exception):
    def __init__(self, arguments: Arguments) -> None:
        super().__init__()
        self.arguments = arguments


def _stop_before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _StoppedBefore((args, kwargs))
