"""AttentiveMix+: keep the cells of an image that are looked at most, show the partner in all others.

    mask_i = the k cells of the image's own map that are largest        x = mask x_i + (1 - mask) x_p
    k = min(max(floor(N lam), 1), N),  lam ~ Beta(alpha, alpha)         label weight of the image k / N

Walawalkar et al., 2020 (Attentive CutMix: k fixed, 6 of 49 cells); k by chance is the variant that is benchmarked as
AttentiveMix+. Both take the map from a second, pre-trained network; here it is any map, by default the attention that
patches receive in the model being trained. Equal cells are taken in random order; of a thresholded map, which is mostly
zero, that would be nearly all: for labels use HeadCosine(model, threshold=False).

B batch, N = h w cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal import maps
from foveal.maps import Source
from foveal.mix.cutmix import paste
from foveal.mix.draws import Mode, check_alpha, check_mode, check_share, draw_beta, draw_mixes, reversed_partners
from foveal.mix.guided import CellMixer
from foveal.mix.mixed import LabelWeights, Mixed
from foveal.mix.mixer import Draw, check_images
from foveal.mix.windows import at_pixels


@dataclass(frozen=True)
class CellsDraw(Draw):
    """How many cells each image keeps."""

    grid: Tensor  # (2,) int64, cells h and w
    count: Tensor  # (B,) int64 cells kept, from 1 to N
    order: Tensor  # (B, N) int64, a random order of the cells, in which equal ones are taken


def largest_cells(values: Tensor, count: Tensor, order: Tensor) -> Tensor:
    """Which cells are among the `count` largest: (B, N) bool, exactly `count` in a row.

    values: (B, N).  count: (B,).  order: (B, N), a permutation in each row; equal values are taken in this order.
    """
    shuffled = values.gather(1, order)
    ranked = order.gather(1, shuffled.sort(dim=1, descending=True, stable=True).indices)  # cells, largest first
    rank = torch.arange(values.shape[1], device=values.device).expand_as(ranked)
    return torch.zeros_like(ranked).scatter(1, ranked, rank) < count[:, None]


@dataclass(kw_only=True)
class AttentiveMix(CellMixer[CellsDraw]):
    """Keep what is looked at most, in whole cells.

    alpha: of Beta(alpha, alpha), above 0.  share: fixed share of cells in place of the draw; 6/49 in the first paper.
    prob: probability that a draw mixes at all.  mode: what shares a draw, `batch`, `pair` or `elem`.
    map, cells: see MapMixer and CellMixer.
    """

    map: str | Source = "received_attention"
    alpha: float = 2.0
    share: float | None = None
    prob: float = 1.0
    mode: Mode = "batch"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_alpha("alpha", self.alpha, zero="use mix 'none'")
        check_share("prob", self.prob)
        check_mode(self.mode)
        if self.share is not None and not 0.0 < self.share <= 1.0:
            raise ValueError(f"share={self.share} is the share of cells that an image keeps: use a value in (0, 1]")

    def draw(
        self, batch: int, image_size: tuple[int, int], grid: tuple[int, int] | None = None, *, rng: torch.Generator
    ) -> CellsDraw:
        """Partners, numbers of cells, and an order for ties."""
        perm, (h, w) = reversed_partners(batch), self._grid(grid, image_size)
        mixes = draw_mixes(self.prob, perm, self.mode, rng)
        share = draw_beta(self.alpha, batch, self.mode, rng)
        if self.share is not None:
            share = torch.full_like(share, self.share)
        count = (share * (h * w) + 1e-9).long().clamp(1, h * w)  # 6/49 of 49 cells may come out just below 6
        order = torch.rand(batch, h * w, generator=rng).argsort(dim=1)
        return CellsDraw(perm, torch.tensor((h, w)), torch.where(mixes, count, h * w), order)

    def follows(self, draw: CellsDraw) -> bool:
        """Where an image loses a cell."""
        return bool((draw.count < draw.order.shape[1]).any())

    def apply(self, images: Tensor, draw: CellsDraw, map: Tensor | None = None) -> Mixed:
        """Keep the largest cells of the maps (B, h, w); None keeps any."""
        check_images(images, len(draw.perm))
        h, w = draw.grid.tolist()  # asks the draw, which is on the CPU
        draw = draw.to(images.device)
        map = images.new_zeros(len(images), h, w, dtype=torch.float32) if map is None else map.detach().float()
        kept = largest_cells(maps.on_grid(map, (h, w)).flatten(1), draw.count, draw.order).unflatten(1, (h, w))
        keep = at_pixels(kept, (images.shape[-2], images.shape[-1]))[:, None]
        own = draw.count.float() / (h * w)
        weights = LabelWeights(own, draw.perm, 1.0 - own)
        return Mixed(paste(images, images[draw.perm], ~keep), draw.perm, keep.float(), (weights,))
