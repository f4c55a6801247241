"""What the page says: the names of things, one sentence on each, and verdicts that do not overstate.

A verdict claims a difference only where its interval leaves out zero; else it says that none can be claimed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from foveal.report.axes import number
from foveal.stats import Interval
from foveal.train.costs import Cost

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
    "attention_transfer": "which hands on the attention of all tokens of the source, as a second loss (distil) or in "
    "place of the model’s own (copy)",
    "attention_copy": "which puts the attention of the source in place of the model’s own",
    "attn_distill": "a second loss that draws the class token’s attention in the last block to that of a teacher, "
    "whose patches and heads may be others (AttnDistill)",
    "l2_sp": "a penalty on the distance of the weights from where they started, in place of weight decay (L2-SP)",
    "delta": "a penalty on the distance of the blocks’ outputs from those of the initial weights (DELTA)",
    "bss": "a penalty on the smallest singular values of a batch’s features, so that what does not transfer fades "
    "(batch spectral shrinkage)",
    "co_tuning": "a second loss on the classes of the pre-training, whose head is kept and taught how they go with the "
    "new classes (Co-Tuning)",
}

SCHEDULES = {"linear": "falling linearly to zero", "cosine": "falling to zero along a cosine"}

TUNES = {  # what of the weights is trained
    "head": "Only the classifier is trained, on features that stay as they are (a linear probe).",
    "attention": "Only the attention layers, the position embedding and the classifier are trained.",
    "bias": "Only the biases and the classifier are trained (BitFit).",
    "lora": "Only small matrices beside the frozen ones, and the classifier, are trained (LoRA).",
}

PROBED = (
    "Training begins from a classifier that was fitted on frozen features, not from a random one (linear probing, then "
    "fine-tuning)."
)

# When guidance counts as ignored or rigid. The thresholds are this project's own: no paper gives any.
WEAK = 0.01  # median of the gradient ratio below which guidance is ignored
STRONG = 1.0  # median over the second half of the epochs, above which it may be rigid
SAME_DRIFT = 0.05  # guidance of attention that does not lower the drift by this share of plain's is ignored
HELD = 0.1  # drift below this share of plain's is that of a rigid model
STILL = 0.01  # the same without a plain arm, as drift itself

ATTENTIVE = ("gta", "attention_transfer", "attention_copy", "attn_distill")  # guides whose aim is the attention itself

JUDGED = {
    "ignored": "ignored, the guidance is too weak",
    "rigid": "rigid, the guidance is too strong",
    "followed": "followed",
    "": "cannot be told",
}

RULES = (
    f"Guidance is called ignored (too weak) if the median ratio of its gradient to the task’s is below {WEAK:g}, or, "
    "where it aims at the attention, if it does not end with a drift more than "
    f"{100 * SAME_DRIFT:.0f} % below that of plain training with the same settings and seeds. It is called rigid (too "
    f"strong) if the median ratio of the second half of the epochs is above {STRONG:g}, the drift ends below {HELD:g} "
    f"of plain’s (without plain training: below {100 * STILL:.0f} %), and validation accuracy is not above plain’s. "
    "Else it is called followed. These thresholds are this project’s own: read them as a hint, not as a test."
)

MIXERS = {
    "mixup": "which blends two images into one and their labels with the same weights",
    "cutmix": "which pastes a box of one image into another and weighs the labels by area",
    "mixup+cutmix": "which blends (Mixup) or pastes (CutMix) two images, batch by batch",
    "transmix": "which pastes a box of one image into another and weighs the labels by the attention on each part",
    "tdattenmix": "which pastes the window that the partner’s class attends to most over the one that the image’s own "
    "class attends to least, and weighs the labels by area and attention",
    "smmix": "which pastes the most attended window of one image over the least attended one of another",
    "saliencymix": "which pastes a box around the most salient point of one image into another",
    "attentivemix": "which pastes the most attended cells of one image into another",
    "tokenmix": "which pastes scattered blocks of cells and weighs the labels by the attention on what can be seen",
    "puzzlemix": "which cuts two images along their salient parts by the cheapest cut",
    "fmix": "which mixes two images by a mask of random smooth shapes",
    "gridmix": "which pastes one image through a grid of holes into another",
    "resizemix": "which pastes the whole of one image, made smaller, into another",
    "smoothmix": "which blends two images by a soft round mask",
}


NOTHING, THESE = "no difference can be claimed", " in these runs"


TOKEN_MIXERS = {
    "horizontal": "tokens of images that are easy make way for more salient ones of other images (TokenMixup)",
    "vertical": "a block also looks at salient tokens of the blocks before it (TokenMixup)",
    "both": "salient tokens of other images and of the blocks before are mixed in (TokenMixup)",
    "manifold": "images, or all tokens before a block, are blended (Manifold Mixup)",
    "alignmix": "images, or tokens brought to matching places, are blended (AlignMixup)",
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


def ece_of(test: str) -> Measure:
    return Measure(
        f"ece/{test}",
        f"calibration error, {test}",
        "by how much the answers’ confidence differs from how often they are right (expected calibration error)",
        higher_is_better=False,
    )


def inconsistency_of(test: str) -> Measure:
    return Measure(
        f"inconsistency/{test}",
        f"label inconsistency, {test}",
        "by how much the labels that the mixer gives to pairs of images differ from what is seen of the two objects",
        higher_is_better=False,
    )


BG_GAP = Measure(
    "bg_gap",
    "BG-Gap",
    "accuracy on mixed_same minus accuracy on mixed_rand: what the model owes to the background, 0 is best",
    higher_is_better=False,
)


def tuned(tune: str) -> str:
    """What of the weights is trained, as a sentence; "" for all of them."""
    if tune == "all":
        return ""
    if (last := tune.removeprefix("last-")).isdigit():
        blocks = "block" if int(last) == 1 else f"{last} blocks"
        return f"Only the last {blocks} and the classifier are trained."
    return TUNES.get(tune, f"Only what tune={tune} names is trained.")


def guided_by(guide: str) -> str:
    """What a guide does, for a sentence; the same few words for all that this page has no words for."""
    return GUIDES.get(guide, "a loss beside that of the task")


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
    """What may be said of a row: better, worse, or that no difference can be claimed.

    A measure that is no mean over images is judged by its interval over seeds alone.
    """
    of_seeds = seeds is not None and is_clear(seeds)
    if not (is_clear(images) or (of_seeds and not images.available)):
        return NOTHING
    said = "better" if (images.mean > 0) == measure.higher_is_better else "worse"
    return said if of_seeds else f"{said}{THESE}"


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


def rounded(cost: Cost) -> str:
    """What a step costs beside one of the baseline: "× 1.20"; in milliseconds for a baseline."""
    if cost.ratio is None:
        return f"{1000 * cost.seconds:.3g} ms"
    return f"× {cost.ratio:.2f}"


def gigabytes(memory: float) -> str:
    return f"{memory / 1e9:.2f} GB"


def listed(names: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
