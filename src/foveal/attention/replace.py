"""Attend with given maps: for one forward, chosen blocks set their own queries and keys aside.

    out = softmax(given logits) V          V: the block's own values

The given logits are factors (queries, keys, scale, mask), so the fused kernel multiplies them out, as it does the
block's own; a block that computes unfused gets the map itself. What comes before and after attention in a block is its
own, dropout of the map too. Gradient flows through the values only.

Training and evaluation alike. Forwards of other threads and foveal's own extra ones run untouched. A checkpointed block
(not reentrant) is recomputed in the backward, which then belongs inside the block: outside of it torch raises a
CheckpointError. A reader that is opened around sees the given queries and keys, except for nn.MultiheadAttention, whose
own it reads from its input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal.attention.anatomy import Layer, dissect
from foveal.attention.attended import MHA, AttentionCall, Meet
from foveal.attention.capture import SDPA
from foveal.attention.door import door_of
from foveal.attention.errors import ReadError, UnsupportedModelError
from foveal.attention.factors import Factors
from foveal.attention.intervention import AttentionPost, AttentionPre, Intervention
from foveal.attention.seen import Layers

COMPILED = "is compiled, and compiled code passes by the hooks that replace maps: copy attention in an uncompiled model"


def replace(model: nn.Module, layers: Layers, given: Sequence[Factors]) -> Replace:
    """A block in which one forward of `model` attends with given maps.

    layers: as in `foveal.read`.  given: one per layer, of the images that the forward is going to see.
    Raises UnsupportedModelError for a model or layer whose maps cannot be replaced, ValueError for other counts; in the
    forward ValueError where heads, tokens or images differ, ReadError where a block runs twice.
    """
    for name, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise UnsupportedModelError(f"{name or 'the model'} {COMPILED}")
    door = door_of(model)
    anatomy = dissect(model) if door is None else door.anatomy
    chosen = [anatomy.layers[i] for i in anatomy.choose(layers)]  # type: ignore[arg-type]
    for layer in chosen:
        if "factors" not in layer.what:
            raise UnsupportedModelError(
                f"{layer.name} ({layer.kind} attention) keeps its own map: only those of blocks where all tokens ask "
                "all tokens are replaced"
            )
    if len(chosen) != len(given):
        raise ValueError(f"{len(given)} maps for {len(chosen)} layers of the model: give one each")
    return Replace(model, chosen, given)


class Replace(Intervention):
    """Hooks on a model, as a `with` block. Made by `replace`."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer], given: Sequence[Factors]) -> None:
        super().__init__(model)
        self._layers, self._given = layers, given
        self._done = False
        self._met: set[int] = set()

    def install(self) -> None:
        for i, layer in enumerate(self._layers):
            # entered last and left first, so that readers around see what takes the call's place
            pre = layer.attention.register_forward_pre_hook(AttentionPre(self, i))
            self._handles.append(pre)
            post = layer.attention.register_forward_hook(AttentionPost(self, i), prepend=True, always_call=True)
            self._handles.append(post)

    def let_go(self) -> None:
        self._given = ()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if error and error[0] is None and not self._visited:
            raise ReadError("no forward took the given maps: run the model inside the block, in the same thread")

    # -- what the hooks do

    def root_leaves(self, failed: bool) -> None:
        if not self.is_own:
            return
        if not failed:
            self._done = True
        elif not self._done:
            self._visited.clear()  # a forward that raised may be tried again

    def attention_enters(self, index: int) -> None:
        if torch.compiler.is_compiling():
            raise UnsupportedModelError(f"the step {COMPILED}")
        if self._pauses:
            return
        if self.is_recomputed:
            if index not in self._visited:
                return
        elif not self.is_own:
            return
        else:
            self._check_first(index)
            self._visited.add(index)
        self._met.discard(index)
        self.enter_mode(index, Meet(lambda call: self._replaced(index, call)))

    def _check_first(self, index: int) -> None:
        layer = self._layers[index]
        if index in self._visited:
            raise ReadError(
                f"{layer.name} ran twice, but the given maps belong to one forward. Run the model once in the block; "
                "further forwards go before or after it, or in foveal.attention.unseen(model)"
            )
        self.refuse_reentrant(layer, layer.attention)

    def attention_leaves(self, index: int, failed: bool) -> None:
        if self.leave_mode(index) and not failed and index not in self._met:
            raise UnsupportedModelError(
                f"{self._layers[index].name} ran but showed no attention call: its implementation is neither "
                "scaled_dot_product_attention nor a plain softmax (set attn_implementation='sdpa')"
            )

    def _replaced(self, index: int, call: AttentionCall) -> Any:
        layer, given = self._layers[index], self._given[index]
        if index in self._met:
            raise UnsupportedModelError(f"{layer.name} attends several times: which map to replace is not known")
        self._met.add(index)
        if call.func is MHA:
            assert isinstance(layer.attention, nn.MultiheadAttention)
            return _of_multihead(layer, layer.attention, call, given)
        if call.func is not SDPA:  # a plain softmax: what it would have given
            logits = call.args[0] if call.args else call.kwargs["input"]
            _check(layer, given, logits.shape[:3])
            dtype = call.kwargs.get("dtype") or logits.dtype
            return given.map().to(dtype)
        caught = call.caught(layer.attention)
        assert caught.q is not None
        assert caught.v is not None
        _check(layer, given, caught.q.shape[:3])
        named = dict(zip(("query", "key", "value", "attn_mask", "dropout_p"), call.args, strict=False)) | call.kwargs
        return _attend(given, caught.v, named.get("dropout_p", 0.0))


def _attend(given: Factors, v: Tensor, dropout: float) -> Tensor:
    """The given map times values (B, H, T, d)."""
    v = _Marked.apply(v)
    if given.logits is not None:
        return F.dropout(given.map().to(v.dtype), dropout) @ v
    assert given.q is not None
    assert given.k is not None
    mask = None if given.mask is None else given.mask.to(v.dtype)
    return F.scaled_dot_product_attention(
        given.q.to(v.dtype), given.k.to(v.dtype), v, attn_mask=mask, dropout_p=dropout, scale=given.scale
    )


def _of_multihead(layer: Layer, attention: nn.MultiheadAttention, call: AttentionCall, given: Factors) -> Any:
    """What nn.MultiheadAttention's function gives, (output (T, B, D), None), with the given map."""
    named = dict(zip(("query", "key", "value"), call.args, strict=False)) | call.kwargs
    if named.get("key_padding_mask") is not None or named.get("attn_mask") is not None or named.get("need_weights"):
        raise UnsupportedModelError(f"{layer.name} attends under a mask or is asked for its weights: not replaced")
    if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
        raise UnsupportedModelError(f"{layer.name} has several widths or an extra key: its map is not replaced")
    (T, B, D), H = named["value"].shape, attention.num_heads
    _check(layer, given, (B, H, T))
    bias = None if attention.in_proj_bias is None else attention.in_proj_bias[2 * D :]
    v = F.linear(named["value"], attention.in_proj_weight[2 * D :], bias).view(T, B, H, D // H).permute(1, 2, 0, 3)
    out = _attend(given, v, attention.dropout if attention.training else 0.0)
    out = out.permute(2, 0, 1, 3).reshape(T, B, D)
    return F.linear(out, attention.out_proj.weight, attention.out_proj.bias), None


def _check(layer: Layer, given: Factors, sizes: Any) -> None:
    if given.sizes != tuple(sizes):
        raise ValueError(
            f"{layer.name}: the model's map is {tuple(sizes)}, the given one {given.sizes} (images, heads, tokens); "
            "both need the same images, heads, patch size, input size and prefix tokens, and no patch dropout"
        )


class _Marked(torch.autograd.Function):
    """The values as they are, with one more tensor saved for the backward.

    A block that is recomputed when the hooks are gone saves one tensor less, and checkpointing says so: without it a
    backward outside of the `with` block would silently be that of the block's own map.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v.new_empty(0))
        return v.view_as(v)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        _ = ctx.saved_tensors  # checkpointing looks at what is asked for
        return g
