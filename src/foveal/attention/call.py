"""What one forward showed: the caught tensors, and the values computed from them.

Without gradient a value is computed while the block runs and q and k are let go. With gradient the inputs are kept (the
graph holds them anyway) and the value is computed when it is read, outside any checkpointed region: so a recomputed
block saves the same tensors as its first run.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from foveal.attention import rows
from foveal.attention.anatomy import Layer
from foveal.attention.capture import Caught, caught_mha, mha_row
from foveal.attention.errors import ReadError
from foveal.attention.factors import Factors, factors_of
from foveal.attention.windows import merge_windows


class MhaInput:
    """The input of an nn.MultiheadAttention call."""

    def __init__(self, attention: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.attention, self.args, self.kwargs = attention, args, kwargs
        self.versions = self._versions()

    @property
    def requires_grad(self) -> bool:
        query = self.args[0] if self.args else self.kwargs["query"]
        return bool(query.requires_grad or self.attention.in_proj_weight.requires_grad)

    def _versions(self) -> list[int]:
        parameters = (self.attention.in_proj_weight, self.attention.in_proj_bias)
        compiling = torch.compiler.is_compiling()  # tensors made in inference mode have no version
        return [p._version for p in parameters if p is not None and (compiling or not p.is_inference())]

    def _refuse_changed(self) -> None:
        if self._versions() != self.versions:
            raise ReadError(
                "the weights of an nn.MultiheadAttention changed since its forward: read before optimizer.step()"
            )

    def caught(self, values: bool) -> Caught:
        self._refuse_changed()
        return caught_mha(self.attention, self.args, self.kwargs, values)

    def row(self, index: int) -> Tensor:
        self._refuse_changed()
        return mha_row(self.attention, self.args, self.kwargs, index)


class Call:
    """One forward of the model."""

    def __init__(self, explicit: bool, grad: bool) -> None:
        self.explicit = explicit  # opened by the model's own call, not by a part of it (forward_features)
        self.grad = grad
        self.outer: Call | None = None  # the call during which this one was opened: a model that calls itself
        self.closed = False
        self.failed = False
        self.enough = False  # ended on purpose, when all that was asked had been seen
        self.batch: int | None = None
        self.grid: tuple[int, int] | None = None
        self.grids: dict[int, tuple[int, int]] = {}  # where layers have grids of their own
        self.coord: Tensor | None = None  # NaFlex: (B, N, 2) row and column of each patch
        self.valid: Tensor | None = None  # NaFlex: (B, N) bool, False for padding
        self.began: list[int] = []
        self.repeated: list[int] = []
        self.raw: dict[int, Caught | MhaInput] = {}
        self.parts: dict[tuple[int, str], Tensor] = {}
        self.values: dict[tuple[int, str], Tensor | Factors] = {}

    def value(self, layer: Layer, index: int, what: str) -> Any:
        """A value of one layer over all its tokens, computed once: a tensor, or its `Factors`.

        Raises ReadError if the forward did not show it.
        """
        if index in self.repeated:
            raise ReadError(
                f"{layer.name} attended several times within one forward: read the vision transformer inside that is "
                "called several times, so each call counts; a block that is shared between depths or attends twice "
                "cannot be read"
            )
        key = (index, what)
        if key in self.parts and what in ("tokens", "attn_out", "block_out"):
            return self.parts[key]
        if key not in self.values:
            with torch.set_grad_enabled(self.grad):
                self.values[key] = self._compute(layer, index, what)
        return self.values[key]

    def forget(self, index: int) -> None:
        self.raw.pop(index, None)

    def _compute(self, layer: Layer, index: int, what: str) -> Tensor | Factors:
        if (index, what) in self.parts:
            return self._projected(layer, index, what)
        raw = self.raw.get(index)
        if raw is None:
            ran = index in self.began
            raise ReadError(
                f"{layer.name} ran but showed no attention call: its implementation is neither "
                "scaled_dot_product_attention nor a plain softmax (set attn_implementation='sdpa')"
                if ran
                else f"the forward did not run {layer.name}"
            )
        device = _device(raw)
        with torch.autocast(device, enabled=False):
            if isinstance(raw, MhaInput):
                if what == "class_logits" and layer.kind == "self":
                    return raw.row(self._class_index(layer))
                raw = raw.caught(values=what == "values")
            self._check_shape(layer, raw)
            return self._from_caught(layer, index, raw, what)

    def _projected(self, layer: Layer, index: int, what: str) -> Tensor:
        x = self.parts[(index, what)]
        if x.dim() == 4:
            heads = int(getattr(layer.attention, "num_heads", x.shape[1]))
            return x.repeat_interleave(heads // x.shape[1], dim=1) if x.shape[1] != heads else x  # grouped queries
        attention = layer.attention  # transformers: a linear layer's output (B, T, H d)
        d = int(attention.head_dim)  # type: ignore[arg-type]
        return x.reshape(*x.shape[:-1], -1, d).transpose(1, 2)

    def _from_caught(self, layer: Layer, index: int, raw: Caught, what: str) -> Tensor | Factors:
        if what in ("queries", "keys", "values"):
            x = {"queries": raw.q, "keys": raw.k, "values": raw.v}[what]
            if x is None:
                raise ReadError(f"{what} of {layer.name} are not seen in its unfused form: turn fused attention on")
            return x
        if layer.kind == "window":
            return merge_windows(self._received(raw, None), layer.block, self.grids[index], self.batch or 1)
        if what == "factors":
            return factors_of(raw, self._valid_tokens(layer))
        if what == "full":
            return rows.widen(raw.logits).softmax(-1) if raw.logits is not None else self._map(raw)
        if what == "received":
            value = self._received(raw, self._valid_tokens(layer))
        elif what == "patch_received":
            value = self._patch_received(layer, raw)
        elif what == "mean_query":
            value = self._mean_query(layer, raw)
        else:
            value = self._row(raw, self._class_index(layer) if layer.kind == "self" else 0)
        return layer.reorder(value) if layer.reorder is not None else value

    @staticmethod
    def _map(raw: Caught) -> Tensor:
        assert raw.q is not None
        assert raw.k is not None
        return rows.attention_map(raw.q, raw.k, raw.scale, raw.mask)

    @staticmethod
    def _row(raw: Caught, index: int) -> Tensor:
        if raw.logits is not None:
            return rows.widen(raw.logits[:, :, index])
        assert raw.q is not None
        assert raw.k is not None
        mask = raw.mask
        if mask is not None:
            mask = mask[:, :, index if mask.shape[2] > 1 else 0]
        return rows.query_row(raw.q[:, :, index], raw.k, raw.scale, mask)

    @staticmethod
    def _received(raw: Caught, valid: Tensor | None) -> Tensor:
        if raw.logits is None:
            assert raw.q is not None
            assert raw.k is not None
            return rows.received(raw.q, raw.k, raw.scale, raw.mask, valid)
        attn = rows.widen(raw.logits).softmax(-1)
        if valid is None:
            return attn.mean(-2)
        share = valid.to(attn.dtype) / valid.sum(-1, keepdim=True)
        return torch.einsum("bhit,bi->bht", attn, share)

    def _patch_received(self, layer: Layer, raw: Caught) -> Tensor:
        """As `received`, over the patches' queries only."""
        P = layer.layout.prefix
        if raw.logits is not None:
            return self._received(Caught(logits=raw.logits[:, :, P:]), self.valid)
        assert raw.q is not None
        mask = raw.mask
        if mask is not None and mask.shape[2] > 1:
            mask = mask[:, :, P:]
        return self._received(replace(raw, q=raw.q[:, :, P:], mask=mask), self.valid)

    def _mean_query(self, layer: Layer, raw: Caught) -> Tensor:
        P = layer.layout.prefix
        if raw.logits is not None:
            logits = rows.widen(raw.logits[:, :, P:])
            if self.valid is None:
                return logits.mean(-2)
            share = self.valid.to(logits.dtype) / self.valid.sum(-1, keepdim=True)
            kept = logits.masked_fill(~self.valid[:, None, :, None], 0.0)
            return torch.einsum("bhit,bi->bht", kept, share)
        assert raw.q is not None
        assert raw.k is not None
        mask = raw.mask
        if mask is not None and mask.shape[2] > 1:
            mask = mask[:, :, P:]
        return rows.mean_query_row(raw.q[:, :, P:], raw.k, raw.scale, mask, self.valid)

    def _valid_tokens(self, layer: Layer) -> Tensor | None:
        """(B, T) bool with prefix tokens, or None where nothing is padded."""
        if self.valid is None:
            return None
        prefix = self.valid.new_ones(self.valid.shape[0], layer.layout.prefix)
        return torch.cat([prefix, self.valid], dim=1)

    @staticmethod
    def _class_index(layer: Layer) -> int:
        index = layer.layout.class_index
        assert index is not None
        return index

    def _check_shape(self, layer: Layer, raw: Caught) -> None:
        B, Q, T = raw.sizes
        if layer.kind == "self" and Q != T:
            raise ReadError(f"{layer.name}: {Q} queries ask {T} keys; self-attention was expected")
        if self.valid is not None and T not in (N := self.valid.shape[1], N + layer.layout.prefix):
            raise ReadError(
                f"{layer.name} has {T} tokens for {N} patches and their padding: patch dropout removed some, and which "
                "of the others are padding is not known; set the patch dropout to 0"
            )
        if layer.grid is not None and layer.grid[0] * layer.grid[1] != T:
            raise ReadError(f"{layer.name} has {T} tokens for a {layer.grid} grid: a masked forward is not read")
        if layer.kind != "window" and self.batch is not None and self.batch != B:
            raise ReadError(
                f"{layer.name} attends within {B} groups although the batch has {self.batch} images: windows that pose "
                "as a batch are not read"
            )


def _device(raw: Caught | MhaInput) -> str:
    if isinstance(raw, MhaInput):
        return raw.attention.in_proj_weight.device.type
    tensor = raw.q if raw.q is not None else raw.logits
    assert tensor is not None
    return tensor.device.type
