"""Masks that somebody has, as files: MASKS/cat/001.png for PHOTOS/cat/001.jpg, white where the object is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from foveal.data.decode import SUFFIXES
from foveal.data.errors import DataError, listed


def mask_files(names: Sequence[str], folder: str | Path) -> tuple[Path | None, ...]:
    """The mask of each image: the file in `folder` of the same relative name, whatever its image ending.

    names: of the images, paths below their own folder.  None for an image without a mask.
    Raises DataError where the folder does not exist, no image has a mask, or one has two.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"there is no folder {root} of masks")
    there: dict[str, Path] = {}
    for here, inner, files in os.walk(root, followlinks=True):
        inner[:] = sorted(d for d in inner if not d.startswith("."))
        for name in sorted(files):
            path = Path(here, name)
            if path.suffix.lower() in SUFFIXES and not name.startswith("."):
                key = path.relative_to(root).with_suffix("").as_posix()
                if key in there:
                    raise DataError(f"{there[key]} and {path.name}: which is the mask? Keep one of them")
                there[key] = path
    found = tuple(there.get(Path(name).with_suffix("").as_posix()) for name in names)
    if not any(found):
        wanted = Path(names[0]).with_suffix(".png").as_posix() if names else "<name>.png"
        has = f"it has {listed(sorted(there), 3)}" if there else "it has no images"
        raise DataError(f"{root} has no mask of any of the {len(names):,} images, such as {wanted}: {has}")
    return found
