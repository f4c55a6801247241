"""The visible patches through an ordinary timm encoder.

    tokens = patches + positions;   prefix tokens and kept patches go through the blocks        He et al., 2022 (MAE)

The encoder's own parts do the work and stay as they are: embedding, position table, tokens, blocks. Rotary tables are
gathered per kept patch. This fits encoders whose patches are embedded one by one and attend all to all.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.layers import PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from foveal.attention import UnsupportedModelError

UNUSED = ("head", "head_dist", "fc_norm", "attn_pool")  # of the classifier: masked pre-training does not run them

# why not, by class name; whatever else is not a timm ViT or Eva is refused without a reason of its own
REASONS = {
    "SwinTransformer": "it attends in windows, which removed patches leave holes in",
    "SwinTransformerV2": "it attends in windows, which removed patches leave holes in",
    "Hiera": "it pools patches of mask units, so single patches cannot be removed",
    "NaFlexVit": "its images have patch grids of their own and padding",
    "Beit": "its relative position bias is made for the whole grid",
    "CompactTransformer": "its tokens come from convolutions that overlap, so removed pixels would be seen",
    "OptimizedModule": "it is compiled: build the autoencoder from the plain encoder and compile that",
}


def check(encoder: nn.Module) -> None:
    """Raise UnsupportedModelError, with the reason, for an encoder whose patches cannot be left out one by one."""
    name = type(encoder).__name__
    family = next((known for known in (VisionTransformer, Eva) if isinstance(encoder, known)), None)
    if family is None:
        reasons = (REASONS[base.__name__] for base in type(encoder).__mro__ if base.__name__ in REASONS)
        raise _refused(encoder, next(reasons, "it is neither a VisionTransformer nor an Eva of timm"))
    if cast(Any, type(encoder)).forward_features is not family.forward_features:
        raise _refused(encoder, f"{name} has a forward of its own, which cannot be followed for some of its patches")
    embed: Any = encoder.patch_embed
    if not isinstance(embed, PatchEmbed) or not _cuts_patches(embed):
        raise _refused(encoder, "its stem looks across patches, so the pixels of removed patches would be seen")
    if any(size % patch for size, patch in zip(embed.img_size, embed.patch_size, strict=True)):
        raise _refused(encoder, f"images of {embed.img_size} pixels are not whole patches of {embed.patch_size}")
    drop = getattr(encoder, "patch_drop", None)
    if getattr(drop, "prob", 0.0):
        raise _refused(encoder, "it drops patches by itself: set patch_drop_rate=0")


def _cuts_patches(embed: PatchEmbed) -> bool:
    proj = embed.proj
    return (
        isinstance(proj, nn.Conv2d)
        and tuple(proj.kernel_size) == tuple(proj.stride) == tuple(embed.patch_size)
        and tuple(proj.padding) == (0, 0)
        and tuple(proj.dilation) == (1, 1)
    )


def _refused(encoder: nn.Module, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(encoder).__name__} cannot be pre-trained by masking: {why}; what fits is a timm VisionTransformer or "
        "Eva (vit_*, deit*, dinov3, eva02, vit_*_rope) with a plain patch embedding"
    )


def encode(encoder: Any, images: Tensor, keep: Tensor) -> Tensor:
    """Tokens of the kept patches after all blocks and the encoder's final norm, if it has one.

    images: (B, C, H, W) of the encoder's own size.  keep: (B, K) places of the kept patches.
    Returns (B, P + K, D): prefix tokens, then the patches in the order of `keep`. Dropout and drop path are the
    encoder's; under `encoder.set_grad_checkpointing()` each block is checkpointed.
    """
    placed = encoder._pos_embed(encoder.patch_embed(images))  # every timm ViT puts its tokens together here
    x, rope = placed if isinstance(placed, tuple) else (placed, None)
    prefix = encoder.num_prefix_tokens
    patches = x[:, prefix:].gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
    x = encoder.norm_pre(torch.cat([x[:, :prefix], patches], dim=1) if prefix else patches)
    rotary = [None] * len(encoder.blocks) if rope is None else kept_rotary(rope, keep, len(encoder.blocks))
    for block, table in zip(encoder.blocks, rotary, strict=True):
        extra: dict[str, Any] = {} if table is None else {"rope": table}
        if encoder.grad_checkpointing and torch.is_grad_enabled():
            x = checkpoint(block, x, use_reentrant=False, **extra)
        else:
            x = block(x, **extra)
    out: Tensor = encoder.norm(x)
    return out


def kept_rotary(table: Tensor, keep: Tensor, blocks: int) -> list[Tensor]:
    """Each block's rotary table for the kept patches.

    table: (N, d) for all blocks, or (L, H, N, d) where each block and head has its own.  keep: (B, K).
    Returns L tables (B, 1, K, d) or (B, H, K, d).
    """
    if table.dim() == 2:
        return [table[keep][:, None]] * blocks
    return list(table[:, :, keep].transpose(1, 2).unbind(0))  # (L, H, B, K, d) -> (L, B, H, K, d)
