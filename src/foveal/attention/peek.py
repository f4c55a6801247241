"""Look into a block before it runs: what its attention would see, at the price of one norm and one projection.

A peek runs a block on given tokens up to its first attention call and stops there. Nothing is drawn, nothing is kept
for the backward, and readers from outside see nothing of it. With further steps the blocks after it are run too, for
attention rollout:

    r A_top ... A_lower        tokens at the top look at tokens entering the lowest block through A_upper A_lower,

a row vector r times the maps from the uppermost down, mean over heads each, no identity added, no map stored.

B batch, H heads, T tokens (prefix and patches), D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from foveal.attention import rows
from foveal.attention.anatomy import Layer
from foveal.attention.capture import SDPA, SOFTMAX, Caught, caught_mha, caught_sdpa
from foveal.attention.door import unseen
from foveal.attention.errors import ReadError
from foveal.attention.layout import TokenLayout

MHA = F.multi_head_attention_forward
TOKENS = ("x", "hidden_states", "input")  # what blocks call the argument that holds the tokens


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

    Nothing of it has gradient.
    """

    def __init__(self, caught: Caught, layout: TokenLayout) -> None:
        self.layout = layout
        q, k, mask, logits = (
            None if x is None else x.detach() for x in (caught.q, caught.k, caught.mask, caught.logits)
        )
        self._caught = Caught(q, k, None, mask, caught.scale, logits)

    def class_row(self) -> Tensor:
        """Attention of the class token: (B, T). Raises ValueError for a model without one."""
        index = self.layout.class_index
        if index is None:
            raise ValueError("this model has no class token, so there is no class row: use the attention received")
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
        assert some is not None
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


def tokens_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tokens (B, T, D) among a block's arguments."""
    found = args[0] if args else next((kwargs[name] for name in TOKENS if name in kwargs), None)
    if not isinstance(found, Tensor) or found.dim() != 3:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ReadError(f"a block got {shape} where tokens (B, T, D) were expected")
    return found


def with_tokens(
    args: tuple[Any, ...], kwargs: dict[str, Any], tokens: Tensor | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
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


def peek(layers: Sequence[Layer], tokens: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Attended]:
    """What the attention of these consecutive blocks would see on `tokens` (B, T, D); the last one stops there.

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
        last = layers[-1]
        seen.append(Attended(attention_call(last, tokens, args, kwargs).caught(last.attention), last.layout))
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

    A weight that is cast here has no gradient; the block's own run inside the same autocast block would find that cast
    in the cache and train nothing.
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
