"""Move a window: the part of the partner that is looked at most, over the part of the image that is looked at least.

    paste_i = argmin_w W_i(w)        cut_i = argmax_w W_p(w)        W(w) = sum of the map over window w
    x_i[paste_i] = x_p[cut_i]        area = 1 - k_h k_w / (h w)

Both windows have the same size in whole cells, drawn once for a batch; pixels are copied, never resized, so cells stay
aligned with a ViT's patches. Other than in CutMix the two places differ. TdAttenMix and SMMix share this and differ in
the map and in the label. Steps without windows are Mixup steps.

B batch, h x w cells of the grid, k_h x k_w cells of the window.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from foveal import maps
from foveal.attention import Seen
from foveal.maps import Found
from foveal.mix.consistency import clean_logits, consistency_loss
from foveal.mix.cutmix import inside
from foveal.mix.draws import check_alpha, check_share, draw_beta, draw_mixes, draw_uniform, reversed_partners
from foveal.mix.guided import CellMixer
from foveal.mix.mixed import LabelWeights, Mixed, label_rows
from foveal.mix.mixer import Draw, Term, check_images
from foveal.mix.mixup import Mixup, MixupDraw
from foveal.mix.regions import check_regions, region_head, region_loss, region_reader, region_tokens
from foveal.mix.windows import at, extreme_window, move_windows, scaled, window_boxes, window_size, window_sums


@dataclass(frozen=True)
class WindowDraw(Draw):
    """One window size for the batch, or a weight."""

    grid: Tensor  # (2,) int64, cells h and w
    side: Tensor  # (2,) int64, cells k_h and k_w of the window; zeros in a step without windows
    lam: Tensor  # (B,) float32 in [0, 1], weight of the first image in a Mixup step; 1 in others
    tie: Tensor  # (B, 2) float32 in [0, 1), picks among tied windows of each image, least and most looked at


@dataclass(frozen=True)
class Places:
    """Where windows are pasted and cut, and what the maps hold there."""

    paste: Tensor  # (B, 2) int64 first cell, in the image
    cut: Tensor  # (B, 2) int64 first cell, in the partner
    total: Tensor  # (B,) sum of the image's map
    partner_total: Tensor  # (B,) sum of the partner's map
    covered: Tensor  # (B,) sum of the image's map over its paste window
    shown: Tensor  # (B,) sum of the partner's map over the cut window
    aside: Tensor  # (B,) sum of the image's own map at the place of the cut window: what the release reads by mistake


def find_places(map: Tensor, perm: Tensor, side: tuple[int, int], tie: Tensor) -> Places:
    """Least window of each image, most looked at window of its partner.

    map: (B, h, w) zero or more.  perm: (B,).  tie: (B, 2) in [0, 1).  An image that is its own partner has cut = paste.
    """
    sums = window_sums(map, side)
    total = map.to(sums.dtype).sum((1, 2))
    paste = extreme_window(sums, total, tie[:, 0], largest=False)
    most = extreme_window(sums, total, tie[:, 1], largest=True)
    alone = perm == torch.arange(len(perm), device=perm.device)
    cut = torch.where(alone[:, None], paste, most[perm])
    return Places(paste, cut, total, total[perm], at(sums, paste), at(sums[perm], cut), at(sums, cut))


@dataclass(kw_only=True)
class WindowMixer(CellMixer[WindowDraw]):
    """What TdAttenMix and SMMix share.

    prob: probability that a step mixes at all.  switch_prob: probability that a mixed step moves windows; the others
    are Mixup with Beta(mixup_alpha, mixup_alpha). mixup_alpha=0 turns Mixup off: then every mixed step moves windows.
    side: least and largest side of the window as shares of the grid's, uniform over whole cells.
    consistency: weight of the loss that compares the mixed prediction with the clean ones (consistency.py).
    region: weight of the loss on the means of both images' patches (regions.py), which needs a ViT and `learned`.
    ties: windows that the map cannot tell apart are picked at `random`, or the `first` in row-major order, as the
    released codes do: their pastes pile up in the top rows.
    map, cells: see MapMixer and CellMixer. One draw serves the batch. An image that is its own partner is left alone.
    """

    switch_prob: float = 0.5
    mixup_alpha: float = 0.8
    prob: float = 1.0
    side: tuple[float, float] = (0.25, 0.75)
    consistency: float = 1.0
    region: float = 0.0
    ties: Literal["random", "first"] = "random"
    _head: nn.Module | None = field(default=None, init=False, repr=False, compare=False)
    _checked: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("prob", self.prob)
        check_share("switch_prob", self.switch_prob)
        check_alpha("mixup_alpha", self.mixup_alpha, zero="")
        low, high = self.side
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"side={self.side} but it is (least, largest) share of the grid's side, within [0, 1]")
        self.side = (float(low), float(high))
        for name, weight in (("consistency", self.consistency), ("region", self.region)):
            if not 0.0 <= weight < float("inf"):
                raise ValueError(f"{name}={weight} is the weight of a loss: use 0 or more")
        if self.ties not in ("random", "first"):
            raise ValueError(f"ties={self.ties!r} is not known; use 'random' or 'first'")

    @abstractmethod
    def own_share(self, places: Places, area: Tensor) -> Tensor:
        """Label weight of the first image: (B,). area: (B,) share of cells that stay its own."""

    def draw(
        self, batch: int, image_size: tuple[int, int], grid: tuple[int, int] | None = None, *, rng: torch.Generator
    ) -> WindowDraw:
        """Partners; whether to move windows and of which size, or by how much to blend; picks among ties."""
        perm, (h, w) = reversed_partners(batch), self._grid(grid, image_size)
        if h == w == 1:
            raise ValueError(
                "a grid of one cell has no window to move: use larger images, or cells=..., the grid to cut along"
            )
        mixes = draw_mixes(self.prob, perm, "batch", rng)
        moves = self.mixup_alpha == 0.0 or float(draw_uniform(1, "batch", rng)) < self.switch_prob
        lam = torch.ones(batch, dtype=torch.float64)
        if self.mixup_alpha > 0.0:
            lam = draw_beta(self.mixup_alpha, batch, "batch", rng)
        side = torch.tensor(window_size(self.side, (h, w), float(draw_uniform(1, "batch", rng))))
        tie = torch.rand(batch, 2, generator=rng)
        return WindowDraw(
            perm,
            torch.tensor((h, w)),
            side * (moves and bool(mixes.any())),
            torch.where(mixes & (not moves), lam, 1.0).float(),
            tie if self.ties == "random" else torch.zeros_like(tie),
        )

    def follows(self, draw: WindowDraw) -> bool:
        """Where windows move."""
        return bool(draw.side.any())

    def apply(self, images: Tensor, draw: WindowDraw, map: Tensor | None = None) -> Mixed:
        """Move windows by the maps (B, h, w), or blend where the draw says so."""
        check_images(images, len(draw.perm))
        if not self.follows(draw):
            return Mixup().apply(images, MixupDraw(draw.perm, draw.lam))
        (h, w), side = draw.grid.tolist(), (int(draw.side[0]), int(draw.side[1]))  # asks the draw, which is on the CPU
        draw = draw.to(images.device)
        size = (images.shape[-2], images.shape[-1])
        patch = (size[0] // h, size[1] // w)
        pixels = (side[0] * patch[0], side[1] * patch[1])
        map = images.new_zeros(len(images), h, w, dtype=torch.float32) if map is None else map.detach().float()
        places = find_places(maps.on_grid(map, (h, w)), draw.perm, side, draw.tie)

        paste, cut = scaled(places.paste, patch), scaled(places.cut, patch)
        alone = (draw.perm == torch.arange(len(images), device=images.device))[:, None, None, None]
        keep = (~inside(window_boxes(paste, pixels), size) | alone).float()
        seen = (inside(window_boxes(cut, pixels), size) & ~alone).float()
        area = torch.full_like(places.total, 1.0 - side[0] * side[1] / (h * w))
        own = torch.where(alone.flatten(), 1.0, self.own_share(places, area)).float()
        return Mixed(
            move_windows(images, draw.perm, paste, cut, pixels),
            draw.perm,
            keep,
            (LabelWeights(own, draw.perm, 1.0 - own),),
            moved_partner=seen,
        )

    @property
    def terms(self) -> tuple[str, ...]:
        """consistency, region: those with a weight. Zero in steps that move no window or trust no map."""
        return tuple(name for name in ("consistency", "region") if getattr(self, name) > 0.0)

    def learned(self, model: nn.Module, num_classes: int) -> nn.Module | None:
        """The head of the region loss, None without one. Raises ValueError for a model without patches to read."""
        if self.region > 0.0 and self._head is None:
            self._head = region_head(model, num_classes, self.seed)
        return self._head

    @contextmanager
    def adding(
        self, model: nn.Module, images: Tensor, labels: Tensor, found: Found | None, draw: WindowDraw
    ) -> Iterator[Mapping[str, Term]]:
        """The losses that have a weight; zeros in a step that follows no map."""
        clean = None
        if found is not None and self.consistency > 0.0:
            clean = clean_logits(model, images, self.source(model), found)
        with self._patches(model, images, found) as patches:

            def consistency(mixed: Mixed, logits: Tensor, smoothing: float) -> Tensor:
                if clean is None:
                    return logits.new_zeros((), dtype=torch.float32)
                return self.consistency * consistency_loss(clean, logits, mixed)

            def region(mixed: Mixed, logits: Tensor, smoothing: float) -> Tensor:
                assert self._head is not None
                if patches is None:  # a gradient of zeros: every process trains the same parameters in every step
                    return 0.0 * torch.stack([p.float().sum() for p in self._head.parameters()]).sum()
                keep = maps.on_grid(mixed.keep[:, 0], patches.grid).flatten(1)
                rows = label_rows(labels, logits.shape[-1], smoothing)
                return self.region * region_loss(region_tokens(model, patches), keep, self._head, rows, mixed.perm)

            terms: dict[str, Term] = {"consistency": consistency, "region": region}
            yield {name: terms[name] for name in self.terms}

    @contextmanager
    def _patches(self, model: nn.Module, images: Tensor, found: Found | None) -> Iterator[Seen | None]:
        """Read the training forward for the region loss, where a step has one."""
        if self.region == 0.0:
            yield None
            return
        if self._head is None:
            raise ValueError(
                f"region={self.region} trains a head of its own: call mixer.learned(model, num_classes) once, and give "
                "its parameters to the optimiser"
            )
        if found is None:
            yield None
            return
        if not self._checked:
            check_regions(model, images[:1])
            self._checked = True
        with region_reader(model) as seen:
            yield seen
