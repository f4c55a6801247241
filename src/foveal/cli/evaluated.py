"""What `foveal evaluate` found: its table, and evaluation.json with the conditions beside each number.

evaluation.json: {evaluations: [{model, origin, features, frame, arithmetic, data, data_seed, label_fraction,
train_images, protocol, recipe, chosen {setting, on, accuracy, ...}, tried [...], sets: {<test set>: {n, accuracy,
over_images, balanced_accuracy, ...}}, last: {...}, notes, versions, finished}]}. Accuracies are shares; over_images is
{mean, low, high, level, over}. The same measurement takes the place of its earlier result; others stay.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveal import stats
from foveal.data import Data, ImageConfig
from foveal.evaluate import KNN, Features, Probe
from foveal.train.errors import RunError
from foveal.train.files import cannot_write, write_text
from foveal.train.models import versions

NAME = "evaluation.json"
SAME = (
    "model", "origin", "features", "frame", "arithmetic", "data", "data_seed", "label_fraction", "protocol", "recipe",
    "tried",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Subject:
    """A model to measure, where it computes, and what is known of it. folder, data: of a run, else None and ""."""

    model: nn.Module
    name: str
    origin: str
    config: ImageConfig
    device: torch.device
    autocast: torch.dtype | None
    folder: Path | None
    data: str
    data_seed: int
    image_size: int | None

    @property
    def frame(self) -> str:
        """How images are framed, in words."""
        (h, w), c = self.config.size, self.config
        return f"{h} x {w} pixels, {c.interpolation}, crop {c.crop_pct:g} {c.crop_mode} (files), no augmentation"

    def about(self, data: Data, fraction: float, n: int) -> dict[str, Any]:
        """The conditions of a measurement."""
        return {
            "model": self.name,
            "origin": self.origin,
            "frame": self.frame,
            "arithmetic": "float32" if self.autocast is None else "bfloat16",
            "data": data.name,
            "data_seed": self.data_seed,
            "label_fraction": fraction,
            "train_images": n,
        }


@dataclass(frozen=True, eq=False)
class Taken:
    """Features of every set, taken once."""

    train: Features
    val: Features
    tests: dict[str, Features]


@dataclass(frozen=True)
class Line:
    """A row of the table.  val: accuracy on validation.  sets: {test set: {"accuracy", "over_images", ...}}."""

    name: str
    val: float | None
    sets: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Evaluation:
    """A protocol's results: lines of the table, and everything as plain values."""

    title: str
    lines: tuple[Line, ...]
    plain: dict[str, Any]


def of_knn(about: dict[str, Any], val: KNN, tests: dict[str, KNN]) -> Evaluation:
    """Setting by setting; the one chosen on val is marked."""
    lines, tried = [], []
    for setting in val.accuracy:
        k, T = setting
        sets = {
            name: _score(one.correct[setting], one.balanced[setting])
            | {"top5": one.top5[setting], "unknown": one.unknown}
            for name, one in tests.items()
        }
        used = f" (all {val.size:,})" if k > val.size else ""
        mark = "  chosen on val" if setting == val.best and len(val.accuracy) > 1 else ""
        lines.append(Line(f"k={k}{used} T={T:g}{mark}", val.accuracy[setting], sets))
        tried.append({"k": k, "temperature": T, "val": val.accuracy[setting], "sets": sets})
    k, T = val.best
    plain = about | {
        "features": val.definition,
        "protocol": "k-NN",
        "recipe": "cosine, votes exp(s / T)",
        "chosen": {"k": k, "temperature": T, "on": "val", "accuracy": val.accuracy[val.best]},
        "tried": tried,
        "sets": next(one["sets"] for one in tried if (one["k"], one["temperature"]) == val.best),
        "notes": sorted({note for one in (val, *tests.values()) for note in one.notes}),
    }
    return Evaluation("k-NN, cosine, weighted", tuple(lines), plain)


def of_probe(about: dict[str, Any], probe: Probe) -> Evaluation:
    """At what was chosen on val, and at the last epoch."""
    sets, last = (
        {name: _score(one.correct, one.balanced) | {"unknown": one.unknown} for name, one in scores.items()}
        for scores in (probe.tests, probe.last)
    )
    at = "" if probe.epoch is None else f", epoch {probe.epoch}"
    lines = [Line(f"{probe.setting}{at}  chosen on val", probe.val, sets)]
    if last:
        chosen = next(trial for trial in probe.trials if probe.setting.split(" of ")[0] == trial.setting)
        lines.append(Line("the same, last epoch", chosen.last, last))
    notes = [
        f"{score['unknown']:,} of {score['n']:,} images of {name} are of classes without a training image: wrong"
        for name, score in sets.items()
        if score["unknown"]
    ]
    plain = about | {
        "features": probe.definition,
        "protocol": probe.kind,
        "recipe": probe.recipe,
        "chosen": {"setting": probe.setting, "epoch": probe.epoch, "on": probe.chosen_on, "accuracy": probe.val},
        "tried": [asdict(trial) for trial in probe.trials],
        "sets": sets,
        "last": last,
        "notes": [*probe.notes, *notes],
    }
    return Evaluation(f"{probe.kind}: {probe.recipe}", tuple(lines), plain)


def table(found: list[Evaluation]) -> str:
    """Accuracies in percent with 95 % intervals over the test images, protocol by protocol."""
    blocks = []
    for one in found:
        names = list(one.lines[0].sets)
        rows = [["", "val", *names]]
        for line in one.lines:
            val = "" if line.val is None else f"{100 * line.val:.1f}"
            rows.append([line.name, val, *(_shown(line.sets[name]["over_images"]) for name in names)])
        widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
        fraction = one.plain["label_fraction"]
        share = "" if fraction == 1 else f" ({100 * fraction:g} % of the labels)"
        text = [f"{one.title}; {one.plain['train_images']:,} training images{share}"]
        text.append(f"  {one.plain['features']}")
        text += ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        text += [f"  note: {note}" for note in one.plain["notes"]]
        blocks.append("\n".join(text))
    some = next(iter(found[0].lines[0].sets.values()))["over_images"]
    blocks.append(f"Accuracy in percent [95 % interval over {some['over']}]" if some["low"] is not None else
                  "Accuracy in percent")  # fmt: skip
    return "\n\n".join(blocks)


def write(folder: Path, found: list[Evaluation]) -> Path:
    """evaluation.json with these results, in place of earlier ones of the same measurements. Raises RunError."""
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kept = json.loads(path.read_text(encoding="utf-8"))["evaluations"] if path.is_file() else []
    except OSError as error:
        raise cannot_write(path, error) from error
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{path} is not what foveal evaluate writes: move it, or give another --out") from None
    stamp = {"versions": versions(), "finished": datetime.now(UTC).isoformat(timespec="seconds")}
    new = [json.loads(json.dumps(one.plain | stamp)) for one in found]
    mine = [_what(one) for one in new]
    kept = [one for one in kept if _what(one) not in mine]
    write_text(path, json.dumps({"evaluations": [*kept, *new]}, indent=1, ensure_ascii=False) + "\n")
    return path


def _what(one: dict[str, Any]) -> list[Any]:
    """What was measured, without what came out."""
    told = [one.get(name) for name in SAME[:-1]]
    return [*told, [(t.get("k"), t.get("temperature"), t.get("setting")) for t in one.get("tried", [])]]


def _score(correct: Tensor, balanced: float) -> dict[str, Any]:
    interval = asdict(stats.over_images(correct.double()))
    interval = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in interval.items()}
    return {
        "n": len(correct),
        "accuracy": float(correct.double().mean()),
        "balanced_accuracy": balanced,
        "over_images": interval,
    }


def _shown(interval: dict[str, Any]) -> str:
    ends = "" if interval["low"] is None else f" [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"
    return f"{100 * interval['mean']:.1f}{ends}"
