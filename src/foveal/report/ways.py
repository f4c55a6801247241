"""Which arms belong together: the same way to train at several shares of the labels, or with several weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from foveal import stats
from foveal.report.gather import Arm, Subject
from foveal.report.tables import settings_of
from foveal.stats import Interval

GUIDANCE = ("guide", "guide_weight", "guide_args", "guide_schedule", "guide_source")
SHARE = ("label_fraction", "per_class", "train_list")
MACHINE = ("seed", "device", "devices", "precision", "workers")  # change no result that is meant


@dataclass(frozen=True, order=True)
class Share:
    """How much of the labels an arm has: a share of each class's images, or so many of each; ordered by images."""

    images: int
    name: str  # "15 %", "5 per class"


def share_of(arm: Arm) -> Share:
    run = arm.runs[0]
    fraction, each, listed = (getattr(run.settings, name, None) for name in SHARE)
    images = int(run.results.get("images", 0))
    if listed is not None:
        return Share(images, Path(listed).stem)
    if each is not None:
        return Share(images, f"{each} per class")
    return Share(images, f"{100 * (1.0 if fraction is None else fraction):.4g} %")


def is_guided(arm: Arm) -> bool:
    """Whether guidance acts: a guide is chosen and its weight is not 0."""
    settings = arm.runs[0].settings
    return bool(settings.guide != "none" and weight_of(settings) != 0)


def weight_of(settings: Any) -> float | None:
    """Lambda of a run: as it was set, else the method's own; None for a guide that is not known."""
    if settings.guide_weight is not None:
        return float(settings.guide_weight)
    from foveal.train.guiding import default_weight
    from foveal.transfer import GUIDES

    return default_weight(settings.guide) if settings.guide in GUIDES else None


def key_of(arm: Arm, *, without: Iterable[str] = ()) -> str:
    """All that decides the arm's result but its seed and the settings in `without`."""
    settings = arm.runs[0].settings
    held = {name: value for name, value in settings_of(arm.runs[0]).items() if name not in MACHINE}
    held["guide_weight"] = weight_of(settings)  # the method's own may be given or not
    if all(held.get(name) is None for name in SHARE):
        held["label_fraction"] = 1.0
    if settings.guide == "none":  # then the rest of the guidance says nothing
        held |= dict.fromkeys(GUIDANCE, "none")
    return json.dumps({k: v for k, v in held.items() if k not in without}, sort_keys=True, default=str)


def plain_of(subject: Subject, arm: Arm) -> Arm | None:
    """The arm that differs from a guided one in nothing but the guidance, which it lacks: its control."""
    key = key_of(arm, without=GUIDANCE)
    return next(
        (one for one in subject.arms if not is_guided(one) and key_of(one, without=GUIDANCE) == key and one != arm),
        None,
    )


def way_of(arm: Arm) -> str:
    """The arm's name without its share of the labels: "gta-15%" -> "gta"."""
    return re.sub(r"-[\d.]+%$", "", arm.name)


def paired(subject: Subject, key: str, arm: Arm, base: Arm) -> Interval | None:
    """A measure of an arm minus that of another over the seeds that both have; None without any."""
    mine, theirs = by_seed(subject, key, arm), by_seed(subject, key, base)
    if not (both := [seed for seed in mine if seed in theirs]):
        return None
    return stats.paired_over_seeds([mine[seed] for seed in both], [theirs[seed] for seed in both])


def by_seed(subject: Subject, key: str, arm: Arm) -> Mapping[int, float]:
    """A measure of each run of an arm, by its seed; {} where the arm lacks it."""
    found = subject.numbers.get(key, {}).get(arm.name)
    if found is None or len(found.values) != len(arm.runs):
        return {}
    return {run.settings.seed: value for run, value in zip(arm.runs, found.values, strict=True)}


def over_seeds(subject: Subject, key: str, arm: Arm) -> Interval | None:
    values = list(by_seed(subject, key, arm).values())
    return stats.over_seeds(values) if values and np.isfinite(values).all() else None


def evenly(count: int) -> Sequence[float]:
    """Places of so many steps across a chart."""
    return [0.5] if count == 1 else np.linspace(0.06, 0.94, count).tolist()
