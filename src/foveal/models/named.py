"""The published models by name, for `timm.create_model`.

    cct_L_PxC_S     L blocks, C convolutions of kernel P, images of S pixels
    cvt_L_P_S, vit_lite_L_P_S     L blocks, patches of P pixels, images of S pixels
    ..._sine        the same with sine positions (with the authors' builders CCT and CVT got learned ones here, too)

Importing this file registers them; arguments of CompactTransformer can be given on top:
timm.create_model("cct_7_3x1_32", num_classes=100, img_size=64, depth=9).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor

from foveal.models.compact import CompactTransformer
from foveal.models.official import from_official, is_official

# L: depth, width D, heads, hidden width of the MLP / D
SIZES = {
    2: {"depth": 2, "embed_dim": 128, "num_heads": 2, "mlp_ratio": 1.0},
    4: {"depth": 4, "embed_dim": 128, "num_heads": 2, "mlp_ratio": 1.0},
    6: {"depth": 6, "embed_dim": 256, "num_heads": 4, "mlp_ratio": 2.0},
    7: {"depth": 7, "embed_dim": 256, "num_heads": 4, "mlp_ratio": 2.0},
    14: {"depth": 14, "embed_dim": 384, "num_heads": 6, "mlp_ratio": 3.0},
}

# what a model was published for: classes, mean, std, share of the resized image that evaluation keeps
CIFAR = {"num_classes": 10, "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616), "crop_pct": 1.0}
FLOWERS = {"num_classes": 102, "mean": (0.4353, 0.3773, 0.2872), "std": (0.2966, 0.2455, 0.2698), "crop_pct": 1.0}
IMAGENET = {"num_classes": 1000, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "crop_pct": 0.9}

# (L, P, C, S) of the CCTs
CCT = {
    (2, 3, 2, 32): CIFAR,
    (4, 3, 2, 32): CIFAR,
    (6, 3, 1, 32): CIFAR,
    (6, 3, 2, 32): CIFAR,
    (7, 3, 1, 32): CIFAR,
    (7, 3, 2, 32): CIFAR,
    (7, 7, 2, 224): FLOWERS,
    (14, 7, 2, 224): IMAGENET,
    (14, 7, 2, 384): IMAGENET,
}
PATCHED = (2, 4, 6, 7)  # L of CVT and ViT-Lite


def _models() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """name -> (arguments of CompactTransformer, timm's data configuration)."""
    models: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for (L, P, C, S), published in CCT.items():
        cfg = published | {"input_size": (3, S, S), "first_conv": "patch_embed.conv_layers.0.0"}
        models[f"cct_{L}_{P}x{C}_{S}"] = SIZES[L] | {"kernel_size": P, "conv_layers": C}, cfg
    for family, class_token in (("cvt", False), ("vit_lite", True)):
        for L in PATCHED:
            cfg = CIFAR | {"input_size": (3, 32, 32), "first_conv": "patch_embed.proj"}
            patches = {"kernel_size": 4, "conv_layers": 0, "class_token": class_token}
            models[f"{family}_{L}_4_32"] = SIZES[L] | patches, cfg
    sines = {f"{name}_sine": (arguments | {"pos_embed": "sine"}, cfg) for name, (arguments, cfg) in models.items()}
    return models | sines


MODELS = _models()
NAMES = tuple(MODELS)
default_cfgs = generate_default_cfgs(  # timm looks here, by this name
    {
        name: {"interpolation": "bicubic", "classifier": "head", "fixed_input_size": True, "pool_size": None, **cfg}
        for name, (_, cfg) in MODELS.items()
    }
)


def _checkpoint(state: Mapping[str, Tensor], model: CompactTransformer) -> Mapping[str, Tensor]:
    return from_official(state, model) if is_official(state) else state


def _entry(name: str, arguments: dict[str, Any]) -> Callable[..., CompactTransformer]:
    def create(pretrained: bool = False, **changes: Any) -> CompactTransformer:
        model: CompactTransformer = build_model_with_cfg(
            CompactTransformer, name, pretrained, pretrained_filter_fn=_checkpoint, **{**arguments, **changes}
        )
        return model

    create.__name__ = create.__qualname__ = name
    return create


__all__ = ["MODELS", "NAMES"]  # timm adds the names of the models
globals().update({name: register_model(_entry(name, arguments)) for name, (arguments, _) in MODELS.items()})
