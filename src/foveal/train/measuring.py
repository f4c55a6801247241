"""What comparison.json says: every metric of every arm, and its differences to the baseline with intervals.

over images    bootstrap over the test images, the seeds as they are
over seeds     Student's t over the seeds
paired         of arm - baseline: on the same images, with the seeds that both arms have finished
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from foveal import stats
from foveal.stats import Interval
from foveal.train.outcome import read_label_gaps
from foveal.train.run import Run

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """A metric of an arm.

    seeds: of its runs.  values: (S,) per seed.  images: (S, N) whose row means are the values, or None.  names: of
    the N images.
    """

    seeds: tuple[int, ...]
    values: Floats
    images: Floats | None = None
    names: tuple[str, ...] = ()

    def only(self, seeds: Sequence[int]) -> "Measured":
        """The same for some of the seeds."""
        rows = [self.seeds.index(seed) for seed in seeds]
        return Measured(tuple(seeds), self.values[rows], None if self.images is None else self.images[rows], self.names)


def metrics_of(runs: Mapping[str, Sequence[Run]], baseline_of: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """{metric: {arm: what comparison.json says}} of the finished runs of each arm; an arm may lack a metric.

    Labels that are not mixed cannot be inconsistent: inconsistency is not compared with that of an arm that mixes none.
    """
    measured = {arm: measure(made) for arm, made in runs.items() if made}
    told: dict[str, dict[str, Any]] = {}
    for key in _merged([list(found) for found in measured.values()]):
        told[key] = {}
        for arm, found in measured.items():
            base = baseline_of.get(arm, "")
            right = key.startswith("inconsistency/") and base in measured and runs[base][0].settings.mix == "none"
            if key in found:
                told[key][arm] = summary(found[key], None if right else measured.get(base, {}).get(key))
    return told


def measure(runs: Sequence[Run]) -> dict[str, Measured]:
    """Every metric that all runs of an arm have, per seed and, where it is a mean over images, per image."""
    seeds = tuple(run.settings.seed for run in runs)
    found: dict[str, Measured] = {}
    for name in runs[0].results["sets"]:
        scores = [run.results["sets"][name] for run in runs]
        made = [run.predictions(name) for run in runs]
        tested = {tuple(run.split["sets"][f"test/{name}"]["images"]) for run in runs}
        names = tested.pop() if len(tested) == 1 else ()
        right = [one.correct.double().numpy() for one in made]
        gaps = [read_label_gaps(run.folder, name) for run in runs]
        rows: dict[str, list[Floats]] = {
            "accuracy": right,
            "balanced_accuracy": [
                row * class_weights(one.labels.numpy()) for row, one in zip(right, made, strict=True)
            ],
            "ece": [],  # no mean over images
            "inconsistency": [gap.double().numpy() for gap in gaps if gap is not None],
            "pointing": [one.pointing.double().numpy() for one in made if one.pointing is not None],
        }
        for kind, images in rows.items():
            values = [_score(score, kind) for score in scores]
            if None not in values:
                found[f"{kind}/{name}"] = Measured(seeds, np.array(values, np.float64), _stack(images, names), names)
    if all(run.results["bg_gap"] is not None for run in runs):
        same, rand = (found[f"accuracy/mixed_{name}"].images for name in ("same", "rand"))
        gap = same - rand if same is not None and rand is not None and same.shape == rand.shape else None
        values = [run.results["bg_gap"] for run in runs]
        found["bg_gap"] = Measured(seeds, np.array(values, np.float64), gap, found["accuracy/mixed_same"].names)
    return found


def _score(score: Mapping[str, Any], kind: str) -> float | None:
    """A number of results.json; None where it was not measured, as in runs of older versions."""
    value = score.get(kind)
    return value["gap"] if isinstance(value, dict) else value


def class_weights(labels: npt.NDArray[np.int64]) -> Floats:
    """(N,) weights under which the mean over images is the mean over classes: N / (classes present * class size)."""
    sizes = np.bincount(labels)
    weights: Floats = len(labels) / (np.count_nonzero(sizes) * sizes[labels])
    return weights


def summary(own: Measured, base: Measured | None) -> dict[str, Any]:
    """A metric of an arm, and of its differences to the baseline where there is one, as plain values."""
    told: dict[str, Any] = {"values": own.values.tolist(), "over_seeds": _plain(stats.over_seeds(own.values))}
    if _any_image(own.images):
        told["over_images"] = _plain(stats.over_images(own.images))
    if base is None or not (both := [seed for seed in own.seeds if seed in base.seeds]):
        return told
    mine, theirs = own.only(both), base.only(both)
    differences = mine.values - theirs.values
    told["paired"] = {
        "seeds": both,
        "values": differences.tolist(),
        "up": int((differences > 0).sum()),
        "down": int((differences < 0).sum()),
        "over_seeds": _plain(stats.paired_over_seeds(mine.values, theirs.values)),
    }
    if (
        mine.images is not None
        and theirs.images is not None
        and mine.names == theirs.names
        and mine.images.shape == theirs.images.shape
        and _any_image(mine.images - theirs.images)
    ):
        told["paired"]["over_images"] = _plain(stats.paired_over_images(mine.images, theirs.images))
    return told


def memory_of(runs: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, Any]]:
    """{arm: {"bytes": peak of each run, "of": "device" or "process"}}, for arms all of whose runs tell."""
    told = {}
    for arm, made in runs.items():
        peaks = [run.results.get("peak_memory") for run in made]
        if peaks and all(peaks):
            told[arm] = {"bytes": [peak["bytes"] for peak in peaks if peak], "of": peaks[0]["of"] if peaks[0] else ""}
    return told


def _any_image(images: Floats | None) -> bool:
    return images is not None and bool(np.isfinite(images).all(0).any())


def _merged(lists: list[list[str]]) -> list[str]:
    """All entries once: those of the first list in its order, then what only later ones have."""
    return list(dict.fromkeys(entry for each in lists for entry in each))


def _plain(interval: Interval) -> dict[str, Any]:
    told = asdict(interval)
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in told.items()}


def _stack(rows: list[Floats], names: tuple[str, ...]) -> Floats | None:
    """(S, N), or None where the runs were not tested on the same images: a column would not be one image."""
    return np.stack(rows) if names and {len(row) for row in rows} == {len(names)} else None
