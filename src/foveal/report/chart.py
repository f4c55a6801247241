"""Charts as inline SVG that stretch to their column and take their colours from the page.

Colours are the page's CSS variables by class (`base`, `arm`, `ink`), so the same markup is right in light and dark.
Only names and numbers go in, and every name is escaped.  Places are those of `foveal.report.marks`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from markupsafe import Markup

from foveal.report.axes import Scale, number, scale
from foveal.report.marks import below, dot, gridline, horizontal, level, plot, row, vertical, whisker


@dataclass(frozen=True)
class Line:
    """One line of a chart: kind is `base` or `arm`, thin lines are single seeds."""

    kind: str
    xs: Sequence[float]
    ys: Sequence[float]
    thin: bool = False


def curves(
    lines: Sequence[Line],
    *,
    label: str,
    unit: str,
    x_label: str = "epoch",
    height: int = 190,
    up: Scale | None = None,
    levels: Sequence[float] = (),
) -> Markup:
    """Lines over a common axis, NaN leaves a gap.  label: what a listener to the page hears.

    up: the vertical axis, shared with other charts, perhaps logarithmic; None: one that holds these lines.
    levels: dashed lines from side to side.
    """
    ys = [y for line in lines for y in line.ys]
    xs = [x for line in lines for x in line.xs]
    up = up or scale(ys, 4, within=(0, 100) if unit == "%" else None)
    along = Scale(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, ())
    steps = [tick for tick in scale([along.low, along.high], 4).ticks if along.low <= tick <= along.high]
    marks = [horizontal(up, tick, height, unit if tick == up.ticks[-1] else "") for tick in up.ticks]
    for tick in steps:
        if tick == round(tick):
            marks.append(below(along.at(tick), height, f"{tick:.0f}"))
    marks.append(below(1.0, height, x_label, second=True))
    marks += [level(up, value, height) for value in levels]
    drawn = []
    for line in sorted(lines, key=lambda line: not line.thin):  # thin ones below
        kind = f"line {line.kind}{' thin' if line.thin else ''}"
        for part in _parts(line):
            points = " ".join(f"{100 * along.at(x):.2f},{height * (1 - up.at(y)):.2f}" for x, y in part)
            drawn.append(Markup('<polyline class="{}" points="{}"/>').format(kind, points))
            if len(part) == 1:  # a line through one point is not seen
                x, y = part[0]
                marks.append(dot(along.at(x), height * (1 - up.at(y)), line.kind, 2 if line.thin else 4))
    return plot(marks, drawn, height, label)


def _parts(line: Line) -> list[list[tuple[float, float]]]:
    parts: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(line.xs, line.ys, strict=True):
        if math.isfinite(y):
            parts[-1].append((x, y))
        elif parts[-1]:
            parts.append([])
    return [part for part in parts if part]


@dataclass(frozen=True)
class Histogram:
    """Counts per bin as shares of all, drawn as a step; `mark` is a vertical line with its name."""

    kind: str
    shares: Sequence[float]
    mark: float | None = None


def histograms(
    shapes: Sequence[Histogram], *, edges: Sequence[float], label: str, even: float | None, height: int = 170
) -> Markup:
    """Step-shaped distributions over one axis of percent; `even` is the dashed line of an even gaze."""
    along = Scale(edges[0], edges[-1], ())
    top = max(max(shape.shares) for shape in shapes) * 1.12 or 1.0
    marks = [below(along.at(tick), height, f"{tick:.0f} %") for tick in (0, 25, 50, 75, 100)]
    marks.append(Markup('<line class="axis" x1="0%" x2="100%" y1="{0}" y2="{0}"/>').format(height))
    if even is not None:
        marks.append(vertical(along.at(even), height, "even"))
    drawn = []
    for shape in shapes:
        points = [f"{100 * along.at(edges[0]):.2f},{height}"]
        for left, right, share in zip(edges[:-1], edges[1:], shape.shares, strict=True):
            y = f"{height * (1 - share / top):.2f}"
            points += [f"{100 * along.at(left):.2f},{y}", f"{100 * along.at(right):.2f},{y}"]
        points.append(f"{100 * along.at(edges[-1]):.2f},{height}")
        drawn.append(Markup('<polygon class="step {}" points="{}"/>').format(shape.kind, " ".join(points)))
        if shape.mark is not None:
            marks.append(vertical(along.at(shape.mark), height, shape.kind))
    return plot(marks, drawn, height, label, axis=False)


@dataclass(frozen=True)
class Span:
    """A dot with its interval, both in data units; `outer` is a second, thinner interval around the same mean."""

    mean: float
    low: float
    high: float
    kind: str = "arm"
    outer: tuple[float, float] | None = None
    clear: bool = True  # False: the interval includes zero, the dot is hollow


def strip(spans: Sequence[Span], axis: Scale, *, label: str, zero: bool = False, height: int = 30) -> Markup:
    """One row of a forest plot: dots with whiskers on a shared axis, one under the other when several."""
    marks = [gridline(axis.at(tick), "zero" if zero and tick == 0 else "grid") for tick in axis.ticks]
    for i, span in enumerate(spans):
        y = height * (i + 1) / (len(spans) + 1)
        if span.outer:
            marks.append(whisker(axis, *span.outer, y, f"outer {span.kind}"))
        marks.append(whisker(axis, span.low, span.high, y, f"inner {span.kind}"))
        x = 100 * min(max(axis.at(span.mean), 0), 1)
        kind = f"dot {span.kind}{'' if span.clear else ' hollow'}"
        marks.append(Markup('<circle class="{}" cx="{:.2f}%" cy="{:.1f}" r="5"/>').format(kind, x, y))
    return row(marks, label, height)


def dumbbell(spans: Sequence[Span], axis: Scale, *, label: str, height: int = 26) -> Markup:
    """One row of a dot plot: a dot per arm and a line between them; the last dot lies on top."""
    marks = [gridline(axis.at(tick), "grid") for tick in axis.ticks]
    places = [100 * axis.at(span.mean) for span in spans]
    y = height / 2
    marks.append(whisker(axis, min(s.mean for s in spans), max(s.mean for s in spans), y, f"link {spans[-1].kind}"))
    for x, span in zip(places, spans, strict=True):
        marks.append(Markup('<circle class="dot {}" cx="{:.2f}%" cy="{:.1f}" r="4.5"/>').format(span.kind, x, y))
    return row(marks, label, height)


def axis_strip(axis: Scale, unit: str = "") -> Markup:
    """The numbers below a column of strips."""
    marks = []
    for tick in axis.ticks:
        x, text = 100 * axis.at(tick), axis.label(tick) + unit
        marks.append(Markup('<text x="{:.2f}%" y="14" text-anchor="middle">{}</text>').format(x, text))
    return Markup('<svg class="strip ticks" aria-hidden="true" width="100%" height="20">{}</svg>').format(
        Markup("").join(marks)
    )


@dataclass(frozen=True)
class Slope:
    """One arm's way from the first value to the second, with its single seeds."""

    kind: str
    name: str
    ends: tuple[float, float]
    seeds: Sequence[tuple[float, float]] = field(default=())


def slopes(arms: Sequence[Slope], names: tuple[str, str], *, label: str, height: int = 230) -> Markup:
    """Two test sets, one line per arm: the steeper it falls, the more the background mattered."""
    values = [v for arm in arms for pair in [arm.ends, *arm.seeds] for v in pair]
    up = scale(values, 4, within=(0, 100))
    x1, x2 = 24.0, 72.0
    marks = [gridline(x / 100, "axis") for x in (x1, x2)]
    for x, name in zip((x1, x2), names, strict=True):
        marks.append(Markup('<text x="{}%" y="{}" text-anchor="middle">{}</text>').format(x, height + 20, name))

    def y(value: float) -> float:
        return height * (1 - up.at(value))

    segment = Markup('<line class="line {}" x1="{}%" x2="{}%" y1="{:.1f}" y2="{:.1f}"/>')
    for arm in arms:
        for first, second in arm.seeds:
            marks.append(segment.format(f"{arm.kind} thin", x1, x2, y(first), y(second)))
    for arm in arms:
        marks.append(segment.format(arm.kind, x1, x2, y(arm.ends[0]), y(arm.ends[1])))
        for x, value in zip((x1, x2), arm.ends, strict=True):
            dot = Markup('<circle class="dot {}" cx="{}%" cy="{:.1f}" r="5"/>')
            marks.append(dot.format(arm.kind, x, y(value)))
    for end, x, anchor, dx in ((0, x1, "end", -12), (1, x2, "start", 12)):
        places = _apart([y(arm.ends[end]) for arm in arms], 18)
        for arm, place in zip(arms, places, strict=True):
            text = number(arm.ends[end])
            if end == 1 and len(arm.name) <= 8:  # a longer one would not fit a phone; the key has it
                text += f" {arm.name}"
            marks.append(
                Markup('<text class="value {}" x="{}%" dx="{}" y="{:.1f}" dy="5" text-anchor="{}">{}</text>').format(
                    arm.kind, x, dx, place, anchor, text
                )
            )
    return Markup(
        '<div class="plot bare"><svg role="img" aria-label="{}" width="100%" height="{}">{}</svg></div>'
    ).format(label, height, Markup("").join(marks))


def _apart(places: Sequence[float], room: float) -> list[float]:
    """The places pushed apart until `room` pixels lie between neighbours."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    for _ in range(50):
        for i, j in pairwise(order):
            short = room - (moved[j] - moved[i])
            if short > 0.01:
                moved[i] -= short / 2
                moved[j] += short / 2
    return moved
