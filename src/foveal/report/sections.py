"""The parts of a page: numbers to charts and tables. Each gives what its template shows, or nothing to show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from foveal.report import chart
from foveal.report.chart import number
from foveal.report.gather import Arm, Subject
from foveal.report.words import Measure, between, is_clear, judgement, level, points
from foveal.stats import Interval
from foveal.train.run import Run

BINS = 25
MOST_CLASSES = 12  # in a chart or a confusion matrix


@dataclass(frozen=True)
class Panel:
    """A chart with the arms it shows."""

    title: str
    arms: tuple[Arm, ...]
    chart: Markup


@dataclass(frozen=True)
class Fact:
    """One large number. before: the baseline's value, "" for a single run."""

    name: str
    before: str
    value: str
    unit: str
    change: str
    what: str


def facts(subject: Subject, measures: Sequence[Measure]) -> list[Fact]:
    """The largest numbers: of a run as they are, of two arms from the baseline to the other."""
    found = []
    for measure in measures:
        by_arm = subject.numbers[measure.key]
        value = by_arm[subject.arms[-1].name]
        unit = "points" if measure.key == "bg_gap" else "%"
        if subject.others:
            assert value.difference is not None
            before = number(100 * by_arm[subject.base.name].over_images.mean)
            change = f"{points(value.difference.mean)} points {between(value.difference, sign=True)}"
        else:
            before, change = "", between(value.over_images)
        found.append(Fact(measure.name, before, number(100 * value.over_images.mean), unit, change, measure.what))
    return found


@dataclass(frozen=True)
class Row:
    """One row of a forest plot."""

    name: str
    note: str
    chart: Markup
    value: str
    says: str


@dataclass(frozen=True)
class Forest:
    """Rows on one axis, under headings where there are several arms."""

    rows: tuple[tuple[str, tuple[Row, ...]], ...]
    axis: Markup
    over: str
    over_seeds: str


def forest(subject: Subject) -> Forest | None:
    """Differences to the baseline in points, with their intervals, one row per measure (and arm)."""
    cells: list[tuple[Measure, Arm, Interval, Interval | None]] = []
    for measure in subject.measures:
        for arm in subject.others:
            found = subject.numbers[measure.key].get(arm.name)
            if found and found.difference:
                cells.append((measure, arm, found.difference, found.difference_over_seeds))
    if not cells:
        return None
    ends = [0.0]
    for _, _, inner, outer in cells:
        ends += [100 * v for v in (inner.mean, inner.low, inner.high) if math.isfinite(v)]
        if outer and outer.available:  # with few seeds it may be huge: it may leave the axis, the dot may not
            ends += [100 * min(max(v, inner.mean - 0.25), inner.mean + 0.25) for v in (outer.low, outer.high)]
    axis = chart.scale(ends, 6)
    many = len(subject.others) > 1
    rows: dict[str, list[Row]] = {}
    for measure, arm, inner, outer in cells:
        says = judgement(measure, inner, outer)
        low, high = (inner.low, inner.high) if inner.available else (inner.mean, inner.mean)
        span = chart.Span(
            100 * inner.mean,
            100 * low,
            100 * high,
            outer=(100 * outer.low, 100 * outer.high) if outer and outer.available else None,
            clear=is_clear(inner),
        )
        label = f"{arm.name} minus {subject.base.name}, {measure.name}: {points(inner.mean)} points, {says}"
        note = "" if measure.higher_is_better else "lower is better"
        row = Row(
            name=arm.name if many else measure.name,
            note="" if many else note,
            chart=chart.strip([span], axis, label=label, zero=True, height=40),
            value=f"{points(inner.mean)} {between(inner, sign=True)}",
            says=says,
        )
        heading = f"{measure.name}{', ' + note if note else ''}" if many else ""
        rows.setdefault(heading, []).append(row)
    over, over_seeds = cells[0][2], cells[0][3]
    return Forest(
        rows=tuple((heading, tuple(each)) for heading, each in rows.items()),
        axis=chart.axis_strip(axis),
        over=f"{level(over)} interval over {over.over}",
        over_seeds="" if over_seeds is None else f"{level(over_seeds)} interval over {over_seeds.over}",
    )


def backgrounds(subject: Subject) -> list[Panel]:
    """Accuracy on mixed_same and mixed_rand, a line per arm; nothing without these sets."""
    keys = ("accuracy/mixed_same", "accuracy/mixed_rand")
    if not subject.others or not all(key in subject.numbers for key in keys):
        return []  # of a single run the large numbers say it all

    def slope(arm: Arm) -> chart.Slope:
        first, second = (subject.numbers[key][arm.name] for key in keys)
        seeds = list(zip(first.values, second.values, strict=True)) if len(first.values) > 1 else []
        ends = (100 * first.over_images.mean, 100 * second.over_images.mean)
        return chart.Slope(arm.kind, arm.name, ends, [(100 * a, 100 * b) for a, b in seeds])

    panels = []
    for arms in _panels(subject):
        said = [f"{arm.name}: {number(slope(arm).ends[0])} to {number(slope(arm).ends[1])} %" for arm in arms]
        drawn = chart.slopes([slope(arm) for arm in arms], ("mixed_same", "mixed_rand"), label="; ".join(said))
        panels.append(Panel("accuracy, %", arms, drawn))
    return panels


def curves(subject: Subject) -> list[Panel]:
    """Training, epoch by epoch: validation accuracy and loss per arm; for a single run, training beside it."""
    found = []
    for column, title, unit in (("accuracy", "accuracy", "%"), ("loss", "loss", "")):
        if column == "loss" and len(subject.others) > 1:
            break  # a panel per arm is enough
        factor = 100 if unit else 1
        for arms in _panels(subject):
            lines = []
            for arm in arms:
                lines += _lines(arm, f"val_{column}", arm.kind, factor)
            name = f"validation {title}"
            if not subject.others:
                lines += _lines(arms[0], f"train_{column}", "base", factor)
                name = title
            if lines:
                drawn = chart.curves(lines, label=f"{name} by epoch", unit=unit)
                found.append(Panel(name, arms, drawn))
    return found


def gazes(subject: Subject, even: Mapping[str, float | None]) -> list[tuple[str, Panel]]:
    """How much of the attention falls on the object, image by image: a distribution per test set."""
    found = []
    edges = [100 * i / BINS for i in range(BINS + 1)]
    for measure in subject.measures:
        kind, _, test = measure.key.partition("/")
        if kind != "pointing" or (test != subject.main_test and subject.others):
            continue
        for arms in _panels(subject):
            shapes, said = [], []
            for arm in arms:
                shares = np.concatenate([_pointing(run, test) for run in arm.runs])
                counts, _ = np.histogram(100 * shares, bins=edges)
                mean = 100 * subject.numbers[measure.key][arm.name].over_images.mean
                shapes.append(chart.Histogram(arm.kind, (counts / counts.sum()).tolist(), mean))
                said.append(f"{arm.name} {number(mean)} % on average")
            share = even.get(test)
            drawn = chart.histograms(
                shapes,
                edges=edges,
                label="; ".join(said),
                even=None if share is None else 100 * share,
            )
            found.append((test, Panel("; ".join(said), arms, drawn)))
    return found


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


def by_class(subject: Subject) -> ByClass:
    """Accuracy of each class on the main test set, mean over seeds; of many classes those that differ most."""
    arms, names = subject.arms, subject.first.classes
    shares = [np.nanmean([recalls(run, subject.main_test) for run in arm.runs], 0) for arm in arms]
    counts = np.bincount(subject.first.predictions(subject.main_test).labels, minlength=len(names))
    present = [c for c in range(len(counts)) if counts[c]]
    weight = -np.ptp(shares, 0) if len(arms) > 1 else shares[0]
    chosen = sorted(sorted(present, key=lambda c: (weight[c], c))[:MOST_CLASSES])
    axis = chart.Scale(0, 100, (0, 25, 50, 75, 100))
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


@dataclass(frozen=True)
class Number:
    """One field of the table of all numbers."""

    value: str
    interval: str = ""
    seeds: str = ""


def table(subject: Subject) -> list[tuple[str, list[Number]]]:
    """Every measure of every arm, then the differences, with both intervals and the single seeds."""
    rows = []
    for measure in subject.measures:
        held = subject.numbers[measure.key]
        cells = [_number(found.over_images, found.over_seeds, found.values) for found in held.values()]
        for arm in subject.others:
            if (found := held[arm.name]).difference:
                cells.append(_number(found.difference, found.difference_over_seeds, (), sign=True))
        rows.append((measure.name, cells))
    return rows


def _number(images: Interval, seeds: Interval | None, values: Sequence[float], *, sign: bool = False) -> Number:
    below = []
    if seeds is not None and seeds.available:
        below.append(between(seeds, sign=sign))
    if len(values) > 1:
        below.append(" ".join(number(100 * value) for value in values))
    return Number(
        number(100 * images.mean, sign=sign),
        between(images, sign=sign) if images.available else "",
        " · ".join(below),
    )


def settings_of(run: Run) -> dict[str, Any]:
    """The settings as plain values, without the place and the name of the run."""
    return {
        field.name: getattr(run.settings, field.name)
        for field in fields(run.settings)
        if field.name not in ("out", "name")
    }


def setting_rows(arms: Sequence[Arm]) -> tuple[list[tuple[str, list[str]]], list[tuple[str, str]]]:
    """(those that differ between arms with the value of each, those that all share)."""
    held = [settings_of(arm.runs[0]) for arm in arms]
    differ: list[tuple[str, list[str]]] = []
    shared: list[tuple[str, str]] = []
    for name, value in held[0].items():
        values = [each[name] for each in held]
        if name == "seed":
            seeds = sorted({run.settings.seed for arm in arms for run in arm.runs})
            shared.append((name, ", ".join(map(str, seeds))))
        elif any(other != value for other in values):
            differ.append((name, [_plain(each) for each in values]))
        else:
            shared.append((name, _plain(value)))
    return differ, shared


def _plain(value: Any) -> str:
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_plain(each)}" for key, each in value.items()) or "—"
    if isinstance(value, list | tuple):
        return ", ".join(_plain(each) for each in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _panels(subject: Subject) -> list[tuple[Arm, ...]]:
    """Arms that share a chart: each with the baseline, which is grey, so that one accent colour is enough."""
    return [(subject.base, arm) for arm in subject.others] or [(subject.base,)]


def _lines(arm: Arm, column: str, kind: str, factor: float) -> list[chart.Line]:
    """Thin lines of single runs and the mean over the epochs that all have."""
    series = []
    for run in arm.runs:
        rows = [row for row in run.metrics if row.get(column) is not None]
        if rows:
            series.append(
                ([float(row["epoch"] or 0) for row in rows], [factor * float(row[column] or 0) for row in rows])
            )
    if not series:
        return []
    shortest = min(len(xs) for xs, _ in series)
    mean = np.mean([ys[:shortest] for _, ys in series], 0).tolist()
    thin = [chart.Line(kind, xs, ys, thin=True) for xs, ys in series] if len(series) > 1 else []
    return [*thin, chart.Line(kind, series[0][0][:shortest], mean)]


def _pointing(run: Run, test: str) -> NDArray[np.float64]:
    pointing = run.predictions(test).pointing
    assert pointing is not None
    shares = pointing.double().numpy()
    return np.asarray(shares[np.isfinite(shares)])
