"""What edits and replacements share: hooks that change one forward of a model and leave it as it was.

The hooks act for the thread that opened the block, outside of `paused`, and when a checkpointed block is recomputed for
the backward, whichever thread does that: autograd has its own.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from foveal.attention.anatomy import Layer
from foveal.attention.attended import Meet
from foveal.attention.door import _Hook, unwind
from foveal.attention.errors import ReadError


class Intervention(ABC):
    """Hooks on `model`, as a `with` block. The kinds say which (`install`) and what these do."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles: list[RemovableHandle] = []
        self._thread, self._pauses, self._grad = -1, 0, False
        self._visited: set[int] = set()
        self._modes: dict[int, Meet] = {}

    @abstractmethod
    def install(self) -> None:
        """Add the hooks on the blocks to `_handles`."""

    @abstractmethod
    def let_go(self) -> None:
        """Drop what was kept of the forward."""

    @abstractmethod
    def root_leaves(self, failed: bool) -> None:
        """The model's forward is over, or raised."""

    @abstractmethod
    def attention_enters(self, index: int) -> None:
        """An attention module begins."""

    @abstractmethod
    def attention_leaves(self, index: int, failed: bool) -> None:
        """An attention module is over, or raised."""

    def __enter__(self) -> Self:
        self._thread, self._grad = threading.get_ident(), torch.is_grad_enabled()
        try:
            self._handles.append(self._model.register_forward_pre_hook(_RootPre(self)))
            self._handles.append(self._model.register_forward_hook(_RootPost(self), always_call=True))
            self.install()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._remove()

    def _remove(self) -> None:
        try:
            while self._handles:
                self._handles[-1].remove()
                self._handles.pop()
            for mode in self._modes.values():
                unwind(mode)
        except BaseException:  # Ctrl-C came in between: finish, then let it through
            while self._handles:
                self._handles.pop().remove()
            raise
        finally:
            self._modes = {}
            self.let_go()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forwards in here run as they are; `foveal.attention.unseen` pauses this as it pauses readers."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    @property
    def is_own(self) -> bool:
        """Whether what runs now is of the thread that opened the block, and not paused."""
        return not self._pauses and threading.get_ident() == self._thread

    @property
    def is_recomputed(self) -> bool:
        """Whether what runs now is a checkpointed block in the backward, of any thread."""
        return torch._C._current_graph_task_id() != -1

    def root_enters(self) -> None:
        if self.is_own:
            self._grad = torch.is_grad_enabled()

    def refuse_reentrant(self, layer: Layer, module: nn.Module) -> None:
        """Raise ReadError for a module that runs without gradient although the forward has one."""
        if self._grad and not torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
            raise ReadError(
                f"{layer.name} runs without gradient inside a forward that has gradient: reentrant activation "
                "checkpointing would run it a second time on its own. Use use_reentrant=False, or put the whole step "
                "into torch.no_grad() if no gradient is wanted"
            )

    def enter_mode(self, index: int, mode: Meet) -> None:
        """Meet the attention calls of a module that begins."""
        self._modes[index] = mode
        mode.__enter__()  # type: ignore[no-untyped-call]

    def leave_mode(self, index: int) -> bool:
        """Stop meeting them; False if this module's were not met."""
        if self._pauses or (mode := self._modes.pop(index, None)) is None:
            return False
        unwind(mode)
        return True


class InterventionHook(_Hook):
    """A hook of an intervention; `unseen` finds it as it finds those of a door."""

    def __init__(self, owner: Any, index: int = -1) -> None:
        super().__init__(owner, index)  # paused() is what a door and an intervention share
        self.owner = owner


class _RootPre(InterventionHook):
    def __call__(self, module: nn.Module, args: Any) -> None:
        self.owner.root_enters()


class _RootPost(InterventionHook):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.owner.root_leaves(failed=output is None)


class AttentionPre(InterventionHook):
    """Before an attention module."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.owner.attention_enters(self.index)


class AttentionPost(InterventionHook):
    """After an attention module, or where it raised."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.owner.attention_leaves(self.index, failed=output is None)
