"""Tables of the page: all numbers with their intervals, and the settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from foveal.report.axes import number
from foveal.report.gather import Arm, Measured, Subject
from foveal.report.words import between, gigabytes, is_clear, points, rounded
from foveal.stats import Interval
from foveal.train.run import Run


@dataclass(frozen=True)
class Number:
    """One field of the table of all numbers."""

    value: str
    interval: str = ""
    seeds: str = ""


def numbers(subject: Subject) -> list[tuple[str, list[Number]]]:
    """Every measure of every arm, then the differences, with both intervals and the single seeds."""
    rows = []
    for measure in subject.measures:
        held = subject.numbers[measure.key]
        cells = [_value(held.get(arm.name)) for arm in subject.arms]
        cells += [_difference(held.get(arm.name)) for arm in subject.others if arm.base]
        rows.append((measure.name + ("" if measure.higher_is_better else " (less is better)"), cells))
    return rows


@dataclass(frozen=True)
class Table:
    """A measure of many arms: a row for each."""

    name: str
    rows: tuple[tuple[str, Number, Number, str], ...]  # arm, value, difference, how many seeds agree on its sign


def by_measure(subject: Subject) -> list[Table]:
    """All numbers of many arms, a table per measure with the arms as rows."""
    found = []
    for measure in subject.measures:
        held = subject.numbers[measure.key]
        rows = [
            (arm.name, _value(held[arm.name]), _difference(held[arm.name]), str(held[arm.name].agreement or ""))
            for arm in subject.arms
            if arm.name in held
        ]
        found.append(Table(measure.name + ("" if measure.higher_is_better else " (less is better)"), tuple(rows)))
    return found


@dataclass(frozen=True)
class Glance:
    """All arms in one table: columns (name, which way is better), and per arm a cell for each."""

    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[Arm, tuple[Number, ...]], ...]


def glance(subject: Subject) -> Glance:
    """Arms as rows: means on the main test set with their differences, cost of a step, peak memory.

    A difference whose interval over seeds leaves out zero is marked with a star.
    """
    test = f"/{subject.main_test}"
    measures = [
        m for m in subject.measures if "/" not in m.key or m.key.endswith(test) or m.key.startswith("accuracy/")
    ]
    columns = [(m.name, "more is better" if m.higher_is_better else "less is better") for m in measures]
    costs, memory = any(arm.cost for arm in subject.arms), any(arm.memory for arm in subject.arms)
    columns += [("cost of a step", "less is better")] * costs + [("peak memory", "less is better")] * memory
    rows = []
    for arm in subject.arms:
        cells = [_short(subject.numbers[m.key].get(arm.name)) for m in measures]
        if costs:
            cells.append(Number(rounded(arm.cost)) if arm.cost else Number(MISSING))
        if memory:
            cells.append(Number(gigabytes(arm.memory) if arm.memory else MISSING))
        rows.append((arm, tuple(cells)))
    return Glance(tuple(columns), tuple(rows))


MISSING = "—"


def _short(found: Measured | None) -> Number:
    if found is None:
        return Number(MISSING)
    seeds = found.difference_over_seeds
    mean = number(100 * sum(found.values) / len(found.values))
    return Number(mean, "" if seeds is None else points(seeds.mean) + ("*" if is_clear(seeds) else ""))


def _value(found: Measured | None) -> Number:
    return Number(MISSING) if found is None else _number(found.over_images, found.over_seeds, found.values)


def _difference(found: Measured | None) -> Number:
    if found is None or found.difference is None:
        return Number(MISSING)
    return _number(found.difference, found.difference_over_seeds, (), sign=True)


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
