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
from foveal.report.gather import Arm, Measured, Subject
from foveal.report.words import NOTHING, Measure, between, judgement, level, points, rounded
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
        if any(arm.name not in by_arm for arm in subject.arms):
            continue
        value = by_arm[subject.arms[-1].name]
        unit = "points" if measure.key == "bg_gap" else "%"
        if subject.others:
            if value.difference is None:
                continue
            before = number(100 * by_arm[subject.base.name].over_images.mean)
            change = f"{points(value.difference.mean)} points {between(value.difference, sign=True)}"
        else:
            before, change = "", between(value.over_images)
        found.append(Fact(measure.name, before, number(100 * value.over_images.mean), unit, change, measure.what))
    return found


@dataclass(frozen=True)
class Row:
    """One row of a forest plot. cost: of a training step, "" where it was not measured or is said elsewhere."""

    name: str
    note: str
    chart: Markup
    value: str
    says: str
    cost: str = ""


@dataclass(frozen=True)
class Forest:
    """Rows on one axis: of one measure for several arms, or of all measures of one arm, then without a heading."""

    heading: str
    note: str
    rows: tuple[Row, ...]
    axis: Markup
    over: str
    over_seeds: str
    costs: bool = False


def forests(subject: Subject) -> list[Forest]:
    """Differences to the baseline in points, with their intervals.

    One other arm: one forest of all measures. Several: one for each measure, the main one first.
    """
    compared = [arm for arm in subject.arms if arm.base]
    several = len(subject.others) > 1
    measures = sorted(subject.measures, key=lambda measure: several and measure.key != f"accuracy/{subject.main_test}")
    cells = [
        (measure, arm, found)
        for measure in measures
        for arm in compared
        if (found := subject.numbers[measure.key].get(arm.name)) and found.difference
    ]
    if not several:
        return [_forest(subject, "", "", cells)] if cells else []
    made: list[Forest] = []
    for measure in measures:
        if own := [cell for cell in cells if cell[0] is measure]:
            note = "" if measure.higher_is_better else "less is better"
            made.append(_forest(subject, measure.name, note, own, costs=not made))
    return made


def _forest(
    subject: Subject, heading: str, note: str, cells: Sequence[tuple[Measure, Arm, Measured]], costs: bool = False
) -> Forest:
    axis = scale(_ends([(found.difference, found.difference_over_seeds) for _, _, found in cells]), 6)
    costs = costs and any(arm.cost for _, arm, _ in cells)
    rows = []
    for measure, arm, found in cells:
        inner, outer = found.difference, found.difference_over_seeds
        assert inner is not None
        says = judgement(measure, inner, outer)
        low, high = (inner.low, inner.high) if inner.available else (inner.mean, inner.mean)
        span = chart.Span(
            100 * inner.mean,
            100 * low,
            100 * high,
            outer=(100 * outer.low, 100 * outer.high) if outer and outer.available else None,
            clear=says != NOTHING,
        )
        shown = inner if inner.available or outer is None else outer
        agreed = f"{found.agreement} · " if found.agreement and found.agreement.n > 1 else ""
        rows.append(
            Row(
                name=arm.name if heading else measure.name,
                note="" if heading or measure.higher_is_better else "less is better",
                chart=chart.strip(
                    [span],
                    axis,
                    label=f"{arm.name} minus {arm.base}, {measure.name}: {points(inner.mean)} points, {says}",
                    zero=True,
                    height=46,
                ),
                value=f"{points(inner.mean)} {between(shown, sign=True)}",
                says=f"{agreed}{says}",
                cost=rounded(arm.cost) if costs and arm.cost else "",
            )
        )
    inner, outer = (
        next((one for one in each if one is not None and one.available), None)
        for each in zip(*((found.difference, found.difference_over_seeds) for _, _, found in cells), strict=True)
    )
    return Forest(
        heading,
        note,
        tuple(rows),
        chart.axis_strip(axis),
        over=f"{level(inner)} interval over {inner.over}" if inner else "",
        over_seeds=f"{level(outer)} interval over {outer.over}" if outer else "",
        costs=costs,
    )


def _ends(intervals: Sequence[tuple[Interval | None, Interval | None]]) -> list[float]:
    """What the axis must hold, in points."""
    ends = [0.0]
    for inner, outer in intervals:
        assert inner is not None
        ends += [100 * v for v in (inner.mean, inner.low, inner.high) if math.isfinite(v)]
        if outer and outer.available:  # with few seeds it may be huge: it may leave the axis, the dot may not
            ends += [100 * min(max(v, inner.mean - 0.25), inner.mean + 0.25) for v in (outer.low, outer.high)]
    return ends


def backgrounds(subject: Subject, arms: Sequence[Arm]) -> list[Panel]:
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
    for pair in pairs_of(arms):
        said = [f"{arm.name}: {number(slope(arm).ends[0])} to {number(slope(arm).ends[1])} %" for arm in pair]
        drawn = chart.slopes([slope(arm) for arm in pair], ("mixed_same", "mixed_rand"), label="; ".join(said))
        panels.append(Panel("accuracy, %", pair, drawn))
    return panels


def curves(subject: Subject, arms: Sequence[Arm]) -> list[Panel]:
    """Training, epoch by epoch: validation accuracy and loss per arm; for a single run, training beside it."""
    found = []
    for column, title, unit in (("accuracy", "accuracy", "%"), ("loss", "loss", "")):
        if column == "loss" and len(subject.others) > 1:
            break  # a panel per arm is enough
        factor = 100 if unit else 1
        for pair in pairs_of(arms):
            lines = []
            for arm in pair:
                lines += lines_of(arm, f"val_{column}", arm.kind, factor)
            name = f"validation {title}"
            if not subject.others:
                lines += lines_of(pair[0], f"train_{column}", "base", factor)
                name = title
            if lines:
                drawn = chart.curves(lines, label=f"{name} by epoch", unit=unit)
                found.append(Panel(name, pair, drawn))
    return found


def gazes(subject: Subject, arms: Sequence[Arm], even: Mapping[str, float | None]) -> list[tuple[str, Panel]]:
    """How much of the attention falls on the object, image by image: a distribution per test set."""
    found = []
    edges = [100 * i / BINS for i in range(BINS + 1)]
    for measure in subject.measures:
        kind, _, test = measure.key.partition("/")
        if kind != "pointing" or (test != subject.main_test and subject.others):
            continue
        held = subject.numbers[measure.key]
        for pair in pairs_of([arm for arm in arms if arm.name in held]):
            shapes, said = [], []
            for arm in pair:
                shares = np.concatenate([_pointing(run, test) for run in arm.runs])
                counts, _ = np.histogram(100 * shares, bins=edges)
                mean = 100 * held[arm.name].over_images.mean
                shapes.append(chart.Histogram(arm.kind, (counts / counts.sum()).tolist(), mean))
                said.append(f"{arm.name} {number(mean)} % on average")
            share = even.get(test)
            drawn = chart.histograms(
                shapes,
                edges=edges,
                label="; ".join(said),
                even=None if share is None else 100 * share,
            )
            found.append((test, Panel("; ".join(said), pair, drawn)))
    return found


def pairs_of(arms: Sequence[Arm]) -> list[tuple[Arm, ...]]:
    """Arms that share a chart: each with its baseline, which is grey, so that one accent colour is enough."""
    by_name = {arm.name: arm for arm in arms}
    alone = len(arms) == 1
    return [(by_name[arm.base], arm) if arm.base in by_name else (arm,) for arm in arms if alone or arm.kind == "arm"]


def lines_of(arm: Arm, column: str, kind: str, factor: float) -> list[chart.Line]:
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
