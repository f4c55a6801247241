"""Files that are either whole or absent: written under a temporary name beside the target, then renamed."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path
from uuid import uuid4

from matplotlib.figure import Figure
from PIL import Image

from foveal.explain.overlay import Pixels


def save(data: bytes, path: str | os.PathLike[str]) -> Path:
    """Write `data` to `path`; a reader sees the old file or the new one, never a part.

    Missing parent folders are made.  If writing fails, an earlier file of that name is left as it was.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{uuid4().hex}.part")  # same folder: a rename across file systems is a copy
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return target


def save_png(picture: Pixels | Figure, path: str | os.PathLike[str], dpi: int = 144) -> Path:
    """Write an (H, W, 3) uint8 array or a matplotlib figure as PNG, whole or not at all."""
    buffer = BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    else:
        Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return save(buffer.getvalue(), path)
