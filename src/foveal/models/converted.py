"""Weights of transformers' vision models under timm's names, so that an ordinary timm model is tuned.

    timm_model.load_state_dict(converted(load_file(f"{folder}/model.safetensors"), config))      config: its config.json

Families by the config's model_type: ViT, DeiT, ViTMAE (the encoder), ViTMSN, DINOv2 (with registers), BEiT, CLIP (the
vision tower) and DINOv3. Queries, keys and values are stacked into one layer; where timm gives patches alone a
position, the class token takes its own along. transformers itself is not needed.

The two libraries agree to float32 rounding, but for the eps of layer norms: many configs say 1e-12, timm 1e-6.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

FAMILIES = (
    "vit",
    "deit",
    "vit_mae",
    "vit_msn",
    "dinov2",
    "dinov2_with_registers",
    "beit",
    "clip_vision_model",
    "dinov3_vit",
)
SCALED_IN_BLOCK = (
    "beit",
    "dinov3_vit",
)  # timm's Beit and Eva call layer scale gamma_1, its VisionTransformer ls1.gamma

ROOT = r"(?:(?:vit|deit|beit|dinov2|dinov2_with_registers|dinov3_vit|clip|model|vision_model)\.)*"
BODY = r"(?:embeddings|encoder|layers?|norm|layernorm|pre_layrnorm|post_layernorm)\."
OUTSIDE = ("embeddings.mask_token", "embeddings.position_ids")  # of pre-training, of older files

WHOLE = (
    (r"embeddings\.(?:cls_token|class_embedding)", "cls_token"),
    (r"embeddings\.distillation_token", "dist_token"),
    (r"embeddings\.register_tokens", "reg_token"),
    (r"embeddings\.(?:position_embeddings|position_embedding\.weight)", "pos_embed"),
    (r"embeddings\.patch_embeddings?\.(?:projection\.)?(weight|bias)", r"patch_embed.proj.\1"),
    (r"pre_layrnorm\.(weight|bias)", r"norm_pre.\1"),
    (r"(?:layernorm|norm|post_layernorm)\.(weight|bias)", r"norm.\1"),
    (r"pooler\.layernorm\.(weight|bias)", r"fc_norm.\1"),
    (r"(?:cls_)?classifier\.(weight|bias)", r"head.\1"),
    (r"distillation_classifier\.(weight|bias)", r"head_dist.\1"),
)
IN_BLOCK = (
    (r"(?:attention\.attention\.|attention\.|self_attn\.)(q|k|v)(?:uery|ey|alue|_proj)\.(weight|bias)", r"attn.\1.\2"),
    (r"(?:attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.(weight|bias)", r"attn.proj.\1"),
    (r"attention\.attention\.relative_position_bias\.(relative_position_bias_table)", r"attn.\1"),
    (r"(?:layernorm_before|norm1|layer_norm1)\.(weight|bias)", r"norm1.\1"),
    (r"(?:layernorm_after|norm2|layer_norm2)\.(weight|bias)", r"norm2.\1"),
    (r"(?:intermediate\.dense|mlp\.fc1|mlp\.weights_in)\.(weight|bias)", r"mlp.fc1.\1"),
    (r"(?:output\.dense|mlp\.fc2|mlp\.weights_out|mlp\.down_proj)\.(weight|bias)", r"mlp.fc2.\1"),
    (r"mlp\.gate_proj\.(weight|bias)", r"mlp.fc1_g.\1"),
    (r"(?:layer_scale|lambda_)([12])(?:\.lambda1)?", r"scale.\1"),
)


def vision_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config.json that describes the vision model. Raises ValueError for a family that is not known."""
    inner = config.get("vision_config")
    found = dict(inner) | {"model_type": inner.get("model_type", "")} if isinstance(inner, Mapping) else dict(config)
    if isinstance(inner, Mapping) and config.get("model_type") == "clip":
        found["model_type"] = "clip_vision_model"
    if found.get("model_type") not in FAMILIES:
        raise ValueError(
            f"transformers models of the type {found.get('model_type')!r} are not converted (known: "
            f"{', '.join(FAMILIES)}); give weights under timm's names"
        )
    return found


def converted(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a transformers model under timm's names.

    What timm's model has no place for (poolers, decoders, mask tokens, text towers) keeps its name. A bias of queries
    and values alone becomes q_bias and v_bias. Raises ValueError for a family, or a tensor of its body, not known.
    """
    family = vision_config(config)["model_type"]
    gated = any(name.endswith("mlp.gate_proj.weight") for name in state)
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        found[_renamed(name, family, gated)] = tensor
    if "cls_token" in found:
        found["cls_token"] = found["cls_token"].reshape(1, 1, -1)
    if "pos_embed" in found and found["pos_embed"].dim() == 2:
        found["pos_embed"] = found["pos_embed"][None]
    if "reg_token" in found and not found["reg_token"].shape[1]:
        del found["reg_token"]
    if family == "dinov2_with_registers":
        found["cls_token"] = found["cls_token"] + found["pos_embed"][:, :1]
        found["pos_embed"] = found["pos_embed"][:, 1:]
    return _stacked(found)


def check_arithmetic(model: nn.Module, config: Mapping[str, Any]) -> tuple[str, ...]:
    """What the shapes do not tell: heads, activation, rotation. Returns what differs but hardly matters, in words.

    model: the timm model that takes the weights. Raises ValueError, naming the remedy, where it computes otherwise.
    """
    config = vision_config(config)
    block = next(iter(getattr(model, "blocks", [])), None)
    heads, wanted = getattr(getattr(block, "attn", None), "num_heads", None), config.get("num_attention_heads")
    if heads is not None and wanted is not None and heads != wanted:
        raise ValueError(f"it has {wanted} heads, the model {heads}: give model_args {{num_heads: {wanted}}}")
    mlp = getattr(block, "mlp", None)
    own, act = (
        _activation(mlp),
        config.get("hidden_act") or ("quick_gelu" if "clip" in config["model_type"] else "gelu"),
    )
    if own is not None and own != act.replace("gelu_pytorch_tanh", "gelu_tanh").replace("gelu_new", "gelu_tanh"):
        remedy = "a timm model with quickgelu in its name" if act == "quick_gelu" else "another timm model"
        raise ValueError(f"its activation is {act}, the model's {own}: give {remedy}")
    theta, temperature = config.get("rope_theta"), getattr(getattr(model, "rope", None), "temperature", None)
    if theta is None:
        theta = (config.get("rope_parameters") or {}).get("rope_theta")
    if config["model_type"] == "dinov3_vit" and theta is not None and temperature != theta:
        raise ValueError(f"it rotates with a base of {theta:g}, the model with {temperature}: give a timm dinov3 model")
    eps, norm = config.get("layer_norm_eps"), getattr(block, "norm1", None)
    if eps is not None and norm is not None and getattr(norm, "eps", eps) != eps:
        return (f"eps of its layer norms is {eps:g}, the model's {norm.eps:g}: features differ in the fifth digit",)
    return ()


def _renamed(name: str, family: str, gated: bool) -> str:
    bare = re.sub(f"^{ROOT}", "", name)
    layer = re.fullmatch(r"(?:encoder\.)?layers?\.(\d+)\.(.+)", bare)
    if layer is None:
        for theirs, ours in WHOLE:
            match = re.fullmatch(theirs, bare)
            if match:
                return match.expand(ours)
    else:
        inner = re.sub(r"^mlp\.up_proj\.", "mlp.fc1_x." if gated else "mlp.fc1.", layer[2])
        if inner.startswith("mlp.fc1_x."):
            return f"blocks.{layer[1]}.{inner}"
        for theirs, ours in IN_BLOCK:
            match = re.fullmatch(theirs, inner)
            if match:
                part = match.expand(ours)
                part = re.sub(r"scale\.(\d)", r"gamma_\1" if family in SCALED_IN_BLOCK else r"ls\1.gamma", part)
                return f"blocks.{layer[1]}.{part}"
    if re.match(BODY, bare) and bare not in OUTSIDE:
        raise ValueError(f"{name!r} is no known name in a transformers model of the type {family}")
    return name


def _stacked(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values of each block as one layer."""
    for name in [name for name in found if name.endswith(".attn.q.weight")]:
        attn = name.removesuffix("q.weight")
        found[f"{attn}qkv.weight"] = torch.cat([found.pop(f"{attn}{part}.weight") for part in "qkv"])
        biases = {part: found.pop(f"{attn}{part}.bias") for part in "qkv" if f"{attn}{part}.bias" in found}
        if len(biases) == 3:
            found[f"{attn}qkv.bias"] = torch.cat([biases[part] for part in "qkv"])
        else:
            found |= {f"{attn}{part}_bias": bias for part, bias in biases.items()}
    return found


def _activation(mlp: nn.Module | None) -> str | None:
    """transformers' word for the activation of a plain MLP; None for a gated one or an activation that is not known."""
    act = getattr(mlp, "act", None)
    if act is None or type(mlp).__name__ != "Mlp":
        return None
    kind = type(act).__name__
    if kind == "GELU":
        return "gelu_tanh" if getattr(act, "approximate", "none") == "tanh" else "gelu"
    return {"QuickGELU": "quick_gelu", "GELUTanh": "gelu_tanh", "ReLU": "relu", "SiLU": "silu"}.get(kind)
