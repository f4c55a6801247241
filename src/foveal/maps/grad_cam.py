"""Grad-CAM: which patches speak for a class.

    w_d = mean_n  d logit_c / d F_nd,    cam_n = max(0, sum_d w_d F_nd)         n over patches, d over channels

Selvaraju et al., 2017 (arXiv 1610.02391). F is what the attention of a block gets, the output of its first norm, as is
usual for vision transformers: after the last block only the class token's gradient is left, and the map would be
exactly zero. Models that average their patches can be asked for the last block's output too.

B batch, N patches, D width, h x w grid, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from foveal.attention import UnsupportedModelError
from foveal.attention.blocks import Blocks
from foveal.maps.asking import as_wanted, asking
from foveal.maps.attended import logits_of
from foveal.maps.discover.patches import one_grid, reader
from foveal.maps.errors import MapModelError
from foveal.maps.found import Found, found

At = Literal["norm1", "block_out"]


def grad_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """The map of each image, (B, N) float32, zero or more: patches that the class's channels are strong in.

    activations: (B, N, D) of the patches.  gradients: (B, N, D) of the class's logit at them.
    """
    F, gradient = activations.detach().float(), gradients.detach().float()
    return (F @ gradient.mean(1, keepdim=True).mT)[..., 0].clamp_min(0)


class GradCAM:
    """The source `grad_cam`, for vision transformers with a classifier.

    layer: number of the block, -1 is the last.  at: `norm1`, what its attention gets; `block_out`, what leaves it.
    classes: how many classes the data have, checked against the logits.
    Raises MapModelError for a model whose blocks cannot be read or that has no classifier, ValueError for a layer or
    place that is not there. Parameters get no gradient.
    """

    def __init__(self, model: nn.Module, *, layer: int = -1, at: At = "norm1", classes: int | None = None) -> None:
        if at not in get_args(At):
            raise ValueError(f"at={at!r} is not known; use one of {', '.join(get_args(At))}")
        self.model, self.layer, self.at, self.classes = model, layer, at, classes
        try:
            blocks = Blocks(model)
        except UnsupportedModelError as error:
            raise MapModelError(
                f"no blocks to take Grad-CAM at: {error}. input_gradient fits any classifier"
            ) from error
        chosen = blocks.layers[blocks.position(layer)]
        if getattr(blocks.trunk, "num_classes", None) == 0:
            raise MapModelError("the model has no classifier, and Grad-CAM is of a class: give one that was tuned")
        if at == "norm1" and chosen.attention is chosen.block:
            raise MapModelError(f"{chosen.name} has no attention of its own whose input could be taken: at='block_out'")
        self._module = chosen.attention if at == "norm1" else chosen.block
        self._prefix = chosen.layout.prefix

    def __call__(self, images: Tensor, labels: Tensor | None = None, given: Tensor | None = None) -> Found:
        """Maps (B, h, w) of normalised images, for labels: indices (B,), rows (B, C), or None for the model's guess."""
        with torch.inference_mode(False), asking(self.model, gradient=True):
            pixels = as_wanted(self.model, images.detach()).clone().requires_grad_()  # also where weights are frozen
            with reader(self.model, "tokens", self.layer) as seen, self._listening() as heard:
                logits = logits_of(self.model(pixels))
            if logits is None or (self.classes is not None and logits.shape[1] != self.classes):
                raise MapModelError(
                    f"{type(self.model).__name__} returns {'no logits' if logits is None else tuple(logits.shape)}; "
                    f"logits (B, {self.classes or 'C'}) are needed, one per class of the data"
                )
            if not heard:
                raise MapModelError("the block did not run as a module: Grad-CAM needs a model that is not compiled")
            (gradient,) = torch.autograd.grad(_asked(logits, labels), heard[0])
            F, gradient = (x[:, self._prefix :] for x in (heard[0], gradient))
            h, w = one_grid(seen)
            if F.shape[1] != h * w:
                raise MapModelError(
                    f"{F.shape[1]} patches do not fill the {(h, w)} grid: other tokens, or patch dropout"
                )
            return found(grad_cam(F, gradient).view(-1, h, w), logits)

    @contextmanager
    def _listening(self) -> Iterator[list[Tensor]]:
        """The tokens (B, T, D) at the chosen place, of the forward in here."""
        heard: list[Tensor] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            heard.append(next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)))

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            heard.append(output if isinstance(output, Tensor) else output[0])

        if self.at == "norm1":
            hook = self._module.register_forward_pre_hook(before, with_kwargs=True)
        else:
            hook = self._module.register_forward_hook(after)
        try:
            yield heard
        finally:
            hook.remove()


def _asked(logits: Tensor, labels: Tensor | None) -> Tensor:
    """The sum over images of the logits that are explained; an image's gradient is of its own."""
    C = logits.shape[1]
    if labels is None:
        return logits.float().amax(1).sum()
    labels = labels.detach().clone().to(logits.device)  # clone: also of inference mode
    if labels.dim() == 2:
        if labels.shape[1] != C:
            raise ValueError(f"label rows of {labels.shape[1]} classes but the model has {C}")
        return (logits.float() * labels.float()).sum()
    if labels.device.type == "cpu" and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < C:
        raise ValueError(f"labels from {int(labels.min())} to {int(labels.max())} but the model has {C} classes")
    return logits.float().gather(1, labels[:, None]).sum()
