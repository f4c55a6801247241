"""The norms between a model's last block and its head: what tokens go through, and what a pooled vector does.

    features = pooled(reduce(tokens(block output)))       reduce: the class token, the mean of the patches, ...

Most models normalise every token; models that pool first (timm's `fc_norm`, transformers' CLIP) normalise what they
pooled. One of the two is then the identity.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from foveal.attention.anatomy import FAMILIES, dissect
from foveal.attention.door import bare, door_of
from foveal.attention.errors import UnsupportedModelError

# family -> where its trunk keeps the norm of all tokens, and the norm after pooling ("": it has none)
NORMS = {
    "timm ViT": ("norm", "fc_norm"),
    "timm EVA, DINOv3, PE": ("norm", "fc_norm"),
    "timm BEiT": ("norm", "fc_norm"),
    "timm NaFlex": ("norm", "fc_norm"),
    "foveal CCT, CVT, ViT-Lite": ("norm", ""),
    "torchvision ViT": ("encoder.ln", ""),
    "transformers ViT": ("layernorm", ""),
    "transformers DeiT": ("layernorm", ""),
    "transformers DINOv2": ("layernorm", ""),
    "transformers DINOv2 with registers": ("layernorm", ""),
    "transformers DINOv3": ("norm", ""),
    "transformers CLIP vision": ("", "post_layernorm"),
    "transformers SigLIP vision": ("post_layernorm", ""),
    "transformers BEiT": ("layernorm", "pooler.layernorm"),
}


@dataclass(frozen=True)
class Norms:
    """tokens: for every token of the last block, (B, T, D).  pooled: for what tokens were reduced to, (B, D)."""

    tokens: nn.Module
    pooled: nn.Module


def final_norms(model: nn.Module) -> Norms:
    """The model's own modules, an Identity for one that it does not have.

    Raises UnsupportedModelError for a model that cannot be read, or whose norms are not known or are missing.
    """
    model = bare(model)
    door = door_of(model)
    anatomy = dissect(model) if door is None else door.anatomy
    if anatomy.family not in NORMS:
        known = "; ".join(family for family in FAMILIES if family in NORMS)
        raise UnsupportedModelError(f"the final norm of {anatomy.family} is not known; known are {known}")
    trunk = getattr(anatomy.trunk, "vision_model", anatomy.trunk)  # transformers wraps the trunk of CLIP and SigLIP
    tokens, pooled = (_found(trunk, path) for path in NORMS[anatomy.family])
    if isinstance(tokens, nn.Identity) and isinstance(pooled, nn.Identity):
        raise UnsupportedModelError(
            f"{type(anatomy.trunk).__name__} has no norm after its last block: ask for its features before the norm"
        )
    return Norms(tokens, pooled)


def _found(trunk: nn.Module, path: str) -> nn.Module:
    found: object = trunk
    for name in path.split(".") if path else ():
        found = getattr(found, name, None)
    return found if path and isinstance(found, nn.Module) else nn.Identity()
