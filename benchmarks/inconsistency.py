"""How far mixed labels are from what can be seen of the two objects, for every mixer, on the same pairs.

    python benchmarks/inconsistency.py [--osie osie.npz] [--boxes FOLDER] [--seeds 3] [--plot FOLDER]

Three kinds of truth: exact masks of digit scenes (made here), boxes of a labelled data set with masks or boxes, as
foveal.data.load reads it (a folder of packs: train.npz, val.npz), and gaze of the OSIE pack (15 observers, no classes).
For the labelled sets the bundled encoder is fine-tuned on the training images, plainly; for gaze it is taken as it is,
resized to the images' shape, and mixers whose map needs a label follow its class attention instead.

Each image is mixed with its partner in a batch of ten; draws depend on the seed and the batch alone. Where a mixer can
draw for each image it does (mode=elem), and mixers that are Mixup half of the time are asked for the other half. With
all three sets it takes about ten minutes on one core.
Figures: mean over images of |label weight - visible share|, in per cent, and its interval over images (bootstrap, each
image by its mean over the seeds); the same minus CutMix's on pairs where both have one; nats from the visible share to
the label, and to the model's prediction between the two labels on the mixed image (lower is nearer).

The second table asks of every source of maps what attention labels assume: on CutMix pairs, is the share of the map
that stays visible the share of the object that does? `given area`: correlation left when the area is accounted for,
which both shares follow without any map being good. `on object`: share of the map on the object of a whole image.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from clock import processor
from torch import Tensor, nn

import foveal
from foveal import chance, maps
from foveal.assets import demo_encoder
from foveal.data import Images, image_config, load
from foveal.data.batches import Batches
from foveal.data.config import ImageConfig
from foveal.data.errors import DataWarning
from foveal.data.packs import read_pack
from foveal.evaluate import LabelGaps, energy_share, inconsistency, label_gaps, own_weight, relation
from foveal.mix import MIXERS, CutMix, MapMixer, TransMix
from foveal.stats import Interval, over_images
from foveal.train import Settings, fit

SCENES = "scenes:train=1000,val=200,test=500,size=32,stage=target"
BATCH = 10
OSIE_PIXELS = (48, 64)  # of 240 x 320
DEGREE = 24 / 800  # of the width: one degree of visual angle, the usual sigma of OSIE
NEED_LABELS = {"head_cosine", "label_biased", "input_gradient"}
SOURCES = ("head_cosine", "label_biased", "class_attention", "received_attention", "input_gradient")
PIXEL_SOURCES = ("centre_surround", "spectral_residual")
VARIANTS: dict[str, dict[str, Any]] = {  # of TdAttenMix
    "label_ratio=batch": {"label_ratio": "batch"},
    "beta=0": {"beta": 0.0},
    "beta=1": {"beta": 1.0},
    **{f"map={name}": {"map": name, "normalise": True} for name in (*SOURCES[1:], *PIXEL_SOURCES, "given")},
}


@dataclasses.dataclass(frozen=True)
class Subject:
    """Images with a truth, and a model that looks at them."""

    name: str
    images: Images
    truth: Tensor  # (N, H, W) masks or gaze
    model: nn.Module
    config: ImageConfig
    labelled: bool
    about: str


# -- what is measured on


def fitted(name: str, spec: str, epochs: int, image_size: int, most: int) -> Subject:
    """The bundled encoder fine-tuned on a labelled set, and the images of its last test set."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            data=spec,
            model="demo",
            init="demo",
            image_size=image_size,
            epochs=epochs,
            batch_size=32,
            lr=1e-3,
            layer_decay=0.75,
            crop_scale=(0.6, 1.0),
            precision="float32",
            device="cpu",
            out=folder,
            name="model",
        )
        run = fit(settings)
        (test, scores) = list(run.results["sets"].items())[-1]
        images = load(spec, seed=0, image_size=image_size).tests[test]
        model, config = run.model(), run.config
    images = spread(images, most)
    assert images.masks is not None, f"{spec} has no masks or boxes"
    about = f"{len(images)} images of {test}, accuracy {scores['accuracy']:.3f} ({len(images.classes)} classes)"
    return Subject(name, images, images.masks, model, config, True, f"{about}; {command(settings)}")


def gaze(path: Path, most: int) -> Subject:
    """OSIE: fixations of 15 observers, 3 s each, as maps of 240 x 320 blurred by one degree."""
    images = read_pack(path)
    with np.load(path) as arrays:
        at, x, y = (arrays[name] for name in ("fix_image", "fix_x", "fix_y"))
        width = int(arrays["orig_size"][0])
    assert images.pixels is not None
    h, w = images.pixels.shape[-2:]
    truth = torch.stack(
        [
            maps.fixation_map((x[at == i] - 1) * w / width, (y[at == i] - 1) * w / width, (h, w), DEGREE * w)
            for i in range(min(most, len(images)))
        ]
    )
    model = demo_encoder()
    model.set_input_size(img_size=OSIE_PIXELS)
    config = dataclasses.replace(image_config(model), size=OSIE_PIXELS)
    about = f"{len(truth)} images at {w} x {h} brought to {OSIE_PIXELS[1]} x {OSIE_PIXELS[0]}, bundled encoder as it is"
    return Subject("OSIE gaze", images.subset(range(len(truth))), truth, model.eval(), config, False, about)


def spread(images: Images, most: int) -> Images:
    """At most so many, classes alike and neighbours of other classes: one of each class, then the next."""
    turn = torch.zeros(len(images), dtype=torch.int64)
    for c in range(len(images.classes)):
        mine = images.labels == c
        turn[mine] = torch.arange(int(mine.sum()))
    return images.subset((turn * len(images.classes) + images.labels).argsort()[:most])


# -- mixers


def asked(labelled: bool) -> dict[str, Any]:
    """Every mixer by name, and TdAttenMix in variants; what cannot be without labels goes by class attention."""
    found = {name: mixer(name, labelled) for name in MIXERS}
    for text, options in VARIANTS.items():
        if labelled or options.get("map") not in {*NEED_LABELS, "class_attention"}:
            found[f"tdattenmix:{text}"] = mixer("tdattenmix", labelled, **options)
    return found


def mixer(name: str, labelled: bool, **options: Any) -> Any:
    kind = MIXERS[name]
    known = {field.name: field.default for field in dataclasses.fields(kind) if field.init}
    plain = {"mode": "elem", "switch_prob": 1.0, "consistency": 0.0}
    options = {key: value for key, value in plain.items() if key in known} | options
    if not labelled and issubclass(kind, MapMixer) and options.get("map", known.get("map")) in NEED_LABELS:
        options["map"] = "class_attention"
    return kind(**options)


def measured(subject: Subject, mixing: Any, seeds: int) -> list[LabelGaps]:
    return [
        label_gaps(
            subject.model, mixing, subject.images, subject.config, truth=subject.truth, seed=seed, batch_size=BATCH
        )
        for seed in range(seeds)
    ]


def per_image(values: Tensor) -> Tensor:
    """Mean over the seeds that have a value: (S, N) to (N,)."""
    return values.double().nanmean(0)


def interval(values: Tensor, factor: float = 100.0) -> Interval | None:
    each = per_image(values)
    return None if bool(each.isnan().all()) else over_images(each).scaled(factor)


def mixer_table(subject: Subject, seeds: int) -> None:
    print("\n| mixer | gap, % | minus CutMix's | label, nats | prediction, nats | own label | no gap, % |")
    print("|---|---|---|---|---|---|---|")
    baseline: Tensor | None = None
    for name, mixing in sorted(asked(subject.labelled).items(), key=lambda item: item[0] != "cutmix"):
        began = time.perf_counter()
        found = measured(subject, mixing, seeds)
        gap, own, truth, label, judged, blended = (
            torch.stack([getattr(one, field) for one in found])
            for field in ("gap", "own", "truth", "label_kl", "prediction_kl", "blended")
        )
        baseline = gap if baseline is None else baseline
        minus = "" if name in ("cutmix", "mixup") else shown(interval(gap - baseline), "{:+.2f} [{:+.2f}, {:+.2f}]")
        cells = [shown(interval(gap), "{:.2f} [{:.2f}, {:.2f}]"), minus, nats(label), nats(judged)]
        missing = float((gap.isnan() & ~blended).double().mean()) * 100
        followed = f" ({mixing.map})" if isinstance(mixing, MapMixer) and ":map" not in name else ""
        print(f"| {name}{followed} | {' | '.join(cells)} | {float(own.mean()):.3f} | {missing:.1f} |", flush=True)
        if bool(blended.all()):
            apart = interval((own - truth).abs())
            print(f"| &nbsp; by definition, against 1/2 | {shown(apart, '{:.2f} [{:.2f}, {:.2f}]')} | | | | | |")
        print(f"{subject.name}: {name} took {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)


def shown(found: Interval | None, pattern: str) -> str:
    if found is None:
        return "none"
    return pattern.format(found.mean, found.low, found.high) if found.available else f"{found.mean:.2f}"


def nats(values: Tensor) -> str:
    return "" if bool(values.isnan().all()) else f"{float(values.double().nanmean()):.3f}"


# -- maps


def shares(subject: Subject, seeds: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """By source: visible share of the map, of the truth, of the area; of all CutMix pairs of all seeds, (S N,) each."""
    sources = sources_of(subject)
    cutmix, transmix = CutMix(mode="elem"), TransMix(mode="elem")
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for seed in range(seeds):
        for number, (images, labels, truth) in enumerate(batches(subject)):
            size = (images.shape[-2], images.shape[-1])
            draw = cutmix.draw(len(images), size, rng=chance.generator(seed, "mix", 0, number))
            mixed = cutmix.apply(images, draw)
            own = own_weight(mixed)
            seen = inconsistency(own, mixed, truth).truth_share
            for name, source in sources.items():
                share = inconsistency(own, mixed, source(images, labels).map).truth_share
                parts.setdefault(name, []).append((share, seen, own))
            rng = chance.generator(seed, "mix", 0, number)
            with torch.no_grad(), transmix.on(subject.model, images, labels, rng=rng, num_classes=1) as step:
                subject.model(step.images)
                step.accuracy(images.new_zeros(len(images), len(subject.images.classes)))
            inside = 2 * own_weight(step.mixed) - own  # TransMix: half by area, half by attention on the mixed image
            parts.setdefault("class attention on the mixed image", []).append((inside, seen, own))
            parts.setdefault("area", []).append((own, seen, own))
    return {name: tuple(torch.cat(column) for column in zip(*rows, strict=True)) for name, rows in parts.items()}


def sources_of(subject: Subject) -> dict[str, maps.Source]:
    names = [name for name in SOURCES if subject.labelled or name not in NEED_LABELS] + list(PIXEL_SOURCES)
    return {name: maps.make(name, subject.model, subject.config) for name in names}


def on_object(subject: Subject) -> dict[str, float]:
    """Share of each source's map that lies on the object, and of the area; nothing for gaze, which has no edge."""
    if subject.truth.dtype != torch.bool:
        return {}
    parts: dict[str, list[Tensor]] = {"area": [subject.truth.float().mean((1, 2))]}
    sources = sources_of(subject)
    for images, labels, truth in batches(subject):
        for name, source in sources.items():
            found = source(images, labels)
            parts.setdefault(name, []).append(energy_share(found.map, truth)[~found.blank])
    return {name: float(torch.cat(rows).mean()) for name, rows in parts.items()}


def batches(subject: Subject) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for batch in Batches(subject.images, subject.config, BATCH, train=False):
        yield batch.images, batch.labels, subject.truth[batch.index]


def map_table(subject: Subject, seeds: int, plot: Path | None) -> None:
    found = shares(subject, seeds)
    pointing = on_object(subject)
    print(
        "\n| share of | Pearson | Spearman | Pearson given area | gap of a label by it alone, % | pairs | on object |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, (share, truth, area) in found.items():
        both = relation(share, truth)
        gap = float((share - truth).abs().double().nanmean()) * 100
        partial = given(share, truth, area)
        beyond = "" if math.isnan(partial) else f"{partial:.3f}"
        cells = [f"{both.pearson:.3f}", f"{both.spearman:.3f}", beyond, f"{gap:.2f}", f"{both.n:,}"]
        held = f"{pointing[name]:.3f}" if name in pointing else ""
        print(f"| {name} | {' | '.join(cells)} | {held} |", flush=True)
    if plot is not None:
        scatter(subject, found, plot)


def given(x: Tensor, y: Tensor, z: Tensor) -> float:
    """Pearson of x and y with z held fixed."""
    kept = x.isfinite() & y.isfinite() & z.isfinite()
    xy, xz, yz = (relation(a[kept], b[kept]).pearson for a, b in ((x, y), (x, z), (y, z)))
    return float("nan") if abs(xz) > 1 - 1e-9 else (xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2))


def scatter(subject: Subject, found: dict[str, tuple[Tensor, Tensor, Tensor]], folder: Path) -> None:
    """A panel per source: visible share of the truth along, of the map up; the diagonal is a map that is right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = math.ceil(len(found) / 3)
    figure, axes = plt.subplots(rows, 3, figsize=(9, 3 * rows), sharex=True, sharey=True, layout="constrained")
    for axis in axes.flat[len(found) :]:
        axis.axis("off")
    for axis, (name, (share, truth, _)) in zip(axes.flat, found.items(), strict=False):
        both = relation(share, truth)
        axis.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        axis.scatter(truth, share, s=4, alpha=0.25, linewidths=0, rasterized=True)
        axis.set_title(f"{name}\nPearson {both.pearson:.2f}, n = {both.n:,}", fontsize=9)
        axis.set_aspect("equal")
    figure.supxlabel(f"visible share of the truth ({subject.name})", fontsize=10)
    figure.supylabel("visible share of the map", fontsize=10)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"relation-{subject.name.replace(' ', '-').lower()}.png"
    figure.savefig(file, dpi=120)
    plt.close(figure)
    print(f"\nScatter: {file.name}")


# -- the script


def command(settings: Settings) -> str:
    kept = {"epochs": settings.epochs, "lr": settings.lr, "batch_size": settings.batch_size}
    return f"bundled encoder fine-tuned at {settings.image_size} px, {kept}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--osie", type=Path, help="osie.npz")
    parser.add_argument("--boxes", help="a labelled data set with masks or boxes, as foveal.data.load takes it")
    parser.add_argument("--boxes-size", type=int, default=64, help="side of its images in pixels")
    parser.add_argument("--no-scenes", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=500, help="at most so many of each set")
    parser.add_argument("--epochs", type=int, default=10, help="of fine-tuning")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--plot", type=Path, help="folder for the scatter pictures")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", DataWarning)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}, ", end="")
    print(f"foveal {foveal.__version__}; {processor()}, {torch.get_num_threads()} threads; seeds 0 to ", end="")
    print(f"{options.seeds - 1}; fine-tuning seed 0")
    for subject in subjects(options):
        print(f"\n## {subject.name}\n\n{subject.about}; {BATCH} to a batch, {options.seeds} seeds.")
        mixer_table(subject, options.seeds)
        map_table(subject, options.seeds, options.plot)


def subjects(options: argparse.Namespace) -> Iterator[Subject]:
    if not options.no_scenes:
        yield fitted("scenes", SCENES, options.epochs, 32, options.images)
    if options.boxes:
        yield fitted("boxes", options.boxes, options.epochs, options.boxes_size, options.images)
    if options.osie:
        yield gaze(options.osie, options.images)


if __name__ == "__main__":
    main()
