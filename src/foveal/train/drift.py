"""How far the attention of the model in training has moved from its source's, on validation images.

    drift = mean_{b,l,h} 1/2 sum_j |p_T - p_S|          in [0, 1]: 0 looks where the source looks, 1 nowhere near

p is the class token's attention on the patches, renormalised over them, of every block and head; without a class token
that of the mean patch query. The source is that of a guide which compares block by block (gta, attention_transfer,
delta), else the initial weights; one of another depth or with other heads is not compared. It is read off the
validation's own forward, on the first `LIMIT` images. Before training the same pass tells how much of the source's
attention falls on the objects, where the validation images have masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foveal.attention import Look, attach, glance, read, supported
from foveal.data.batches import Batches
from foveal.evaluate import energy_share
from foveal.evaluate.pointing import coverage
from foveal.maps.asking import asking

LIMIT = 256  # validation images per process: enough for a third digit, few enough for a large model


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """1/2 sum |p - q| of two distributions over the last dimension, in float32 or wider."""
    return 0.5 * (p - q).abs().sum(-1)


@dataclass(frozen=True)
class SourceQuality:
    """How well the source looks at the objects.

    pointing: share of its last block's attention on the objects; even: of a map that is the same everywhere; both None
    without masks.  images: that were looked at.
    """

    pointing: float | None
    even: float | None
    images: int

    @property
    def warning(self) -> str:
        """What to tell the user; empty if the source looks at the objects more than an even map would."""
        if self.pointing is None or self.even is None or self.pointing > self.even:
            return ""
        return (
            f"the source puts {100 * self.pointing:.0f} % of its attention on the objects, no more than a map that is"
            f" the same everywhere ({100 * self.even:.0f} %): guidance towards it may hold the model where it should"
            " not look"
        )

    def __str__(self) -> str:
        if self.pointing is None or self.even is None:
            return "no object masks: how well the source looks at the objects is not known"
        return (
            f"{100 * self.pointing:.1f} % of the source's attention is on the objects"
            f" (even: {100 * self.even:.1f} %; {self.images} validation images)"
        )

    def told(self) -> dict[str, object]:
        """As results.json has it."""
        return {"pointing": self.pointing, "even": self.even, "n": self.images, "warning": self.warning}


class Drift:
    """Attention of a source on the first validation images, to compare a model in training with.

    rows: for each batch one (B, H, N) distribution per layer.
    """

    def __init__(self, rows: list[list[Tensor]], what: str, quality: SourceQuality) -> None:
        self.rows, self.what, self.quality = rows, what, quality
        self.sums: list[Tensor] = []

    @classmethod
    def of(cls, source: nn.Module, batches: Batches, limit: int = LIMIT) -> Drift | None:
        """Look at the validation images with the source; None for one whose attention rows cannot be read."""
        what = readable(source)
        if what is None:
            return None
        rows: list[list[Tensor]] = []
        shares: list[Tensor] = []
        evens: list[Tensor] = []
        seen = 0
        with asking(source), attach(source):
            for batch in batches:
                look = glance(source, batch.images, "all", what)
                rows.append(distributions(look, what))
                if batch.masks is not None and not isinstance(look.grid[-1], list):
                    there = batch.masks.flatten(1).any(1)
                    attn = look.to_grid(rows[-1][-1], layer=len(rows[-1]) - 1)
                    shares.append(energy_share(attn, batch.masks)[there])
                    evens.append(coverage(batch.masks, attn.shape[1:]).mean((1, 2))[there])
                seen += len(batch)
                if seen >= limit:
                    break
        held = torch.cat(shares) if shares else torch.empty(0)
        masked = len(held) > 0
        pointing, even = (float(held.mean()), float(torch.cat(evens).mean())) if masked else (None, None)
        return cls(rows, what, SourceQuality(pointing, even, seen))

    def begin(self) -> None:
        """Forget the last validation."""
        self.sums = []

    def covers(self, number: int) -> bool:
        """Whether the validation's batch of this number is compared."""
        return number < len(self.rows)

    def add(self, number: int, look: Look) -> None:
        """Take in a look at the model on a batch; nothing is fetched from the device."""
        gaps = [
            total_variation(own, theirs.to(own)).sum() / own.shape[1]  # mean over heads, sum over images
            for own, theirs in zip(distributions(look, self.what), self.rows[number], strict=True)
        ]
        images = len(self.rows[number][0])
        self.sums.append(torch.stack([torch.stack(gaps).mean(), gaps[0].new_full((), images)]))

    def total(self, like: Tensor) -> Tensor:
        """(2,) sum over the images of this process, and their number."""
        return torch.stack(self.sums).sum(0) if self.sums else like.new_zeros(2)


def readable(model: nn.Module) -> str | None:
    """What tells where a model looks: class_logits, mean_query, or None where neither can be read of all blocks."""
    support = supported(model)
    if not support:
        return None
    for what in ("class_logits", "mean_query"):
        try:
            read(model, "all", what)
        except (ValueError, RuntimeError):
            continue
        return what
    return None


def comparable(source: nn.Module, model: nn.Module, size: tuple[int, int]) -> bool:
    """Whether two models show rows of as many blocks, heads and patches for images (h, w). Leaves no trace."""
    what = readable(source)
    if what is None or what != readable(model):
        return False
    shapes = []
    for one in (source, model):
        images = next(one.parameters()).new_zeros(1, 3, *size)
        with asking(one):
            shapes.append([row.shape for row in distributions(glance(one, images, "all", what), what)])
    return shapes[0] == shapes[1]


def distributions(look: Look, what: str) -> list[Tensor]:
    """Attention on the patches alone, one (B, H, N) per layer that sums to 1."""
    rows: Sequence[Tensor] = getattr(look, what)()
    return [row.detach().softmax(-1) for row in rows]
