"""Region loss: the mean of each image's visible patches is to tell that image's own class.

    e_T = sum_n keep_n z_n / sum_n keep_n        e_S = sum_n (1 - keep_n) z_n / sum_n (1 - keep_n)
    L_fine = 1/B sum_i 1/2 [ CE(H e_T, y_i) + CE(H e_S, y_p(i)) ]

z are the patch tokens after the last norm in the training forward on mixed images, H a linear layer of its own that is
thrown away after training. From SMMix (Chen et al., 2023), also in TdAttenMix's release for DeiT.

B batch, N patches, C classes, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foveal import chance
from foveal.attention import Seen, UnsupportedModelError, read
from foveal.maps import MapModelError
from foveal.maps.asking import asking
from foveal.maps.features import features, last_norm, width


def region_means(tokens: Tensor, share: Tensor) -> Tensor:
    """Mean token of a region: (B, D), zero for a region without cells.

    tokens: (B, N, D).  share: (B, N) in [0, 1], how much of each cell belongs to it.
    """
    share = share.to(tokens.dtype)
    return torch.einsum("bn,bnd->bd", share, tokens) / share.sum(1, keepdim=True).clamp_min(1e-6)


def region_loss(tokens: Tensor, keep: Tensor, head: nn.Module, rows: Tensor, perm: Tensor) -> Tensor:
    """Cross-entropy of both regions, half each, mean over the batch: a scalar. A region without cells costs nothing.

    tokens: (B, N, D).  keep: (B, N) share of each cell that is the first image.  head: (B, D) to (B, C).
    rows: (B, C) labels of the images before mixing.  perm: (B,) partners.
    """
    shares = torch.cat([keep, 1.0 - keep])  # (2B, N)
    logits = head(region_means(torch.cat([tokens, tokens]), shares))
    losses = -(torch.cat([rows, rows[perm]]) * logits.log_softmax(-1)).sum(-1)
    return torch.where(shares.sum(1) > 0, losses, 0.0).mean()


def region_head(model: nn.Module, num_classes: int, seed: int = 0) -> nn.Linear:
    """A new linear head for the patches of a vision transformer, on the model's device.

    Raises ValueError for a model without such patches.
    """
    try:
        region_reader(model)
        last_norm(model)
        head = nn.Linear(width(model), num_classes)
    except (UnsupportedModelError, MapModelError, ValueError) as error:
        raise ValueError(
            f"region compares the patches of a vision transformer; set region=0 for {type(model).__name__}: {error}"
        ) from error
    nn.init.trunc_normal_(head.weight, std=0.02, generator=chance.generator(seed, "init"))
    nn.init.zeros_(head.bias)
    return head.to(next(model.parameters()).device)


def region_reader(model: nn.Module) -> Seen:
    """Reads what the last block gives."""
    return read(model, layers=-1, what="block_out")


def region_tokens(model: nn.Module, seen: Seen) -> Tensor:
    """(B, N, D) float32 patch tokens after the last norm, of the forward that was read; with its gradient."""
    tokens: Tensor = seen.block_out()
    norm = last_norm(model)
    weight = next(p for p in model.parameters() if p.is_floating_point())
    with torch.autocast(tokens.device.type, enabled=False):  # the training step's may have ended
        return norm(tokens.to(weight.dtype)).float()


def check_regions(model: nn.Module, images: Tensor) -> None:
    """Raise ValueError unless the patches of the last block, through the last norm, are what the model's head reads."""
    with asking(model), region_reader(model) as seen:
        expected = features(model, images).tokens.float()
        same = torch.allclose(region_tokens(model, seen), expected, rtol=0.02, atol=0.02)  # 8 bits under autocast
    if not same:
        raise ValueError(
            f"region compares the patches that the head reads, but those of {type(model).__name__} change after its "
            "last self-attention block: set region=0 for this model"
        )
