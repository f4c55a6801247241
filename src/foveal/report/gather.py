"""What a page is about: arms of runs, numbers with intervals, and the test images if they can still be had."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from foveal import stats
from foveal.data import Data, DataError, Images, load
from foveal.report.words import (
    BG_GAP,
    Measure,
    accuracy_of,
    balanced_accuracy_of,
    ece_of,
    inconsistency_of,
    pointing_of,
)
from foveal.stats import Interval
from foveal.train.comparison import Agreement, Comparison
from foveal.train.costs import Cost
from foveal.train.outcome import read_label_gaps
from foveal.train.run import Run

FEW = 4  # arms that can be shown side by side; of more, some are chosen


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed only.

    kind: `base` for the first and others that arms are compared with, else `arm`.  base: the arm that it is compared
    with.  cost: of a training step.  memory: the most bytes that a run held.
    """

    name: str
    kind: str
    runs: tuple[Run, ...]
    base: str | None = None
    cost: Cost | None = None
    memory: float | None = None


@dataclass(frozen=True)
class Measured:
    """One number of one arm; differences are arm minus baseline, None for the baseline and for a single run."""

    values: tuple[float, ...]  # per seed
    over_images: Interval
    over_seeds: Interval
    difference: Interval | None = None  # paired over images
    difference_over_seeds: Interval | None = None
    agreement: Agreement | None = None  # of the seeds, on the sign of the difference


@dataclass(frozen=True)
class Subject:
    """One run (one arm, one run) or a comparison (the baseline first).

    numbers: by a measure's key and an arm's name; an arm may lack a measure.  failed: why, by a run's name.  missing:
    arms without finished runs.  costs: how they were measured.
    """

    folder: Path
    arms: tuple[Arm, ...]
    measures: tuple[Measure, ...]
    numbers: Mapping[str, Mapping[str, Measured]]
    command: str
    failed: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    costs: str = ""

    @property
    def base(self) -> Arm:
        return self.arms[0]

    @property
    def others(self) -> tuple[Arm, ...]:
        return self.arms[1:]

    @property
    def is_wide(self) -> bool:
        """Whether there are too many arms to show all of each."""
        return len(self.arms) > FEW

    @property
    def bases(self) -> list[str]:
        """Names of the baselines, in order."""
        return list(dict.fromkeys(arm.base for arm in self.arms if arm.base))

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def first(self) -> Run:
        return self.arms[0].runs[0]

    @property
    def tests(self) -> list[str]:
        """The test sets that all arms have."""
        held = [arm.runs[0].results["sets"] for arm in self.arms]
        return [name for name in held[0] if all(name in sets for sets in held)]

    @property
    def main_test(self) -> str:
        """The test set of the headline: backgrounds that do not help where there are such, else the first."""
        tests = self.tests
        return "mixed_rand" if "mixed_rand" in tests else tests[0]


def of_run(run: Run) -> Subject:
    """A single run; its intervals are over the test images."""
    arm = Arm(run.folder.name, "arm", (run,))
    sets: Mapping[str, Any] = run.results["sets"]
    values: dict[str, NDArray[np.float64]] = {}  # per image
    for name in sets:
        predictions = run.predictions(name)
        values[f"accuracy/{name}"] = predictions.correct.double().numpy()
        if predictions.pointing is not None and predictions.mean_pointing is not None:
            values[f"pointing/{name}"] = predictions.pointing.double().numpy()
        if (
            run.settings.mix != "none"
            and (gaps := read_label_gaps(run.folder, name)) is not None
            and gaps.isfinite().any()
        ):
            values[f"inconsistency/{name}"] = gaps.double().numpy()
    if {"accuracy/mixed_same", "accuracy/mixed_rand"} <= values.keys():
        same, rand = values["accuracy/mixed_same"], values["accuracy/mixed_rand"]
        if len(same) == len(rand):
            values["bg_gap"] = same - rand
    numbers = {}
    for key, each in values.items():
        interval = stats.over_images(each)
        numbers[key] = {arm.name: Measured((interval.mean,), interval, stats.over_seeds([interval.mean]))}
    for name, scores in sets.items():
        for kind in ("balanced_accuracy", "ece"):
            if (value := scores.get(kind)) is not None:
                numbers[f"{kind}/{name}"] = {arm.name: Measured((value,), _no_interval(value), _no_interval(value))}
    return Subject(run.folder, (arm,), _measures(numbers, sets), numbers, str(run.results.get("command", "")))


def of_comparison(comparison: Comparison, command: str | None = None) -> Subject:
    """A comparison: numbers as its comparison.json has them.  command: that makes all of it, where there is one."""
    names = comparison.arms
    bases = {names[0], *(comparison.baseline(name) for name in names)}
    costs = comparison.costs
    arms = tuple(
        Arm(
            name,
            "base" if name in bases else "arm",
            tuple(comparison.runs(name)),
            comparison.baseline(name),
            costs.arms.get(name) if costs else None,
            (comparison.memory(name) or (None,))[0],
        )
        for name in names
    )
    numbers = {
        key: {name: _measured(comparison, key, name) for name in names if comparison.values(key, name)}
        for key in comparison.metrics
    }
    commands = [str(run.results.get("command", "")) for arm in arms for run in arm.runs]
    return Subject(
        comparison.folder,
        arms,
        _measures(numbers, arms[0].runs[0].results["sets"]),
        numbers,
        command or "\n".join(commands),
        comparison.failed,
        tuple(comparison.missing),
        costs.told() if costs and costs.arms else "",
    )


def test_images(run: Run) -> Data | str:
    """The run's data set, or a sentence on why its pictures cannot be shown.

    Images that are no longer those that were tested (names differ from split.json) are not shown.
    """
    settings = run.settings
    seed = settings.seed if settings.data_seed is None else settings.data_seed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said when the run was made
            data = load(settings.data, seed=seed, image_size=settings.image_size)
    except (DataError, OSError) as error:
        return f"The pictures are left out, as the data set cannot be read now: {error}."
    for name, images in data.tests.items():
        if name in run.results["sets"] and list(images.names) != run.split["sets"][f"test/{name}"]["images"]:
            return f"The pictures are left out: the images of {name} are no longer those that were tested."
    return data


def even_gaze(images: Images) -> float | None:
    """Share of attention that a map spread evenly would put on the objects; None without masks."""
    if images.masks is None:
        return None
    has_object = images.masks.flatten(1).any(1)
    return float(images.masks[has_object].to(torch.float64).mean()) if has_object.any() else None


def _measures(numbers: Mapping[str, Mapping[str, Measured]], sets: Iterable[str]) -> tuple[Measure, ...]:
    """Measures that are there, in the order of the page; balanced accuracy only where it says something else."""
    found = [accuracy_of(name) for name in sets]
    for name in sets:
        plain, balanced = (numbers.get(f"{kind}/{name}", {}) for kind in ("accuracy", "balanced_accuracy"))
        pairs = [zip(plain[arm].values, balanced[arm].values, strict=True) for arm in plain if arm in balanced]
        if any(abs(a - b) >= 0.0005 for arm in pairs for a, b in arm):
            found.append(balanced_accuracy_of(name))
    found.append(BG_GAP)
    for kind in (pointing_of, ece_of, inconsistency_of):
        found += [kind(name) for name in sets]
    return tuple(measure for measure in found if numbers.get(measure.key))


def _measured(comparison: Comparison, key: str, arm: str) -> Measured:
    values = tuple(comparison.values(key, arm))
    over_seeds, difference_over_seeds = (comparison.interval(key, arm, "seeds", paired=p) for p in (False, True))
    over_images, difference = (comparison.interval(key, arm, "images", paired=p) for p in (False, True))
    if difference_over_seeds is not None and difference is None:
        difference = _no_interval(difference_over_seeds.mean)
    return Measured(
        values,
        over_images or _no_interval(float(np.mean(values))),
        over_seeds or _no_interval(float(np.mean(values))),
        difference,
        difference_over_seeds,
        comparison.agreement(key, arm),
    )


def _no_interval(mean: float) -> Interval:
    return Interval(mean, math.nan, math.nan, 0.95, "not available: it is no mean over images that can be paired")
