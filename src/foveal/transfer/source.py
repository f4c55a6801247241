"""The frozen model that the tuned one is compared with, on the same images.

It is a copy in evaluation, outside of every module tree: in no checkpoint, running average or gradient bucket. Its
forward has no gradient and ends after the last block that is asked about. With adapters (LoRA) no copy is needed: the
source is the tuned model itself with its adapters switched off.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext

import torch
from torch import Tensor, nn

from foveal import attention
from foveal.attention import Layers
from foveal.attention.door import bare
from foveal.maps.asking import as_wanted, asking
from foveal.transfer.lora import without_adapters

TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": None}


class Source:
    """A frozen source.

    model: copied, so it may be the very model that will be tuned; None: the tuned model without its adapters.
    precision: autocast of its forward, bfloat16 or float16; float32: none; None: as it is around the step.
    compiled: its forward is compiled (then it runs to its end).
    """

    def __init__(self, model: nn.Module | None, *, precision: str | None = None, compiled: bool = False) -> None:
        if precision is not None and precision not in TYPES:
            raise ValueError(f"precision={precision!r} of the source is not known; use {', '.join(TYPES)}")
        self.precision = precision
        self.model = None if model is None else copy.deepcopy(bare(model)).eval().requires_grad_(False)
        self._door = None
        if compiled:
            if self.model is None:
                raise ValueError("the source is the tuned model without its adapters: it is not compiled apart")
            self._door = attention.attach(self.model)  # first: hooks that come after compilation see nothing
            self.model.compile()

    def look(
        self, images: Tensor, layers: Layers, what: str | Sequence[str], tuned: nn.Module | None = None
    ) -> attention.Look:
        """What the source shows on `images`, which take its device and type; constants for the tuned model's graph.

        tuned: the model that is tuned, asked where there is no copy.
        """
        with ExitStack() as stack:
            if self.model is not None:
                model = self.model.to(images.device)
                images = as_wanted(model, images)
            else:
                model = self._bare(tuned)
                stack.enter_context(asking(model))
                stack.enter_context(without_adapters(model))
            stack.enter_context(self._autocast(images.device.type))
            return attention.glance(model, images, layers, what)

    def check(self, layers: Layers, what: str | Sequence[str], tuned: nn.Module | None = None) -> None:
        """Raise UnsupportedModelError or ValueError now, not in the first step, where that cannot be read."""
        model = self.model if self.model is not None else tuned
        if model is not None:
            attention.read(model, layers, what)

    def _autocast(self, device: str) -> torch.autocast | nullcontext[None]:
        if self.precision is None:
            return nullcontext()
        dtype = TYPES[self.precision]
        return torch.autocast(device, dtype=dtype, enabled=dtype is not None, cache_enabled=False)

    def _bare(self, tuned: nn.Module | None) -> nn.Module:
        if tuned is None:
            raise ValueError("a source without a copy needs the tuned model, whose adapters it switches off")
        return bare(tuned)
