"""The learning curve: accuracy against the share of the labels, and whether a gain grows as labels shrink.

A panel for each way to train, with the baseline's way in grey; below it the difference to the baseline at each share,
paired over the seeds that both have.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from foveal import stats
from foveal.report.axes import scale
from foveal.report.gather import Arm, Subject
from foveal.report.ladder import Ladder, Rung, ladders, reach, rung, told
from foveal.report.ways import SHARE, Share, by_seed, evenly, key_of, over_seeds, paired, share_of, way_of
from foveal.report.words import accuracy_of, between, is_clear, level, points
from foveal.stats import Interval


@dataclass(frozen=True)
class Curve:
    """One way's panel. gain: the chart of differences, None for the baseline's own; says: on the gain."""

    name: str
    base: str
    chart: Markup
    gain: Markup | None
    says: str


@dataclass(frozen=True)
class _Way:
    name: str
    arms: dict[Share, Arm]


def learning_curves(subject: Subject) -> list[Curve]:
    """Panels of accuracy on the main test set against the share of labels; [] where no way has two shares."""
    ways = _ways(subject)
    if not any(len(way.arms) > 1 for way in ways):
        return []
    base, others = ways[0], [way for way in ways[1:] if len(way.arms) > 1]
    key = accuracy_of(subject.main_test).key
    shares = sorted({share for way in ways for share in way.arms})
    places = dict(zip(shares, evenly(len(shares)), strict=True))
    lines = {way.name: _rungs(subject, key, way, places) for way in ways}
    gains = {way.name: _gains(subject, key, way, base) for way in others}
    up = scale(reach([one for way in ways for one in lines[way.name]]), 4, within=(0, 100))
    drawn = [rung(places[s], gain) for way in others for s, gain in gains[way.name].items()]
    over = scale([0.0, *reach(drawn)], 4)
    steps = [(places[share], share.name, f"{share.images:,}") for share in shares]
    made = []
    for way in others or [base]:
        pair = [base, way] if way is not base else [way]
        heard = "; ".join(
            f"{one.name} {told(lines[one.name], [s.name for s in sorted(one.arms)], '%')}" for one in pair
        )
        panel = ladders(
            [Ladder("arm" if one is way else "base", lines[one.name]) for one in pair],
            steps,
            label=f"accuracy by share of the labels: {heard}",
            unit="%",
            up=up,
        )
        gain, says = None, ""
        if own := gains.get(way.name):
            rungs = [rung(places[share], one, clear=is_clear(one)) for share, one in own.items()]
            names = [share.name for share in own]
            gain = ladders(
                [Ladder("arm", rungs)],
                steps,
                label=f"{way.name} minus {base.name}: {told(rungs, names, 'points', sign=True)}",
                unit="",
                up=over,
                zero=True,
                height=130,
            )
            says = growth(subject, key, way.arms, base.arms)
        made.append(Curve(way.name, base.name if way is not base else "", panel, gain, says))
    return made


def growth(subject: Subject, key: str, arms: dict[Share, Arm], base: dict[Share, Arm]) -> str:
    """Whether the gain over the baseline is larger with the fewest labels than with the most, seed by seed."""
    both = sorted(arms.keys() & base.keys())
    if len(both) < 2:
        return ""
    few, many = both[0], both[-1]
    held = [by_seed(subject, key, found[share]) for share in (few, many) for found in (arms, base)]
    seeds = [seed for seed in held[0] if all(seed in one for one in held)]
    if not seeds:
        return ""
    change = stats.over_seeds([held[0][s] - held[1][s] - (held[2][s] - held[3][s]) for s in seeds])
    said = _grows(change)
    at = [paired(subject, key, arms[share], base[share]) for share in (few, many)]
    gains = [points(one.mean) for one in at if one is not None]
    rests = f"{level(change)} interval {between(change, sign=True)} over seeds" if change.available else "no interval"
    return f"{gains[0]} points at {few.name}, {gains[1]} at {many.name}: {said} ({rests})."


def _grows(change: Interval) -> str:
    size = f"{points(change.mean)} points"
    if is_clear(change):
        return f"the gain {'grows' if change.mean > 0 else 'declines'} as labels shrink, by {size}"
    return f"{size} between them, which is not enough to claim that the gain grows or declines as labels shrink"


def _ways(subject: Subject) -> list[_Way]:
    """Ways in the order of their first arms, the baseline's first; arms of one way differ in their share alone."""
    found: dict[str, dict[Share, Arm]] = {}
    for arm in subject.arms:
        found.setdefault(key_of(arm, without=SHARE), {}).setdefault(share_of(arm), arm)
    ways, taken = [], set()
    for arms in found.values():
        name = way_of(arms[max(arms)])
        if name in taken:
            name = arms[max(arms)].name
        taken.add(name)
        ways.append(_Way(name, dict(sorted(arms.items()))))
    bases = [way for way in ways if any(arm.name == subject.base.name for arm in way.arms.values())]
    return [*bases, *(way for way in ways if way not in bases)]


def _rungs(subject: Subject, key: str, way: _Way, places: dict[Share, float]) -> list[Rung]:
    found = [(share, over_seeds(subject, key, arm)) for share, arm in way.arms.items()]
    return [rung(places[share], one) for share, one in found if one is not None]


def _gains(subject: Subject, key: str, way: _Way, base: _Way) -> dict[Share, Interval]:
    found = {s: paired(subject, key, arm, base.arms[s]) for s, arm in way.arms.items() if s in base.arms}
    return {share: one for share, one in found.items() if one is not None and np.isfinite(one.mean)}
