"""The decoder of a masked autoencoder: visible tokens at their places, one learnt token at all others.

    linear D -> Dd;   mask token where patches were removed;   + fixed positions;   blocks;   norm;   linear Dd -> P

He et al., 2022 (MAE). Prefix tokens (class, registers) pass through and are dropped at the end. It is thrown away
after pre-training.
"""

from __future__ import annotations

from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from foveal.pretrain.initial import initialise
from foveal.pretrain.positions import sincos_table


class Decoder(nn.Module):
    """From the encoder's tokens of visible patches to the numbers of every patch.

    encoder_width: D.  grid: (h, w).  prefix: P, tokens before the patches.  numbers: of one patch.
    Raises ValueError for a width that is no multiple of 4 or of the heads.
    """

    pos_embed: Tensor

    def __init__(
        self,
        encoder_width: int,
        grid: tuple[int, int],
        prefix: int,
        numbers: int,
        width: int = 512,
        depth: int = 8,
        heads: int = 16,
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"decoder_heads={heads} do not share decoder_width={width}: use a divisor of {width}")
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.prefix, self.grad_checkpointing = prefix, False
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", sincos_table(grid, width, prefix)[None])
        self.blocks = nn.ModuleList(Block(width, heads, 4.0, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        self.norm = norm(width)
        self.head = nn.Linear(width, numbers)

    def initialise(self, generator: torch.Generator) -> None:
        """MAE's first weights."""
        initialise(self, generator)

    def forward(self, latent: Tensor, keep: Tensor) -> Tensor:
        """latent: (B, P + K, D), patches in the order of `keep` (B, K).  Returns (B, N, numbers)."""
        x = self.embed(latent).to(self.mask_token.dtype)  # under autocast the residual stream is float32, as in MAE
        N = self.pos_embed.shape[1] - self.prefix
        places = keep[..., None].expand(-1, -1, x.shape[-1])
        patches = self.mask_token.expand(len(x), N, -1).scatter(1, places, x[:, self.prefix :])
        x = torch.cat([x[:, : self.prefix], patches], dim=1) + self.pos_embed
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        prediction: Tensor = self.head(self.norm(x[:, self.prefix :]))
        return prediction
