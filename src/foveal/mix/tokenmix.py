"""TokenMix: paste scattered blocks of cells, weigh both labels by how much of their own map can be seen.

    w_i = sum of T_i outside the mask        w_p = sum of T_p inside it        T: the map, summing to 1
    y   = w_i y_i + w_p y_p

Liu et al., ECCV 2022. One mask for a batch: blocks of random area and aspect (0.3 to 1/0.3) until the partner has
n = floor(N/2) + floor(N/14) of N cells, or a random choice of n cells. In the release N = 196 and 14 cells are added to
one half; a fourteenth keeps that share on other grids. The paper's map is the score that a large teacher gives the
image's own class at each place; here it is any map, by default the attention that patches receive in the model being
trained; HeadCosine(model, threshold=False) is such a score.

An implementation in use weighs the first label by its map inside the mask and the second outside: by what is hidden.

B batch, N = h w cells, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from foveal import maps
from foveal.maps import Source
from foveal.mix.cutmix import paste
from foveal.mix.draws import check_share, draw_mixes, reversed_partners
from foveal.mix.guided import CellMixer
from foveal.mix.mixed import LabelWeights, Mixed, label_rows
from foveal.mix.mixer import Draw, check_images
from foveal.mix.windows import at_pixels

TRIES = 10  # for a block that fits
ASPECT = (0.3, 1 / 0.3)


@dataclass(frozen=True)
class TokenDraw(Draw):
    """Which cells show the partner."""

    mask: Tensor  # (B, h, w) bool; none of an image that is not mixed


@dataclass(frozen=True)
class TokenMixed(Mixed):
    """Labels smoothed as the release does: y = (w_i - s/2) y_i + (w_p - s/2) y_p + s/C, what falls below zero is zero.

    An image that is not mixed is smoothed as any.
    """

    def targets(
        self, labels: Tensor, num_classes: int | None = None, smoothing: float = 0.0, multi_label: bool = False
    ) -> Tensor:
        """(B, C); see Mixed.targets. Several labels at once are smoothed before mixing, as everywhere."""
        usual = super().targets(labels, num_classes, smoothing, multi_label)
        if smoothing == 0.0 or multi_label:
            return usual
        rows = label_rows(labels, num_classes)
        both = self.mix_labels(rows) - smoothing / 2 * (rows + rows[self.perm]) + smoothing / rows.shape[1]
        mixed = (self.keep < 1).flatten(1).any(1, keepdim=True)
        return torch.where(mixed, both.clamp_min(0.0), usual)


def random_cells(grid: tuple[int, int], count: int, rng: torch.Generator) -> Tensor:
    """`count` cells of the grid, all choices alike: (h, w) bool."""
    h, w = grid
    mask = torch.zeros(h * w, dtype=torch.bool)
    mask[torch.randperm(h * w, generator=rng)[:count]] = True
    return mask.reshape(h, w)


def random_blocks(grid: tuple[int, int], count: int, rng: torch.Generator) -> Tensor:
    """Blocks, which may overlap, of `count` cells together: (h, w) bool. Fewer where no block fits any more."""
    h, w = grid
    mask = torch.zeros(h, w, dtype=torch.bool)
    low, high = (math.log(a) for a in ASPECT)
    left = count
    while left > 0:
        for _ in range(TRIES):
            area, aspect, y, x = torch.rand(4, generator=rng, dtype=torch.float64).tolist()
            area, aspect = 1 + area * (left - 1), math.exp(low + aspect * (high - low))
            rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if rows >= h or columns >= w:
                continue
            top, first = int(y * (h - rows + 1)), int(x * (w - columns + 1))
            block = mask[top : top + rows, first : first + columns]
            new = rows * columns - int(block.sum())
            if 1 <= new <= left:
                block.fill_(True)
                left -= new
                break
        else:
            break
    return mask


@dataclass(kw_only=True)
class TokenMix(CellMixer[TokenDraw]):
    """Blocks of the partner's cells, labels by the maps of both.

    pattern: `blocks`, or `random` cells.
    normalise: divide w_i and w_p by their sum, so that targets sum to 1, which cross-entropy needs. With False they may
    sum to anything from 0 to 2 and are smoothed as in the release, which trains one sigmoid per class
    (`step.loss(..., kind="bce")`).
    prob: probability that a step mixes at all.  map, cells: see MapMixer and CellMixer. One draw serves the batch.
    """

    map: str | Source = "received_attention"
    pattern: Literal["blocks", "random"] = "blocks"
    normalise: bool = True
    prob: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("prob", self.prob)
        if self.pattern not in ("blocks", "random"):
            raise ValueError(f"pattern={self.pattern!r} is not known; use 'blocks' or 'random'")

    def draw(
        self, batch: int, image_size: tuple[int, int], grid: tuple[int, int] | None = None, *, rng: torch.Generator
    ) -> TokenDraw:
        """Partners and the mask."""
        perm, (h, w) = reversed_partners(batch), self._grid(grid, image_size)
        mixes = draw_mixes(self.prob, perm, "batch", rng)
        count = min(h * w, h * w // 2 + h * w // 14)
        mask = (random_blocks if self.pattern == "blocks" else random_cells)((h, w), count, rng)
        return TokenDraw(perm, mask & mixes[:, None, None])

    def follows(self, draw: TokenDraw) -> bool:
        """Where cells are pasted."""
        return bool(draw.mask.any())

    def apply(self, images: Tensor, draw: TokenDraw, map: Tensor | None = None) -> Mixed:
        """Paste the drawn cells, and weigh labels by the maps (B, h, w); None weighs them by area."""
        check_images(images, len(draw.perm))
        draw = draw.to(images.device)
        _, h, w = draw.mask.shape
        map = images.new_ones(len(images), h, w, dtype=torch.float32) if map is None else map.detach().float()
        share = maps.on_grid(map, (h, w))
        mass = share.sum((1, 2), keepdim=True)
        share = torch.where(mass > 0, share / mass.clamp_min(torch.finfo(mass.dtype).tiny), 1.0 / (h * w))
        own = (share * ~draw.mask).sum((1, 2))
        partner = (share[draw.perm] * draw.mask).sum((1, 2))
        if self.normalise:
            both, area = own + partner, 1.0 - draw.mask.float().mean((1, 2))
            own = torch.where(both > 0, own / both.clamp_min(torch.finfo(both.dtype).tiny), area)
            partner = 1.0 - own
        pasted = at_pixels(draw.mask, (images.shape[-2], images.shape[-1]))[:, None]
        mixed = paste(images, images[draw.perm], pasted)
        weights = LabelWeights(own, draw.perm, partner)
        kind = Mixed if self.normalise else TokenMixed
        return kind(mixed, draw.perm, (~pasted).float(), (weights,))
