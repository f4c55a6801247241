"""What a finished training is worth: predictions on the test sets, scores, a few of the images it learnt from."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foveal import evaluate
from foveal.chance import generator
from foveal.data.batches import Batch
from foveal.data.config import ImageConfig
from foveal.data.images import Data, Images
from foveal.evaluate import LabelGaps, expected_calibration_error
from foveal.evaluate.predict import Predictions, predict
from foveal.train.errors import RunError
from foveal.train.files import whole_file, write_text
from foveal.train.models import Built
from foveal.train.names import unknown
from foveal.train.settings import Settings

SAMPLES = 8  # training images that samples.npz shows


def scores(predictions: Predictions, gaps: LabelGaps | None = None) -> dict[str, Any]:
    """n, loss, accuracy, balanced accuracy (mean recall of the classes present), ece, pointing and inconsistency.

    Pointing and inconsistency are None without masks; so is inconsistency where the mixer only blends.
    """
    loss = torch.nn.functional.cross_entropy(predictions.logits.double(), predictions.labels)
    return {
        "n": len(predictions),
        "loss": float(loss),
        "accuracy": predictions.accuracy,
        "balanced_accuracy": predictions.balanced_accuracy,
        "ece": expected_calibration_error(predictions.logits, predictions.labels),
        "pointing": predictions.mean_pointing,
        "inconsistency": None
        if gaps is None or not gaps.n
        else {"gap": gaps.mean, "n": gaps.n, "skipped": gaps.skipped},
    }


def label_gaps(built: Built, images: Images, mixer: Any, settings: Settings, device: torch.device) -> LabelGaps | None:
    """How far the labels that the run's mixer gives are from what can be seen, on a test set with masks; else None.

    Pairs of test images are mixed as in training, with the trained model; the draws hang on the run's seed alone, so
    every arm of a comparison meets the same pairs. A mixer that blends in some steps is taken without those.
    """
    if images.masks is None:
        return None
    return evaluate.label_gaps(
        built.model,
        covering(mixer),
        images,
        built.image,
        seed=settings.seed,
        batch_size=settings.batch_size,
        device=device,
    )


def covering(mixer: Any) -> Any:
    """The mixer of images without its blends, which cover nothing, and without losses of its own."""
    mixer = getattr(mixer, "over", mixer)  # tokens are mixed in training only
    has = {one.name for one in fields(mixer) if one.init}
    if not {"mixup_alpha", "switch_prob"} <= has or getattr(mixer, "cutmix_alpha", 1.0) == 0.0:
        return mixer
    off = {"mixup_alpha": 0.0} | {name: 0.0 for name in ("consistency", "region") if name in has}
    return replace(mixer, **off)


def bg_gap(sets: dict[str, dict[str, Any]]) -> float | None:
    """Accuracy on mixed_same less that on mixed_rand, or None where there are no such test sets."""
    if not {"mixed_same", "mixed_rand"} <= sets.keys():
        return None
    return float(sets["mixed_same"]["accuracy"] - sets["mixed_rand"]["accuracy"])


def predict_share(
    model: nn.Module, images: Images, config: ImageConfig, *, rank: int, world: int, **options: Any
) -> Predictions | None:
    """Predictions on all of `images`, made by `world` processes, a contiguous share each; None but on rank 0.

    Every process must call this. options: batch_size, device, workers, as predict takes them.
    """
    bounds = [len(images) * r // world for r in range(world + 1)]
    first, last = bounds[rank], bounds[rank + 1]
    own = predict(model, images.subset(range(first, last)), config, **options) if last > first else None
    if world == 1:
        return own
    parts: list[Predictions | None] | None = [None] * world if rank == 0 else None
    torch.distributed.gather_object(own, parts)
    if parts is None:
        return None
    return joined([(p, start) for p, start in zip(parts, bounds, strict=False) if p is not None])


def joined(parts: list[tuple[Predictions, int]]) -> Predictions:
    """Predictions of the contiguous parts of a set as one; each with the position where it starts."""

    def together(name: str) -> Tensor | None:
        values = [getattr(part, name) for part, _ in parts]
        return None if any(v is None for v in values) else torch.cat(values)

    first = parts[0][0]
    index = torch.cat([part.index + start for part, start in parts])
    whole = {name: together(name) for name in ("logits", "labels", "pointing", "attention")}
    return replace(first, index=index, **whole)  # type: ignore[arg-type]


def write_predictions(folder: Path, name: str, predictions: Predictions, gaps: LabelGaps | None = None) -> None:
    """predictions/<name>.npz, one array per field that is there, and the gaps of the mixer's labels as `label_gap`.

    Raises RunError where the disk does not take it.
    """
    values = {one.name: getattr(predictions, one.name) for one in fields(predictions)}
    values["label_gap"] = None if gaps is None else gaps.gap
    with whole_file(folder / "predictions" / f"{name}.npz") as file:
        np.savez(file, **{k: np.asarray(v) for k, v in values.items() if v is not None})  # type: ignore[arg-type]


def read_predictions(folder: Path, name: str) -> Predictions:
    """Predictions as written. Raises RunError, naming the nearest, for a test set that is not there."""
    path = folder / "predictions" / f"{name}.npz"
    if not path.is_file():
        raise RunError(unknown("test set", name, [p.stem for p in path.parent.glob("*.npz")]) + f" in {folder}")
    with np.load(path) as arrays:
        values: dict[str, Any] = {"pointing": None, "attention": None}
        values |= {k: str(v) if v.dtype.kind == "U" else torch.from_numpy(v) for k, v in arrays.items()}
    values.pop("label_gap", None)
    return Predictions(**values)


def read_label_gaps(folder: Path, name: str) -> Tensor | None:
    """(N,) gaps of the labels that the run's mixer gives on a test set; None where they were not measured."""
    path = folder / "predictions" / f"{name}.npz"
    if not path.is_file():
        return None
    with np.load(path) as arrays:
        return torch.from_numpy(arrays["label_gap"]) if "label_gap" in arrays else None


def write_samples(folder: Path, batch: Batch, config: ImageConfig, mixer: Any, model: nn.Module, seed: int) -> None:
    """samples.npz: the first training images of epoch 1 as the model got them.

    images (n, 3, h, w) uint8, targets (n, C) float32, labels (n,), partners (n,) labels of the partner images,
    keep (n, 1, h, w) share of each pixel that is the first image. Attention-made labels are the trained model's.
    """
    n = min(SAMPLES, len(batch.labels))
    classes = int(model.num_classes)  # type: ignore[arg-type]
    rng = generator(seed, "mix", 0, batch.micro)
    images, labels = batch.images[:n], batch.labels[:n]
    masks = None if batch.masks is None else batch.masks[:n]
    with torch.no_grad(), mixer.on(model, images, labels, rng=rng, num_classes=classes, given=masks) as step:
        model(step.images)
        targets = step.targets(classes)
    mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    shown = ((step.images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    arrays = {
        "images": shown,
        "targets": targets,
        "labels": labels,
        "partners": labels[step.mixed.perm.to(labels.device)],
        "keep": step.mixed.keep.float(),
    }
    with whole_file(folder / "samples.npz") as file:
        np.savez_compressed(file, **{k: v.detach().cpu().numpy() for k, v in arrays.items()})


def write_split(folder: Path, data: Data, *, resumed: bool) -> None:
    """split.json: notes, class names, and for each set its size, images per class and the images' names.

    Raises RunError if a run is resumed on other images than it was begun with.
    """
    sets = {"train": data.train, "val": data.val, **{f"test/{k}": v for k, v in data.tests.items()}}
    content: dict[str, Any] = {
        "data": data.name,
        "notes": list(data.notes),
        "classes": list(data.classes),
        "sets": {
            name: {"n": len(images), "per_class": images.class_sizes().tolist(), "images": list(images.names)}
            for name, images in sets.items()
        },
    }
    path = folder / "split.json"
    if resumed and path.is_file() and (then := json.loads(path.read_text(encoding="utf-8"))["sets"]) != content["sets"]:
        changed = [name for name in sets if then.get(name) != content["sets"][name]]
        raise RunError(
            f"the data have changed since {folder} was begun (other images in {', '.join(changed)}): bring them back,"
            " or begin anew with --overwrite"
        )
    write_text(path, json.dumps(content, ensure_ascii=False) + "\n")
