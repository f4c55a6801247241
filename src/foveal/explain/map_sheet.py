"""A contact sheet of maps: each image, its map over it, and the objects that the map is of, where there are any."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from torch import Tensor

from foveal.explain.discovered import masks_of, objects
from foveal.explain.grid import captioned_rows
from foveal.explain.overlay import Pixels, overlay, resize
from foveal.maps import Found

SIDE = 160  # shorter side of a picture, in pixels
ACROSS = 2  # images in a row of the sheet


def map_sheet(
    images: Sequence[Tensor], maps: Sequence[Tensor], found: Sequence[Found | None], title: str, note: str
) -> Figure:
    """The sheet.

    images: (3, H, W) uint8 each, of any shapes.  maps: (h, w) each, zero or more, as stored.  found: what the source
    says of each image (a batch of one), None where only its map is known.
    """
    rows: list[list[Pixels | None]] = []
    cells: list[list[Pixels]] = []
    for image, map, one in zip(images, maps, found, strict=True):
        pictures = [_square(picture) for picture in (resize(image, SIDE), overlay(image, map, side=SIDE))]
        masks = None if one is None else masks_of(one, 0)
        if masks is not None:
            pictures.append(_square(objects(image, masks, side=SIDE)))
        cells.append(pictures)
    for i in range(0, len(cells), ACROSS):
        rows.append([picture for pictures in cells[i : i + ACROSS] for picture in pictures])
    return captioned_rows(rows, title, note)


def _square(picture: Pixels) -> Pixels:
    """The middle of a picture that is very long, so that rows stay in line."""
    most = 3 * SIDE // 2
    H, W = picture.shape[:2]
    top, left = max(0, (H - most) // 2), max(0, (W - most) // 2)
    return picture[top : top + most, left : left + most]
