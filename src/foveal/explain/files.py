"""Pictures of image files: what `foveal explain RUN images...` writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from foveal.data.config import ImageConfig
from foveal.data.images import Images
from foveal.explain.frames import frames
from foveal.explain.grid import captioned, head_grid
from foveal.explain.overlay import overlay, resize
from foveal.explain.pictures import Pictures, pictures
from foveal.explain.save import save_png

SIDE = 448  # shorter side of a large picture, in pixels
UNTAUGHT = "no classes: an encoder pre-trained without labels"


class Trained(Protocol):
    """What is asked of a run: its model, how that wants images, and the names of its classes."""

    @property
    def config(self) -> ImageConfig: ...
    @property
    def classes(self) -> Sequence[str]: ...
    def model(self) -> nn.Module: ...


def explain(run: Trained, paths: Sequence[str | Path], out: str | Path) -> list[Path]:
    """Two pictures per image in `out`: NAME-overlay.png and NAME-heads.png.

    The overlay shows the image as the model saw it and, beside it, where the last layer looks (mean over heads),
    with the predicted class and its probability, where the run has classes.  The heads are all layers x heads.  A model
    without class token is shown by received attention, and the caption says so.  Images of one name get numbers.
    Returns the files in order.  Raises DataError for an image that cannot be read, before anything is written,
    and `foveal.UnsupportedModelError` for a model that cannot be read.
    """
    if not paths:
        raise ValueError("give at least one image to explain")
    model, config, classes = run.model(), run.config, tuple(run.classes)
    files = [Path(path) for path in paths]
    unlabelled = torch.zeros(1, dtype=torch.int64), classes or ("image",)
    ready = [frames(Images(*unlabelled, files=(file,)), config) for file in files]
    written: list[Path] = []
    for name, frame in zip(numbered(files), ready, strict=True):
        seen = pictures(model, frame.inputs)
        image, said = frame.pixels[0], prediction(seen.logits[0], classes) if classes else UNTAUGHT
        heads = seen.attention[-1].shape[1]
        note = f"{name}. Right: {seen.describe()}, mean over {heads} heads of {seen.layers[-1]}. "
        note += "Colour begins where a patch gets more than its even share."
        pair = [resize(image, SIDE), overlay(image, seen.look(0), side=SIDE)]
        grid = head_grid(image, seen.heads(0), seen.layers, title=f"{name}: {said}", note=_note(seen))
        written.append(save_png(captioned(pair, said, note), Path(out) / f"{name}-overlay.png"))
        written.append(save_png(grid, Path(out) / f"{name}-heads.png"))
    return written


def prediction(logits: Tensor, classes: Sequence[str]) -> str:
    """The most probable class and its probability, and the runner-up: "cat (83 %), then dog (9 %)"."""
    shares, order = logits.float().softmax(-1).sort(descending=True)
    first, *rest = [f"{classes[i]} ({100 * share:.0f} %)" for share, i in zip(shares[:2], order[:2], strict=True)]
    return f"{first}, then {rest[0]}" if rest else first


def _note(seen: Pictures) -> str:
    kinds = list(dict.fromkeys(seen.describe(i) for i in range(len(seen.layers))))
    told = "; last row: ".join(kinds) if len(kinds) > 1 else kinds[0]
    scale = "Every panel has its own scale: full colour is its largest patch, at least twice the even share."
    return f"{told[0].upper()}{told[1:]}. {scale}"


def numbered(files: Sequence[Path]) -> list[str]:
    """A name for each file: its stem, numbered where another has it."""
    names: list[str] = []
    for file in files:
        name, number = file.stem, 2
        while name in names:
            name, number = f"{file.stem}-{number}", number + 1
        names.append(name)
    return names
