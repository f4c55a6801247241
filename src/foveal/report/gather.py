"""What a page is about: arms of runs, numbers with intervals, and the test images if they can still be had."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from foveal import stats
from foveal.data import Data, DataError, Images, load
from foveal.report.words import BG_GAP, Measure, accuracy_of, balanced_accuracy_of, pointing_of
from foveal.stats import Interval
from foveal.train.comparing import Comparison
from foveal.train.run import Run


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed only.  kind: `base` for the one that others are compared with, else `arm`."""

    name: str
    kind: str
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Measured:
    """One number of one arm; differences are arm minus baseline, None for the baseline and for a single run."""

    values: tuple[float, ...]  # per seed
    over_images: Interval
    over_seeds: Interval
    difference: Interval | None = None  # paired over images
    difference_over_seeds: Interval | None = None


@dataclass(frozen=True)
class Subject:
    """One run (one arm, one run) or a comparison (the baseline first)."""

    folder: Path
    arms: tuple[Arm, ...]
    measures: tuple[Measure, ...]
    numbers: Mapping[str, Mapping[str, Measured]]  # measure's key -> arm's name -> numbers
    command: str

    @property
    def base(self) -> Arm:
        return self.arms[0]

    @property
    def others(self) -> tuple[Arm, ...]:
        return self.arms[1:]

    @property
    def first(self) -> Run:
        return self.arms[0].runs[0]

    @property
    def tests(self) -> list[str]:
        return list(self.first.results["sets"])

    @property
    def main_test(self) -> str:
        """The test set of the headline: backgrounds that do not help where there are such, else the first."""
        return "mixed_rand" if "mixed_rand" in self.tests else self.tests[0]


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
    if {"accuracy/mixed_same", "accuracy/mixed_rand"} <= values.keys():
        same, rand = values["accuracy/mixed_same"], values["accuracy/mixed_rand"]
        if len(same) == len(rand):
            values["bg_gap"] = same - rand
    numbers = {}
    for key, each in values.items():
        interval = stats.over_images(each)
        numbers[key] = {arm.name: Measured((interval.mean,), interval, stats.over_seeds([interval.mean]))}
    return Subject(run.folder, (arm,), _measures(numbers, sets), numbers, str(run.results.get("command", "")))


def of_comparison(comparison: Comparison, command: str | None = None) -> Subject:
    """A comparison: numbers as its comparison.json has them.  command: that makes all of it, where there is one."""
    names = comparison.arms
    arms = tuple(Arm(name, "arm" if i else "base", tuple(comparison.runs(name))) for i, name in enumerate(names))
    numbers = {key: {name: _measured(comparison, key, name) for name in names} for key in comparison.metrics}
    commands = [str(run.results.get("command", "")) for arm in arms for run in arm.runs]
    sets = arms[0].runs[0].results["sets"]
    return Subject(comparison.folder, arms, _measures(numbers, sets), numbers, command or "\n".join(commands))


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


def _measures(numbers: Mapping[str, Any], sets: Mapping[str, Any]) -> tuple[Measure, ...]:
    """Measures that are there, in the order of the page; balanced accuracy only where it says something else."""
    found = [accuracy_of(name) for name in sets]
    for name, scores in sets.items():
        if abs(scores["balanced_accuracy"] - scores["accuracy"]) >= 0.0005:
            found.append(balanced_accuracy_of(name))
    found += [BG_GAP, *(pointing_of(name) for name in sets)]
    return tuple(measure for measure in found if measure.key in numbers)


def _measured(comparison: Comparison, key: str, arm: str) -> Measured:
    values = tuple(comparison.values(key, arm))
    paired = arm != comparison.arms[0]
    over_seeds = comparison.interval(key, arm, "seeds")
    over_images = comparison.interval(key, arm, "images")
    difference = comparison.interval(key, arm, "images", paired=True) if paired else None
    difference_over_seeds = comparison.interval(key, arm, "seeds", paired=True) if paired else None
    if paired and difference is None:
        base = comparison.values(key, comparison.arms[0])
        difference = _no_interval(float(np.mean(values) - np.mean(base)))
    return Measured(
        values,
        over_images or _no_interval(float(np.mean(values))),
        over_seeds or _no_interval(float(np.mean(values))),
        difference,
        difference_over_seeds,
    )


def _no_interval(mean: float) -> Interval:
    return Interval(mean, math.nan, math.nan, 0.95, "not available: the images of the runs cannot be paired")
