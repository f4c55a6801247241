"""The door: hooks on one model that let readers see its attention.

`attach` installs them once for a whole run; a read without it installs them for its own duration. While nobody reads
they return at once. Nothing here changes a value: outputs stay bitwise what they were.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils.hooks import RemovableHandle

from foveal.attention.anatomy import ROWS, Anatomy, dissect, grid_of
from foveal.attention.call import Call, MhaInput
from foveal.attention.capture import Catch, Caught
from foveal.attention.errors import ReadError, UnsupportedModelError

_HOLDERS = threading.Lock()  # installing and removing: two threads may read one model


class _State:
    """What one thread reads through a door."""

    def __init__(self) -> None:
        self.catch = Catch()
        self.catching = False
        self.needs: dict[int, tuple[str, ...]] = {}  # layer -> values that some reader wants
        self.calls: list[Call] = []
        self.current: Call | None = None
        self.readers: list[Any] = []


class Door:
    """Hooks on `model`. Made by `attach`; removed by leaving its block or by `remove()`."""

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        self.model = model
        self.anatomy = anatomy
        self.states: dict[int, _State] = {}
        self.latest = _State()
        self.holders = 0
        self.handles: list[RemovableHandle] = []

    # -- installing

    def _install(self) -> None:
        add = self.handles.append
        add(self.model.register_forward_hook(_RootPost(self), always_call=True))
        add(self.anatomy.stem.register_forward_hook(_Stem(self), with_kwargs=True))
        for i, layer in enumerate(self.anatomy.layers):
            add(layer.attention.register_forward_pre_hook(_AttentionPre(self, i), with_kwargs=True))
            add(layer.attention.register_forward_hook(_AttentionPost(self, i), with_kwargs=True, always_call=True))
            add(layer.block.register_forward_pre_hook(_BlockPre(self, i), with_kwargs=True))
            add(layer.block.register_forward_hook(_BlockPost(self, i)))
            if layer.before_rotation is not None:
                for module, what in zip(layer.before_rotation, ("queries", "keys"), strict=True):
                    add(module.register_forward_hook(_Projection(self, i, what)))
        add(self.model.register_forward_pre_hook(_RootPre(self)))  # last: a door is found by it, so it is whole

    def _uninstall(self) -> None:
        try:
            while self.handles:
                self.handles[-1].remove()
                self.handles.pop()
        except BaseException:  # Ctrl-C came in between: finish, then let it through
            while self.handles:
                self.handles.pop().remove()
            raise

    def remove(self) -> None:
        """Take this hold of the hooks back; the last one removes them."""
        with _HOLDERS:
            self.holders -= 1
            if self.holders > 0:
                return
            self._uninstall()
            for state in [*self.states.values(), self.latest]:
                state.calls, state.current = [], None

    def __enter__(self) -> Door:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    # -- the state of the thread that runs

    def state(self) -> _State | None:
        if torch.compiler.is_compiling():
            return self.latest
        return self.states.get(threading.get_ident())

    def own_state(self) -> _State:
        """The calling thread's state, made when it first reads."""
        return self.states.setdefault(threading.get_ident(), _State())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forwards of this thread in here are not seen by readers from outside: for extra forwards of one's own.

        A reader opened in here sees the forwards in here.
        """
        thread = threading.get_ident()
        state, latest = self.own_state(), self.latest
        self.states[thread] = self.latest = _State()
        try:
            yield
        finally:
            self.states[thread], self.latest = state, latest

    def reading(self) -> _State | None:
        """The state, if some reader of this thread is to see what runs now."""
        state = self.state()
        if state is None or not state.needs:
            return None
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return None  # inside a backward: a checkpointed block is being recomputed
        return state

    # -- what the hooks do

    def open(self, state: _State, *, explicit: bool) -> None:
        outer = state.current
        state.current = Call(explicit=explicit, grad=torch.is_grad_enabled())
        state.current.outer = outer if explicit else None
        state.calls.append(state.current)

    def enter(self, index: int) -> None:
        state = self.reading()
        if state is None or index not in state.needs:
            return
        call = state.current
        if call is None or (not call.explicit and index in call.began):
            self.open(state, explicit=False)
            call = state.current
        assert call is not None
        layer = self.anatomy.layers[index]
        if index in call.began:
            call.repeated.append(index)
        call.began.append(index)
        if (
            call.grad
            and not torch.is_grad_enabled()
            and layer.attention.training
            and any(p.requires_grad for p in layer.attention.parameters())
        ):
            raise ReadError(
                f"{layer.name} runs without gradient inside a forward that has gradient: reentrant activation "
                "checkpointing would cut the attention off from the loss. Use use_reentrant=False, or wrap the whole "
                "forward in torch.no_grad() if no gradient is wanted; a frozen part: .requires_grad_(False) or .eval()"
            )
        if not any(_is_caught(what, layer.before_rotation is not None) for what in state.needs[index]):
            return
        if not isinstance(layer.attention, nn.MultiheadAttention):
            state.catch.caught, state.catch.several = None, False
            state.catching = True
            state.catch.__enter__()  # type: ignore[no-untyped-call]

    def leave(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        state = self.reading()
        if state is None or index not in state.needs or state.current is None:
            return
        call, layer = state.current, self.anatomy.layers[index]
        needs = state.needs[index]
        if state.catching:
            caught = state.catch.caught
            state.catching, state.catch.caught = False, None
            state.catch.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            if caught is not None:
                call.raw[index] = caught
            if state.catch.several:
                call.repeated.append(index)
        if output is None:  # the module raised
            return
        if isinstance(layer.attention, nn.MultiheadAttention) and any(_is_caught(what, False) for what in needs):
            call.raw[index] = MhaInput(layer.attention, args, kwargs)  # now: other hooks may have changed its input
        if "attn_out" in needs:
            call.parts[(index, "attn_out")] = _first(output)
        raw = call.raw.get(index)
        if raw is None or index in call.repeated:
            return
        if not (torch.is_grad_enabled() and raw.requires_grad):
            # no graph to build: compute now and let q and k go
            for what in needs:
                if what in ROWS or what == "values":
                    call.value(layer, index, what)
            if not any(what in ("queries", "keys") and layer.before_rotation is None for what in needs):
                call.forget(index)
        elif isinstance(raw, Caught) and _saves_as_it_is():
            # single rows now: the backward then meets each at its block, not all of them at its start
            for what in needs:
                if what in ("class_logits", "mean_query"):
                    call.value(layer, index, what)

    def keep(self, index: int, what: str, value: Any) -> None:
        state = self.reading()
        if state is None or what not in state.needs.get(index, ()):
            return
        if state.current is None:
            self.open(state, explicit=False)
        assert state.current is not None
        state.current.parts[(index, what)] = _first(value)

    def block_enters(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = self.reading()
        if state is None or index not in state.needs:
            return
        tokens = args[0] if args else kwargs.get("hidden_states")
        if isinstance(tokens, Tensor) and tokens.dim() == 4 and state.current is not None:
            state.current.grids[index] = (int(tokens.shape[1]), int(tokens.shape[2]))  # Swin: (B, h, w, D)
        self.keep(index, "tokens", tokens)

    def stem_ran(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        state = self.reading()
        if state is None:
            return
        if state.current is None or not state.current.explicit:
            self.open(state, explicit=False)
        call = state.current
        assert call is not None
        call.batch = (args[0] if args else next(iter(kwargs.values()))).shape[0]
        call.grid = grid_of(output)
        if call.grid is None:  # NaFlex
            coord = args[1] if len(args) > 1 else kwargs.get("patch_coord")
            valid = args[2] if len(args) > 2 else kwargs.get("patch_valid")
            if coord is not None:
                call.coord, call.valid = coord, valid
            else:
                images = args[0] if args else kwargs["x"]
                h, w = self.anatomy.stem.dynamic_feat_size(images.shape[-2:])  # type: ignore[operator]
                call.grid = (int(h), int(w))

    # -- readers

    def admit(self, reader: Any, needs: dict[int, tuple[str, ...]]) -> _State:
        state = self.own_state()
        if not state.readers:
            state.calls, state.current = [], None
        state.readers.append((reader, needs))
        self._gather(state)
        self.latest = state
        return state

    def dismiss(self, reader: Any, state: _State) -> None:
        state.readers = [(r, n) for r, n in state.readers if r is not reader]
        self._gather(state)
        unwind(state.catch)
        state.catching, state.catch.caught = False, None
        if not state.readers:
            state.calls, state.current = [], None

    @staticmethod
    def _gather(state: _State) -> None:
        needs: dict[int, tuple[str, ...]] = {}
        for _, wanted in state.readers:
            for index, what in wanted.items():
                needs[index] = tuple(dict.fromkeys((*needs.get(index, ()), *what)))
        state.needs = needs


def _saves_as_it_is() -> bool:
    """Whether a forward saves what its backward needs, rather than to be run again for it, as checkpointing does.

    False where torch cannot tell, or is compiling.
    """
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return hooks is not None and not torch.compiler.is_compiling() and hooks(False) is None


def _is_caught(what: str, rotated: bool) -> bool:
    """Does this value come from the attention call itself, rather than from a module hook?"""
    return what in ROWS or what == "values" or (what in ("queries", "keys") and not rotated)


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) else output


def unwind(mode: TorchFunctionMode) -> None:
    """Take `mode` off the function-mode stack if an interrupt left it there; other modes keep their order."""
    while any(m is mode for m in _get_current_function_mode_stack()):
        above = []
        while (top := _pop_mode()) is not mode:
            above.append(top)
        for other in reversed(above):
            _push_mode(other)


class _Hook:
    """A hook of a door. A deep copy or a pickle of a hooked model gets one that does nothing.

    The pickle's comes from the standard library, so that a model saved while attached loads without foveal.
    """

    def __init__(self, door: Door, index: int = -1, what: str = "") -> None:
        self.door, self.index, self.what = door, index, what

    def __deepcopy__(self, memo: dict[int, Any]) -> _Inert:
        return _Inert()

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")  # takes anything, returns None


class _Inert:
    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None


class _RootPre(_Hook):
    def __call__(self, module: nn.Module, args: Any) -> None:
        state = self.door.reading()
        if state is not None:
            self.door.open(state, explicit=True)


class _RootPost(_Hook):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        state = self.door.reading()
        if state is not None and state.current is not None:
            state.current.failed = output is None and not state.current.enough
            state.current.closed = True
            state.current = state.current.outer


class _Stem(_Hook):
    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.door.stem_ran(args, kwargs, output)


class _AttentionPre(_Hook):
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.door.enter(self.index)


class _AttentionPost(_Hook):
    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.door.leave(self.index, args, kwargs, output)


class _BlockPre(_Hook):
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.door.block_enters(self.index, args, kwargs)


class _BlockPost(_Hook):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.door.keep(self.index, "block_out", output)


class _Projection(_Hook):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.door.keep(self.index, self.what, output)


def door_of(model: nn.Module) -> Door | None:
    """The door attached to this very model, if any."""
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, _RootPre):
            return hook.door
    return None


@contextmanager
def unseen(model: nn.Module) -> Iterator[None]:
    """Forwards of `model` and its parts in here are not seen by readers from outside, whatever they read.

    A reader opened in here sees the forwards in here. Fits every module, also one that cannot be read.
    """
    hooks: list[Any] = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    doors = {id(hook.door): hook.door for hook in hooks if isinstance(hook, _Hook)}
    with ExitStack() as stack:
        for door in doors.values():
            stack.enter_context(door.paused())
        yield


def bare(model: nn.Module) -> nn.Module:
    """The module behind torch.compile's wrapper."""
    return model._orig_mod if type(model).__name__ == "OptimizedModule" else model  # type: ignore[return-value]


def attach(model: nn.Module) -> Door:
    """Install the hooks on a model once, for a whole run.

    Needed before `torch.compile`: a compiled forward keeps the hooks it was traced with, so hooks added later see
    nothing. Use as a block (`with attach(model) as door:`) or call `remove()` at the end. A compiled forward cannot
    tell threads apart: read a compiled model from one thread at a time.

    Raises UnsupportedModelError for a model that cannot be read, or that is compiled already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a torch.nn.Module is read, not {type(model).__name__}")
    return hold(bare(model) if door_of(bare(model)) is not None else model)


def hold(model: nn.Module, anatomy: Anatomy | None = None) -> Door:
    """The door of `model`, made if there is none, with one holder more. anatomy: of the model, if known already."""
    with _HOLDERS:
        door = door_of(model)
        if door is None:
            door = Door(model, inspect(model) if anatomy is None else anatomy)
            try:
                door._install()
            except BaseException:
                door._uninstall()
                raise
        door.holders += 1
        return door


def inspect(model: nn.Module) -> Anatomy:
    """What of a model can be read. Raises UnsupportedModelError.

    Also if the model or a part of it is compiled: hooks added now would see nothing and say nothing.
    """
    for name, module in model.named_modules():
        wrapped = type(module).__name__ == "OptimizedModule"
        if wrapped or getattr(module, "_compiled_call_impl", None) is not None:
            where = f"its part {name!r}" if name and not (wrapped and name == "_orig_mod") else "the model"
            raise UnsupportedModelError(
                f"{where} is compiled already, so hooks added now would see nothing: call foveal.attach(model) first, "
                "then torch.compile"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModelError("a scripted model is not read: pass the module it was scripted from")
    return dissect(model)
