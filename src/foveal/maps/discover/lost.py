"""LOST: the patch with the fewest look-alikes, and what resembles it.

    A = K K',   d_i = #{j != i : A_ij > 0},   seed = argmin d
    S = {s among the k patches of lowest degree : A_seed,s > 0},   M_j = sum_{s in S} A_sj
    mask = the piece of M > 0 that holds the seed;  map = max(M, 0)

Simeoni et al., 2021 (arXiv 2109.14279). The features are not normalised. Of equal degrees the first in row-major order
counts as lower.

B batch, N patches, D width, h x w grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.attention.rows import widen
from foveal.maps.discover.components import boxes_of, component_of, corners
from foveal.maps.discover.discovered import Discovered
from foveal.maps.discover.exactly import exactly
from foveal.maps.discover.tokencut import CHUNK_BYTES, checked_grid
from foveal.maps.found import found


def lost(features: Tensor, grid: tuple[int, int], *, candidates: int = 100) -> Discovered:
    """The object of each image.

    features: (B, N, D) of the patches, row-major.  grid: (h, w) with h w = N.  candidates: k, all patches if N is less.
    `inverted`: M > 0 has three or four of the grid's corners. An image whose seed resembles nothing, itself included,
    is degenerate. Raises ValueError for shapes that do not fit.
    """
    h, w = checked_grid(features, grid)
    if candidates < 1:
        raise ValueError(f"candidates={candidates}: one or more patches are compared with the seed")
    B, N, _ = features.shape
    images = max(1, CHUNK_BYTES.get(features.device.type, CHUNK_BYTES["cuda"]) // (4 * N * N))
    parts = [seed_and_votes(features[i : i + images], candidates) for i in range(0, max(B, 1), images)]
    seed, votes = (torch.cat(column) for column in zip(*parts, strict=True))
    side = votes > 0
    degenerate = ~side.gather(1, seed[:, None])[:, 0]
    seed = seed.masked_fill(degenerate, -1)
    mask = component_of(side.view(-1, h, w), seed)
    base = found(votes.clamp_min(0).masked_fill(degenerate[:, None], 0).view(-1, h, w))
    return Discovered(
        map=base.map,
        blank=base.blank,
        mask=mask,
        boxes=boxes_of(mask),
        seed=seed,
        degenerate=degenerate,
        inverted=(corners(side.view(-1, h, w)) >= 3) & ~degenerate,
    )


def seed_and_votes(features: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
    """The seed (B,) and M (B, N) of features (B, N, D)."""
    x = widen(features.detach())
    with exactly(x):
        A = x @ x.mT
    alike = A > 0
    degree = alike.sum(2) - alike.diagonal(dim1=1, dim2=2).long()
    order = degree.sort(dim=1, stable=True).indices[:, :candidates]
    seed = order[:, :1]
    of_seed = A.gather(1, seed[..., None].expand(-1, -1, A.shape[2]))[:, 0]  # (B, N)
    chosen = (of_seed.gather(1, order) > 0).to(A.dtype)  # (B, k)
    weights = torch.zeros_like(of_seed).scatter_(1, order, chosen)
    return seed[:, 0], (weights[..., None] * A).sum(1)
