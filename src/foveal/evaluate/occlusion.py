"""Occlusion: how accuracy falls when patches are taken away, at random or by how salient they are.

    floor(share N + 1/2) of an image's N patches become 0, the mean colour of normalised images
    random: any of them    salient: those that the map is largest at    non_salient: smallest

The protocol of Naseer et al., 2021 ("Intriguing properties of vision transformers"), with the model's own patches. One
order of the patches is drawn per image and breaks ties; so the patches that go at a share are among those that go at a
larger one, and what `salient` takes at a share `non_salient` leaves at the rest.

B batch, N = h w patches, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from foveal.chance import generator
from foveal.data.batches import Batches
from foveal.data.config import ImageConfig
from foveal.data.images import Images
from foveal.evaluate.accuracy import correct
from foveal.evaluate.running import autocasting, class_logits, device_of, evaluating
from foveal.maps import Source, cells, on_grid

Order = Literal["random", "salient", "non_salient"]
ORDERS: tuple[Order, ...] = ("random", "salient", "non_salient")
SHARES = tuple(tenth / 10 for tenth in range(10))


def dropped(
    map: Tensor | None, share: float, order: Order, grid: tuple[int, int], *, batch: int, rng: torch.Generator
) -> Tensor:
    """Which patches go: (B, h, w) bool, floor(share h w + 1/2) of them true in each image.

    map: (B, h', w') zero or more, brought to the grid by means over areas; None where the order is random.
    rng: a CPU generator; the same state gives nested patches for rising shares, and complementary ones for `salient` at
    a share and `non_salient` at 1 less it.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share={share} of the patches: use a value in [0, 1]")
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is not known; use one of {', '.join(ORDERS)}")
    patches = grid[0] * grid[1]
    at = torch.rand(batch, patches, generator=rng, dtype=torch.float64).argsort(1)  # patches in an order of their own
    if order != "random":
        if map is None:
            raise ValueError(f"order {order!r} needs a map of where the images are salient")
        at = at.to(map.device)
        salience = on_grid(map.float(), grid).flatten(1).gather(1, at)
        at = at.gather(1, salience.argsort(dim=1, descending=True, stable=True))
    count = math.floor(share * patches + 0.5)
    gone = at[:, patches - count :] if order == "non_salient" else at[:, :count]
    return torch.zeros_like(at, dtype=torch.bool).scatter_(1, gone, True).view(batch, *grid)


def occlude(
    images: Tensor,
    map: Tensor | None,
    share: float,
    order: Order = "random",
    *,
    grid: tuple[int, int],
    rng: torch.Generator,
) -> Tensor:
    """Images without a share of their patches, which become 0. Pixels that stay are copied, not computed.

    images: (B, channels, H, W), normalised.  grid: (h, w) patches; pixel (r, c) is in patch (floor(r h/H),
    floor(c w/W)).  map, order, rng: as `dropped`.
    """
    B, _, H, W = images.shape
    gone = dropped(map, share, order, grid, batch=B, rng=rng).to(images.device)
    r = torch.arange(H, device=images.device) * grid[0] // H
    c = torch.arange(W, device=images.device) * grid[1] // W
    return images.masked_fill(gone[:, None, r[:, None], c], 0.0)


@dataclass(frozen=True, eq=False)
class Occlusion:
    """What is right without some of the patches. `foveal.stats.over_images(found.correct["salient"])` has intervals."""

    shares: tuple[float, ...]
    correct: dict[Order, Tensor]  # by order: (shares, N) bool, in the order of the set

    @property
    def accuracy(self) -> dict[Order, tuple[float, ...]]:
        """By order, for each share, in [0, 1]."""
        return {order: tuple(right.double().mean(1).tolist()) for order, right in self.correct.items()}


def occlusion(
    model: nn.Module,
    images: Images,
    config: ImageConfig,
    source: Source | None = None,
    *,
    shares: Sequence[float] = SHARES,
    orders: Sequence[Order] = ORDERS,
    grid: tuple[int, int] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    workers: int = 0,
) -> Occlusion:
    """Which images `model` gets right without `shares` of their patches; evaluated, and left as it was.

    source: where images are salient, any of foveal.maps, of this model or of another, asked once on the whole images
    (with their labels and masks, for sources that want them); may be None for the order `random` alone.
    grid: (h, w) patches; by default the model's own.  seed: of the orders, with the number of the batch.
    batch_size, device, autocast, workers: as predict takes them.
    Raises ValueError for salience without source, and for a model that has not one output for each class.
    """
    if source is None and any(order != "random" for order in orders):
        raise ValueError('to take away patches by salience give a source of foveal.maps, or orders=("random",)')
    where = device_of(model, device)
    grid = cells(model, config.size) if grid is None else grid
    right: dict[tuple[Order, float], list[Tensor]] = {(order, share): [] for order in orders for share in shares}
    with evaluating(model), torch.no_grad(), autocasting(where, autocast):
        batches = Batches(images, config, batch_size, train=False, workers=workers, device=where)
        for number, batch in enumerate(batches):
            map = None if source is None else source(batch.images, batch.labels, batch.masks).map
            for (order, share), seen in right.items():
                rng = generator(seed, "occlusion", number)  # the same for all: nested and complementary
                left = occlude(batch.images, map, share, order, grid=grid, rng=rng)
                logits = class_logits(model(left), len(images.classes))
                seen.append(correct(logits, batch.labels).cpu())
    whole = {order: torch.stack([torch.cat(right[order, share]) for share in shares]) for order in orders}
    return Occlusion(tuple(shares), whole)
