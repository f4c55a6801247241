"""Which channels of the pre-trained features matter for a task: the attention of DELTA.

    w_l = softmax_c( z_c / 5 ),    z = standardised over channels,  of the loss without channel c minus the loss

Li et al., 2019 (arXiv 1901.09229), section 3.3; the 5 and the few batches are those of the authors' code.
The model is the frozen pre-trained one under a linear classifier that was trained on its features. Taking every channel
out in turn costs a forward per channel, layer and batch; to first order one backward per batch gives them all:

    loss(F_c = 0) - loss(F) = - sum_{b, tokens} dL/dF_c F_c + ...
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import foveal.attention as attention
from foveal.attention.door import bare
from foveal.maps.asking import as_wanted, asking
from foveal.transfer.delta import quarters


def channel_weights(importance: Tensor) -> Tensor:
    """(C,) loss differences to (C,) weights with sum 1: standardised (population deviation), over 5, softmax.

    Channels that all matter alike (deviation 0) weigh alike. float32 or wider.
    """
    x = importance.to(torch.promote_types(torch.float32, importance.dtype))
    x = x - x.mean()
    deviation = x.square().mean().sqrt()
    z = torch.where(deviation > 0, x / deviation.clamp_min(torch.finfo(x.dtype).tiny), torch.zeros_like(x))
    return (z / 5).softmax(-1)


def channel_attention(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    layers: attention.Layers | None = None,
    *,
    limit: int | None = 4,
) -> list[Tensor]:
    """Weights (C,) of the channels of each layer, to first order, for `DELTA(channels=...)`.

    model: pre-trained, with a classifier that was trained on its frozen features (a linear probe); it runs in
    evaluation and is left as it was.  batches: images (B, 3, H, W) and classes (B,); the first `limit`, None for all.
    layers: as for DELTA, with the same default.

    A channel is taken out of every token, the class token's too: the last block's patches alone reach no class-token
    classifier, and no channel of them would matter.
    Raises ValueError for no batches, UnsupportedModelError or ValueError for layers that cannot be read.
    """
    model = bare(model)
    chosen = quarters(model) if layers is None else layers
    totals: list[Tensor] = []
    count = 0
    with asking(model, gradient=True):
        for images, labels in itertools.islice(batches, limit):
            found = _importance(model, images, labels, chosen)
            totals = [t + f for t, f in zip(totals, found, strict=True)] if totals else found
            count += 1
    if not count:
        raise ValueError("channel attention is measured on images: give one batch or more")
    return [channel_weights(total / count) for total in totals]


def _importance(model: nn.Module, images: Tensor, labels: Tensor, layers: attention.Layers) -> list[Tensor]:
    """First-order change of the mean loss of a batch when a channel is zero, (C,) per layer."""
    pixels = as_wanted(model, images.detach()).clone().requires_grad_()  # a graph also where all weights are frozen
    with attention.read(model, layers, "block_out") as seen:
        loss = F.cross_entropy(model(pixels).float(), labels)
    found = seen.block_out(prefix=True)
    features = [found] if isinstance(found, Tensor) else found
    wide = torch.promote_types(torch.float32, features[0].dtype)
    gradients = torch.autograd.grad(loss, features)
    return [-(g.to(wide) * f.detach().to(wide)).flatten(0, -2).sum(0) for g, f in zip(gradients, features, strict=True)]
