"""Input gradient: which pixels the loss on the clean image is sensitive to.

    s_p = sqrt( 1/3 sum_c g_cp^2 ),  g = gradient of the batch-mean cross-entropy at the images      Kim et al., 2020

The network is in evaluation; one forward and one backward that stops at the images (PuzzleMix, arXiv 2009.06962).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal.attention.rows import widen
from foveal.maps.asking import as_wanted, asking
from foveal.maps.attended import logits_of
from foveal.maps.errors import MapModelError
from foveal.maps.found import Found, found


class InputGradient:
    """Root mean square over channels of the loss's gradient at the images: a map on pixels, for any classifier.

    classes: how many classes the data have, checked against the logits.  Parameters get no gradient.
    Raises MapModelError for a model that gives no logits (B, C) or other classes, ValueError without labels.
    """

    def __init__(self, model: nn.Module, *, classes: int | None = None) -> None:
        self.model = model
        self.classes = classes

    def __call__(self, images: Tensor, labels: Tensor | None = None, given: Tensor | None = None) -> Found:
        """Maps (B, H, W) of normalised images for their labels, indices (B,) or rows (B, C)."""
        if labels is None:
            raise ValueError(
                "input_gradient differentiates the loss of a label: give labels, indices (B,) or rows (B, C)"
            )
        with torch.inference_mode(False), asking(self.model, gradient=True):
            pixels = as_wanted(self.model, images.detach()).clone().requires_grad_()  # clone: also of inference mode
            logits = logits_of(self.model(pixels))
            if logits is None or (self.classes is not None and logits.shape[1] != self.classes):
                raise MapModelError(
                    f"{type(self.model).__name__} returns {'no logits' if logits is None else tuple(logits.shape)}; "
                    f"logits (B, {self.classes or 'C'}) are needed, one per class of the data"
                )
            loss = F.cross_entropy(widen(logits), _targets(labels, logits), reduction="sum")
            (gradient,) = torch.autograd.grad(loss, pixels)  # of the sum: a batch mean underflows in half precision
            return found(gradient.float().square().mean(1).sqrt() / len(images), logits)


def _targets(labels: Tensor, logits: Tensor) -> Tensor:
    labels = labels.detach().clone().to(logits.device)
    C = logits.shape[1]
    if labels.dim() == 2:
        if labels.shape[1] != C:
            raise ValueError(f"label rows of {labels.shape[1]} classes but the model has {C}")
        return labels.to(widen(logits).dtype)
    if labels.device.type == "cpu" and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < C:
        raise ValueError(f"labels from {int(labels.min())} to {int(labels.max())} but the model has {C} classes")
    return labels
