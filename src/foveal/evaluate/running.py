"""Running a model to measure it: in evaluation, where it is, and left as it was."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation; afterwards, also after an error, each of its modules in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def device_of(model: nn.Module, device: torch.device | str | None = None) -> torch.device:
    """The device asked for; by default that of the model's parameters, the CPU if it has none."""
    first = next(model.parameters(), None)
    return torch.device(device if device is not None else first.device if first is not None else "cpu")


def autocasting(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[object]:
    """Autocast to `dtype` (torch.bfloat16); None computes as the model is."""
    return torch.autocast(device.type, dtype) if dtype is not None else contextlib.nullcontext()


def class_logits(output: object, classes: int) -> Tensor:
    """Logits (B, C) of what a model returned. Raises ValueError unless there is one for each class."""
    logits = getattr(output, "logits", output)  # transformers' models return an object
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] != classes:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise ValueError(
            f"the model gives {got}, not one logit for each of the {classes} classes of the images;"
            f" build it with num_classes={classes}"
        )
    return logits
