"""An extra forward that leaves no trace: how every source runs its model.

Inside `asking(model)` the model is in evaluation, nothing has gradient, and readers opened outside see nothing of it.
Afterwards, also when the forward raised, every module is in the mode it was in. Statistics of batch norm do not move in
evaluation, and a forward in evaluation draws no chance.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from foveal.attention import unseen
from foveal.attention.peek import uncached_casts


@contextmanager
def asking(model: nn.Module, *, gradient: bool = False) -> Iterator[None]:
    """Run `model` in here as often as needed. gradient: keep the graph, for sources that differentiate the input."""
    training = [module for module in model.modules() if module.training]
    with ExitStack() as stack:
        stack.enter_context(unseen(model))
        stack.enter_context(uncached_casts(model))
        stack.enter_context(torch.set_grad_enabled(gradient))
        try:
            for module in training:
                module.training = False  # not eval(): what a module does besides (merging adapters) would be a trace
            yield
        finally:
            for module in training:
                module.training = True


def as_wanted(model: nn.Module, images: Tensor) -> Tensor:
    """Images in the float type of the model's weights: a guide may run in another than the model being trained."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), images.dtype)
    return images.to(dtype)
