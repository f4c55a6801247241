"""Compare ways to train: every arm with every seed, then differences with intervals that say what they are over.

    paired over images    arm - baseline on the same test images, the seeds as they are
    paired over seeds     arm - baseline with the same seeds

A comparison that was stopped goes on where it was: finished runs are kept, an unfinished one resumes.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from foveal import stats
from foveal.stats import Interval
from foveal.train.errors import Interrupted, RunError, SettingsError
from foveal.train.files import write_text
from foveal.train.folder import check_same, is_finished
from foveal.train.run import Run, read_json
from foveal.train.settings import Settings

AGAIN = "stopped; run the same comparison again to go on where it was"
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """A finished comparison in its folder; the first arm is the baseline of the others."""

    folder: Path

    @classmethod
    def load(cls, path: str | Path) -> "Comparison":
        """The comparison in a folder. Raises RunError where there is none or it has not finished."""
        folder = Path(path).expanduser()
        if not (folder / "comparison.json").is_file():
            raise RunError(f"{folder} holds no finished comparison (no comparison.json)")
        return cls(folder)

    @cached_property
    def content(self) -> dict[str, Any]:
        """comparison.json as it is."""
        return read_json(self.folder / "comparison.json")

    @property
    def arms(self) -> list[str]:
        """Names of the arms, the baseline first."""
        return list(self.content["arms"])

    @property
    def seeds(self) -> list[int]:
        """The seeds that every arm was trained with."""
        return list(self.content["seeds"])

    @property
    def metrics(self) -> list[str]:
        """What was measured: accuracy/<set>, balanced_accuracy/<set>, pointing/<set>, bg_gap; all shares."""
        return list(self.content["metrics"])

    def runs(self, arm: str) -> list[Run]:
        """The runs of an arm, in the order of the seeds."""
        return [Run.load(self.folder / name) for name in self.content["runs"][arm]]

    def values(self, metric: str, arm: str) -> list[float]:
        """The metric of each seed."""
        return list(self.content["metrics"][metric][arm]["values"])

    def interval(self, metric: str, arm: str, over: str = "seeds", paired: bool = False) -> Interval | None:
        """The metric of an arm, or with `paired` what it is above the baseline; None where there is no such interval.

        over: "seeds" or "images".
        """
        told = self.content["metrics"][metric][arm]
        found = (told.get("paired") or {} if paired else told).get(f"over_{over}")
        if found is None:
            return None
        ends = {name: math.nan if found[name] is None else found[name] for name in ("low", "high")}
        return Interval(**(found | ends))


def compare(
    arms: Mapping[str, Settings],
    seeds: Sequence[int],
    out: str | Path,
    jobs: int = 1,
    progress: Callable[[str, dict[str, Any]], None] | None = None,
) -> Comparison:
    """Train every arm with every seed into `out`/<arm>-seed<k>, then compare the arms with the first.

    jobs: runs at a time, each in a process with one thread; worth it for models too small to fill two cores with
    one run. 1 trains here, one after the other. progress: called as progress(run's name, row of metrics.csv)
    after each epoch, and with an empty row when a run is done. Raises as `fit`, and SettingsError for arms or
    seeds that cannot be compared.
    """
    _check(arms, seeds, jobs)
    out = Path(out)
    runs = {
        arm: [settings.replace(seed=seed, out=str(out), name=f"{arm}-seed{seed}") for seed in seeds]
        for arm, settings in arms.items()
    }
    # seed by seed, so that a comparison that is stopped early has whole pairs
    order = [runs[arm][k] for k in range(len(seeds)) for arm in arms]
    tell = progress or _say_nothing
    for settings in [one for one in order if is_finished(one.folder)]:
        check_same(settings, Settings.from_yaml(settings.folder / "settings.yaml"), settings.folder)
        order.remove(settings)
        tell(str(settings.name), {})
    if jobs == 1 or len(order) < 2:
        from foveal.train.fitting import fit

        try:
            for settings in order:
                fit(settings, resume=True, progress=partial(tell, str(settings.name)))
                tell(str(settings.name), {})
        except KeyboardInterrupt:
            raise Interrupted(AGAIN) from None
    else:
        from foveal.train.crew import train_all

        try:
            train_all(order, jobs, tell)
        except KeyboardInterrupt:
            raise Interrupted(AGAIN) from None
    write_text(out / "comparison.json", json.dumps(_content(arms, seeds, runs), indent=1, ensure_ascii=False) + "\n")
    return Comparison(out)


def _say_nothing(name: str, row: dict[str, Any]) -> None:
    pass


def _check(arms: Mapping[str, Settings], seeds: Sequence[int], jobs: int) -> None:
    if not arms:
        raise SettingsError("no arms to compare: give a name and settings for each")
    for arm in arms:
        if not re.fullmatch(r"[\w.+=-]+", arm):
            raise SettingsError(f"arm {arm!r} cannot name a folder: use letters, digits and . _ + = -")
    if not seeds or len(set(seeds)) != len(seeds):
        raise SettingsError(f"seeds={list(seeds)}: give one or more, each once")
    if jobs < 1:
        raise SettingsError(f"jobs={jobs} must be 1 or more")


def _content(arms: Mapping[str, Settings], seeds: Sequence[int], runs: dict[str, list[Settings]]) -> dict[str, Any]:
    measured = {arm: measure([Run.load(settings.folder) for settings in made]) for arm, made in runs.items()}
    baseline = next(iter(arms))
    shared = [key for key in measured[baseline] if all(key in of for of in measured.values())]
    return {
        "baseline": baseline,
        "arms": list(arms),
        "seeds": list(seeds),
        "runs": {arm: [settings.name for settings in made] for arm, made in runs.items()},
        "settings": {arm: settings.as_dict() for arm, settings in arms.items()},
        "metrics": {
            key: {
                arm: _summary(measured[arm][key], None if arm == baseline else measured[baseline][key]) for arm in arms
            }
            for key in shared
        },
    }


@dataclass(frozen=True)
class Measured:
    """A metric of an arm: values (S,) per seed; images (S, N) whose row means are the values, or None."""

    values: Floats
    images: Floats | None


def measure(runs: Sequence[Run]) -> dict[str, Measured]:
    """Every metric of the runs of one arm, per seed and, where it is a mean over images, per image."""
    found: dict[str, Measured] = {}
    right: dict[str, Floats | None] = {}
    for name in runs[0].results["sets"]:
        made = [run.predictions(name) for run in runs]
        scores = [run.results["sets"][name] for run in runs]
        right[name] = _stack([one.correct.double().numpy() for one in made])
        found[f"accuracy/{name}"] = Measured(_of(scores, "accuracy"), right[name])
        weighed = _stack([one.correct.double().numpy() * class_weights(one.labels.numpy()) for one in made])
        found[f"balanced_accuracy/{name}"] = Measured(_of(scores, "balanced_accuracy"), weighed)
        if all(score["pointing"] is not None for score in scores):
            pointing = _stack([one.pointing.double().numpy() for one in made if one.pointing is not None])
            found[f"pointing/{name}"] = Measured(_of(scores, "pointing"), pointing)
    if all(run.results["bg_gap"] is not None for run in runs):
        same, rand = right["mixed_same"], right["mixed_rand"]
        aligned = same is not None and rand is not None and same.shape == rand.shape
        gap = same - rand if aligned and same is not None and rand is not None else None
        found["bg_gap"] = Measured(np.array([run.results["bg_gap"] for run in runs]), gap)
    return found


def class_weights(labels: npt.NDArray[np.int64]) -> Floats:
    """(N,) weights under which the mean over images is the mean over classes: N / (classes present * class size)."""
    sizes = np.bincount(labels)
    weights: Floats = len(labels) / (np.count_nonzero(sizes) * sizes[labels])
    return weights


def _summary(own: Measured, base: Measured | None) -> dict[str, Any]:
    told: dict[str, Any] = {"values": own.values.tolist(), "over_seeds": _plain(stats.over_seeds(own.values))}
    if own.images is not None:
        told["over_images"] = _plain(stats.over_images(own.images))
    if base is not None:
        told["paired"] = {"over_seeds": _plain(stats.paired_over_seeds(own.values, base.values))}
        if own.images is not None and base.images is not None and own.images.shape == base.images.shape:
            told["paired"]["over_images"] = _plain(stats.paired_over_images(own.images, base.images))
    return told


def _plain(interval: Interval) -> dict[str, Any]:
    told = asdict(interval)
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in told.items()}


def _of(scores: list[dict[str, Any]], name: str) -> Floats:
    return np.array([score[name] for score in scores], np.float64)


def _stack(rows: list[Floats]) -> Floats | None:
    return np.stack(rows) if len({len(row) for row in rows}) == 1 else None
