"""Pictures of every mixer on the same pairs: rows are mixers, columns are pairs of training images.

With the same seed all arms see the same first batch, so the pairs are the same by construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from foveal.report import tiles
from foveal.report.gather import Arm, Subject
from foveal.report.words import MIXERS, listed
from foveal.train.run import Run

SIDE = 128  # pixels of a picture in the file
BLENDS = ("none", "mixup")  # have no mask to show in any draw


@dataclass(frozen=True)
class Row:
    """A way to mix. what: one clause on it.  samples: its pictures, a column each, the image's own label first."""

    name: str
    what: str
    samples: tuple[tiles.Sample, ...]


@dataclass(frozen=True)
class Matrix:
    """pairs: (own, partner's) class of each column.  note: what is shown, in sentences."""

    pairs: tuple[tuple[str, str], ...]
    rows: tuple[Row, ...]
    note: str


def matrix(subject: Subject) -> Matrix | None:
    """The ways to mix that the arms have, on the same pairs; None for fewer than two, or where the pairs differ."""
    ways: dict[str, Arm] = {}
    for arm in sorted(subject.arms, key=lambda arm: arm.runs[0].settings.guide != "none"):
        if arm.base in (None, subject.base.name) or not subject.bases:  # another share of the labels, other images
            ways.setdefault(_way(arm.runs[0]), arm)
    order = [arm for arm in subject.arms if arm in ways.values()]
    if len(order) < 2:
        return None
    by_seed = {seed: _of_seed(order, seed) for seed in (run.settings.seed for run in order[0].runs)}
    complete = {seed: runs for seed, runs in by_seed.items() if len(runs) == len(order) and _are_alike(runs)}
    if not complete:
        return None
    seed = max(complete, key=lambda seed: sum(map(_cuts, complete[seed])))  # of equals the first
    runs = complete[seed]
    labels, partners = _labels(next((run for run in runs if run.settings.mix != "none"), runs[0]))
    classes = runs[0].classes
    rows = [
        Row(_name(arm), MIXERS.get(run.settings.mix, "").removeprefix("which "), _samples(run))
        for arm, run in zip(order, runs, strict=True)
    ]
    pairs = tuple((classes[own], classes[other]) for own, other in zip(labels, partners, strict=True))
    return Matrix(pairs, tuple(rows), _note(by_seed, seed, runs))


def _samples(run: Run) -> tuple[tiles.Sample, ...]:
    """The run's pictures, each with its own label first, so that colours mean the same in all rows."""
    owns = (run.classes[label] for label in _labels(run)[0])
    return tuple(
        replace(sample, labels=tuple(sorted(sample.labels, key=lambda told: told[0] != own)))
        for sample, own in zip(tiles.samples(run, SIDE), owns, strict=True)
    )


def _name(arm: Arm) -> str:
    """The arm's name without its guide, which has no part in mixing."""
    return arm.name.partition(f"+{arm.runs[0].settings.guide}")[0]


def _note(by_seed: dict[int, list[Run]], seed: int, runs: Sequence[Run]) -> str:
    said = f"The first images of epoch 1 with seed {seed}, each with its partner: the same for every arm."
    if seed != next(iter(by_seed)):
        said += " In no seed before it did as many mixers cut rather than blend."
    if blended := [run.settings.mix for run in runs if run.settings.mix not in BLENDS and not _cuts(run)]:
        said += f" In this batch {listed(list(dict.fromkeys(blended)))} had the turn of Mixup."
    return f"{said} Labels that follow attention are those of the trained model."


def _way(run: Run) -> str:
    """What decides how a run mixes."""
    values = run.settings.as_dict()
    return str([values[name] for name in ("mix", "mix_args", "map", "map_args", "map_model") if name in values])


def _of_seed(arms: Sequence[Arm], seed: int) -> list[Run]:
    """The run of each arm with this seed, as far as it kept its samples."""
    runs = [run for arm in arms for run in arm.runs if run.settings.seed == seed]
    return [run for run in runs if (run.folder / "samples.npz").is_file()]


def _are_alike(runs: Sequence[Run]) -> bool:
    """Whether all have mixed the same pairs: the labels tell. No mixing has no partners."""
    found = [(run.settings.mix, *_labels(run)) for run in runs]
    partners = {partner for mix, _, partner in found if mix != "none"}
    return len({labels for _, labels, _ in found}) == 1 and len(partners) <= 1


def _labels(run: Run) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Labels of the images of samples.npz, and of their partners."""
    with np.load(run.folder / "samples.npz") as held:
        return tuple(held["labels"].tolist()), tuple(held["partners"].tolist())


def _cuts(run: Run) -> bool:
    """Whether the samples show more than an even blend."""
    if run.settings.mix in BLENDS:
        return False
    with np.load(run.folder / "samples.npz") as held:
        if "keep" not in held:
            return False
        keep = held["keep"].reshape(len(held["keep"]), -1)
    return bool((np.ptp(keep, 1) > 0).any())
