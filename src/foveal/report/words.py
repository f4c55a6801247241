"""What the page says: the names of things, one sentence on each, and verdicts that do not overstate.

A verdict claims a difference only where its interval leaves out zero; else it says that none can be claimed.
"""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from foveal.report.axes import number
from foveal.stats import Interval

TESTS = {
    "mixed_same": "objects in front of a background of their own class, which helps to guess",
    "mixed_rand": "objects in front of a background of a random class, which no longer gives the answer away",
    "mixed_next": "objects in front of a background of the next class, which misleads",
    "original": "test images as they were taken",
    "only_fg": "the object alone, its background black",
    "no_fg": "the background alone, the object cut out",
    "test": "images that took no part in training or in choosing the model",
    "val": "images of the folder val/, which took no part in training",
}

WHERE = {  # after "points better"
    "mixed_same": "on backgrounds of the object’s own class",
    "mixed_rand": "on backgrounds that say nothing about the class",
    "test": "on the test images",
}

GUIDES = {
    "gta": "a second loss that holds the attention of the class token close to where the initial weights look "
    "(guided transfer of attention)",
}

MIXERS = {
    "mixup": "which blends two images into one and their labels with the same weights",
    "cutmix": "which pastes a box of one image into another and weighs the labels by area",
    "mixup+cutmix": "which blends (Mixup) or pastes (CutMix) two images, batch by batch",
    "transmix": "which pastes a box of one image into another and weighs the labels by the attention on each part",
}


@dataclass(frozen=True)
class Measure:
    """A number that arms are compared by; values are percent, differences are points."""

    key: str
    name: str
    what: str  # one sentence, as a caption
    higher_is_better: bool = True


def accuracy_of(test: str) -> Measure:
    where = TESTS.get(test, "a test set of the data")
    return Measure(f"accuracy/{test}", f"accuracy, {test}", f"share of right answers on {where}")


def balanced_accuracy_of(test: str) -> Measure:
    return Measure(
        f"balanced_accuracy/{test}",
        f"balanced accuracy, {test}",
        "accuracy of each class, then the mean over classes: rare classes count as much as frequent ones",
    )


def pointing_of(test: str) -> Measure:
    return Measure(
        f"pointing/{test}",
        f"attention on the object, {test}",
        "share of the attention that falls on the object’s pixels (energy-based pointing game)",
    )


BG_GAP = Measure(
    "bg_gap",
    "BG-Gap",
    "accuracy on mixed_same minus accuracy on mixed_rand: what the model owes to the background, 0 is best",
    higher_is_better=False,
)


def percent(value: float, digits: int = 1) -> str:
    """0.7431 -> "74.3"."""
    return number(100 * value, digits)


def points(value: float, *, sign: bool = True) -> str:
    """A difference of shares in points: 0.0911 -> "+9.1"."""
    return number(100 * value, 1, sign=sign)


def between(interval: Interval, *, sign: bool = False) -> str:
    """An interval of shares in percent or points: "[4.0, 14.2]"."""
    if not interval.available:
        return "(no interval)"
    low, high = (number(100 * value, 1, sign=sign) for value in (interval.low, interval.high))
    return f"[{low}, {high}]"


def level(interval: Interval) -> str:
    return f"{100 * interval.level:g} %"


def is_clear(interval: Interval) -> bool:
    """Does the interval leave out zero?"""
    return interval.low > 0 or interval.high < 0


def judgement(measure: Measure, images: Interval, seeds: Interval | None) -> str:
    """What may be said of a row: better, worse, or that no difference can be claimed."""
    if not is_clear(images):
        return "no difference can be claimed"
    said = "better" if (images.mean > 0) == measure.higher_is_better else "worse"
    return said if seeds is not None and is_clear(seeds) else f"{said} in these runs"


def verdict(arm: str, baseline: str, test: str, images: Interval, seeds: Interval | None) -> Markup:
    """The sentence on top of a comparison: who beat whom, by how much, where. Names are escaped and coloured.

    A difference that holds for other images but not surely for other seeds is claimed for these runs only.
    """
    difference = images
    where = WHERE.get(test, f"on {test}")
    names = {"arm": Markup('<span class="arm">{}</span>').format(arm), "base": baseline, "where": where}
    if not is_clear(difference):
        return Markup("{arm} against {base}: no difference can be claimed {where}.").format(**names)
    verb = "beat" if difference.mean > 0 else "lost to"
    runs = "" if seeds is not None and is_clear(seeds) else ", in these runs"
    said = f"{{arm}} {verb} {{base}} by {{size}} points {{where}}{runs}."
    return Markup(said).format(size=number(100 * abs(difference.mean)), **names)


def evidence(images: Interval, seeds: Interval | None) -> str:
    """What a verdict rests on, in words: the interval over images, then the one over seeds."""
    said = f"{points(images.mean)} points, {_rests(images)}."
    if seeds is not None:
        said += f" With other seeds: {_rests(seeds)}."
    return said


def _rests(interval: Interval) -> str:
    if not interval.available:
        return f"interval {interval.over}"
    zero = "" if is_clear(interval) else ", which holds zero"
    return f"{level(interval)} interval {between(interval, sign=True)}{zero}, paired {interval.over}"
