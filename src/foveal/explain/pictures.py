"""Where a model looks, as arrays: one forward, all layers and heads.

Class attention where the model has a class token: the share of its gaze that each patch gets.  Elsewhere the
attention that each patch receives, averaged over all patches that look.  `Pictures.kind` says which.

B batch, H heads, L layers, h x w patch grid, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import foveal

KINDS = {
    "class": "attention of the class token",
    "received": "attention received from all patches (the model has no class token)",
}


@dataclass(frozen=True)
class Pictures:
    """What one forward showed; everything on the CPU."""

    kind: str  # a key of KINDS
    layers: tuple[str, ...]  # names, from the input up
    attention: tuple[Tensor, ...]  # per layer (B, H, h, w) float32; heads and grids may differ between layers
    logits: Tensor  # (B, C) float32, or (B, D) of a model without a classifier

    def look(self, i: int, layer: int = -1) -> Tensor:
        """(h, w): where one layer looks on image i, mean over heads."""
        return self.attention[layer][i].mean(0)

    def heads(self, i: int) -> list[Tensor]:
        """Per layer (H, h, w) of image i, as `head_grid` takes it."""
        return [attn[i] for attn in self.attention]


def pictures(model: nn.Module, images: Tensor, layers: object = "all") -> Pictures:
    """Read where `model` looks on `images`.

    images: (B, 3, S, T) normalised as the model wants it, on its device.  layers: as for `foveal.read`.
    The forward runs in evaluation mode without gradient; the model's mode is put back.
    Raises `foveal.UnsupportedModelError` for a model that cannot be read.
    """
    support = foveal.supported(model)
    if not support:
        raise foveal.UnsupportedModelError(support.reason)
    kind = "class" if "class_logits" in support.what else "received"
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), foveal.read(model, layers=layers, what=_WHAT[kind]) as seen:
            logits = model(images)
        found = seen.class_attention() if kind == "class" else seen.received()
        maps = [seen.to_grid(attn, heads=None) for attn in (found if isinstance(found, list) else [found])]
        names = tuple(seen.layers)
    finally:
        for module, mode in modes:
            module.training = mode
    return Pictures(kind, names, tuple(attn.float().cpu() for attn in maps), logits.float().cpu())


_WHAT = {"class": "class_logits", "received": "received"}
