"""What a classifier that was fitted on frozen features scores, and how it was chosen.

Every probe is chosen on validation images (which learning rate and epoch, which penalty) and reported on test images;
what the last epoch gives is reported too, as the best epoch is the best of many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.data.splits import split_by_seed
from foveal.evaluate.accuracy import mean_over_classes
from foveal.evaluate.features import Features
from foveal.evaluate.knn import matched

HELD_OUT = 15  # percent of the training images, where there is no validation set


@dataclass(frozen=True, eq=False)
class Scored:
    """On one set of M images.  accuracy, balanced: in [0, 1].  correct: (M,) bool.  unknown: images of classes that the
    probe does not know, wrong by definition."""

    accuracy: float
    balanced: float
    correct: Tensor
    unknown: int = 0


@dataclass(frozen=True)
class Trial:
    """One of the settings that were tried.  val: validation accuracy at the epoch chosen.  last: at the last epoch."""

    setting: str
    val: float
    last: float
    epoch: int | None = None


@dataclass(frozen=True, eq=False)
class Probe:
    """A probe's accuracies, in [0, 1].

    kind: which probe, in words.  definition: which features.  recipe: how it was fitted, in words.
    setting, epoch: the choice among `trials`, made on `chosen_on`, where its accuracy is `val`; epochs count from 1,
    None where there are none.  tests: on each test set by name.  last: the same at the last epoch, {} without epochs.
    """

    kind: str
    definition: str
    recipe: str
    setting: str
    epoch: int | None
    chosen_on: str
    val: float
    trials: tuple[Trial, ...]
    tests: dict[str, Scored]
    last: dict[str, Scored]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        at = "" if self.epoch is None else f", epoch {self.epoch}"
        scores = ", ".join(f"{name} {100 * one.accuracy:.1f} %" for name, one in self.tests.items())
        return f"{scores} ({self.kind}; {self.setting}{at}, chosen on {self.chosen_on}; {self.definition})"


def scored(predicted: Tensor, truth: Features, classes: tuple[str, ...]) -> Scored:
    """predicted: (M,) int64, places in `classes`; those of `truth` are matched by name."""
    labels = matched(truth.labels, truth.classes, classes)
    right = predicted == labels
    return Scored(
        accuracy=float(right.double().mean()),
        balanced=mean_over_classes(right, truth.labels),
        correct=right,
        unknown=int((labels < 0).sum()),
    )


def named(tests: Features | Mapping[str, Features]) -> dict[str, Features]:
    """Test sets by name; a single one is called "test". Raises ValueError if there is none."""
    if isinstance(tests, Features):
        return {"test": tests}
    if not tests:
        raise ValueError("there is no test set: give at least one")
    return dict(tests)


def check(train: Features, others: Mapping[str, Features]) -> None:
    """Raise ValueError for features that cannot be fitted, or are not of one kind."""
    train.checked("training")
    distinct(train.labels, train.classes)
    for name, one in others.items():
        one.checked(name)
        if one.values.shape[1] != train.values.shape[1]:
            raise ValueError(f"features of train are {train.values.shape[1]} wide, of {name} {one.values.shape[1]}")
        if train.definition and one.definition and train.definition != one.definition:
            raise ValueError(
                f"features of different definitions: train has {train.definition!r}, {name} {one.definition!r}"
            )


def distinct(labels: Tensor, classes: tuple[str, ...]) -> None:
    """Raise ValueError for labels of a single class."""
    if len(found := labels.unique().tolist()) < 2:
        only = ", ".join(classes[c] for c in found) or "none"
        raise ValueError(f"the training images are all of one class ({only}): there is nothing to tell apart")


def hold_out(train: Features, seed: int) -> tuple[Features, Features, str]:
    """Training features without those held out for the choice, those, and what to call them."""
    parts = split_by_seed(train.labels, len(train.classes), {"val": HELD_OUT}, seed)
    if not len(parts["val"]) or len(train.labels[parts["train"]].unique()) < 2:
        raise ValueError(f"{len(train):,} training images are too few to hold some out: give a validation set")
    name = f"{HELD_OUT} % of the training images, held out by seed {seed}"
    return train.subset(parts["train"]), train.subset(parts["val"]), name


def accuracy_and_loss(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Of images with labels; negative labels are wrong and have no loss. A loss that is not a number is infinite."""
    known = labels >= 0
    right = (logits.argmax(1) == labels) & ~logits.isnan().any(1)
    loss = torch.nn.functional.cross_entropy(logits[known].double(), labels[known]) if bool(known.any()) else None
    value = float("inf") if loss is None or not bool(loss.isfinite()) else float(loss)
    return float(right.double().mean()), value
