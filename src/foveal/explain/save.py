"""Pages and pictures as files that are whole or absent."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from foveal.explain.overlay import Pixels
from foveal.whole import whole_file


def save(data: bytes, path: str | os.PathLike[str]) -> Path:
    """Write `data` to `path`; a reader sees the old file or the new one, never a part.

    Missing parent folders are made.  If writing fails, an earlier file of that name is left as it was.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as file:
        file.write(data)
    return target


def save_png(picture: Pixels | Figure, path: str | os.PathLike[str], dpi: int = 144) -> Path:
    """Write an (H, W, 3) uint8 array or a matplotlib figure as PNG, whole or not at all."""
    buffer = BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    else:
        Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return save(buffer.getvalue(), path)
