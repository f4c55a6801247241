"""Read a model: `with read(model) as seen: model(images)`, then ask `seen`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveal.attention.anatomy import WHAT, Anatomy, Layer
from foveal.attention.call import Call
from foveal.attention.door import Door, bare, door_of, hold, inspect
from foveal.attention.errors import ReadError, UnsupportedModelError
from foveal.attention.layout import TokenLayout

Layers = int | str | Sequence[int | str]

HEADS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "mean": lambda x, dim: x.mean(dim),
    "max": lambda x, dim: x.amax(dim),
    "min": lambda x, dim: x.amin(dim),
}


def read(model: nn.Module, layers: Layers = -1, what: str | Sequence[str] = "class_logits") -> Seen:
    """Read attention off the next forward of `model`.

    layers: -1 counts self-attention blocks from the end; a name ("blocks.3", "attn_pool"); several; or "all".
    what: one or several of class_logits (class_attention follows from them), received, patch_received, mean_query,
    full, factors, queries, keys, values, tokens, attn_out, block_out. Only that is computed and kept.

    The forward is bitwise what it is without reading, and values are differentiable when it is. Raises
    UnsupportedModelError for a model that cannot be read exactly, ValueError for a layer or value that is not there.
    """
    return Seen(model, layers, what)


class Look:
    """What one forward showed. Every value is a tensor if one layer was asked (an integer or a name), else a list."""

    def __init__(self, call: Call, anatomy: Anatomy, chosen: list[int], single: bool, what: tuple[str, ...]) -> None:
        self._call, self._anatomy, self._chosen, self._single, self._what = (
            call,
            anatomy,
            chosen,
            single,
            what,
        )

    @property
    def grid(self) -> Any:
        """(h, w) of the patches per asked layer; a list of (h, w) per image for NaFlex."""
        grids = [self._grid(i) for i in self._chosen]
        return grids[0] if self._single else grids

    @property
    def valid(self) -> Tensor | None:
        """(B, N) bool, False for NaFlex's padding; None where nothing is padded."""
        return self._call.valid

    def class_logits(self, prefix: bool = False) -> Any:
        """Class-token query row, scaled, before softmax: (B, H, N). Padding is -inf. prefix=True keeps all columns."""
        return self._each("class_logits", lambda x, i: self._columns(self._hide(x, i, float("-inf")), i, prefix))

    def class_attention(self, prefix: bool = False) -> Any:
        """Share of the class token's attention on each patch: (B, H, N).

        Normalised over all columns, so the patches' share is at most 1; prefix columns are dropped afterwards.
        """
        return self._each(
            "class_logits",
            lambda x, i: self._columns(self._hide(x, i, float("-inf")).softmax(-1), i, prefix),
        )

    def received(self, prefix: bool = False) -> Any:
        """Attention each patch receives, mean over all queries: (B, H, N). Over all columns it sums to 1."""
        return self._each("received", lambda x, i: self._columns(self._hide(x, i, 0.0), i, prefix))

    def patch_received(self, prefix: bool = False) -> Any:
        """Attention each patch receives from patches, mean over their queries: (B, H, N). See received."""
        return self._each("patch_received", lambda x, i: self._columns(self._hide(x, i, 0.0), i, prefix))

    def mean_query(self, prefix: bool = False) -> Any:
        """Logits of the mean patch query: (B, H, N). A class-free cousin of the class row."""
        return self._each("mean_query", lambda x, i: self._columns(self._hide(x, i, float("-inf")), i, prefix))

    def full(self) -> Any:
        """Whole attention maps, probabilities over all tokens: (B, H, T, T)."""
        return self._each("full", lambda x, i: x)

    def factors(self) -> Any:
        """What the whole maps follow from, not multiplied out: `foveal.attention.factors.Factors`."""
        return self._each("factors", lambda x, i: x)

    def queries(self, prefix: bool = False) -> Any:
        """Queries after their norm, before rotation: (B, H, N, d)."""
        return self._each("queries", lambda x, i: self._tokens(x, i, 2, prefix))

    def keys(self, prefix: bool = False) -> Any:
        """Keys after their norm, before rotation: (B, H, N, d)."""
        return self._each("keys", lambda x, i: self._tokens(x, i, 2, prefix))

    def values(self, prefix: bool = False) -> Any:
        """Values: (B, H, N, d)."""
        return self._each("values", lambda x, i: self._tokens(x, i, 2, prefix))

    def tokens(self, prefix: bool = False) -> Any:
        """Tokens as they enter the block: (B, N, D)."""
        return self._each("tokens", lambda x, i: self._tokens(x, i, 1, prefix))

    def attn_out(self, prefix: bool = False) -> Any:
        """Output of the attention module, before the residual: (B, N, D)."""
        return self._each("attn_out", lambda x, i: self._tokens(x, i, 1, prefix))

    def block_out(self, prefix: bool = False) -> Any:
        """Output of the block: (B, N, D)."""
        return self._each("block_out", lambda x, i: self._tokens(x, i, 1, prefix))

    def to_grid(self, x: Any, heads: str | None = "mean", layer: int = 0) -> Any:
        """Patches as a picture: (B, N) to (B, h, w); (B, H, N) is reduced over heads first.

        x: a tensor of this look, or a list with one per asked layer.  heads: mean, max, min; None keeps (B, H, h, w).
        layer: position among the asked layers that a single tensor belongs to, where layers have different grids.
        NaFlex images have a grid each: a list over images.
        """
        if isinstance(x, list):
            if len(x) != len(self._chosen):
                raise ValueError(f"{len(x)} tensors for {len(self._chosen)} asked layers")
            return [self.to_grid(one, heads, i) for i, one in enumerate(x)]
        if x.dim() == 3 and heads is not None:
            if heads not in HEADS:
                raise ValueError(f"heads={heads!r}; use one of {', '.join(HEADS)} or None")
            x = HEADS[heads](x, 1)
        grid = self._grid(self._chosen[layer])
        if isinstance(grid, list):
            return [self._scatter(x[b], b, hw) for b, hw in enumerate(grid)]
        h, w = grid
        if x.shape[-1] != h * w:
            name = self._anatomy.layers[self._chosen[layer]].name
            raise ValueError(
                f"{x.shape[-1]} columns do not fill the {h} x {w} grid of {name}: prefix columns were kept, "
                "another layer's tensor was given, or patch dropout removed tokens"
            )
        return x.unflatten(-1, (h, w))

    # -- inside

    def _each(self, what: str, shape: Callable[[Any, int], Any]) -> Any:
        if what not in self._what:
            raise ReadError(f"{what} was not asked: read(model, what={[*self._what, what]!r})")
        out = []
        for i in self._chosen:
            with torch.set_grad_enabled(self._call.grad and torch.is_grad_enabled()):
                out.append(shape(self._call.value(self._anatomy.layers[i], i, what), i))
        return out[0] if self._single else out

    def _prefix(self, i: int, tokens: int) -> int:
        """Prefix tokens among the columns; a pooling head may see patches only."""
        layer = self._anatomy.layers[i]
        if layer.kind == "pool" and tokens == self._patches():
            return 0
        return layer.layout.prefix

    def _patches(self) -> int:
        if self._call.valid is not None:
            return int(self._call.valid.shape[1])
        if self._call.grid is None:
            raise ReadError("the patch embedding did not run in this forward, so prefix tokens are not known")
        return self._call.grid[0] * self._call.grid[1]

    def _columns(self, x: Tensor, i: int, prefix: bool) -> Tensor:
        return x if prefix else x[..., self._prefix(i, x.shape[-1]) :]

    def _tokens(self, x: Tensor, i: int, dim: int, prefix: bool) -> Tensor:
        start = self._prefix(i, x.shape[dim])
        return x if prefix or not start else x.narrow(dim, start, x.shape[dim] - start)

    def _hide(self, x: Tensor, i: int, value: float) -> Tensor:
        """NaFlex's padded columns as `value`."""
        if self._call.valid is None:
            return x
        P = x.shape[-1] - self._call.valid.shape[1]
        hidden = torch.cat([self._call.valid.new_zeros(x.shape[0], P), ~self._call.valid.bool()], dim=1)
        return x.masked_fill(hidden[:, None], value)

    def _grid(self, i: int) -> Any:
        call, layer = self._call, self._anatomy.layers[i]
        if layer.grid is not None:
            return layer.grid
        if i in call.grids:
            return call.grids[i]
        if call.coord is not None:
            valid = call.valid if call.valid is not None else call.coord.new_ones(call.coord.shape[:2])
            last = call.coord.masked_fill(~valid.bool()[..., None], -1).amax(1) + 1
            return [(int(h), int(w)) for h, w in last.tolist()]
        if call.grid is None:
            raise ReadError("the patch embedding did not run in this forward, so the grid is not known")
        return call.grid

    def _scatter(self, x: Tensor, b: int, grid: tuple[int, int]) -> Tensor:
        assert self._call.coord is not None
        coord = self._call.coord[b]
        if self._call.valid is not None:
            keep = self._call.valid[b].bool()
            coord, x = coord[keep], x[..., keep]
        picture = x.new_zeros(*x.shape[:-1], *grid)
        picture[..., coord[:, 0], coord[:, 1]] = x
        return picture


class Seen:
    """A reader. Inside its block forwards are seen; values can be asked inside and after it.

    With exactly one forward ask it directly; with several ask `seen.calls[k]`.
    """

    def __init__(self, model: nn.Module, layers: Layers, what: str | Sequence[str]) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"a torch.nn.Module is read, not {type(model).__name__}")
        if door_of(bare(model)) is not None:
            model = bare(model)
        self._model = model
        door = door_of(model)
        self._anatomy = door.anatomy if door is not None else inspect(model)
        self._single = isinstance(layers, int) or (isinstance(layers, str) and layers != "all")
        self._chosen = self._anatomy.choose(layers)  # type: ignore[arg-type]
        self._what = _check_what(what)
        for i in self._chosen:
            for one in self._what:
                _check_offered(self._anatomy, self._anatomy.layers[i], one)
        self._door: Door | None = None
        self._state: Any = None
        self._start = 0
        self._kept: list[Call] = []

    @property
    def layers(self) -> list[str]:
        """Names of the asked layers."""
        return [self._anatomy.layers[i].name for i in self._chosen]

    @property
    def what(self) -> tuple[str, ...]:
        """The asked values."""
        return self._what

    @property
    def last(self) -> Layer:
        """The asked layer that runs last."""
        return self._anatomy.layers[max(self._chosen)]

    @property
    def layout(self) -> TokenLayout:
        """Prefix tokens of the (first) asked layer."""
        return self._anatomy.layers[self._chosen[0]].layout

    def __enter__(self) -> Seen:
        if self._door is not None:
            raise ReadError("this read is open already: make another with foveal.read")
        self._door = hold(self._model, self._anatomy)
        try:
            self._kept = []
            self._state = self._door.admit(self, dict.fromkeys(self._chosen, self._what))
            self._start = len(self._state.calls)
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            # a forward that is not over now was interrupted
            self._kept = [call for call in self._calls() if call.closed or not call.explicit]
        finally:
            self._leave()
        if kind is None and not self._kept:
            raise ReadError(NOTHING)

    def _leave(self) -> None:
        door, state = self._door, self._state
        assert door is not None
        try:
            if state is not None:
                door.dismiss(self, state)
        finally:
            door.remove()
            self._door = self._state = None

    def _calls(self) -> list[Call]:
        calls = self._state.calls[self._start :] if self._state is not None else self._kept
        return [call for call in calls if not call.failed]

    @property
    def calls(self) -> list[Look]:
        """One Look per forward seen."""
        return [Look(call, self._anatomy, self._chosen, self._single, self._what) for call in self._calls()]

    @property
    def look(self) -> Look:
        """The only forward. Raises ReadError if none or several were seen."""
        calls = self.calls
        if not calls:
            raise ReadError(NOTHING)
        if len(calls) > 1:
            raise ReadError(f"{len(calls)} forwards were seen; ask one of them: seen.calls[k]")
        return calls[0]

    def class_logits(self, prefix: bool = False) -> Any:
        """See Look.class_logits."""
        return self.look.class_logits(prefix)

    def class_attention(self, prefix: bool = False) -> Any:
        """See Look.class_attention."""
        return self.look.class_attention(prefix)

    def received(self, prefix: bool = False) -> Any:
        """See Look.received."""
        return self.look.received(prefix)

    def patch_received(self, prefix: bool = False) -> Any:
        """See Look.patch_received."""
        return self.look.patch_received(prefix)

    def mean_query(self, prefix: bool = False) -> Any:
        """See Look.mean_query."""
        return self.look.mean_query(prefix)

    def full(self) -> Any:
        """See Look.full."""
        return self.look.full()

    def factors(self) -> Any:
        """See Look.factors."""
        return self.look.factors()

    def queries(self, prefix: bool = False) -> Any:
        """See Look.queries."""
        return self.look.queries(prefix)

    def keys(self, prefix: bool = False) -> Any:
        """See Look.keys."""
        return self.look.keys(prefix)

    def values(self, prefix: bool = False) -> Any:
        """See Look.values."""
        return self.look.values(prefix)

    def tokens(self, prefix: bool = False) -> Any:
        """See Look.tokens."""
        return self.look.tokens(prefix)

    def attn_out(self, prefix: bool = False) -> Any:
        """See Look.attn_out."""
        return self.look.attn_out(prefix)

    def block_out(self, prefix: bool = False) -> Any:
        """See Look.block_out."""
        return self.look.block_out(prefix)

    def to_grid(self, x: Any, heads: str | None = "mean", layer: int = 0) -> Any:
        """See Look.to_grid."""
        return self.look.to_grid(x, heads, layer)

    @property
    def grid(self) -> Any:
        """See Look.grid."""
        return self.look.grid


NOTHING = (
    "the read saw no forward: run the model inside the block, in the same thread. A compiled function around the model "
    "that was traced before the hooks came hides it: call foveal.attach(model) before the first compiled call"
)


def _check_what(what: str | Sequence[str]) -> tuple[str, ...]:
    asked = (what,) if isinstance(what, str) else tuple(what)
    if not asked:
        raise ValueError(f"nothing asked: what is one or several of {', '.join(WHAT)}")
    for one in asked:
        if one not in WHAT:
            near = difflib.get_close_matches(one, WHAT, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"what={one!r} is not known; {hint}use {', '.join(WHAT)}")
    return asked


def _check_offered(anatomy: Anatomy, layer: Layer, what: str) -> None:
    if what not in layer.what:
        raise ValueError(f"{layer.name} ({layer.kind} attention) has no {what}; it offers {', '.join(layer.what)}")
    if what == "class_logits" and layer.kind == "self" and layer.layout.class_index is None:
        pools = [one.name for one in anatomy.layers if one.kind in ("pool", "class")]
        pooled = f", or the row of its pooling query with layers={pools[0]!r}" if pools else ""
        registers = (
            f" ({len(layer.layout.registers)} register tokens are not class tokens)" if layer.layout.registers else ""
        )
        raise ValueError(
            f"this model has no class token{registers}, so there is no class row: read what='received' or "
            f"what='mean_query'{pooled}"
        )


@dataclass(frozen=True)
class Support:
    """What can be read of a model. True where something can.

    layers: names.  what: layer name -> values it offers.  reason: why not, or what is left out; empty if all is well.
    """

    family: str
    layers: tuple[str, ...]
    what: dict[str, tuple[str, ...]]
    layout: TokenLayout | None
    reason: str

    def __bool__(self) -> bool:
        return bool(self.layers)


def supported(model: nn.Module) -> Support:
    """What of a model can be read, and why not. Raises nothing and runs nothing."""
    try:
        door = door_of(bare(model))
        anatomy = door.anatomy if door is not None else inspect(model)
    except UnsupportedModelError as error:
        return Support("", (), {}, None, str(error))
    offered = {layer.name: _offers(layer) for layer in anatomy.layers}
    return Support(anatomy.family, tuple(offered), offered, anatomy.layers[0].layout, "; ".join(anatomy.refused))


def pooling_heads(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers in which a query of its own, not a token, attends to the patches. Empty if there are none."""
    door = door_of(bare(model))
    anatomy = door.anatomy if door is not None else inspect(model)
    return tuple(layer.name for layer in anatomy.layers if layer.kind == "pool")


def _offers(layer: Layer) -> tuple[str, ...]:
    no_class = layer.kind == "self" and layer.layout.class_index is None
    return tuple(what for what in layer.what if not (no_class and what == "class_logits"))
