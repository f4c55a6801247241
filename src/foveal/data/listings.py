"""The annotation files of published sets: which images they have, of which class, to train on or to test on.

Each function reads one set's files as its authors published them, given the folder they lie in; no image is opened.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from foveal.data.errors import DataError

Entries = list[tuple[str, int]]  # path of an image below `images`, number of its class from 0


@dataclass(frozen=True)
class Listing:
    """classes: their names.  images: the folder that train and test are below."""

    classes: tuple[str, ...]
    images: Path
    train: Entries
    test: Entries


def cub(folder: Path) -> Listing:
    """CUB-200-2011: text files that give each image a number and say things of the numbers, 1 in the split is train."""
    paths = dict(_rows(folder / "images.txt", int, str))
    told = {}
    for name in ("image_class_labels.txt", "train_test_split.txt"):
        told[name] = dict(_rows(folder / name, int, int))
        if told[name].keys() != paths.keys():
            raise DataError(f"images.txt and {name} in {folder} are not of the same images: unpack the archive again")
    label, in_train = told.values()
    parts: tuple[Entries, Entries] = ([], [])
    for i, path in paths.items():
        parts[0 if in_train[i] else 1].append((path, label[i] - 1))
    names = _named(((c - 1, name.partition(".")[2]) for c, name in _rows(folder / "classes.txt", int, str)), folder)
    return Listing(names, folder / "images", *parts)


def cub_boxes(folder: Path) -> dict[str, tuple[int, int, int, int]]:
    """The birds' boxes in CUB-200-2011 by image name: top, left, bottom, right in pixels, the last two exclusive."""
    paths = dict(_rows(folder / "images.txt", int, str))
    boxes = _rows(folder / "bounding_boxes.txt", int, float, float, float, float)
    return {paths[i]: (round(y), round(x), round(y + h), round(x + w)) for i, x, y, w, h in boxes if i in paths}


def cars(folder: Path) -> Listing:
    """Stanford Cars, laid out as torchvision has it: devkit/, cars_train/, cars_test/ and the labels of the test."""
    classes = _mat(folder / "devkit" / "cars_meta.mat", "class_names")[0]
    files = {"cars_train": folder / "devkit" / "cars_train_annos.mat"}
    files["cars_test"] = folder / "cars_test_annos_withlabels.mat"
    parts = []
    for part, file in files.items():
        found = _mat(file, "annotations")[0]
        if not {"fname", "class"} <= set(found.dtype.names or ()):
            raise DataError(f"the annotations of {file} have no class: for the test images take those with labels")
        parts.append([(f"{part}/{one['fname']}", int(one["class"]) - 1) for one in found])
    return Listing(tuple(str(name) for name in classes), folder, *parts)


def aircraft(folder: Path) -> Listing:
    """FGVC Aircraft, by variant: training and validation images as published are the training set of the protocol."""
    data = folder / "data"
    classes = tuple(name for (name,) in _rows(data / "variants.txt", str))
    number = {name: c for c, name in enumerate(classes)}
    parts = []
    for part in ("trainval", "test"):
        file = data / f"images_variant_{part}.txt"
        rows = _rows(file, str, str)
        unknown = next((variant for _, variant in rows if variant not in number), None)
        if unknown is not None:
            raise DataError(f"{file} has a variant {unknown!r} that variants.txt does not have")
        parts.append([(f"{image}.jpg", number[variant]) for image, variant in rows])
    return Listing(classes, data / "images", *parts)


def dogs(folder: Path) -> Listing:
    """Stanford Dogs: lists of paths such as n02085620-Chihuahua/n02085620_5927.jpg."""
    parts = []
    for part in ("train", "test"):
        paths, labels = _mat(folder / f"{part}_list.mat", "file_list", "labels")
        parts.append([(str(path), int(label) - 1) for path, label in zip(paths, labels, strict=True)])
    named = ((label, path.partition("/")[0].partition("-")[2]) for part in parts for path, label in part)
    return Listing(_named(named, folder), folder / "Images", *parts)


def pets(folder: Path) -> Listing:
    """Oxford-IIIT Pet: rows of image, breed, species, number within it; images are called like their breed."""
    parts = []
    for part in ("trainval", "test"):
        rows = _rows(folder / "annotations" / f"{part}.txt", str, int, int, int)
        parts.append([(f"{image}.jpg", breed - 1) for image, breed, _, _ in rows])
    named = ((label, path.rpartition("_")[0].title()) for part in parts for path, label in part)
    return Listing(_named(named, folder), folder / "images", *parts)


def _rows(path: Path, *kinds: Callable[[str], Any]) -> list[tuple[Any, ...]]:
    """The lines of a text file as so many values; the last takes the rest of its line. Lines with # are left out."""
    rows = []
    line = ""
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip() and not line.startswith("#"):
                words = line.split(maxsplit=len(kinds) - 1)
                rows.append(tuple(kind(word.strip()) for kind, word in zip(kinds, words, strict=True)))
    except ValueError as error:
        meant = " ".join("number" if kind in (int, float) else "name" for kind in kinds)
        raise DataError(f"{path} has the line {line[:80]!r} instead of: {meant}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    return rows


def _mat(path: Path, *keys: str) -> list[Any]:
    """Arrays of a MATLAB file, each of one dimension."""
    from scipy.io import loadmat  # here: only two of the sets need it

    try:
        content = loadmat(path, squeeze_me=True)
        return [np.atleast_1d(content[key]) for key in keys]
    except KeyError as error:
        raise DataError(f"{path} has no {error.args[0]}") from error
    except Exception as error:  # a cut or foreign file raises many kinds
        raise DataError(f"cannot read {path}: {' '.join(str(error).split())}") from error


def _named(pairs: Iterable[tuple[int, str]], folder: Path) -> tuple[str, ...]:
    """The names of classes 0 to C - 1 from (class, name) as often as it comes; blanks for underscores."""
    names = dict.fromkeys(pairs)
    label = dict(names.keys())
    if len(label) < len(names) or sorted(label) != list(range(len(label))):
        raise DataError(f"the lists in {folder} do not give every class one number and one name: unpack them again")
    return tuple(label[c].replace("_", " ") for c in range(len(label)))
