"""How salient each token of an image is: what TokenMixup compares.

    S_t = mean over heads of A[class, t]                         models with a class token: its row, patches only
    S_t = mean over heads and queries q of A[q, t]               models without: the column mean

A is the attention of the block that the tokens are about to enter (Choi et al., 2022, equations 2 and 3, with l = 0).
With l > 0 the l blocks after it take part: S is the same row or mean of A_{L+l} ... A_{L+1} A_L (rows are queries, so
the upper map stands left), mean over heads per map, without identity. The paper's baselines: the gradient of the loss
at the pixels, and random numbers.

B batch, N patches, P prefix tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from foveal import maps
from foveal.attention import TokenLayout
from foveal.attention.attended import Attended, rollout

Rows = Literal["auto", "class", "received"]


def by_class(layout: TokenLayout, rows: Rows) -> bool:
    """Whether the class token's row is meant. Raises ValueError where there is none."""
    if rows not in ("auto", "class", "received"):
        raise ValueError(f"rows={rows!r} is not known; use 'auto', 'class' or 'received'")
    if rows == "class" and layout.class_index is None:
        raise ValueError("rows='class' but the model has no class token: use 'received', or 'auto'")
    return rows == "class" or (rows == "auto" and layout.class_index is not None)


def attention_saliency(attended: Sequence[Attended], rows: Rows = "auto") -> Tensor:
    """S of the tokens entering the first of these consecutive blocks: (B, N), no gradient, float32 or wider.

    Prefix columns are dropped and nothing is normalised again: rows sum to at most 1.
    """
    layout = attended[0].layout
    return rollout(attended, by_class(layout, rows))[:, layout.prefix :]


def gradient_saliency(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Root mean square over colours of the loss's gradient at the pixels, mean over each patch: (B, N), rows sum to 1.

    images: (B, channels, H, W).  labels: (B,) or rows (B, C).  A second forward, and a backward that stops at the
    images. A gradient of zeros counts every patch alike.
    """
    grid = maps.cells(model, (images.shape[-2], images.shape[-1]))
    found = maps.make("input_gradient", model)(images, labels)
    map = maps.on_grid(found.map, grid).flatten(1)  # (B, N)
    total = map.sum(-1, keepdim=True)
    return torch.where(total > 0, map / total, 1.0 / map.shape[1])


def random_saliency(batch: int, patches: int, rng: torch.Generator) -> Tensor:
    """Uniform random numbers on the CPU, scaled to rows that sum to 1: (B, N) float32."""
    drawn = torch.rand(batch, patches, generator=rng)
    return drawn / drawn.sum(-1, keepdim=True)
