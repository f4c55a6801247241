"""Class by class: how many of each were answered right, and what the others were taken for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from foveal.report import chart
from foveal.report.axes import Scale, number
from foveal.report.gather import Arm, Subject
from foveal.train.run import Run

MOST_CLASSES = 12  # in a chart or a confusion matrix


@dataclass(frozen=True)
class ByClass:
    """Accuracy class by class: a dot plot of one or two arms, a table of more.

    rows: class, number of images, chart, what it says.  table: class, number of images, percent of each arm.
    hidden: how many classes are not among the `shown`.
    """

    rows: tuple[tuple[str, int, Markup, str], ...]
    axis: Markup
    table: tuple[tuple[str, int, tuple[str, ...]], ...]
    shown: int
    hidden: int


def by_class(subject: Subject, arms: Sequence[Arm]) -> ByClass:
    """Accuracy of each class on the main test set, mean over seeds; of many classes those that differ most."""
    names = subject.first.classes
    shares = [_means(np.array([recalls(run, subject.main_test) for run in arm.runs])) for arm in arms]
    counts = np.bincount(subject.first.predictions(subject.main_test).labels, minlength=len(names))
    present = [c for c in range(len(counts)) if counts[c]]
    weight = -np.ptp(shares, 0) if len(arms) > 1 else shares[0]
    chosen = sorted(sorted(present, key=lambda c: (weight[c], c))[:MOST_CLASSES])
    axis = Scale(0, 100, (0, 25, 50, 75, 100))
    rows, table = [], []
    for c in chosen:
        values = [100 * float(share[c]) for share in shares]
        spans = [chart.Span(v, v, v, arm.kind) for v, arm in zip(values, arms, strict=True)]
        said = " → ".join(number(v, 0) for v in values) + " %"
        drawn = chart.dumbbell(spans, axis, label=f"{names[c]}: {said}")
        rows.append((names[c], int(counts[c]), drawn, said))
        table.append((names[c], int(counts[c]), tuple(number(v, 0) for v in values)))
    return ByClass(
        tuple(rows) if len(arms) <= 2 else (),
        chart.axis_strip(axis, " %"),
        tuple(table) if len(arms) > 2 else (),
        len(chosen),
        len(present) - len(chosen),
    )


def _means(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """(C,) means over the seeds that have images of a class; NaN for a class without."""
    there = np.isfinite(rows)
    total = np.where(there, rows, 0.0).sum(0)
    means: NDArray[np.float64] = np.divide(total, there.sum(0), out=np.full(total.shape, np.nan), where=there.any(0))
    return means


def recalls(run: Run, test: str) -> NDArray[np.float64]:
    """(C,) share of each class's test images that were right, NaN for a class without images."""
    predictions = run.predictions(test)
    labels = predictions.labels.numpy()
    total = np.bincount(labels, minlength=len(run.classes)).astype(np.float64)
    right = np.bincount(labels[predictions.correct.numpy()], minlength=len(run.classes))
    return np.divide(right, total, out=np.full_like(total, np.nan), where=total > 0)


@dataclass(frozen=True)
class Cell:
    """One field of the confusion matrix.  share: of its row, in percent."""

    count: int
    share: float
    right: bool


def confusion(run: Run, test: str) -> list[tuple[str, tuple[Cell, ...]]] | None:
    """Rows of true classes, columns of predicted ones; None for more classes than can be read."""
    classes = run.classes
    if len(classes) > MOST_CLASSES:
        return None
    predictions = run.predictions(test)
    pairs = predictions.labels.numpy() * len(classes) + predictions.logits.argmax(1).numpy()
    counts = np.bincount(pairs, minlength=len(classes) ** 2).reshape(len(classes), len(classes))
    return [
        (name, tuple(Cell(int(n), 100 * n / max(1, row.sum()), i == j) for j, n in enumerate(row)))
        for i, (name, row) in enumerate(zip(classes, counts, strict=True))
    ]
