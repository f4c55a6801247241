"""PuzzleMix: the mask of blocks that shows what is salient in both images, by a minimum cut.

    minimise  sum_blocks (1 - t) C_a + t C_b + prior(t)  +  sum_neighbours (w + beta') (t - t')^2        t = l / (L - 1)
    mask = 1 - t        x = mask a' + (1 - mask) b'        lam = mean(mask)

Kim et al., 2020. a is the image, b its partner. Showing a block of one image loses the saliency of the other there
(its share u of the image's saliency, a mean over the block's pixels). With the difference of the border pixels of two
neighbouring blocks, P above or left of Q,

    N(P, Q) = beta' gamma mean |P's last pixels - Q's first|        beta' = beta / (16 n)
    C_a = u_b + (N(a,b) + N(a,a))/2 of each neighbour below or right + (N(b,a) + N(a,a))/2 of each above or left
    C_b alike with a and b exchanged        w = (N(a,b) + N(b,a) - N(a,a) - N(b,b)) / 2
    prior(t) = -(eta / n^2) log(binomial(L-1, l) lam0^(L-1-l) (1 - lam0)^l + 1e-8)        lam0 ~ Beta(alpha, alpha)

Costs become integers, 1000 n^2 times as large, and are minimised exactly (`graph_cut`; the release stops at a local
minimum of alpha-beta swaps). a' and b' are the images with blocks moved to where they will be seen (`transport`).
It is the one mixer that waits for the device: the cut is made on the CPU. Not here: the release's clean loss, which
uses the saliency's backward pass for the weights too (clean_lam), and its adversarial noise.

B batch, n x n blocks, L labels, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import timm.data
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from foveal import maps
from foveal.maps import Source
from foveal.mix import graph_cut, transport
from foveal.mix.draws import (
    Mode,
    check_alpha,
    check_mode,
    check_share,
    draw_beta,
    draw_mixes,
    reversed_partners,
)
from foveal.mix.guided import MapMixer
from foveal.mix.mixed import LabelWeights, Mixed
from foveal.mix.mixer import Draw, Step, check_images
from foveal.mix.smoothmix import fade

BLOCKS = (2, 4, 8, 16)  # a side


@dataclass(frozen=True)
class Costs:
    """What a mask costs, before the prior."""

    own: Tensor  # (B, n, n) C_a, of showing the image
    partner: Tensor  # (B, n, n) C_b
    down: Tensor  # (B, n-1, n) w between a block and the one below
    right: Tensor  # (B, n, n-1)


def block_costs(
    images: Tensor, std: Tensor, saliency: Tensor, perm: Tensor, smoothness: float, neigh_size: int = 4
) -> Costs:
    """Costs of every image against its partner.

    images: (B, channels, H, W), normalised.  std: (channels,) or (1,) of the normalisation, so that differences of
    pixels are of values in [0, 1].
    saliency: (B, n, n), sums of 1; n divides H and W.  smoothness: beta' gamma.
    neigh_size: border pixels are means over squares of at most this side, of one that divides the block's.
    """
    n = saliency.shape[-1]
    sides = [_fitting(neigh_size, images.shape[-2] // n), _fitting(neigh_size, images.shape[-1] // n)]
    pixels = F.avg_pool2d(images.float(), sides) * std[:, None, None]
    a = pixels.unflatten(3, (n, -1)).unflatten(2, (n, -1))  # (B, channels, n, k, n, k')
    b = a[perm]

    def down(above: Tensor, below: Tensor) -> Tensor:
        return smoothness * (above[:, :, :-1, -1] - below[:, :, 1:, 0]).abs().mean((1, -1))  # (B, n-1, n)

    def right(left: Tensor, beside: Tensor) -> Tensor:
        return smoothness * (left[:, :, :, :, :-1, -1] - beside[:, :, :, :, 1:, 0]).abs().mean((1, 3))  # (B, n, n-1)

    own, partner = saliency[perm], saliency.clone()  # fancy indexing copies too
    between = []
    for differ, first, last in (
        (down, np.s_[:, :-1], np.s_[:, 1:]),
        (right, np.s_[:, :, :-1], np.s_[:, :, 1:]),
    ):
        aa, ab, ba, bb = differ(a, a), differ(a, b), differ(b, a), differ(b, b)
        own[first] += (ab + aa) / 2
        own[last] += (ba + aa) / 2
        partner[first] += (ba + bb) / 2
        partner[last] += (ab + bb) / 2
        between.append((ab + ba - aa - bb) / 2)
    return Costs(own, partner, *between)


def _fitting(most: int, block: int) -> int:
    """The largest divisor of a block's side that is not above `most`."""
    return max(side for side in range(1, min(most, block) + 1) if block % side == 0)


def prior(lam: Tensor, n_labels: int, eta: float, n: int) -> Tensor:
    """Cost of each label by the requested weight: (B, L) float64. lam: (B,) of the first image."""
    lam = lam.double()[:, None]
    label = torch.arange(n_labels)
    ways = torch.tensor([math.comb(n_labels - 1, l) for l in range(n_labels)])
    chance = ways * lam ** (n_labels - 1 - label) * (1.0 - lam) ** label
    return -(eta / n**2) * (chance + 1e-8).log()


def best_labels(costs: Costs, priors: Tensor, beta: float) -> Tensor:
    """The labels (B, n, n) int64 of least cost, on the CPU.

    costs: on the CPU.  priors: (B, L).  beta: beta', added to every edge; an edge that would be below 0, which takes
    gamma above 1 or pixels beyond [0, 1], becomes 0. Costs beyond 32-bit integers are scaled by less than 1000 n^2.
    """
    K, n = priors.shape[1] - 1, costs.own.shape[-1]
    t = torch.arange(K + 1, dtype=torch.float64) / K
    own, partner = costs.own.double()[..., None], costs.partner.double()[..., None]
    unary = ((1 - t) * own + t * partner + priors[:, None, None]).nan_to_num()
    edges = [(w.double() + beta).clamp_min(0).nan_to_num() for w in (costs.down, costs.right)]
    highest = K**2 * (unary.abs().sum((1, 2, 3)) + sum(edge.sum((1, 2)) for edge in edges)).max()
    scale = min(1000.0 * n**2, graph_cut.LIMIT / 8 / float(highest.clamp_min(1e-30)))
    down, right = ((scale * edge).long().numpy() for edge in edges)
    return torch.from_numpy(graph_cut.cheapest((scale * unary).long().numpy(), down, right))


def shares(map: Tensor | None, images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Share of each image's saliency in each block: (B, *grid) float32. Blocks are alike without a map, or a blank one.

    map: (B, h, w), zero or more.
    """
    even = images.new_full((len(images), *grid), 1.0 / (grid[0] * grid[1]), dtype=torch.float32)
    if map is None:
        return even
    block = maps.on_grid(map.detach().float(), grid)
    mass = block.sum((1, 2), keepdim=True)
    return torch.where(mass > 0, block / mass, even)


def enlarged(blocks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Each cell as many cells of a finer grid: (B, h, w) to (B, *grid), whose sides are multiples."""
    h, w = blocks.shape[1:]
    return blocks.repeat_interleave(grid[0] // h, 1).repeat_interleave(grid[1] // w, 2)


@dataclass(frozen=True)
class PuzzleDraw(Draw):
    """What is asked of each image's mask, and the number of blocks."""

    lam: Tensor  # (B,) float32, requested weight of the first image; the label's is the mask's mean
    mixes: Tensor  # (B,) bool
    blocks: Tensor  # () int64, n


@dataclass(kw_only=True)
class PuzzleMix(MapMixer[PuzzleDraw]):
    """Show what is salient in both images, block by block.

    map: a source, or the name of one, for the saliency; the paper's is the gradient of the loss at the pixels.
    alpha: of Beta(alpha, alpha), of the requested weight.
    n_labels: L, in how many steps a block fades from one image to the other, 2 or more.
    beta: how alike neighbours should be labelled.  gamma: how much less so where the images differ at the border.
    eta: how much the requested weight counts.  neigh_size: side of the squares that border pixels are averaged over.
    transport: whether blocks move.  t_eps: what distance costs.  t_size: side in pixels of what moves; -1, and block
    sides that it does not divide, move whole blocks. Small pieces are dear: costs are held for all pairs of them.
    std: of the images' normalisation, per channel; None takes the model's in `on` and ImageNet's in `apply`.
    prob: probability that a draw mixes at all.  mode: what shares a requested weight, `batch`, `pair` or `elem`. The
    number of blocks, 2, 4, 8 or 16 a side, is drawn for the batch among those that divide the image.

    `draw` raises ValueError for images of an odd height or width.
    """

    map: str | Source = "input_gradient"
    alpha: float = 1.0
    n_labels: int = 3
    beta: float = 1.2
    gamma: float = 0.5
    eta: float = 0.2
    neigh_size: int = 4
    transport: bool = True
    t_eps: float = 0.8
    t_size: int = -1
    std: tuple[float, ...] | None = None
    prob: float = 1.0
    mode: Mode = "batch"
    _model_std: tuple[float, ...] = field(default=IMAGENET_DEFAULT_STD, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_alpha("alpha", self.alpha, zero="use mix 'none'")
        for name in ("beta", "gamma", "eta", "t_eps"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} is a weight: use a finite number of 0 or more")
        if self.n_labels < 2:
            raise ValueError(f"n_labels={self.n_labels} leaves nothing to choose: use 2 (either image) or more")
        if self.neigh_size < 1:
            raise ValueError(f"neigh_size={self.neigh_size} is a number of pixels: use 1 or more")
        if self.t_size < 1 and self.t_size != -1:
            raise ValueError(f"t_size={self.t_size} is a number of pixels: use 1 or more, or -1 for whole blocks")
        if self.std is not None:
            self.std = tuple(float(one) for one in self.std)
            if not self.std or min(self.std) <= 0:
                raise ValueError(f"std={self.std}: give the deviation of each channel, above 0")
        check_share("prob", self.prob)
        check_mode(self.mode)

    def draw(
        self, batch: int, image_size: tuple[int, int], grid: tuple[int, int] | None = None, *, rng: torch.Generator
    ) -> PuzzleDraw:
        """Partners, requested weights and the number of blocks."""
        fitting = [n for n in BLOCKS if image_size[0] % n == image_size[1] % n == 0]
        if not fitting:
            raise ValueError(
                f"images of {image_size[0]} x {image_size[1]} pixels cannot be cut into 2, 4, 8 or 16 equal blocks a "
                "side: use an even height and width"
            )
        perm = reversed_partners(batch)
        mixes = draw_mixes(self.prob, perm, self.mode, rng)
        lam = draw_beta(self.alpha, batch, self.mode, rng)
        blocks = torch.tensor(fitting)[torch.randint(len(fitting), (), generator=rng)]
        return PuzzleDraw(perm, lam.float(), mixes, blocks)

    def follows(self, draw: PuzzleDraw) -> bool:
        """Whether anything is mixed."""
        return bool(draw.mixes.any())

    def apply(self, images: Tensor, draw: PuzzleDraw, map: Tensor | None = None) -> Mixed:
        """Find the masks, move the blocks, and mix."""
        check_images(images, len(draw.perm))
        n, perm = int(draw.blocks), draw.perm.to(images.device, non_blocking=True)
        with torch.autocast(images.device.type, enabled=False):  # bfloat16 shares of 256 blocks keep two digits
            mask = self._mask(images, draw, perm, shares(map, images, (n, n)))  # (B, n, n)
            lam = mask.mean((1, 2))
            weights = LabelWeights(lam, perm, 1.0 - lam)
            keep = _pixels(mask, images)
            if not self.transport:
                return Mixed(fade(images, images[perm], keep), perm, keep, (weights,))
            grid = self._pieces(images, n)
            mask, saliency = enlarged(mask, grid), shares(map, images, grid)
            pieces, index = transport.cut(images, grid), torch.arange(len(images), device=images.device)
            plan = transport.plan(saliency, mask > 0, self.t_eps)
            partners_plan = transport.plan(saliency[perm], mask < 1, self.t_eps)
            own, partners = pieces[index[:, None], plan.shown], pieces[perm[:, None], partners_plan.shown]
            mixed = fade(own, partners, mask.flatten(1)[:, :, None, None, None])
            return Mixed(
                transport.joined(mixed, grid),
                perm,
                keep,
                (weights,),
                moved_own=_pixels(transport.seen_at_home(mask, plan), images),
                moved_partner=_pixels(transport.seen_at_home(1.0 - mask, partners_plan), images),
            )

    def _mask(self, images: Tensor, draw: PuzzleDraw, perm: Tensor, saliency: Tensor) -> Tensor:
        """Share of each block that is the first image: (B, n, n) float32. Waits for the device."""
        if not self.follows(draw):
            return torch.ones_like(saliency)
        n = saliency.shape[-1]
        beta = self.beta / (16 * n)
        std = self._deviation(images).to(images.device, non_blocking=True)
        costs = block_costs(images.detach(), std, saliency, perm, beta * self.gamma, self.neigh_size)
        rows = draw.mixes.nonzero().flatten()
        here = Costs(*(one.cpu()[rows] for one in (costs.own, costs.partner, costs.down, costs.right)))
        labels = torch.zeros(len(images), n, n)
        labels[rows] = best_labels(here, prior(draw.lam[rows], self.n_labels, self.eta, n), beta).float()
        return 1.0 - labels.to(images.device) / (self.n_labels - 1)

    def _deviation(self, images: Tensor) -> Tensor:
        """(channels,) or (1,), on the CPU."""
        std = self._model_std if self.std is None else self.std
        if len(std) not in (1, images.shape[1]):
            raise ValueError(f"images of {images.shape[1]} channels but std={std}: give one deviation per channel")
        return torch.tensor(std)

    def _pieces(self, images: Tensor, n: int) -> tuple[int, int]:
        """The grid of what moves."""
        height, width = (
            self.t_size if 0 < self.t_size < side // n and (side // n) % self.t_size == 0 else side // n
            for side in images.shape[-2:]
        )
        return images.shape[-2] // height, images.shape[-1] // width

    @contextmanager
    def on(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        rng: torch.Generator | None = None,
        num_classes: int | None = None,
        given: Tensor | None = None,
        trusted: bool = True,
    ) -> Iterator[Step]:
        """One training step on mixed images; see Mixer.on."""
        self._model_std = tuple(timm.data.resolve_data_config(model=model)["std"])
        with super().on(model, images, labels, rng, num_classes, given, trusted) as step:
            yield step


def _pixels(blocks: Tensor, images: Tensor) -> Tensor:
    """(B, h, w) to (B, 1, H, W)."""
    return enlarged(blocks, (images.shape[-2], images.shape[-1]))[:, None]
