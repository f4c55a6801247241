"""AlignMix: blend the tokens of two images after finding which place of the one belongs to which of the other.

    M_ij = |a_i - b_j|^2        P = entropic transport plan of M between uniform marginals        R = r P
    out  = lam a + (1 - lam) R b          at the places of the image, or
    out  = lam R^T a + (1 - lam) b        at those of the partner

Venkataramanan et al., 2022 (AlignMixup, arXiv 2103.15375). Per batch one fair coin chooses between this and Mixup of
the images, another the places. No gradient flows through R. The authors mix the last feature map of a CNN, where
pooling follows at once and undoes the alignment; here it is the input of a transformer block, so that something acts on
places afterwards. Prefix tokens are blended plainly.

Sinkhorn in the log domain, f = u / eps, g = v / eps, r places each:

    f_i = log(1/r + 1e-8) - logsumexp_j(g_j - M_ij / eps)        then g_j alike over i

g comes last, which makes R the softmax of f_i - M_ij / eps over i: columns sum to 1, rows only when it has converged.

B batch, r = N patches, T tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal.attention.edit import Change, Visit, edit
from foveal.mix.draws import check_alpha, draw_beta
from foveal.mix.manifold import DepthDraw, blend_tokens, one_partner_step, one_weight
from foveal.mix.mixed import Mixed
from foveal.mix.mixer import Step
from foveal.mix.mixup import blend
from foveal.mix.token_mixer import TokenMixer


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """M_ij = |a_i|^2 + |b_j|^2 - 2 a_i . b_j: (B, r, r), no tensor of (B, r, r, D). a, b: (B, r, D)."""
    product = a @ b.transpose(-1, -2)
    return (a.square().sum(-1)[..., :, None] + b.square().sum(-1)[..., None, :] - 2 * product).clamp_min(0)


def correspondence(cost: Tensor, eps: float = 0.1, iterations: int = 100, stop: float | None = None) -> Tensor:
    """R = r P: (B, r, r), float32 or wider, no gradient; columns sum to 1.

    cost: M (B, r, r).  iterations: all of them, or with `stop` at most: the authors' code stops when the mean over the
    batch of sum_i |u_i - u_i before| is below 0.1, which asks the device for a number at every iteration.
    """
    with torch.no_grad(), torch.autocast(cost.device.type, enabled=False):
        kernel = -cost.to(torch.promote_types(torch.float32, cost.dtype)) / eps
        r = cost.shape[-1]
        share = math.log(1.0 / r + 1e-8)
        f, g = kernel.new_zeros(kernel.shape[:-1]), kernel.new_zeros(kernel.shape[:-1])
        for _ in range(iterations):
            before = f
            f = share - torch.logsumexp(kernel + g[..., None, :], -1)
            g = share - torch.logsumexp(kernel + f[..., :, None], -2)
            if stop is not None and float(eps * (f - before).abs().sum(-1).mean()) < stop:
                break
        return (kernel + f[..., :, None]).softmax(-2)  # = r exp(kernel + f + g), without rounding distances over eps


def align(own: Tensor, partner: Tensor, R: Tensor, lam: Tensor, onto_partner: bool) -> Tensor:
    """Blend of own and partner's patches (B, N, D) at the places of one of them. R: (B, N, N).  lam: (B,)."""
    R = R.to(own.dtype)
    if onto_partner:
        own = R.transpose(-1, -2) @ own
    else:
        partner = R @ partner
    return blend(own[:, None], partner[:, None], lam)[:, 0]


@dataclass(frozen=True)
class AlignDraw(DepthDraw):
    """Whether tokens are aligned (depth 1) or images blended (depth 0), and at whose places."""

    onto_partner: Tensor  # () bool


@dataclass(kw_only=True)
class AlignMix(TokenMixer[AlignDraw]):
    """Blend images, or aligned tokens at the input of a block, by a coin.

    alpha: of Beta(alpha, alpha), above 0.  block: whose input is mixed; -1 is the last, the nearest to the authors'
    last feature map that still has something after it.  eps, iterations, stop: of the transport, see `correspondence`;
    stop=0.1 is the authors' rule.  normalise: compare directions of tokens only; the authors do not, and then the plan
    is often far from balanced.
    """

    alpha: float = 2.0
    block: int = -1
    eps: float = 0.1
    iterations: int = 100
    stop: float | None = None
    normalise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_alpha("alpha", self.alpha, zero="leave the token mixer out")
        if not 0.0 < self.eps < float("inf"):
            raise ValueError(f"eps={self.eps} smooths the transport plan: use a number above 0")
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations} finds no plan: use 1 or more")

    def first_mixed_block(self, model: nn.Module) -> int | None:
        """The block."""
        return self.blocks(model).position(self.block)

    def draw(
        self, batch: int, image_size: tuple[int, int], grid: tuple[int, int] | None = None, *, rng: torch.Generator
    ) -> AlignDraw:
        """Partners, weight and two coins."""
        perm = torch.randperm(batch, generator=rng)
        lam = draw_beta(self.alpha, batch, "batch", rng).float()
        coins = torch.rand(2, generator=rng) < 0.5
        return AlignDraw(perm, lam, coins[0].long(), coins[1])

    def apply(self, images: Tensor, draw: AlignDraw) -> Mixed:
        """The labels, and where the coin says so the images."""
        return one_weight(images, draw)

    @contextmanager
    def mixing(
        self, model: nn.Module, under: Step, draw: AlignDraw, labels: Tensor, num_classes: int | None
    ) -> Iterator[Step]:
        """Align and blend, where the coin says so."""
        blocks, change = self.blocks(model), dict[int, Change]()
        block = blocks.position(self.block)
        own = self.apply(under.images, draw)
        if int(draw.depth):
            perm, lam, onto_partner = own.perm, own.factors[0].own, bool(draw.onto_partner)
            found: list[Tensor] = []

            def aligned(visit: Visit) -> Tensor:
                P = visit.layout.prefix
                prefix, patches = visit.tokens[:, :P], visit.tokens[:, P:]
                if not visit.replay:
                    found[:] = [self.correspondence(patches, perm)]
                mixed = align(patches, patches[perm], found[0], lam, onto_partner)
                return torch.cat([blend_tokens(prefix, perm, lam), mixed], dim=1) if P else mixed

            change[block] = aligned
        with edit(blocks, change) as edits:
            yield one_partner_step(self, under, own, labels, num_classes, edits)

    def correspondence(self, patches: Tensor, perm: Tensor) -> Tensor:
        """R of every image and its partner: (B, N, N). patches: (B, N, D)."""
        with torch.no_grad(), torch.autocast(patches.device.type, enabled=False):
            a = patches.to(torch.promote_types(torch.float32, patches.dtype))
            a = F.normalize(a, dim=-1) if self.normalise else a
            return correspondence(squared_distances(a, a[perm]), self.eps, self.iterations, self.stop)
