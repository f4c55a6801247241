"""MaskCut: several objects, by cutting again without what was found.

    round t: features of all cells masked so far set to 0, TokenCut of the rest
    side     the seed's; the other one if the seed's has three or four of the grid's corners
    seed     argmax y on that side;   mask = its piece
    t > 1    nothing if the mask overlaps the previous round's by IoU > 0.5 or covers no more than 1 % of the grid
    object t = mask less the objects before

Wang et al. (CutLER), 2023 (arXiv 2301.11320). A vector of zeros resembles nothing, itself included. A mask that was
refused is not set to 0, and the next round compares with nothing, so it may find the same again. The release counts
the corners of the side y > mean(y), whose sign is the solver's choice; here it is the seed's side, for either sign.

B batch, N patches, D width, K objects, h x w grid of any shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.maps.discover.components import boxes_of, component_of
from foveal.maps.discover.discovered import Objects
from foveal.maps.discover.tokencut import checked_grid, cut_features, object_side
from foveal.maps.found import found

MAX_IOU = 0.5  # with the round before
MIN_CELLS = 100  # a mask of no more than one cell in so many is left out


def maskcut(
    features: Tensor, grid: tuple[int, int], *, objects: int = 3, tau: float = 0.15, eps: float = 1e-5
) -> Objects:
    """Up to `objects` objects of each image; the first is TokenCut's with foreground='corners'.

    features: (B, N, D) of the patches, row-major, any scale.  grid: (h, w) with h w = N.  tau, eps: see `graph`.
    Raises ValueError for settings that make no graph and shapes that do not fit.
    """
    h, w = checked_grid(features, grid)
    if objects < 1:
        raise ValueError(f"objects={objects}: look for one or more")
    painted = features.new_zeros(features.shape[:2], dtype=torch.bool)
    taken = previous = painted.view(-1, h, w)
    rounds = []
    for t in range(objects):
        cut = cut_features(features.masked_fill(painted[..., None], 0.0), tau, eps)
        chosen = object_side(cut.vector, grid, "corners")
        seed = chosen.seed.masked_fill(cut.degenerate, -1)
        mask = component_of(chosen.side.view(-1, h, w), seed)
        if t:
            mask = mask & (iou(previous, mask) <= MAX_IOU)[:, None, None]
            mask = mask & (MIN_CELLS * mask.sum((1, 2)) > h * w)[:, None, None]
            seed = seed.masked_fill(~mask.flatten(1).any(1), -1)
        rounds.append((mask & ~taken, seed, cut.degenerate, chosen.inverted & ~cut.degenerate, chosen.eigenvector))
        taken, previous, painted = taken | mask, mask, painted | mask.flatten(1)
    masks, seeds, degenerate, inverted, vectors = (torch.stack(column, 1) for column in zip(*rounds, strict=True))
    base = found(masks.any(1))
    return Objects(
        map=base.map,
        blank=base.blank,
        masks=masks,
        boxes=boxes_of(masks),
        seeds=seeds,
        degenerate=degenerate,
        inverted=inverted,
        eigenvectors=vectors.float().unflatten(-1, grid),
    )


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of masks (B, h, w) bool: (B,), 0 where both are empty."""
    return (a & b).sum((-2, -1)) / (a | b).sum((-2, -1)).clamp_min(1)
