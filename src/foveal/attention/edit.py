"""Change what enters the blocks of a model, for the length of a training step.

    blocks = Blocks(model)                                               # examined once
    with edit(blocks, change={2: f}, watch={0: g}, extend={3: h}):       # hooks for one forward and its backward
        logits = model(images)

`change`: f(visit) gives the tokens with which the block then runs.  `watch`: g(tokens, attended) is told, without
gradient, what a block's own attention saw.  `extend`: h() gives further tokens that the block's attention may look at:
they get the block's own norm and projections and are appended to keys and values; the number of tokens stays.

The forward must be in training mode, where `change` and `extend` are for; other forwards (evaluation, other threads,
foveal's own extra ones) run untouched, and so does everything after the block. A block that is checkpointed is
recomputed in the backward: then `visit.replay` is True and f must do to the tokens what it did before, with the same
operations. So the backward of a checkpointed model belongs inside the block; outside of it torch raises a
CheckpointError. Readers that are opened around or inside see the changed tokens, and attention to a block's own tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveal.attention.anatomy import Layer
from foveal.attention.attended import MHA, Attended, AttentionCall, Meet
from foveal.attention.blocks import Blocks, compiled
from foveal.attention.capture import SDPA
from foveal.attention.door import unseen
from foveal.attention.errors import ReadError, UnsupportedModelError
from foveal.attention.intervention import AttentionPost, AttentionPre, Intervention, InterventionHook
from foveal.attention.layout import TokenLayout
from foveal.attention.peek import attention_call, peek, tokens_of, with_tokens

Change = Callable[["Visit"], Tensor]
Watch = Callable[[Tensor, Attended], None]
Extend = Callable[[], Tensor]


@dataclass(frozen=True)
class Visit:
    """Tokens on their way into a block.

    tokens: (B, T, D).  block: its number.  replay: the block is being recomputed for the backward.
    """

    tokens: Tensor
    block: int
    replay: bool
    layout: TokenLayout
    layers: Sequence[Layer]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def peek(self, steps: int = 0, by_class: bool = False) -> list[Attended]:
        """What this block's attention would see, and that of the `steps` blocks after it, on the tokens as they are.

        by_class: only the class token's row is asked of the last of them, which costs less.
        """
        layers = self.layers[self.block : self.block + steps + 1]
        return peek(layers, self.tokens, self.args, self.kwargs, by_class)


def edit(
    blocks: Blocks,
    change: Mapping[int, Change] | None = None,
    watch: Mapping[int, Watch] | None = None,
    extend: Mapping[int, Extend] | None = None,
) -> Edit:
    """A block in which a forward of the model is edited; see above. Keys are block numbers counted from 0.

    Raises UnsupportedModelError for a block that cannot be edited so.
    """
    for block in {*(change or {}), *(watch or {}), *(extend or {})}:
        blocks.check_change(block)
    for block in extend or {}:
        blocks.check_extend(block)
    return Edit(blocks, change or {}, watch or {}, extend or {})


class Edit(Intervention):
    """Hooks on a model, as a `with` block. Made by `edit`."""

    def __init__(
        self, blocks: Blocks, change: Mapping[int, Change], watch: Mapping[int, Watch], extend: Mapping[int, Extend]
    ) -> None:
        super().__init__(blocks.model)
        self._blocks, self._change, self._watch, self._extend = blocks, change, watch, extend
        self._rest: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}  # arguments of blocks, without the tokens
        self._entered: dict[int, Tensor] = {}  # tokens of watched blocks that are running
        self._calls: dict[int, AttentionCall] = {}

    @property
    def ran(self) -> bool:
        """Whether a forward went through the edited blocks."""
        return {*self._change, *self._watch, *self._extend} <= self._visited

    def install(self) -> None:
        add = self._handles.append
        for i in sorted({*self._change, *self._watch, *self._extend}):
            layer = self._blocks.layers[i]
            # first of all hooks, so that readers see the tokens as they are changed and keys as they are not
            add(layer.block.register_forward_pre_hook(_BlockPre(self, i), with_kwargs=True, prepend=True))
            add(layer.block.register_forward_hook(_BlockPost(self, i)))
            if i in self._watch or i in self._extend:
                add(layer.attention.register_forward_pre_hook(AttentionPre(self, i), prepend=True))
                add(layer.attention.register_forward_hook(AttentionPost(self, i), always_call=True))

    def let_go(self) -> None:
        self._rest, self._entered, self._calls = {}, {}, {}

    # -- what the hooks do

    def _replaying(self, index: int) -> bool | None:
        """Whether a block runs again for the backward; None for a run that is not to be edited."""
        if torch.compiler.is_compiling():
            raise UnsupportedModelError(compiled("the step"))
        if self._pauses:
            return None
        if self.is_recomputed:
            return True if index in self._visited else None
        if not self.is_own or not self._model.training:
            return None
        return False

    def root_leaves(self, failed: bool) -> None:
        if failed and self.is_own:
            self._visited.clear()  # a forward that raised may be tried again

    def block_enters(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        replay = self._replaying(index)
        if replay is None:
            return None
        layer = self._blocks.layers[index]
        if not replay:
            self._check_first(index, layer)
            self._visited.add(index)
        if index in self._change:
            tokens = tokens_of(args, kwargs)
            visit = Visit(tokens, index, replay, layer.layout, self._blocks.layers, args, kwargs)
            args, kwargs = with_tokens(args, kwargs, self._change[index](visit))
        if index in self._extend:
            self._rest[index] = with_tokens(args, kwargs, None)
        if index in self._watch and not replay:
            self._entered[index] = tokens_of(args, kwargs)
        return args, kwargs

    def _check_first(self, index: int, layer: Layer) -> None:
        if index in self._visited:
            raise ReadError(
                f"{layer.name} ran twice in one step, but labels can follow one forward only. Run the model once in "
                "the block; further forwards go before or after it, in evaluation, or in foveal.attention.unseen(model)"
            )
        self.refuse_reentrant(layer, layer.block)

    def attention_enters(self, index: int) -> None:
        replay = self._replaying(index)
        if replay is None:
            return
        if index in self._extend:
            self.enter_mode(index, self._appending(index))
        elif not replay:
            self.enter_mode(index, Meet(lambda call: self._note(index, call)))

    def attention_leaves(self, index: int, failed: bool) -> None:
        if not self.leave_mode(index):
            return
        if (call := self._calls.pop(index, None)) is not None and not failed:
            layer = self._blocks.layers[index]
            with torch.no_grad():
                self._watch[index](self._entered.pop(index), Attended(call.caught(layer.attention), layer.layout))

    def _note(self, index: int, call: AttentionCall) -> Any:
        self._calls.setdefault(index, call)
        return call.func(*call.args, **call.kwargs)

    def _appending(self, index: int) -> Meet:
        """A mode that appends keys and values of further tokens to the block's own attention call."""
        layer = self._blocks.layers[index]
        extra = self._extend[index]()  # (B, m, D)
        if not extra.shape[1]:
            return Meet(lambda call: call.func(*call.args, **call.kwargs))
        with unseen(layer.block), self.paused():
            further = attention_call(layer, extra, *self._rest[index])

        def met(call: AttentionCall) -> Any:
            if call.func is not further.func or call.func not in (SDPA, MHA):
                raise UnsupportedModelError(
                    f"{layer.name} computes attention unfused, where no keys can be appended: turn fused attention on "
                    "(timm: unset TIMM_FUSED_ATTN; transformers: attn_implementation='sdpa')"
                )
            masks = [*call.args[3:4], call.kwargs.get("attn_mask"), call.kwargs.get("key_padding_mask")]
            if any(isinstance(mask, Tensor) for mask in masks):
                raise UnsupportedModelError(f"{layer.name} attends under a mask: no keys are appended there")
            dim = 0 if call.func is MHA else -2  # nn.MultiheadAttention puts the tokens first
            query, key, value = _named(call)
            _, more_keys, more_values = _named(further)
            args = (query, torch.cat([key, more_keys], dim), torch.cat([value, more_values], dim), *call.args[3:])
            kwargs = {name: given for name, given in call.kwargs.items() if name not in ("query", "key", "value")}
            return call.func(*args, **kwargs)

        return Meet(met)


def _named(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of a call."""
    given = dict(zip(("query", "key", "value"), call.args, strict=False)) | call.kwargs
    return given["query"], given["key"], given["value"]


class _BlockPre(InterventionHook):
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return self.owner.block_enters(self.index, args, kwargs)


class _BlockPost(InterventionHook):
    """Does nothing, but is how `unseen` finds the edit of a block."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        return None
