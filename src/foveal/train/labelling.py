"""Label image files with a trained run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from foveal.data.decode import SUFFIXES, decode, why_unreadable
from foveal.data.errors import DataError
from foveal.data.images import Images
from foveal.evaluate.predict import predict
from foveal.train.errors import RunError
from foveal.train.machine import device_of
from foveal.train.run import Run


@dataclass(frozen=True)
class Labelled:
    """paths: of the images that could be read, in order.  guesses: for each the most probable classes, best
    first, with their probabilities.  unreadable: the others, with the reason."""

    paths: tuple[Path, ...]
    guesses: tuple[tuple[tuple[str, float], ...], ...]
    unreadable: tuple[tuple[Path, str], ...]

    @property
    def labels_each(self) -> int:
        """How many guesses each image has."""
        return len(self.guesses[0])


def find_images(places: Sequence[Path]) -> list[Path]:
    """Image files as given, and those in the folders among `places`, at any depth, by name.

    Raises DataError for a place that does not exist or a folder without images.
    """
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            inside = sorted(p for p in place.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not inside:
                raise DataError(f"no images below {place}; looked for {' '.join(SUFFIXES)}")
            found += inside
        elif place.is_file():
            found.append(place)
        else:
            raise DataError(f"there is no file or folder {place}")
    return found


def label(
    run: Run, paths: Sequence[Path], *, top: int = 1, batch_size: int = 64, device: str = "auto", workers: int = 0
) -> Labelled:
    """The `top` most probable classes of each image (all of them, if there are fewer).

    Raises DataError if not one of the images can be read, RunError for a run without classes.
    """
    if not run.classes:
        raise RunError(
            f"{run.folder} is a pre-training, whose encoder knows no classes: fine-tune it first, with"
            f" foveal train DATA --init {run.folder}"
        )
    where = device_of(device)
    model, classes = run.model().to(where), run.classes
    reasons = [why_unreadable(path) for path in paths]
    while True:
        good = [path for path, why in zip(paths, reasons, strict=True) if why is None]
        bad = tuple((path, why) for path, why in zip(paths, reasons, strict=True) if why is not None)
        if not good:
            raise DataError(f"none of the {len(paths):,} images can be read: {bad[0][0]}: {bad[0][1]}")
        images = Images(torch.zeros(len(good), dtype=torch.int64), classes, files=tuple(good))
        try:
            made = predict(
                model, images, run.config, batch_size=batch_size, workers=workers, device=where, attention=False
            )
            break
        except DataError:  # an image that is broken further in: find all such
            broken = [why or _broken(path) for path, why in zip(paths, reasons, strict=True)]
            if broken == reasons:
                raise
            reasons = broken
    shares, order = made.logits.softmax(-1).topk(min(top, len(classes)))
    rows = zip(order.tolist(), shares.tolist(), strict=True)
    guesses = tuple(tuple((classes[c], p) for c, p in zip(cs, ps, strict=True)) for cs, ps in rows)
    return Labelled(tuple(good), guesses, bad)


def _broken(path: Path) -> str | None:
    try:
        decode(path)
    except DataError as error:
        return str(error)
    return None
