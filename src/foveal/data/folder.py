"""A folder of class folders: PHOTOS/cat/*.jpg, PHOTOS/dog/*.jpg, or such folders below train/, val/ and test/.

    train/ val/ test/    as named (also training, valid, validation, dev, testing; any case)
    train/ test/         val is held out of train by the seed
    train/ val/          val/ is the test set, as is usual where there is no other, and keeps its name;
                         the images that select during training are held out of train by the seed
    class folders only   70 % train, 15 % val, 15 % test by the seed, class by class

Selection on val, report on the tests: an image never serves for both. Further test sets: folders named test_...
or as in the Backgrounds Challenge (mixed_same, mixed_rand, original, ...), with class folders in them or in
their val/. Images may lie at any depth below their class folder.
"""

import os
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

import torch

from foveal.data.decode import SUFFIXES, why_unreadable
from foveal.data.errors import DataError, DataWarning, counted, listed
from foveal.data.images import Data, Images
from foveal.data.splits import complete

ROLES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "tests"),
}
BACKGROUNDS = (
    "mixed_same",
    "mixed_rand",
    "mixed_next",
    "original",
    "only_fg",
    "no_fg",
    "only_bg_b",
    "only_bg_t",
)


def load_folder(root: Path, seed: int = 0) -> Data:
    """The data set in a folder. Raises DataError where there is none, says in `notes` what was done with it.

    Left out, with a count, names and a DataWarning: images that cannot be read, class folders without images,
    files outside class folders. Errors: a single class, classes in val or test that train does not have, more
    than half of the images unreadable.
    """
    found = _roles(root)
    if found and "train" not in found:
        raise DataError(f"{root} has {listed([f'{d.name}/' for d in found.values()])} but no train/ folder")
    notes: list[str] = []
    if found:
        others = [f"{d.name}/" for d in _folders(root) if d not in found.values()]
        if others:
            notes.append(f"folders beside the splits are not used: {listed(others)}")
    train = _images(_scan(_class_level(found.pop("train")) if found else root), root, notes)
    tests = {
        name: _images(_scan(_class_level(folder)), root, notes, train.classes, name) for name, folder in found.items()
    }
    val = tests.pop("val", None)
    return complete(root.resolve().name, train, val, tests, seed, notes)


def has_classes(root: Path) -> bool:
    """Whether a folder is laid out for training with labels: split folders, or two class folders with images."""
    if _roles(root):
        return True
    return sum(any(f.suffix.lower() in SUFFIXES for f in folder.rglob("*")) for folder in _folders(root)) > 1


def gathered(root: Path, notes: list[str]) -> list[Path]:
    """All readable images below a folder, in order, whatever the folders are called.

    Those that cannot be read are left out, with a DataWarning and a note. Raises DataError for none, or too many bad.
    """
    scan = _scan(root.parent, [root])
    _complain(scan, root, notes)
    return [path for path in scan.images[root.name] if path not in scan.unreadable]


@dataclass
class _Scan:
    """What lies below a folder of class folders."""

    folder: Path
    images: dict[str, list[Path]] = field(default_factory=dict)  # by class
    unreadable: dict[Path, str] = field(default_factory=dict)  # with the reason
    loose: list[Path] = field(default_factory=list)  # images beside the class folders
    others: Counter[str] = field(default_factory=Counter)  # endings of files that are no images we read


def _roles(root: Path) -> dict[str, Path]:
    """The split folders of a data set: {"train": ..., "val": ..., "test": ..., "mixed_same": ...}."""
    found: dict[str, Path] = {}
    role_of = {name: role for role, names in ROLES.items() for name in names}
    for folder in _folders(root):
        name = folder.name.lower()
        role = role_of.get(name) or (name if name in BACKGROUNDS or name.startswith("test_") else None)
        if role is None:
            continue
        if role in found:
            raise DataError(f"{root} has both {found[role].name}/ and {folder.name}/: which is {role}? Rename one")
        found[role] = folder
    if not found.keys() & {"train", "val", "test"}:
        return {}  # classes may have such names, in a folder of classes
    order = ["train", "val", "test", *BACKGROUNDS]
    return dict(sorted(found.items(), key=lambda item: order.index(item[0]) if item[0] in order else 99))


def _folders(folder: Path) -> list[Path]:
    kept = (d for d in folder.iterdir() if d.is_dir() and not d.name.startswith((".", "__")))
    return sorted(kept, key=lambda d: d.name)


def _class_level(folder: Path) -> Path:
    """folder, or its only folder if that is called val, test or train: mixed_same/val/ of the Challenge."""
    inner = _folders(folder)
    names = {name for names in ROLES.values() for name in names}
    return inner[0] if len(inner) == 1 and inner[0].name.lower() in names else folder


def _scan(folder: Path, only: list[Path] | None = None) -> _Scan:
    """What lies in the class folders of a folder; only: these of its folders, whatever else is in it."""
    scan = _Scan(folder if only is None else only[0])
    if only is None:
        scan.loose = [f for f in sorted(folder.iterdir()) if f.is_file() and f.suffix.lower() in SUFFIXES]
    for class_folder in _folders(folder) if only is None else only:
        paths = []
        for here, inner, files in os.walk(class_folder, followlinks=True):
            inner[:] = sorted(d for d in inner if not d.startswith((".", "__")))
            paths += [Path(here, name) for name in sorted(files) if not name.startswith(".")]
        scan.images[class_folder.name] = [path for path in paths if path.suffix.lower() in SUFFIXES]
        scan.others.update(p.suffix.lower() or p.name for p in paths if p.suffix.lower() not in SUFFIXES)
    everything = [path for paths in scan.images.values() for path in paths]
    with ThreadPoolExecutor(8) as pool:  # reading a few bytes of each: waiting for the disk, mostly
        reasons = list(pool.map(why_unreadable, everything))
    scan.unreadable = {p: why for p, why in zip(everything, reasons, strict=True) if why is not None}
    return scan


def _images(
    scan: _Scan, root: Path, notes: list[str], classes: tuple[str, ...] | None = None, name: str = "train"
) -> Images:
    """The readable images of a scan as a set; `classes` are those of the training set, None for itself."""
    _complain(scan, root, notes)
    kept = {c: [p for p in paths if p not in scan.unreadable] for c, paths in scan.images.items()}
    empty = [c for c, paths in kept.items() if not paths]
    if classes is None:
        classes = tuple(c for c, paths in kept.items() if paths)
        if empty:
            _note(notes, f"{counted(len(empty), 'class folder')} without images left out: {listed(empty)}")
        if len(classes) == 1:
            inside = scan.folder / classes[0]
            hint = f"; did you mean {inside}?" if len(_folders(inside)) > 1 else ""
            raise DataError(f"{scan.folder} has images of one class only, {classes[0]}: two are needed{hint}")
    else:
        _compare(kept, classes, scan.folder, name, notes)
    files = [(p, classes.index(c)) for c, paths in kept.items() for p in paths]
    return Images(
        labels=torch.tensor([label for _, label in files], dtype=torch.int64),
        classes=classes,
        files=tuple(path for path, _ in files),
        names=tuple(path.relative_to(root).as_posix() for path, _ in files),
    )


def _compare(kept: dict[str, list[Path]], classes: tuple[str, ...], folder: Path, name: str, notes: list[str]) -> None:
    """Classes of val or a test against those of train: unknown ones are an error, missing ones a warning."""
    unknown = [c for c, paths in kept.items() if paths and c not in classes]
    if unknown:
        lower = {c.lower(): c for c in classes}
        near = get_close_matches(unknown[0].lower(), lower, 1)
        hint = f"; is {unknown[0]} the same as {lower[near[0]]}?" if near else ""
        raise DataError(
            f"{folder} has {counted(len(unknown), 'class', 'classes')} that train has no images of:"
            f" {listed(unknown)}; a model cannot name what it was not taught{hint}"
        )
    missing = [c for c in classes if not kept.get(c)]
    if missing:
        some = f"{len(missing)} of {counted(len(classes), 'class', 'classes')}"
        _note(notes, f"{name} has no images of {some}: {listed(missing)}")


def _complain(scan: _Scan, root: Path, notes: list[str]) -> None:
    """Everything that is wrong with the files themselves: an error if nothing or little is left."""
    total = sum(len(paths) for paths in scan.images.values())
    others = ", ".join(f"{n:,} {suffix}" for suffix, n in scan.others.most_common(5))
    if not total:
        if scan.loose:
            raise DataError(
                f"{scan.folder} has {counted(len(scan.loose), 'image')} but no class folders: put the images"
                f" of each class into a folder of its own, {scan.folder / '<class>' / scan.loose[0].name}"
            )
        seen = f" (there are {others}: convert them)" if others else ""
        raise DataError(f"no images below {scan.folder}{seen}; looked for {' '.join(SUFFIXES)}")
    bad = [f"{p.relative_to(root)} ({why})" for p, why in scan.unreadable.items()]
    if 2 * len(bad) > total:
        raise DataError(f"{len(bad):,} of {total:,} images below {scan.folder} cannot be read: {listed(bad, 3)}")
    if bad:
        _note(notes, f"{counted(len(bad), 'image')} cannot be read and left out: {listed(bad)}")
    if scan.loose:
        _note(notes, f"{counted(len(scan.loose), 'image')} beside the class folders of {scan.folder} left out")
    if scan.others:
        notes.append(f"files below {scan.folder} that are no images we read: {others}")


def _note(notes: list[str], text: str) -> None:
    notes.append(text)
    warnings.warn(text, DataWarning, stacklevel=4)
