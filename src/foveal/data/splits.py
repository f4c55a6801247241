"""Train to fit, val to select, tests to report: what a data set lacks of these is held out of train by a seed."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from foveal.data.errors import DataError, counted
from foveal.data.images import Data, Images
from foveal.data.subsets import class_orders

HELD_OUT = 15  # percent of train, for each of val and test where they are missing


def complete(
    name: str, train: Images, val: Images | None, tests: dict[str, Images], seed: int, notes: Sequence[str]
) -> Data:
    """The data set with a val and a test, whatever it came with.

    A val without a test is the test set, as is usual where there is no other, and keeps its name: then what
    selects is held out of train, so that no image serves for both.
    """
    notes = list(notes)
    if val is not None and not tests:
        tests, val = {"val": val}, None
        notes.append("val is the test set, as there is no other; selection uses images held out of train")
    percent = ({"val": HELD_OUT} if val is None else {}) | ({} if tests else {"test": HELD_OUT})
    if percent:
        parts, how = hold_out(train, percent, seed)
        notes.append(how)
        train, val = parts["train"], parts["val"] if val is None else val
        tests = tests or {"test": parts["test"]}
    assert val is not None
    return Data(name, train, val, tests, flip=True, notes=(*notes, *imbalance(train)))


def imbalance(train: Images) -> list[str]:
    """A sentence if the largest class of the training set is at least twice the smallest, else none."""
    sizes = train.class_sizes()
    low, high = int(sizes.min()), int(sizes.max())
    if high < 2 * low:
        return []
    small, large = train.classes[int(sizes.argmin())], train.classes[int(sizes.argmax())]
    return [
        f"classes are uneven: {counted(high, 'training image')} of {large}, {low:,} of {small};"
        " read balanced accuracy beside accuracy"
    ]


def split_by_seed(labels: Tensor, classes: int, percent: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    """Hold out parts of a set, class by class. percent: {"val": 15, "test": 15}; the rest is "train".

    A class with n images gives each part round(n percent / 100), at least 1. Where that would leave train
    nothing, the parts later in `percent` are served first: of 2 images one goes to the last part, one to train.
    Returns positions (int64, rising) by part.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in ("train", *percent)}
    for order in class_orders(labels, classes, seed, "split"):
        left = order
        for name in reversed(list(percent)):
            n = min(max(1, (len(order) * percent[name] + 50) // 100), max(len(left) - 1, 0))
            parts[name].append(left[:n])
            left = left[n:]
        parts["train"].append(left)
    return {name: torch.cat(pieces).sort().values for name, pieces in parts.items()}


def hold_out(images: Images, percent: Mapping[str, int], seed: int) -> tuple[dict[str, Images], str]:
    """`images` split by a seed into train and the parts named, and a sentence that says so.

    Raises DataError if a part would be empty.
    """
    index = split_by_seed(images.labels, len(images.classes), percent, seed)
    empty = [name for name, at in index.items() if len(at) == 0]
    if empty:
        raise DataError(
            f"{counted(len(images), 'image')} of {counted(len(images.classes), 'class', 'classes')} are too"
            f" few to split into {' and '.join(index)}: nothing is left for {' and '.join(empty)};"
            f" add images: a class needs at least {len(index)}"
        )
    parts = {name: images.subset(at) for name, at in index.items()}
    how = f"split by seed {seed}: " + ", ".join(f"{len(part):,} {name}" for name, part in parts.items())
    for name, part in parts.items():
        missing = int(((part.class_sizes() == 0) & (images.class_sizes() > 0)).sum())
        how += f"; {counted(missing, 'class', 'classes')} too small to have one in {name}" if missing else ""
    return parts, how
