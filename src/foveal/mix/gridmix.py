"""GridMix: show the partner through a grid of holes.

    cell = ceil(w_c / n) wide, hole = floor(cell sqrt(1 - lam0)) at the top left of each cell of a random crop
    x = partner in the holes, image elsewhere        lam = 1 - share of pixels in holes

The mask of the GridMixup project (Dobrynin, 2020), which is what benchmarks call GridMix; the paper of that name (Baek
et al., 2021) exchanges random cells of a grid and adds a patch loss, which is not here. A hole keeps lam0 of its cell
only roughly and the crop is a part of the image, so the label is counted from the mask, never taken from lam0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.mix.cutmix import paste
from foveal.mix.draws import (
    Mode,
    check_alpha,
    check_mode,
    check_share,
    draw_beta,
    draw_mixes,
    draw_uniform,
    reversed_partners,
)
from foveal.mix.mixed import LabelWeights, Mixed
from foveal.mix.mixer import Draw, Mixer, check_images

LAM0 = (0.1, 0.9)  # range of the requested weight, as released
CROP_SHARE, CROP_ASPECT = (0.5, 1.0), (0.5, 2.0)  # area of the crop as a share of the image; its height over its width


@dataclass(frozen=True)
class GridDraw(Draw):
    """A grid of holes per image, in pixels; (height, width) each."""

    start: Tensor  # (B, 2) int64, top left of the crop; may lie outside the image
    crop: Tensor  # (B, 2) int64, may reach beyond the image
    cell: Tensor  # (B, 2) int64
    hole: Tensor  # (B, 2) int64, smaller than the cell; zeros where nothing is mixed


def grids(
    lam0: Tensor, holes: Tensor, share: Tensor, aspect: Tensor, place: Tensor, image_size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Start, crop, cell and hole of each grid, (B, 2) int64 each.

    lam0: (B,) requested weight.  holes: (B,) int64 across; a crop of w_c pixels holds at most w_c/2.
    share: (B,) area of the crop over the image's.  aspect: (B,) its height over its width.
    place: (B, 2) in [0, 1), of the crop, row and column.
    A long crop can be larger than the image on one side; what falls outside is not seen.
    """
    H, W = image_size
    area = (H * W * share).long()
    width = (area / aspect).sqrt().long().clamp_min(1)
    crop = torch.stack([(width * aspect).long().clamp_min(1), width], dim=-1)
    start = ((torch.tensor(image_size) - crop) * place).long()
    across = torch.minimum(holes, width // 2).clamp_min(1)
    side = -(-width // across)  # rounded up
    hole = (side * (1.0 - lam0).sqrt()).long().clamp_min(1)
    hole = torch.minimum(hole, side - 1)
    return start, crop, torch.stack([side, side], dim=-1), torch.stack([hole, hole], dim=-1)


def in_holes(start: Tensor, crop: Tensor, cell: Tensor, hole: Tensor, pixels: int) -> Tensor:
    """Which pixels along one side lie in holes: (B, pixels) bool. All others (B,)."""
    offset = torch.arange(pixels, device=start.device) - start[:, None]
    return (offset >= 0) & (offset < crop[:, None]) & (offset % cell[:, None] < hole[:, None])


@dataclass(kw_only=True)
class GridMix(Mixer[GridDraw]):
    """Show the partner through a grid of holes.

    holes: fewest and most holes across the crop, both included.
    alpha: 0 draws the requested weight lam0 evenly from [0.1, 0.9], as released; above 0 from Beta(alpha, alpha), of
    which benchmarks use 0.2.
    prob: probability that a draw mixes at all.  mode: what shares a draw, `batch`, `pair` or `elem`.
    """

    holes: tuple[int, int] = (2, 6)
    alpha: float = 0.0
    prob: float = 1.0
    mode: Mode = "batch"

    def __post_init__(self) -> None:
        self.holes = (int(self.holes[0]), int(self.holes[1]))
        if not 1 <= self.holes[0] <= self.holes[1]:
            raise ValueError(f"holes={self.holes} are the fewest and the most holes across, such as (2, 6)")
        check_alpha("alpha", self.alpha, zero="")
        check_share("prob", self.prob)
        check_mode(self.mode)

    def draw(
        self, batch: int, image_size: tuple[int, int], grid: tuple[int, int] | None = None, *, rng: torch.Generator
    ) -> GridDraw:
        """Partners and grids."""
        perm = reversed_partners(batch)
        mixes = draw_mixes(self.prob, perm, self.mode, rng)

        def between(low: float, high: float) -> Tensor:
            return low + (high - low) * draw_uniform(batch, self.mode, rng)

        lam0 = draw_beta(self.alpha, batch, self.mode, rng) if self.alpha > 0.0 else between(*LAM0)
        holes = between(self.holes[0], self.holes[1] + 1).long()
        share, aspect = between(*CROP_SHARE), between(*CROP_ASPECT)
        place = torch.stack([between(0.0, 1.0), between(0.0, 1.0)], dim=-1)
        start, crop, cell, hole = grids(lam0, holes, share, aspect, place, image_size)
        return GridDraw(perm, start, crop, cell, hole * mixes[:, None])

    def apply(self, images: Tensor, draw: GridDraw) -> Mixed:
        """Show the partner in the drawn holes."""
        check_images(images, len(draw.perm))
        draw = draw.to(images.device)
        rows, columns = (  # (B, H), (B, W)
            in_holes(draw.start[:, i], draw.crop[:, i], draw.cell[:, i], draw.hole[:, i], images.shape[2 + i])
            for i in (0, 1)
        )
        shown = (rows[:, :, None] & columns[:, None, :])[:, None]
        share = rows.float().mean(1) * columns.float().mean(1)  # the mean of a product of rows and columns
        weights = LabelWeights(1.0 - share, draw.perm, share)
        return Mixed(paste(images, images[draw.perm], shown), draw.perm, (~shown).float(), (weights,))
