"""Compact transformers for small images: CCT, CVT and ViT-Lite (Hassani et al., 2021).

    tokens = patches or convolutions;  (class token);  + positions
    L times   x <- x + Attn(LN1(x));  x <- LN2(x);  x <- x + MLP(x)
    LN, then   sequence pooling (CCT, CVT)  or  the class token (ViT-Lite),  then a linear layer

The three families share the encoder: ViT-Lite has patches and a class token, CVT patches and sequence pooling, CCT
convolutions and sequence pooling. The second residual starts from the *normalised* tokens. That began as a slip in the
authors' code and was kept, since every checkpoint and every published number has it; it is why timm's Block, which adds
to x itself, cannot be used here. All parts below it are timm's: Attention (without query, key and value biases), Mlp,
DropPath, PatchEmbed.

The models follow timm's interface, so that what trains, reads or explains a timm ViT does the same with them.
"""

from __future__ import annotations

from math import isqrt
from typing import Any, Literal

import torch
from timm.layers import DropPath, Mlp, PatchEmbed
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from foveal.models.pooling import SequencePool
from foveal.models.positions import resize_table, sine_table
from foveal.models.tokenizer import ConvTokenizer, pair

POSITIONS = ("learnable", "sine", "none")


class Block(nn.Module):
    """One encoder layer; its second residual starts from the normalised tokens. Drop paths are drawn separately."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads=num_heads, qkv_bias=False, attn_drop=attn_drop, proj_drop=proj_drop)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, D).  Returns (B, T, D)."""
        x = self.norm2(x + self.drop_path1(self.attn(self.norm1(x))))
        out: Tensor = x + self.drop_path2(self.mlp(x))
        return out


class CompactTransformer(nn.Module):
    """CCT (conv_layers > 0), CVT (conv_layers = 0) or ViT-Lite (conv_layers = 0 and class_token).

    img_size: (H, W) or one number; the position table is made for it, and other images are refused unless pos_embed is
    none (see set_input_size).  conv_layers, kernel_size: convolutions of the tokenizer; 0: patches of kernel_size
    pixels.  pos_embed: `learnable`, `sine` (fixed) or `none`.  class_token: read the class token, instead of sequence
    pooling.  global_pool: None for what fits; "" gives forward_head the tokens unpooled.
    attn_drop_rate: of attention probabilities; drop_path_rate: of the last block, from 0 in the first. These two are
    0.1 in every published model, whatever its training script is told; proj_drop_rate (attention output and MLP),
    pos_drop_rate (tokens with positions) and drop_rate (before the classifier) are 0.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        in_chans: int = 3,
        num_classes: int = 10,
        global_pool: Literal["seq", "token", ""] | None = None,
        kernel_size: int = 3,
        conv_layers: int = 1,
        stride: int | None = None,
        padding: int | None = None,
        embed_dim: int = 256,
        depth: int = 7,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        class_token: bool = False,
        pos_embed: Literal["learnable", "sine", "none"] = "learnable",
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.1,
        drop_path_rate: float = 0.1,
    ) -> None:
        super().__init__()
        if pos_embed not in POSITIONS:
            raise ValueError(f"pos_embed={pos_embed!r} is not known; use one of {', '.join(POSITIONS)}")
        if conv_layers == 0 and (stride is not None or padding is not None):
            raise ValueError("patches (conv_layers=0) lie side by side: stride and padding belong to convolutions")
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = 1 if class_token else 0
        self.global_pool = self._pooling(global_pool, class_token)
        self.positions = pos_embed
        self.grad_checkpointing = False

        self.patch_embed: Any
        if conv_layers:
            self.patch_embed = ConvTokenizer(img_size, kernel_size, conv_layers, in_chans, embed_dim, stride, padding)
        else:
            fixed = pos_embed != "none"
            size = pair(img_size)
            self.patch_embed = PatchEmbed(size, kernel_size, in_chans, embed_dim, strict_img_size=fixed)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.pos_embed: Tensor | None
        tokens = self.num_prefix_tokens + self.patch_embed.num_patches
        if pos_embed == "learnable":
            self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim))
        else:
            self.register_buffer("pos_embed", sine_table(tokens, embed_dim) if pos_embed == "sine" else None)
        self.pos_drop = nn.Dropout(pos_drop_rate)
        rates = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.Sequential(
            *(Block(embed_dim, num_heads, mlp_ratio, proj_drop_rate, attn_drop_rate, rate) for rate in rates)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.seq_pool = None if class_token else SequencePool(embed_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Kaiming normal convolutions, linear layers of deviation 0.02, positions of deviation 0.2 (not 0.02)."""
        self.apply(_init)
        if isinstance(self.pos_embed, nn.Parameter):
            nn.init.trunc_normal_(self.pos_embed, std=0.2)

    # -- the forward

    def forward_features(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W).  Returns tokens (B, T, D) after the last norm, the class token first where there is one.

        Raises ValueError for images whose tokens do not fill the position table.
        """
        self._check_size((int(x.shape[-2]), int(x.shape[-1])))
        x = self.patch_embed(x)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        x = self.pos_drop(x)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        normed: Tensor = self.norm(x)
        return normed

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """x: (B, T, D) from forward_features.  Returns logits (B, C); pre_logits: what the classifier reads, (B, D)."""
        if self.global_pool == "seq":
            assert self.seq_pool is not None
            x = self.seq_pool(x)
        elif self.global_pool == "token":
            x = x[:, 0]
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W), normalised.  Returns logits (B, C)."""
        return self.forward_head(self.forward_features(x))

    def _check_size(self, size: tuple[int, int]) -> None:
        grid = self.patch_embed.dynamic_feat_size(size)
        if self.pos_embed is not None and grid != self.patch_embed.grid_size:
            raise ValueError(
                f"the position table is that of {tuple(self.patch_embed.img_size)} pixels, but the images have {size}: "
                f"build the model with img_size={size}, or call model.set_input_size({size}), which resizes the table"
            )

    # -- other images

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Take images of another size from now on, (H, W) in pixels; the position table is resized, in place."""
        old = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size=pair(img_size))
        if self.pos_embed is None:
            return
        with torch.no_grad():
            table = self.fitted_positions(self.pos_embed, old)
        if isinstance(self.pos_embed, nn.Parameter):
            table = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)
        self.pos_embed = table

    def fitted_positions(self, table: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """A position table of another grid, brought to this model's: (1, T', D) to (1, T, D).

        grid: of the table; None: a square.  A table of sines gets the sines of the new tokens, any other is resized
        bilinearly, the class token's row kept. Raises ValueError for a table of no square grid.
        """
        prefix, new = self.num_prefix_tokens, self.patch_embed.grid_size
        patches = table.shape[1] - prefix
        side = isqrt(max(0, patches))
        old = (side, side) if grid is None else grid
        if grid is None and side * side != patches:
            raise ValueError(f"{patches} patches form no square: say which grid (h, w) the position table is of")
        sines = sine_table(table.shape[1], table.shape[2]).to(table)
        if self.positions == "sine" and torch.allclose(table, sines, atol=1e-3):
            return sine_table(prefix + new[0] * new[1], table.shape[2]).to(table)
        return resize_table(table, old, new, prefix)

    # -- what timm asks of a model

    def get_classifier(self) -> nn.Module:
        """The classifier: one linear layer, or Identity without classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier for num_classes (0: none); global_pool as in the constructor, None leaves it."""
        if global_pool is not None:
            self.global_pool = self._pooling(global_pool, self.cls_token is not None)
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.head.apply(_init).to(self.norm.weight)
        self.head.train(self.training)

    def no_weight_decay(self) -> set[str]:
        """None: the published recipes decay every parameter of two or more axes, the position table included."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which layer a parameter belongs to, for learning rates that fall with depth."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward instead of keeping what is inside it."""
        self.grad_checkpointing = enable

    @staticmethod
    def _pooling(asked: str | None, class_token: bool) -> str:
        fits = "token" if class_token else "seq"
        if asked not in (None, "", fits):
            has = "a class token" if class_token else "sequence pooling"
            raise ValueError(f"global_pool={asked!r}: this model has {has}, so use {fits!r}, or '' for no pooling")
        return fits if asked is None else asked


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight)
