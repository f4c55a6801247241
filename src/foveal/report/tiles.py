"""Pictures for the page: overlays of chosen test images and the mixed images a model learnt from, as data URIs.

Which test images: of each kind (say, right with guidance and wrong without) some, evenly spaced through the test
set. The rule leaves nothing to taste, and the page says so.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from foveal.data import Images
from foveal.evaluate.predict import Predictions
from foveal.explain import frames, overlay, resize
from foveal.explain.overlay import Pixels
from foveal.report.axes import number
from foveal.report.gather import Arm
from foveal.train.run import Run

SIDE = 224  # pixels of a picture's shorter side in the file; shown at about 140


@dataclass(frozen=True)
class Tile:
    """One picture with the lines below it.  kind: `scene`, `base` or `arm`; right: of a prediction."""

    uri: str
    kind: str
    who: str
    text: str
    right: bool | None = None
    detail: str = ""


@dataclass(frozen=True)
class Group:
    """Cards of one kind, each some tiles from top to bottom, and how many images there are of it."""

    title: str
    count: int
    total: int
    cards: tuple[tuple[Tile, ...], ...]


def groups(arms: Sequence[Arm], test: str, images: Images, each: int = 3) -> list[Group]:
    """Pictures of one test set by the first run of every arm, the same images for all.

    One arm: right and wrong. Two: by who was right. More: by whether the first, the baseline, was.
    """
    runs = [arm.runs[0] for arm in arms]
    predicted = [run.predictions(test) for run in runs]
    right = [one.correct.numpy() for one in predicted]
    if len(arms) == 2:
        kinds = [
            (f"answered right by {arms[1].name} only", ~right[0] & right[1]),
            (f"answered right by {arms[0].name} only", right[0] & ~right[1]),
            ("answered right by both", right[0] & right[1]),
            ("answered wrong by both", ~right[0] & ~right[1]),
        ]
    else:
        who = f" by {arms[0].name}" if len(arms) > 1 else ""
        kinds = [(f"answered right{who}", right[0]), (f"answered wrong{who}", ~right[0])]
        each *= 2
    found = []
    for title, mask in kinds:
        cards = []
        for row in spread(np.flatnonzero(mask), each):
            pixels = shown(images, int(predicted[0].index[row]), runs[0])
            truth = runs[0].classes[int(predicted[0].labels[row])]
            looks = [
                _look(arm, run, predictions, int(row), pixels)
                for arm, run, predictions in zip(arms, runs, predicted, strict=True)
            ]
            cards.append((Tile(uri(resize(pixels, SIDE)), "scene", "", truth), *looks))
        found.append(Group(title, int(mask.sum()), len(mask), tuple(cards)))
    return found


def spread(rows: NDArray[np.int64], count: int) -> list[int]:
    """At most `count` of the rows, evenly spaced: the middle of each of `count` equal parts."""
    if len(rows) <= count:
        return [int(row) for row in rows]
    return [int(rows[(2 * i + 1) * len(rows) // (2 * count)]) for i in range(count)]


def shown(images: Images, position: int, run: Run) -> Tensor:
    """One image as the model saw it, (3, H, W) uint8."""
    return frames(images.subset([position]), run.config).pixels[0]


def _look(arm: Arm, run: Run, predictions: Predictions, row: int, pixels: Tensor) -> Tile:
    assert predictions.attention is not None
    shares = predictions.logits[row].double().softmax(-1)
    guess = int(predictions.logits[row].argmax())
    detail = ""
    if predictions.pointing is not None and bool(torch.isfinite(predictions.pointing[row])):
        detail = f"{number(100 * float(predictions.pointing[row]), 0)}\u00a0% on object"
    return Tile(
        uri=uri(overlay(pixels, predictions.attention[row].float(), side=SIDE)),
        kind=arm.kind,
        who=arm.name,
        text=f"{run.classes[guess]}, {number(100 * float(shares[guess]), 0)}\u00a0%",
        right=bool(predictions.correct[row]),
        detail=detail,
    )


@dataclass(frozen=True)
class Sample:
    """A training image as the model got it: its labels and their weights, largest first."""

    uri: str
    labels: tuple[tuple[str, float], ...]


def samples(run: Run, side: int = SIDE) -> list[Sample]:
    """The images of samples.npz, `side` pixels wide; none if the run has no such file."""
    file = run.folder / "samples.npz"
    if not file.is_file():
        return []
    with np.load(file) as held:
        images, targets = held["images"], held["targets"]
    found = []
    for image, target in zip(images, targets, strict=True):
        order = [int(c) for c in np.argsort(-target, kind="stable")[:3] if target[c] >= 0.005]
        labels = tuple((run.classes[c], float(target[c])) for c in order)
        found.append(Sample(uri(resize(image, side)), labels))
    return found


def uri(picture: Pixels) -> str:
    """A picture as a data URI: JPEG with full colour resolution."""
    buffer = BytesIO()
    Image.fromarray(picture).save(buffer, format="JPEG", quality=86, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
