"""Charts of a number at a few steps, such as shares of labels or weights: dots with upright intervals, joined by lines.

Several rungs at the same step are drawn side by side, so that no interval hides another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from foveal.report.axes import Scale, number, scale
from foveal.report.marks import below, dot, gridline, horizontal, level, plot, upright
from foveal.stats import Interval

ASIDE = 0.012  # of the width, between the dots of one step
FAR = 25.0  # an interval may reach so far beyond its dot; what is longer leaves the chart
NARROW = 0.09  # of the width, that a name below the axis takes


@dataclass(frozen=True)
class Rung:
    """A dot at a step (its place in [0, 1] across) with its interval, in the units of the axis; NaN: without one."""

    place: float
    mean: float
    low: float = math.nan
    high: float = math.nan
    clear: bool = True  # False: the interval holds zero, the dot is hollow

    @property
    def is_bounded(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)


@dataclass(frozen=True)
class Ladder:
    """The rungs of one arm or of one way; kind is `base` or `arm`."""

    kind: str
    rungs: Sequence[Rung]


@dataclass(frozen=True)
class Band:
    """A level from side to side with its interval, NaN without one."""

    mean: float
    low: float = math.nan
    high: float = math.nan


def rung(place: float, interval: Interval, *, clear: bool = True) -> Rung:
    """A rung in percent or points, of an interval of shares."""
    return Rung(place, 100 * interval.mean, 100 * interval.low, 100 * interval.high, clear)


def reach(rungs: Sequence[Rung | Band]) -> list[float]:
    """What an axis must hold to show them: all dots, and intervals that are not too long to be worth it."""
    ends = []
    for one in rungs:
        ends.append(one.mean)
        ends += [min(max(v, one.mean - FAR), one.mean + FAR) for v in (one.low, one.high) if math.isfinite(v)]
    return ends


def ladders(
    lines: Sequence[Ladder],
    steps: Sequence[tuple[float, str, str]],
    *,
    label: str,
    unit: str,
    x_label: str = "",
    up: Scale | None = None,
    band: Band | None = None,
    zero: bool = False,
    height: int = 190,
) -> Markup:
    """Lines over steps.  label: what a listener to the page hears.

    steps: (place in [0, 1], name, a second name below it or "").  up: the vertical axis; None: one that holds all.
    band: the grey level that all are compared with.  zero: a line at 0.
    """
    rungs = [one for line in lines for one in line.rungs]
    up = up or scale(reach([*rungs, *([band] if band else [])]), 4, within=(0, 100) if unit == "%" else None)
    shown: list[tuple[float, str, str]] = []
    for step in steps:
        if not shown or step[0] - shown[-1][0] >= NARROW:
            shown.append(step)
    marks = [horizontal(up, tick, height, unit if tick == up.ticks[-1] else "") for tick in up.ticks]
    marks += [gridline(place, "grid") for place, _, _ in steps]
    marks += [below(place, height, name) for place, name, _ in shown]
    marks += [below(place, height, second, second=True) for place, _, second in shown if second]
    if x_label:
        marks.append(below(1.0, height, x_label, second=True))
    if zero:
        marks.append(level(up, 0.0, height, "zero"))

    def y(value: float) -> float:
        return height * (1 - min(max(up.at(value), 0.0), 1.0))

    drawn = []
    if band:
        if math.isfinite(band.low) and math.isfinite(band.high):
            corners = f"0,{y(band.low):.2f} 100,{y(band.low):.2f} 100,{y(band.high):.2f} 0,{y(band.high):.2f}"
            drawn.append(Markup('<polygon class="step base" points="{}"/>').format(corners))
        marks.append(level(up, band.mean, height, "base"))
    for i, line in enumerate(lines):
        aside = ASIDE * (i - (len(lines) - 1) / 2)
        points = " ".join(f"{100 * (one.place + aside):.2f},{y(one.mean):.2f}" for one in line.rungs)
        drawn.append(Markup('<polyline class="line {} thin" points="{}"/>').format(line.kind, points))
        for one in line.rungs:
            if one.is_bounded:
                marks.append(upright(one.place + aside, y(one.low), y(one.high), f"inner {line.kind}"))
    # dots last, in front of every line
    front = [
        dot(one.place + ASIDE * (i - (len(lines) - 1) / 2), y(one.mean), line.kind + ("" if one.clear else " hollow"))
        for i, line in enumerate(lines)
        for one in line.rungs
    ]
    return plot(marks, drawn, height, label, front=front)


def told(rungs: Sequence[Rung], names: Sequence[str], unit: str, *, sign: bool = False) -> str:
    """Rungs for a listener: "15 %: 71.2 %, 30 %: 80.0 %"."""
    return ", ".join(
        f"{name}: {number(one.mean, sign=sign)} {unit}".strip() for one, name in zip(rungs, names, strict=True)
    )
