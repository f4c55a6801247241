"""Which timm model a file's tensors would fit, read off their names and shapes.

A message says so where a file is refused. Heads leave no trace in the shapes: they are known from a config, or those
of the named timm model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import timm
from torch import Tensor

SIZES = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large", (1280, 32): "huge"}


def likeness(state: Mapping[str, Tensor], heads: int | None = None, quick_gelu: bool = False) -> str:
    """The ViT that tensors under timm's names belong to, and the settings that build it; "" where they are no ViT's.

    >>> likeness(timm.create_model("vit_tiny_patch16_224").state_dict())
    'a ViT of width 192, depth 12, patch 16: model=vit_tiny_patch16_224'
    """
    patch = state.get("patch_embed.proj.weight")
    blocks = {int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}
    if patch is None or patch.dim() != 4 or not blocks:
        return ""
    width, depth, side = patch.shape[0], max(blocks) + 1, patch.shape[-1]
    told = f"a ViT of width {width}, depth {depth}, patch {side}" + (f", {heads} heads" if heads else "")
    size = SIZES.get((width, depth))
    usual = heads is None or heads * 64 == width or size == "huge"
    if size is not None and usual and timm.is_model(name := _name(state, size, side, quick_gelu)):
        return f"{told}: model={name}"
    near = next(name for name in (_name(state, "small", side, quick_gelu), _family(state, quick_gelu)) if _known(name))
    sizes = {"patch_size": side, "embed_dim": width, "depth": depth} | ({"num_heads": heads} if heads else {})
    arguments = ", ".join(f"{key}: {value}" for key, value in sizes.items())
    return f"{told}: model={near} with model_args {{{arguments}}}" + ("" if heads else " and its num_heads")


def _known(name: str) -> bool:
    return bool(timm.is_model(name))


def _name(state: Mapping[str, Tensor], size: str, side: int, quick_gelu: bool) -> str:
    """timm's name for a size of the family; it need not exist."""
    return re.sub(r"(vit|deit|beit)_[a-z]+(.*)_patch\d+", rf"\1_{size}\2_patch{side}", _family(state, quick_gelu))


def _family(state: Mapping[str, Tensor], quick_gelu: bool) -> str:
    """A timm model of the family."""
    if any("relative_position_bias_table" in name for name in state):
        return "beit_base_patch16_224"
    if "norm_pre.weight" in state:
        return "vit_base_patch16_clip_quickgelu_224" if quick_gelu else "vit_base_patch16_clip_224"
    if "dist_token" in state:
        return "deit_small_distilled_patch16_224"
    if "blocks.0.gamma_1" in state:
        return f"vit_small_patch16_dinov3{'_qkvb' if _biased(state) else ''}"
    if "blocks.0.ls1.gamma" in state:
        return "vit_small_patch14_reg4_dinov2" if "reg_token" in state else "vit_small_patch14_dinov2"
    return "vit_small_patch16_224"


def _biased(state: Mapping[str, Tensor]) -> bool:
    return any(name.endswith(".q_bias") and bool(tensor.any()) for name, tensor in state.items())
