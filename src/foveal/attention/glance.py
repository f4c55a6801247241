"""A forward for its attention only: it ends where the last asked value has been seen.

    look = glance(source, images, layers="all", what="class_logits")

A frozen model that is asked for attention rows needs neither the last block's MLP nor the head; asked about early
blocks only it saves all blocks after them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveal.attention.call import Call
from foveal.attention.door import bare, door_of
from foveal.attention.seen import Layers, Look, read


def glance(model: nn.Module, images: Tensor, layers: Layers = -1, what: str | Sequence[str] = "class_logits") -> Look:
    """What `foveal.read` would show of one forward without gradient, which stops after the last asked layer.

    images: as the model takes them.  layers, what: as for `read`.  A compiled model runs to its end. Raises as `read`.
    """
    with torch.no_grad(), read(model, layers, what) as seen:
        if _is_compiled(model):
            model(images)
            return seen.look
        last = seen.last
        end = last.block if "block_out" in seen.what else last.attention
        handle = end.register_forward_hook(_Stop(bare(model)))  # after the door's own hooks, which see the value first
        try:
            model(images)
        except _Enough:
            pass
        finally:
            handle.remove()
        return seen.look


def _is_compiled(model: nn.Module) -> bool:
    return bare(model) is not model or any(
        getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()
    )


class _Enough(Exception):  # not an error: it ends a forward that has shown what was asked
    pass


class _Stop:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        door = door_of(self.model)
        state = None if door is None else door.reading()
        if state is not None and isinstance(state.current, Call):
            state.current.enough = True
            raise _Enough
