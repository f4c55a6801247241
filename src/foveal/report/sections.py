"""The charts of a page: numbers of a run or a comparison in, what the template shows out, or nothing to show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from foveal.report import chart
from foveal.report.axes import number, scale
from foveal.report.gather import Arm, Subject
from foveal.report.words import Measure, between, is_clear, judgement, level, points
from foveal.stats import Interval
from foveal.train.run import Run

BINS = 25


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
    axis = scale(ends, 6)
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
            chart=chart.strip([span], axis, label=label, zero=True, height=46),
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
