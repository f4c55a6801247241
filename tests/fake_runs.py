"""Run and comparison folders as training leaves them, without training: for tests of what reads them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foveal.data import Data, ImageConfig, load
from foveal.evaluate import balanced_accuracy, energy_share
from foveal.train.comparing import Comparison, _told
from foveal.train.measuring import memory_of, metrics_of
from foveal.train.run import Run
from foveal.train.settings import Settings

SPEC = "scenes:train=20,val=20,test=40,classes=0-3"
SKILL = {"mixed_same": 3.0, "mixed_rand": 2.0, "test": 2.5}


def fake_run(
    folder: Path,
    *,
    seed: int = 0,
    skill: float = 0.0,
    look: float = 2.0,
    masks: bool = True,
    attention: bool = True,
    classes: tuple[str, ...] | None = None,
    spec: str = SPEC,
    epochs: int = 5,
    memory: float | None = None,
    blend_in: int | None = None,
    gap: float = 0.25,
    curriculum: dict[str, list[float]] | None = None,
    source: dict[str, Any] | None = None,
    init: str = "none",
    val: float = 0.7,
    **settings: Any,
) -> Run:
    """A run whose logits are `skill` better than chance's and whose attention is `look` times more on the object.

    memory: its peak in bytes.  gap: the most that a label is wrong.  curriculum: further columns of metrics.csv, one
    value per epoch; the last `drift` is that of the chosen one.  source: what is known of the source's attention.
    val: accuracy on validation.  blend_in: the seed in which its mixer has the turn of Mixup.
    """
    rng, beside = (torch.Generator().manual_seed(key) for key in (seed, 1000 + seed))
    data = load(spec)
    names = classes or data.classes
    folder.mkdir(parents=True)
    chosen = Settings(data=spec, model="vit_tiny_patch16_224", init=init, seed=seed, epochs=epochs, **settings)
    (folder / "settings.yaml").write_text(chosen.to_yaml(), "utf-8")
    sets = {}
    (folder / "predictions").mkdir()
    for name, images in data.tests.items():
        logits = torch.randn(len(images), len(names), generator=rng)
        logits[torch.arange(len(images)), images.labels] += SKILL[name] - 1 + skill
        arrays = {"logits": logits, "labels": images.labels, "index": torch.arange(len(images))}
        if attention:
            noise = torch.rand(len(images), 8, 8, generator=rng) ** 3
            arrays["attention"] = noise
            if images.masks is not None and masks:
                inside = torch.nn.functional.adaptive_avg_pool2d(images.masks[:, None].float(), 8)[:, 0]
                arrays["attention"] = noise * (1 + look * inside) / 64
                arrays["pointing"] = energy_share(arrays["attention"], images.masks)
            arrays["attention_kind"] = np.array("class")
        gaps = None
        if images.masks is not None and masks and chosen.mix != "mixup":
            gaps = gap * torch.rand(len(images), generator=beside) if chosen.mix != "none" else torch.zeros(len(images))
            gaps[0] = torch.nan  # nothing can be seen of this pair
            arrays["label_gap"] = gaps
        np.savez(folder / "predictions" / f"{name}.npz", **{k: np.asarray(v) for k, v in arrays.items()})
        right = logits.argmax(1) == images.labels
        sets[name] = {
            "n": len(images),
            "loss": float(torch.nn.functional.cross_entropy(logits.double(), images.labels)),
            "accuracy": float(right.double().mean()),
            "balanced_accuracy": balanced_accuracy(logits, images.labels),
            "ece": 0.1 + 0.01 * float(torch.rand((), generator=beside)),
            "pointing": float(arrays["pointing"].mean()) if "pointing" in arrays else None,
            "inconsistency": None
            if gaps is None
            else {"gap": float(gaps.double().nanmean()), "skipped": 1, "n": len(images)},
        }
    _json(folder / "split.json", _split(data, names))
    card = {
        "architecture": chosen.model, "arguments": {}, "classes": list(names), "init": "random weights",
        "image": asdict(ImageConfig(size=(32, 32))), "versions": {"python": "3.11", "torch": "2.11"},
    }  # fmt: skip
    _json(folder / "model.json", card)
    _metrics(folder, epochs, rng, curriculum or {})
    images, labels = data.train.pixels[seed : seed + 8], data.train.labels[seed : seed + 8]
    own, weight = torch.eye(len(names))[labels], torch.rand(8, 1, generator=rng)
    targets, partners = weight * own + (1 - weight) * own.flip(0), labels.flip(0)
    if chosen.mix == "none":
        targets, partners = own, labels
    keep = weight[:, :, None, None].expand(8, 1, 32, 32).clone()
    if chosen.mix not in ("none", "mixup") and blend_in != seed:
        keep[..., :16] = 0
    arrays = {"images": images, "targets": targets, "labels": labels, "partners": partners, "keep": keep}
    np.savez(folder / "samples.npz", **{k: np.asarray(v) for k, v in arrays.items()})
    both = {"mixed_same", "mixed_rand"} <= sets.keys()
    results = {
        "sets": sets,
        "bg_gap": sets["mixed_same"]["accuracy"] - sets["mixed_rand"]["accuracy"] if both else None,
        "peak_memory": None if memory is None else {"bytes": memory, "of": "process"},
        "val": {"accuracy": val, "balanced_accuracy": val, "loss": 1.0}, "best_epoch": epochs, "epochs": epochs,
        "images": math.ceil(len(data.train) * (chosen.label_fraction or 1.0)),
        "parameters": 1234567, "device": "cpu", "precision": "float32", "seconds": 12.5,
        "images_per_second": 987.6, "command": f"foveal train '{spec}' --seed {seed}", "finished": "2025-01-01",
        "drift": (curriculum or {}).get("drift", [None])[-1],
    } | ({} if source is None else {"source": source})  # fmt: skip
    _json(folder / "results.json", results)
    return Run.load(folder)


def fake_comparison(
    folder: Path, arms: dict[str, dict[str, Any]], seeds: tuple[int, ...] = (0, 1), **common: Any
) -> Comparison:
    """A comparison of such runs; the first arm is the baseline. The values of `arms` go to fake_run."""
    runs = {
        arm: [fake_run(folder / f"{arm}-seed{seed}", seed=seed, **common | options) for seed in seeds]
        for arm, options in arms.items()
    }
    return written(folder, runs, seeds)


def written(
    folder: Path,
    runs: dict[str, list[Run]],
    seeds: tuple[int, ...],
    baseline_of: dict[str, str] | None = None,
    failed: dict[str, str] | None = None,
) -> Comparison:
    """comparison.json of runs in a folder; an arm may have none of them."""
    base = dict.fromkeys(list(runs)[1:], next(iter(runs))) if baseline_of is None else baseline_of
    settings = {arm: made[0].settings for arm, made in runs.items() if made}
    arms = {arm: settings.get(arm, Settings(data=SPEC)) for arm in runs}
    told = _told(arms, seeds, base, runs) | {"failed": failed or {}}
    _json(folder / "comparison.json", told | {"metrics": metrics_of(runs, base), "memory": memory_of(runs)})
    return Comparison.load(folder)


def _split(data: Data, names: tuple[str, ...]) -> dict[str, Any]:
    sets = {"train": data.train, "val": data.val, **{f"test/{k}": v for k, v in data.tests.items()}}
    told = {
        name: {"n": len(images), "per_class": images.class_sizes().tolist(), "images": list(images.names)}
        for name, images in sets.items()
    }
    return {"data": data.name, "notes": list(data.notes), "classes": list(names), "sets": told}


def _metrics(folder: Path, epochs: int, rng: torch.Generator, further: dict[str, list[float]]) -> None:
    names = "epoch,lr,train_loss,train_accuracy,val_loss,val_accuracy,val_balanced_accuracy,seconds,images_per_second"
    lines = [",".join([names, *further])]
    for epoch in range(1, epochs + 1):
        noise = 0.03 * torch.randn(4, generator=rng)
        done = 1 - 2.0 ** (-4 * epoch / epochs)
        values = [
            2 - 1.5 * done + noise[0],
            0.1 + 0.5 * done + noise[1],
            2 - 1.2 * done + noise[2],
            0.1 + 0.6 * done + noise[3],
        ]
        more = [column[epoch - 1] for column in further.values()]
        lines.append(
            ",".join(map(str, [epoch, 0.001, *(float(v) for v in values), float(values[-1]), 1.5, 900.0, *more]))
        )
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n", "utf-8")


def _json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), "utf-8")
