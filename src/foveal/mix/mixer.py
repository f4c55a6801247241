"""A mixer: all chance in `draw`, none in `apply`, both around a training step with `on`.

    with mixer.on(model, images, labels) as step:
        logits = model(step.images)
        step.loss(logits).backward()

The step does not change with the mixer: one that weighs labels by what the model looked at reads the forward that ran
inside the block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from foveal import chance
from foveal.mix.losses import LOSSES
from foveal.mix.mixed import Mixed

Relabel = Callable[[Mixed], Mixed]
Term = Callable[[Mixed, Tensor, float], Tensor]  # (mixed batch, logits (B, C), smoothing) -> weighted scalar


@dataclass(frozen=True)
class Draw:
    """What chance decided about one batch, as CPU tensors. Mixers that decide more extend it."""

    perm: Tensor  # (B,) int64, partner of each image

    def to(self, device: torch.device) -> Self:
        """The same draw on another device, without waiting for the copy."""
        moved = {one.name: getattr(self, one.name).to(device, non_blocking=True) for one in fields(self)}
        return replace(self, **moved)


DrawT = TypeVar("DrawT", bound=Draw)


@dataclass(kw_only=True)
class Mixer(ABC, Generic[DrawT]):
    """Settings of a way to mix. Fields are its options; `seed` is used where no generator is given."""

    seed: int = 0
    _steps: int = field(default=0, init=False, repr=False, compare=False)

    @abstractmethod
    def draw(
        self, batch: int, image_size: tuple[int, int], grid: tuple[int, int] | None = None, *, rng: torch.Generator
    ) -> DrawT:
        """All chance of one batch, from a CPU generator.

        image_size: (H, W) in pixels.  grid: (h, w) patches of the model, for mixers that cut along patches.
        """

    @abstractmethod
    def apply(self, images: Tensor, draw: DrawT) -> Mixed:
        """Mix: no chance, and the given images stay as they are. images: (B, channels, H, W), any float type."""

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of what its steps measure, beside loss and accuracy: the keys of `Step.measures`."""
        return ()

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the losses that its steps add to the task's: the further keys of `Step.losses`."""
        return ()

    def learned(self, model: nn.Module, num_classes: int) -> nn.Module | None:
        """The mixer's own trained part for this model, made at the first call; None for one that learns nothing.

        The task optimises and checkpoints it. It is never part of the model or of exported weights.
        """
        return None

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
        """One training step on mixed images.

        model: the one that is called inside the block; left as it was.  images: (B, channels, H, W) float.
        labels: class indices (B,) or rows (B, C).  rng: CPU generator, best made by foveal.chance from the step's
        number; None takes the mixer's own, keyed by its seed and the count of its steps.
        num_classes: for `step.targets()` of class indices; losses know it from the logits.
        given, trusted: for mixers that follow a map: maps or masks of the images (B, H', W') in the same frame, and
        whether the map is to be believed yet; others take no notice.
        """
        rng = self._begin(images, labels, rng)
        draw = self.draw(len(images), (images.shape[-2], images.shape[-1]), rng=rng)
        mixed = self.apply(images, draw)
        with self.relabelling(model, draw) as relabel:
            yield Step(mixed, labels, num_classes, relabel)

    def _begin(self, images: Tensor, labels: Tensor, rng: torch.Generator | None) -> torch.Generator:
        """Check the batch, count the step, and give its generator."""
        check_batch(images, labels)
        if rng is None:
            rng = chance.generator(self.seed, "mix", self._steps)
        self._steps += 1
        return rng

    @contextmanager
    def relabelling(self, model: nn.Module, draw: DrawT) -> Iterator[Relabel | None]:
        """Around the forward: gives what turns provisional label weights into final ones, or None."""
        yield None


class Step:
    """A mixed batch during its training step.

    terms: losses beside the task's, by name, each asked with the final `Mixed`, the logits and the smoothing.
    measures: what to log.
    """

    def __init__(
        self,
        mixed: Mixed,
        labels: Tensor,
        num_classes: int | None = None,
        relabel: Relabel | None = None,
        terms: Mapping[str, Term] | None = None,
        measures: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._mixed, self._labels, self._num_classes, self._relabel = mixed, labels, num_classes, relabel
        self._terms, self._measures = dict(terms or {}), dict(measures or {})

    @property
    def images(self) -> Tensor:
        """Mixed images (B, channels, H, W): what the model is to see."""
        return self._mixed.images

    @property
    def mixed(self) -> Mixed:
        """The batch as known so far: label weights by area until the loss, targets or accuracy is asked."""
        return self._mixed

    def targets(self, num_classes: int | None = None) -> Tensor:
        """Mixed targets without smoothing: (B, C) float32."""
        return self._final().targets(self._labels, num_classes or self._num_classes)

    def loss(self, logits: Tensor, smoothing: float = 0.0, kind: str = "ce") -> Tensor:
        """Loss of the mixed labels, and what the mixer adds to it: a scalar in float32. Arguments as `losses`."""
        return torch.stack(list(self.losses(logits, smoothing, kind).values())).sum()

    def losses(self, logits: Tensor, smoothing: float = 0.0, kind: str = "ce") -> dict[str, Tensor]:
        """{"task": loss of the mixed labels}, and the mixer's own terms by name: weighted scalars in float32.

        logits: (B, C).  smoothing: share of each label spread over all classes before mixing; with kind="bce" and
        labels given as rows, entries move towards 1/2 instead.  kind: ce (soft cross-entropy) or bce (one sigmoid per
        class).
        """
        if kind not in LOSSES:
            raise ValueError(f"kind={kind!r} is not known; use one of {', '.join(LOSSES)}")
        multi_label = kind == "bce" and self._labels.dim() == 2
        mixed = self._final()
        targets = mixed.targets(self._labels, logits.shape[-1], smoothing, multi_label)
        return {"task": LOSSES[kind](logits, targets)} | {
            name: term(mixed, logits, smoothing) for name, term in self._terms.items()
        }

    def measures(self) -> dict[str, Tensor]:
        """What the mixer measured, by name: scalars on the device, NaN where there was nothing to measure."""
        return dict(self._measures)

    def accuracy(self, logits: Tensor) -> Tensor:
        """Label weight of the predicted class, mean over the batch: a scalar. logits: (B, C)."""
        return self._final().accuracy(logits, self._labels)

    def _final(self) -> Mixed:
        if self._relabel is not None:
            self._mixed = self._relabel(self._mixed)
            self._relabel = None  # it holds the attention that it read
        return self._mixed


def check_images(images: Tensor, batch: int | None = None) -> None:
    """Raise unless these are float images (B, channels, H, W), `batch` of them where that is known."""
    if images.dim() != 4:
        raise ValueError(f"images of shape {tuple(images.shape)}: mixing needs a batch (B, channels, H, W)")
    if not images.is_floating_point():
        raise TypeError(f"images of type {images.dtype} cannot be blended: convert and normalise them first")
    if batch is not None and len(images) != batch:
        raise ValueError(f"a draw for {batch} images given {len(images)}: draw anew for each batch")


def check_batch(images: Tensor, labels: Tensor) -> None:
    """Raise unless there are images, and a label for each."""
    check_images(images)
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images but {len(labels)} labels")
