"""Where a model looks, as arrays: one forward, all layers and heads.

Three kinds of looking, whichever a layer offers first:
class      the share of the class token's attention that each patch gets
pool       the same of a latent query that pools the patches (SigLIP, attention-pooled ViTs)
received   the attention that each patch receives, mean over all tokens that look (models without a class token)

B batch, H heads, L layers, h x w patch grid, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import foveal

KINDS = {
    "class": "attention of the class token",
    "pool": "attention of the pooling query",
    "received": "attention received from all patches, as there is no class token",
}


@dataclass(frozen=True)
class Pictures:
    """What one forward showed; everything on the CPU."""

    layers: tuple[str, ...]  # names, from the input up
    kinds: tuple[str, ...]  # of each layer: a key of KINDS
    attention: tuple[Tensor, ...]  # per layer (B, H, h, w) float32; heads and grids may differ between layers
    logits: Tensor  # (B, C) float32, or (B, D) of a model without a classifier

    def look(self, i: int, layer: int = -1) -> Tensor:
        """(h, w): where one layer looks on image i, mean over heads."""
        return self.attention[layer][i].mean(0)

    def heads(self, i: int) -> list[Tensor]:
        """Per layer (H, h, w) of image i, as `head_grid` takes it."""
        return [attn[i] for attn in self.attention]

    def describe(self, layer: int = -1) -> str:
        """What the map of one layer is, in words."""
        return KINDS[self.kinds[layer]]


def pictures(model: nn.Module, images: Tensor, layers: Sequence[str] | None = None) -> Pictures:
    """Read where `model` looks on `images`.

    images: (B, 3, S, T) normalised as the model wants it, on its device.  layers: names, by default all that can
    be read.  The forward runs in evaluation mode without gradient; the mode of every module is put back.
    Raises `foveal.UnsupportedModelError` for a model that cannot be read, ValueError for an unknown layer.
    """
    support = foveal.supported(model)
    if not support:
        raise foveal.UnsupportedModelError(support.reason)
    names = tuple(support.layers if layers is None else layers)
    if unknown := [name for name in names if name not in support.what]:
        raise ValueError(f"no layer {unknown[0]!r}; this model has {', '.join(support.layers)}")
    rows = [name for name in names if "class_logits" in support.what[name]]
    rest = [name for name in names if name not in rows]
    found: dict[str, Tensor] = {}  # layer -> (B, H, h, w)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), foveal.attach(model), ExitStack() as stack:
            class_reads = stack.enter_context(foveal.read(model, rows)) if rows else None
            other_reads = stack.enter_context(foveal.read(model, rest, "received")) if rest else None
            output = model(images)
            if class_reads:
                found |= zip(rows, class_reads.to_grid(class_reads.class_attention(), heads=None), strict=True)
            if other_reads:
                found |= zip(rest, other_reads.to_grid(other_reads.received(), heads=None), strict=True)
    finally:
        for module, mode in modes:
            module.training = mode
    row = "pool" if support.layout is None or support.layout.class_index is None else "class"
    return Pictures(
        layers=names,
        kinds=tuple(row if name in rows else "received" for name in names),
        attention=tuple(found[name].float().cpu() for name in names),
        logits=getattr(output, "logits", output).float().cpu(),  # transformers wraps them
    )
