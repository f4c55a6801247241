"""PuzzleMix's transport: move the salient blocks of an image to where it will be seen.

    cost_ij = t_eps C_ij - g_i [block j is seen]        C = squared distance / (n - 1)^2,  g = share of saliency

In n rounds every block i claims the place j that costs it least; the cheapest claim of a place wins it, and for the
others that place costs 1 more. Who wins in the last round moves. Equal costs go to the first place and the first block.

B images, h x w blocks, N = h w, n = max(h, w).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

COSTS_AT_ONCE = 2**25  # 128 MB of costs; more images are planned one after another


@dataclass(frozen=True)
class Plan:
    """Which block is shown where."""

    shown: Tensor  # (B, N) int64, the block that each place shows; its own where none moves there
    won: Tensor  # (B, N) bool, whether a block moved to (or stayed at) the place; the others are not seen


def distances(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """C of a grid: (N, N) float32."""
    h, w = grid
    rows, columns = torch.arange(h, device=device), torch.arange(w, device=device)
    place = torch.cartesian_prod(rows, columns)
    squared = (place[:, None] - place[None, :]).square().sum(-1)
    return squared.float().div(max(1, max(h, w) - 1) ** 2)


def plan(saliency: Tensor, seen: Tensor, t_eps: float) -> Plan:
    """Where the blocks of each image go. saliency: (B, h, w) float32, sums of 1.  seen: (B, h, w) bool."""
    h, w = saliency.shape[1:]
    apart = t_eps * distances((h, w), saliency.device)
    at_once = max(1, COSTS_AT_ONCE // apart.numel())
    parts = [
        _plan(apart, g.flatten(1), z.flatten(1), max(h, w))
        for g, z in zip(saliency.split(at_once), seen.split(at_once), strict=True)
    ]
    return Plan(torch.cat([part.shown for part in parts]), torch.cat([part.won for part in parts]))


def _plan(apart: Tensor, saliency: Tensor, seen: Tensor, rounds: int) -> Plan:
    B, N = saliency.shape
    cost = (apart - saliency[:, :, None] * seen[:, None, :]).flatten(0, 1)  # (B N, N) of every block at place j
    value, claim = cost.min(-1)
    blocks = torch.arange(N, device=cost.device).expand(B, N)
    winner = nobody = torch.full_like(blocks, N)
    for _ in range(rounds):
        price, place = value.view(B, N), claim.view(B, N)  # by block
        least = torch.full_like(price, torch.inf).scatter_reduce(1, place, price, "amin")  # by place
        is_least = price == least.gather(1, place)
        winner = nobody.scatter_reduce(1, place, torch.where(is_least, blocks, nobody), "amin")  # (B, N) by place
        lost = (winner.gather(1, place) != blocks).flatten().nonzero().flatten()
        if not len(lost):
            break
        cost[lost, claim[lost]] += 1
        value[lost], claim[lost] = cost[lost].min(-1)  # the others claim what they claimed
    won = winner < N
    return Plan(torch.where(won, winner, blocks), won)


def cut(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """The blocks of images: (B, N, channels, H/h, W/w). H and W are multiples of the grid (h, w)."""
    h, w = grid
    blocks: Tensor = images.unflatten(3, (w, -1)).unflatten(2, (h, -1)).permute(0, 2, 4, 1, 3, 5)
    return blocks.flatten(1, 2)


def joined(blocks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Images of blocks: (B, channels, H, W)."""
    placed: Tensor = blocks.unflatten(1, grid).permute(0, 3, 1, 4, 2, 5)
    return placed.flatten(4, 5).flatten(2, 3)


def seen_at_home(weight: Tensor, blocks: Plan) -> Tensor:
    """How much of each block can be seen, in the image's own frame: (B, h, w). weight: (B, h, w), of each place."""
    home = torch.zeros_like(weight).flatten(1)
    return home.scatter_add(1, blocks.shown, weight.flatten(1) * blocks.won).view_as(weight)
