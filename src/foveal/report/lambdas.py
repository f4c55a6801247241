"""The whole curve over lambda, the weight of the guidance: a best point alone would tell chance as skill.

A panel for each measure and share of the labels. Dots are arms that differ in lambda only; the grey level is the arm
without guidance. A dot's upright line is the interval of its difference to that level, paired over seeds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from markupsafe import Markup

from foveal.report.axes import number, scale
from foveal.report.gather import Arm, Subject
from foveal.report.ladder import Band, Ladder, Rung, ladders, reach, told
from foveal.report.ways import SHARE, is_guided, key_of, over_seeds, paired, plain_of, share_of, weight_of
from foveal.report.words import BG_GAP, Measure, accuracy_of, between, is_clear, points
from foveal.stats import Interval


@dataclass(frozen=True)
class Point:
    """A row of the table: a weight, the measure's mean, the paired difference with its interval."""

    weight: str
    value: str
    difference: str
    interval: str


@dataclass(frozen=True)
class Panel:
    """A measure over lambda at one share of the labels; base: the arm without guidance, "" where there is none."""

    title: str
    note: str
    base: str
    chart: Markup
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Curve:
    """All panels of a guide."""

    name: str
    panels: tuple[Panel, ...]


def lambda_curves(subject: Subject) -> list[Curve]:
    """A curve for each guide with two weights above 0 or more, all else being equal."""
    families: dict[str, dict[str, dict[float, Arm]]] = {}
    for arm in subject.arms:
        weight = weight_of(arm.runs[0].settings) if is_guided(arm) else None
        if weight is not None:
            family = families.setdefault(key_of(arm, without=("guide_weight", *SHARE)), {})
            family.setdefault(key_of(arm, without=("guide_weight",)), {}).setdefault(weight, arm)
    made = []
    for family in families.values():
        lines = [dict(sorted(line.items())) for line in family.values() if len(line) > 1]
        if lines:
            name = next(iter(lines[0].values())).runs[0].settings.guide
            made.append(Curve(name, _panels(subject, lines)))
    return made


def _panels(subject: Subject, lines: list[dict[float, Arm]]) -> tuple[Panel, ...]:
    """All measures of a share, share by share; one measure has one vertical axis for all shares."""
    lines = sorted(lines, key=lambda line: share_of(next(iter(line.values()))))
    weights = sorted({weight for line in lines for weight in line})
    low, high = math.log(weights[0]), math.log(weights[-1])
    places = {weight: 0.06 + 0.88 * (math.log(weight) - low) / (high - low) for weight in weights}
    steps = [(places[weight], f"{weight:g}", "") for weight in weights]
    several = len(lines) > 1 or len({share_of(arm) for arm in subject.arms}) > 1
    measures = [m for m in (accuracy_of(subject.main_test), BG_GAP) if m.key in subject.numbers]
    drawn = {
        (measure.key, i): _line(subject, measure, line, places) for measure in measures for i, line in enumerate(lines)
    }
    found = []
    for i, line in enumerate(lines):
        for measure in measures:
            rungs, band, rows = drawn[measure.key, i]
            if not rungs:
                continue
            ends = [one for key, k in drawn for one in _ends(drawn[key, k]) if key == measure.key]
            unit = "points" if measure is BG_GAP else "%"
            share = share_of(next(iter(line.values()))).name
            base = _base(subject, line)
            level = f"; {base.name} {number(band.mean)}" if base and band else ""
            heard = f"{measure.name} by lambda: {told(rungs, [row.weight for row in rows], unit)}{level}"
            found.append(
                Panel(
                    f"{measure.name}, {share}{'' if 'per class' in share else ' of the labels'}"
                    if several
                    else measure.name,
                    "" if measure.higher_is_better else "less is better",
                    base.name if base else "",
                    ladders(
                        [Ladder("arm", rungs)],
                        steps,
                        label=heard,
                        unit=unit,
                        x_label="λ",
                        up=scale(reach(ends), 4, within=None if measure is BG_GAP else (0, 100)),
                        band=band,
                    ),
                    rows,
                )
            )
    return tuple(found)


def _ends(line: tuple[list[Rung], Band | None, tuple[Point, ...]]) -> list[Rung | Band]:
    rungs, band, _ = line
    return [*rungs, *([band] if band else [])]


def _base(subject: Subject, line: dict[float, Arm]) -> Arm | None:
    return plain_of(subject, next(iter(line.values())))


def _line(
    subject: Subject, measure: Measure, line: dict[float, Arm], places: dict[float, float]
) -> tuple[list[Rung], Band | None, tuple[Point, ...]]:
    base = _base(subject, line)
    level = over_seeds(subject, measure.key, base) if base else None
    rungs, rows = [], []
    for weight, arm in line.items():
        own = over_seeds(subject, measure.key, arm)
        if own is None:
            continue
        difference = paired(subject, measure.key, arm, base) if base else None
        rungs.append(_rung(places[weight], own, difference))
        rows.append(
            Point(
                f"{weight:g}",
                number(100 * own.mean),
                "" if difference is None else points(difference.mean),
                between(own) if difference is None else between(difference, sign=True),
            )
        )
    band = None if level is None else Band(100 * level.mean, 100 * level.low, 100 * level.high)
    return rungs, band, tuple(rows)


def _rung(place: float, own: Interval, difference: Interval | None) -> Rung:
    """The arm's mean; its line is the paired interval around it, or without a baseline its own."""
    if difference is None:
        return Rung(place, 100 * own.mean, 100 * own.low, 100 * own.high)
    below, above = difference.mean - difference.low, difference.high - difference.mean
    return Rung(place, 100 * own.mean, 100 * (own.mean - below), 100 * (own.mean + above), is_clear(difference))
