"""A masked autoencoder around an ordinary timm vision transformer.

    hide most patches;  encode those that are left;  decode all places;  regress the hidden pixels

He, Chen, Xie, Li, Dollar, Girshick, "Masked Autoencoders Are Scalable Vision Learners", 2022. The encoder stays a plain
timm model: its state dict is what is kept of the pre-training.

>>> encoder = timm.create_model("vit_small_patch16_224", num_classes=0)        # doctest: +SKIP
>>> autoencoder = MaskedAutoencoder(encoder)                                   # doctest: +SKIP
>>> autoencoder.initialise(seed=0)                                             # doctest: +SKIP
>>> out = autoencoder(images, noise)                                           # doctest: +SKIP
>>> guided_reconstruction(out.prediction, autoencoder.target(images), out.removed).loss.backward()   # doctest: +SKIP
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from foveal import chance
from foveal.pretrain.decoder import Decoder
from foveal.pretrain.encoding import UNUSED, check, encode
from foveal.pretrain.initial import initialise
from foveal.pretrain.masking import kept, random_masking
from foveal.pretrain.patches import denormalise, normalise, patchify, unpatchify
from foveal.pretrain.positions import sincos_table


@dataclass(frozen=True)
class Reconstruction:
    """What the autoencoder made of a batch.

    prediction: (B, N, P) of every patch, visible ones too.  removed: (B, N) float32, 1 for a patch that was hidden.
    latent: (B, prefix + K, D), the encoder's tokens after the final norm, kept patches in shuffled order.
    """

    prediction: Tensor
    removed: Tensor
    latent: Tensor


class MaskedAutoencoder(nn.Module):
    """MAE on a timm VisionTransformer or Eva of any grid, with or without class token and registers.

    encoder: taken as it is. During pre-training its position table and the classifier's parts, which are not run, do
    not require gradients; `release()` gives it back as it came. An encoder without a final norm of its own (timm's
    average pooling puts `fc_norm` behind the pool) gets one here, `latent_norm`, that is dropped with the decoder.
    mask_ratio: share of patches to hide.  norm_pix_loss: predict patches of mean 0 and deviation 1.

    image_size (H, W) and patch_size (p, q) in pixels, grid (h, w) are the encoder's when the autoencoder is built.

    The decoder starts with MAE's first weights; `initialise` also starts the encoder anew.
    Raises UnsupportedModelError for an encoder whose patches cannot be hidden, ValueError for other settings.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = False,
    ) -> None:
        super().__init__()
        check(encoder)
        self.encoder = cast(Any, encoder)
        self.mask_ratio, self.norm_pix_loss = mask_ratio, norm_pix_loss
        embed = self.encoder.patch_embed
        self.image_size, self.grid, self.patch_size = (
            (int(size[0]), int(size[1])) for size in (embed.img_size, embed.grid_size, embed.patch_size)
        )
        (p, q), channels, N = self.patch_size, int(embed.proj.in_channels), self.grid[0] * self.grid[1]
        if kept(N, mask_ratio) == N:
            warnings.warn(f"mask_ratio={mask_ratio} removes none of {N} patches: the loss is 0", stacklevel=2)
        if norm_pix_loss and p * q * channels < 2:
            raise ValueError("norm_pix_loss needs patches of more than one number: a single one has no deviation")
        width, prefix = int(self.encoder.embed_dim), int(self.encoder.num_prefix_tokens)
        like = embed.proj.weight
        with chance.seeded(0, "init"):  # torch fills new layers from the global generator
            self.decoder = Decoder(
                width, self.grid, prefix, p * q * channels, decoder_width, decoder_depth, decoder_heads
            )
        self.decoder.initialise(chance.generator(0, "init", 1))
        bare = isinstance(self.encoder.norm, nn.Identity)
        self.latent_norm = nn.LayerNorm(width, eps=1e-6) if bare else nn.Identity()
        self.decoder.to(like.device, like.dtype)
        self.latent_norm.to(like.device, like.dtype)
        self._asked = {name: p.requires_grad for name, p in encoder.named_parameters()}
        for name, parameter in encoder.named_parameters():
            if name == "pos_embed" or name.partition(".")[0] in UNUSED:
                parameter.requires_grad_(False)

    def initialise(self, seed: int) -> None:
        """Start anew with MAE's first weights, in encoder and decoder, and its fixed position tables.

        Draws from ("init", 0) for the encoder and ("init", 1) for the decoder: another decoder leaves the encoder's
        start as it is. What pre-training does not run (a classifier) is left alone.
        """
        initialise(self.encoder, chance.generator(seed, "init", 0), skip=UNUSED)
        initialise(self.latent_norm, chance.generator(seed, "init", 0))
        self.decoder.initialise(chance.generator(seed, "init", 1))
        table = self.encoder.pos_embed
        if table is not None:
            prefix = 0 if self.encoder.no_embed_class else self.decoder.prefix
            with torch.no_grad():
                table.copy_(sincos_table(self.grid, table.shape[-1], prefix))

    def forward(self, images: Tensor, noise: Tensor) -> Reconstruction:
        """images: (B, C, H, W) normalised, of the encoder's size.  noise: (B, N), the patches of least noise are kept.

        Draws nothing but the encoder's dropout. Raises ValueError for other sizes.
        """
        self._check(images)
        if tuple(noise.shape) != (len(images), self.grid[0] * self.grid[1]):
            raise ValueError(
                f"noise {tuple(noise.shape)} for {len(images)} images of {self.grid[0]} x {self.grid[1]} patches: give "
                f"({len(images)}, {self.grid[0] * self.grid[1]}), such as torch.rand from foveal.chance.generator"
            )
        masking = random_masking(noise.to(images.device, non_blocking=True), self.mask_ratio)
        latent = self.latent_norm(encode(self.encoder, images, masking.keep))
        return Reconstruction(self.decoder(latent, masking.keep), masking.removed, latent)

    def target(self, images: Tensor) -> Tensor:
        """What is to be predicted, (B, N, P) in float32 (float64 stays): pixels, normalised where norm_pix_loss."""
        patches = self._patches(images)
        return normalise(patches) if self.norm_pix_loss else patches

    @torch.no_grad()
    def picture(self, images: Tensor, out: Reconstruction) -> Tensor:
        """(B, C, H, W) like `images`: visible patches as they are, hidden ones as predicted, in true pixels.

        Predictions of normalised patches get the mean and deviation of the true patch back.
        """
        patches = self._patches(images)
        made = out.prediction.to(patches.dtype)
        made = denormalise(made, patches) if self.norm_pix_loss else made
        return unpatchify(torch.where(out.removed[..., None] > 0, made, patches), self.grid, self.patch_size)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks of encoder and decoder in the backward pass instead of keeping what they need for it."""
        self.encoder.set_grad_checkpointing(enable)
        self.decoder.grad_checkpointing = enable

    def release(self) -> nn.Module:
        """The encoder, its parameters requiring gradients as they did before pre-training."""
        encoder: nn.Module = self.encoder
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(self._asked[name])
        return encoder

    def _patches(self, images: Tensor) -> Tensor:
        self._check(images)
        return patchify(images.to(torch.promote_types(images.dtype, torch.float32)), self.patch_size)

    def _check(self, images: Tensor) -> None:
        size = self.image_size
        if images.dim() != 4 or tuple(images.shape[2:]) != size:
            raise ValueError(
                f"images {tuple(images.shape)}: this autoencoder was built for (B, C, {size[0]}, {size[1]}); "
                "resize them, or set the encoder's img_size (encoder.set_input_size) before building it"
            )
