"""What charts are made of: the frame, and single marks in it.

Across, places are percent of the chart's width; downwards they are pixels.  So a chart fits a phone and a wall, and
its letters and lines keep their size.  Lines that bend lie in an inner drawing that is stretched, 100 wide.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from foveal.report.axes import Scale


def plot(
    marks: Sequence[Markup],
    drawn: Sequence[Markup],
    height: int,
    label: str,
    *,
    axis: bool = True,
    front: Sequence[Markup] = (),
) -> Markup:
    """The frame. marks: lie behind what is drawn in the stretched part, `front` before it."""
    inner = Markup('<svg viewBox="0 0 100 {0}" preserveAspectRatio="none" width="100%" height="{0}">{1}</svg>').format(
        height, Markup("").join(drawn)
    )
    outer = Markup('<svg role="img" aria-label="{}" width="100%" height="{}">{}{}{}</svg>').format(
        label, height, Markup("").join(marks), inner, Markup("").join(front)
    )
    return Markup('<div class="plot{}">{}</div>').format("" if axis else " bare", outer)


def row(marks: Sequence[Markup], label: str, height: int) -> Markup:
    return Markup('<svg class="strip" role="img" aria-label="{}" width="100%" height="{}">{}</svg>').format(
        label, height, Markup("").join(marks)
    )


def horizontal(axis: Scale, tick: float, height: int, unit: str) -> Markup:
    y = height * (1 - axis.at(tick))
    text = axis.label(tick) + (f" {unit}" if unit else "")
    return Markup(
        '<line class="grid" x1="0%" x2="100%" y1="{0:.1f}" y2="{0:.1f}"/>'
        '<text x="0" dx="-8" y="{0:.1f}" dy="4" text-anchor="end">{1}</text>'
    ).format(y, text)


def below(place: float, height: int, text: str, *, second: bool = False) -> Markup:
    anchor = "start" if place < 0.02 else "end" if place > 0.98 else "middle"
    y = height + (36 if second else 18)
    return Markup('<text x="{:.2f}%" y="{}" text-anchor="{}">{}</text>').format(100 * place, y, anchor, text)


def vertical(place: float, height: int, kind: str) -> Markup:
    return Markup('<line class="mark {1}" x1="{0:.2f}%" x2="{0:.2f}%" y1="0" y2="{2}"/>').format(
        100 * place, kind, height
    )


def gridline(place: float, kind: str) -> Markup:
    return Markup('<line class="{1}" x1="{0:.2f}%" x2="{0:.2f}%" y1="0" y2="100%"/>').format(100 * place, kind)


def whisker(axis: Scale, low: float, high: float, y: float, kind: str) -> Markup:
    x1, x2 = (100 * min(max(axis.at(value), 0), 1) for value in (low, high))
    return Markup('<line class="whisker {}" x1="{:.2f}%" x2="{:.2f}%" y1="{y:.1f}" y2="{y:.1f}"/>').format(
        kind, x1, x2, y=y
    )


def level(axis: Scale, value: float, height: int, kind: str = "even") -> Markup:
    return Markup('<line class="mark {1}" x1="0%" x2="100%" y1="{0:.1f}" y2="{0:.1f}"/>').format(
        height * (1 - axis.at(value)), kind
    )


def upright(place: float, low: float, high: float, kind: str) -> Markup:
    """A whisker that stands; low and high are pixels."""
    return Markup('<line class="whisker {1}" x1="{0:.2f}%" x2="{0:.2f}%" y1="{2:.1f}" y2="{3:.1f}"/>').format(
        100 * place, kind, low, high
    )


def dot(place: float, y: float, kind: str, radius: float = 5) -> Markup:
    return Markup('<circle class="dot {}" cx="{:.2f}%" cy="{:.1f}" r="{}"/>').format(kind, 100 * place, y, radius)
