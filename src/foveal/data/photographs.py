"""Ten photographs that come with scikit-image and scikit-learn, each cut into tiles that are never shared.

Every photograph is covered by square-ish tiles, four rows of them, and every tile belongs to one pool: what a
source model is trained, selected or tested on, and the same three for the target model that is tuned from it.
A crop lies inside one tile, so two pools have no pixel in common, while all pools have seen all parts of the
picture about equally (the pools are interleaved as on a chessboard).

The files lie inside the two installed packages: nothing is downloaded and no cache folder is read.
"""

from functools import cache

import numpy as np
import numpy.typing as npt

from foveal.data.errors import DataError

Pixels = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]  # top, left, bottom, right; the last two are outside

# In the order of the digits whose background they are; grey and coloured, textures and things, mixed.
PHOTOGRAPHS = ("brick", "coffee", "grass", "cat", "pagoda", "gravel", "retina", "tissue", "rocket", "flower")

POOLS = ("source/train", "source/val", "source/test", "target/train", "target/val", "target/test")
_ROWS = 4
_PATTERN = ((0, 3, 5, 2), (5, 0, 3, 0), (3, 1, 0, 5), (0, 5, 4, 3))  # 5 1 1 4 1 4 tiles of sixteen
_RETINA_DISC = slice(212, 1200)  # the square inside the round picture: its corners are black


@cache
def photograph(name: str) -> Pixels:
    """The photograph as (H, W, 3) uint8, grey ones with three equal channels."""
    if name not in PHOTOGRAPHS:
        raise DataError(f"no photograph {name!r}; there are {', '.join(PHOTOGRAPHS)}")
    try:
        pixels = _read(name)
    except (OSError, ImportError) as error:
        raise DataError(
            f"the photograph {name!r} is missing from the installed scikit-image or scikit-learn ({error});"
            " install them anew from their wheels, which hold it"
        ) from error
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[:, :, None], 3, axis=2)
    pixels = np.ascontiguousarray(pixels[:, :, :3])
    pixels.flags.writeable = False  # cached: one copy for all callers
    return pixels


@cache
def tiles(name: str, pool: str) -> tuple[Box, ...]:
    """The tiles of a photograph that belong to a pool, row by row. Tiles of different pools never overlap."""
    height, width = photograph(name).shape[:2]
    columns = max(_ROWS, round(_ROWS * width / height))
    edges_y = [height * r // _ROWS for r in range(_ROWS + 1)]
    edges_x = [width * c // columns for c in range(columns + 1)]
    wanted = POOLS.index(pool)
    return tuple(
        (edges_y[r], edges_x[c], edges_y[r + 1], edges_x[c + 1])
        for r in range(_ROWS)
        for c in range(columns)
        if _PATTERN[r][c % 4] == wanted
    )


def _read(name: str) -> Pixels:
    import skimage.data
    from sklearn.datasets import load_sample_image

    if name == "retina":
        return np.asarray(skimage.data.retina()[_RETINA_DISC, _RETINA_DISC])
    if name in ("pagoda", "flower"):
        return np.asarray(load_sample_image("china.jpg" if name == "pagoda" else "flower.jpg"))
    readers = {"tissue": "immunohistochemistry"}
    return np.asarray(getattr(skimage.data, readers.get(name, name))())
