"""Tables of the page: all numbers with their intervals, and the settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from foveal.report.axes import number
from foveal.report.gather import Arm, Subject
from foveal.report.words import between
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
