"""How far a mixer's labels are from what can be seen, image by image, over a whole set.

The set is taken in order, in batches of one size, and the draws of batch b come from the key (seed, "mix", 0, b): every
mixer meets the same pairs, and mixers that draw alike get the same boxes. Nothing is trained; the model is in
evaluation and runs once on the mixed images, so that mixers which label by the training forward read this one.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from foveal.chance import generator
from foveal.data.batches import Batches
from foveal.data.config import ImageConfig
from foveal.data.images import Images
from foveal.evaluate.inconsistency import inconsistency, own_weight, share_divergence
from foveal.evaluate.running import autocasting, device_of, evaluating


@dataclass(frozen=True, eq=False)
class LabelGaps:
    """Of N images, each mixed with its partner, in the order of the set, on the CPU; NaN where nothing can be told.

    gap, truth: as foveal.evaluate.Inconsistency has them.  own: weight of the image's own label in the pair's.
    label_kl, prediction_kl: nats from the visible share, as share_divergence, of the mixed label, and of the model's
    prediction on the mixed image between the two labels; the latter is NaN where both images are of one class, the
    former not: it counts by image. Both are NaN for blends.
    """

    gap: Tensor  # (N,) float32 in [0, 1]
    own: Tensor  # (N,) float32 in [0, 1]
    truth: Tensor  # (N,) float32 in [0, 1], visible share of the own object
    label_kl: Tensor  # (N,) float32, nats
    prediction_kl: Tensor  # (N,) float32, nats
    blended: Tensor  # (N,) bool: no gap, since nothing is covered
    partner: Tensor  # (N,) int64, position in the set

    def __len__(self) -> int:
        return len(self.gap)

    @property
    def mean(self) -> float:
        """Mean gap over the images that have one, in [0, 1]; NaN if there are none."""
        return float(self.gap.double().nanmean())

    @property
    def n(self) -> int:
        """Images that have a gap."""
        return int((~self.gap.isnan()).sum())

    @property
    def skipped(self) -> int:
        """Images without a gap that are no blends: nothing of both objects visible, or no object marked."""
        return int((self.gap.isnan() & ~self.blended).sum())


def label_gaps(
    model: nn.Module,
    mixer: Any,
    images: Images,
    config: ImageConfig,
    *,
    truth: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    workers: int = 0,
) -> LabelGaps:
    """Mix every image of a set with its partner in the batch, and compare labels with what can be seen.

    mixer: any of foveal.mix; its draws are not its own but keyed by `seed`, the one thing that chance hangs on.
    images: with masks, unless truth is given.  truth: (N, H', W') gaze maps, masks or boxes, each spanning its whole
    image in the model's frame; they are also what a mixer with the map `given` follows.
    batch_size: partners are of one batch, so other sizes make other pairs. An image alone in its batch is not mixed.
    device, autocast, workers: as predict takes them. Model and mixer are left as they were, but for the mixer's count
    of steps.
    Raises ValueError without masks and truth.
    """
    if truth is None and images.masks is None:
        raise ValueError("label gaps need to know where the objects are: images with masks, or truth=maps (N, H, W)")
    if truth is not None and (truth.dim() != 3 or len(truth) != len(images)):
        raise ValueError(f"truth of shape {tuple(truth.shape)} for {len(images)} images: (N, H, W) is needed")
    where = device_of(model, device)
    parts: list[LabelGaps] = []
    with evaluating(model), torch.no_grad(), autocasting(where, autocast):
        batches = Batches(images, config, batch_size, train=False, workers=workers, device=where)
        for number, batch in enumerate(batches):
            marked = batch.masks if truth is None else truth[batch.index.to(truth.device)].to(where)
            assert marked is not None
            part = _of_batch(model, mixer, batch.images, batch.labels, marked, generator(seed, "mix", 0, number))
            parts.append(_moved(part, int(batch.index[0])))
    return LabelGaps(**{one.name: torch.cat([getattr(part, one.name) for part in parts]) for one in fields(LabelGaps)})


def _of_batch(
    model: nn.Module, mixer: Any, images: Tensor, labels: Tensor, truth: Tensor, rng: torch.Generator
) -> LabelGaps:
    with mixer.on(model, images, labels, rng=rng, given=truth) as step:
        output = model(step.images)
        logits = getattr(output, "logits", output).float()
        step.accuracy(logits)  # whatever asks for labels makes them final
    mixed = step.mixed
    own = own_weight(mixed)
    found = inconsistency(own, mixed, truth)
    other = labels[mixed.perm]
    between = torch.stack([logits.gather(1, one[:, None])[:, 0] for one in (labels, other)], dim=1).softmax(1)
    shown = found.truth_share.masked_fill(found.blended, torch.nan)
    return LabelGaps(
        gap=found.gap,
        own=own,
        truth=found.truth_share,
        label_kl=share_divergence(torch.stack([own, 1 - own], dim=1), shown),
        prediction_kl=share_divergence(between, shown).masked_fill(labels == other, torch.nan),
        blended=found.blended,
        partner=mixed.perm,
    )


def _moved(part: LabelGaps, first: int) -> LabelGaps:
    """On the CPU, in float32, with partners counted in the set."""
    values = {one.name: getattr(part, one.name).cpu() for one in fields(LabelGaps)}
    values = {name: value.float() if value.is_floating_point() else value for name, value in values.items()}
    return LabelGaps(**values | {"partner": values["partner"] + first})
