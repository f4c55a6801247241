"""The tokens that a model's classifier reads, and the classifier's rows, for the libraries people use.

    tokens (B, N, D) after the last norm, one per patch or cell     logits (B, C)     rows (C, D)

A row of a linear classifier lives in the space of what it reads: the normalised class token, or the mean of the
normalised patch tokens. Patch tokens that went through the same norm can be compared with it. Prefix tokens (class,
distillation, registers) are left out; of a distilled model the row is that of the class token's head.

Known are models with timm's interface (`forward_features`, `forward_head`, `get_classifier`), torchvision's
VisionTransformer, SwinTransformer and ResNet, and the image classifiers of transformers (ViT, DeiT, DINOv2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from foveal.attention import UnsupportedModelError, read
from foveal.attention.door import bare
from foveal.maps.errors import MapModelError

KNOWN = (
    "models with timm's interface (forward_features, forward_head, get_classifier), torchvision's VisionTransformer, "
    "SwinTransformer and ResNet, transformers' ViT, DeiT and DINOv2 for image classification"
)


@dataclass(frozen=True)
class Features:
    """What one forward showed."""

    tokens: (
        Tensor  # (B, N, D) N = h w cells in row-major order, through the norm that the classifier's input went through
    )
    grid: tuple[int, int]  # (h, w)
    logits: Tensor  # (B, C) what the model returns


@dataclass(frozen=True)
class _Family:
    """How one library's models are asked."""

    features: Callable[[Any, Tensor], Features]
    head: Callable[[Any], Any]  # the classifier module
    width: Callable[[Any], int]  # D of the tokens
    norm: Callable[[Any], Callable[[Tensor], Tensor]] | None = None  # from the last block's patch tokens to the tokens


def features(model: nn.Module, images: Tensor) -> Features:
    """Tokens, grid and logits of images (B, 3, H, W), from one forward in the mode that the model is in.

    Raises MapModelError for a model that is not known, whose tokens form no grid, or that gives no row of logits.
    """
    model = bare(model)
    found = _family(model).features(model, images)
    B, N, _ = found.tokens.shape
    if found.grid[0] * found.grid[1] != N:
        raise MapModelError(
            f"{type(model).__name__} has {N} tokens besides its prefix, which do not fill its {found.grid} grid: other "
            "tokens than patches, or patch dropout"
        )
    if not isinstance(found.logits, Tensor) or found.logits.shape[:-1] != (B,):
        given = tuple(found.logits.shape) if isinstance(found.logits, Tensor) else type(found.logits).__name__
        raise MapModelError(
            f"{type(model).__name__} returns {given}, not one row of logits per image, (B, C): give it a head"
        )
    return found


def classifier(model: nn.Module, classes: int | None = None) -> Tensor:
    """Rows of the linear classifier: the weight itself, (C, D), no bias.

    classes: how many there must be, None for any number.
    Raises MapModelError for a head that is missing, not linear, of another width than the tokens, or of other classes.
    """
    model = bare(model)
    family = _family(model)
    name = type(model).__name__
    head = _linear(family.head(model))
    if isinstance(head, str):
        raise MapModelError(
            f"the head of {name} is {head}, but a map for a label needs one linear layer with a row per class: give "
            "the model such a head (timm: num_classes=...), or use label_vectors='class_mean', or a map without labels "
            "(received_attention)"
        )
    if getattr(model, "attn_pool", None) is not None:
        raise MapModelError(
            f"the head of {name} reads a pooling query (attn_pool), so its rows do not live in the space of the patch "
            "tokens: use label_vectors='class_mean', or class_attention with layer='attn_pool'"
        )
    weight: Tensor = head.weight if head.weight.dim() == 2 else head.weight.flatten(1)  # a 1 x 1 convolution
    width = family.width(model)
    if weight.shape[1] != width:
        raise MapModelError(
            f"the head of {name} reads {weight.shape[1]} numbers but its tokens have {width} (a hidden layer before "
            "the head, or several poolings side by side), so its rows cannot be compared with tokens: use a model with "
            "one linear layer on the pooled tokens, or label_vectors='class_mean'"
        )
    if classes is not None and weight.shape[0] != classes:
        raise MapModelError(
            f"the head of {name} has {weight.shape[0]} classes but the data have {classes}: label 7 would mean another "
            "class to it. Fine-tune it, or fit a linear probe, on these classes; or use the model being trained"
        )
    return weight


def width(model: nn.Module) -> int:
    """D of the tokens that `features` gives."""
    model = bare(model)
    return _family(model).width(model)


def last_norm(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """What the last block's patch tokens go through to become the tokens of `features`: (B, N, D) to (B, N, D).

    Raises MapModelError where that is not known.
    """
    model = bare(model)
    norm = _family(model).norm
    if norm is None:
        raise MapModelError(f"the last norm of {type(model).__name__} is not known")
    return norm(model)


def _linear(head: Any) -> Any:
    """The one linear layer of a head, or what it is instead."""
    if isinstance(head, nn.Linear):
        return head
    if isinstance(head, nn.Conv2d) and head.kernel_size == (1, 1):
        return head
    if isinstance(head, nn.Sequential):
        parts = [part for part in head if not isinstance(part, nn.Dropout | nn.Identity)]
        if len(parts) == 1:
            return _linear(parts[0])
        return "Sequential of " + ", ".join(type(part).__name__ for part in parts) if parts else "missing"
    if head is None or isinstance(head, nn.Identity):
        return "missing (Identity)"
    return type(head).__name__


def _family(model: nn.Module) -> _Family:
    if all(callable(getattr(model, name, None)) for name in ("forward_features", "forward_head", "get_classifier")):
        return TIMM
    for kind in type(model).__mro__:
        name = f"{kind.__module__}.{kind.__qualname__}"
        if name.startswith("transformers."):
            name = f"transformers.{kind.__qualname__}"
        if name in OTHERS:
            return OTHERS[name]
    raise MapModelError(f"the tokens and the head of {type(model).__name__} are not known; known are {KNOWN}")


# -- timm


def _timm_features(model: Any, images: Tensor) -> Features:
    x = model.forward_features(images)
    logits = model.forward_head(x)
    if not isinstance(x, Tensor) or x.dim() not in (3, 4):
        raise MapModelError(
            f"the features of {type(model).__name__} are {type(x).__name__}, not one grid of tokens for all images"
        )
    norm = _pooled_norm(model)
    if x.dim() == 4:
        last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        grid = x.shape[1:3] if last else x.shape[2:4]
        x = norm(x)
        return Features(x.flatten(1, 2) if last else x.flatten(2).transpose(1, 2), (grid[0], grid[1]), logits)
    try:
        h, w = model.patch_embed.dynamic_feat_size(images.shape[-2:])
    except AttributeError:
        raise MapModelError(
            f"{type(model).__name__} does not tell the grid of its patches; received_attention may read it"
        ) from None
    return Features(norm(x[:, int(getattr(model, "num_prefix_tokens", 0)) :]), (int(h), int(w)), logits)


def _pooled_norm(model: Any) -> Any:
    """The norm that comes after pooling in models that pool first."""
    return getattr(model, "fc_norm", None) or getattr(getattr(model, "head", None), "norm", None) or nn.Identity()


def _timm_norm(model: Any) -> Callable[[Tensor], Tensor]:
    norm, pooled = getattr(model, "norm", None) or nn.Identity(), _pooled_norm(model)
    return lambda x: pooled(norm(x))


def _timm_head(model: Any) -> Any:
    hidden = getattr(getattr(model, "head", None), "pre_logits", None)
    if isinstance(hidden, nn.Module) and not isinstance(hidden, nn.Identity):
        return model.head  # a hidden layer before the last one
    head = model.get_classifier()
    return head[0] if isinstance(head, tuple) else head  # distilled: the class token's, then the distillation token's


TIMM = _Family(_timm_features, _timm_head, lambda model: int(model.num_features), _timm_norm)


# -- torchvision and transformers


def _read_tokens(model: nn.Module, images: Tensor, norm: Callable[[Tensor], Tensor]) -> Features:
    """Tokens of a vision transformer that the door reads: what its last block gives, through the last norm."""
    with read(model, layers=-1, what="block_out") as seen:
        out = model(images)
    return Features(norm(seen.block_out()), seen.grid, getattr(out, "logits", out))


def _torchvision_vit(model: Any, images: Tensor) -> Features:
    return _read_tokens(model, images, model.encoder.ln)


def _torchvision_swin(model: Any, images: Tensor) -> Features:
    x = model.norm(model.features(images))  # (B, h, w, D)
    logits = model.head(model.flatten(model.avgpool(model.permute(x))))
    return Features(x.flatten(1, 2), (x.shape[1], x.shape[2]), logits)


def _torchvision_resnet(model: Any, images: Tensor) -> Features:
    x = images
    for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        x = getattr(model, name)(x)
    logits = model.fc(model.avgpool(x).flatten(1))
    return Features(x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3]), logits)


def _transformers(model: Any, images: Tensor) -> Features:
    try:
        return _read_tokens(model, images, model.base_model.layernorm)
    except UnsupportedModelError as error:
        raise MapModelError(str(error)) from error


def _hidden_size(model: Any) -> int:
    return int(model.config.hidden_size)


def _hf_norm(model: Any) -> Callable[[Tensor], Tensor]:
    norm: Callable[[Tensor], Tensor] = model.base_model.layernorm
    return norm


_HF = _Family(_transformers, lambda model: model.classifier, _hidden_size, _hf_norm)
OTHERS = {
    "torchvision.models.vision_transformer.VisionTransformer": _Family(
        _torchvision_vit, lambda model: model.heads, lambda model: int(model.hidden_dim), lambda model: model.encoder.ln
    ),
    "torchvision.models.swin_transformer.SwinTransformer": _Family(
        _torchvision_swin, lambda model: model.head, lambda model: int(model.norm.normalized_shape[0])
    ),
    "torchvision.models.resnet.ResNet": _Family(
        _torchvision_resnet, lambda model: model.fc, lambda model: int(model.inplanes)
    ),
    "transformers.ViTForImageClassification": _HF,
    "transformers.DeiTForImageClassification": _HF,
    "transformers.DeiTForImageClassificationWithTeacher": _Family(
        _transformers, lambda model: model.cls_classifier, _hidden_size, _hf_norm
    ),
    "transformers.Dinov2ForImageClassification": _HF,
    "transformers.Dinov2WithRegistersForImageClassification": _HF,
}
