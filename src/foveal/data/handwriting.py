"""Handwritten digits, drawn at any size, and which of them belong to which pool.

scikit-learn's 1,797 real digits (8x8, 17 grey levels) are shared out by runs of each class as they lie in the
file. Neighbours there are often by one writer, so different pools are mostly by different hands.
"""

from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.ndimage import maximum_filter

from foveal.data.photographs import POOLS

Field = npt.NDArray[np.float32]

_SHARES = (40, 5, 5, 20, 5, 25)  # per cent of each class's digits, in the order of POOLS


@cache
def shape(digit: int, side: int) -> tuple[Field, Field]:
    """Strokes of a digit, and strokes with the line around them: two (side, side) float32 in [0, 1]."""
    grey = np.pad(handwritten()[digit], 1)  # one empty cell around: room for the line
    smooth = np.asarray(Image.fromarray(grey).resize((side, side), Image.Resampling.BICUBIC))
    cell = side / len(grey)  # pixels
    strokes = ((smooth - 0.42) * cell + 0.5).clip(0, 1)  # an edge about one pixel wide
    reach = max(1, round(cell / 3))
    disc = np.hypot(*np.mgrid[-reach : reach + 1, -reach : reach + 1]) <= reach
    cover = maximum_filter(strokes, footprint=disc)
    cover[cover < 1 / 16] = 0  # no halo too faint to see
    return strokes, cover


@cache
def pool_digits(pool: str, digit: int) -> tuple[int, ...]:
    """Numbers (in scikit-learn's set) of the images of one digit that belong to a pool of `POOLS`."""
    ours = np.flatnonzero(_targets() == digit)
    at = POOLS.index(pool)
    low, high = sum(_SHARES[:at]), sum(_SHARES[: at + 1])
    return tuple(ours[len(ours) * low // 100 : len(ours) * high // 100].tolist())


@cache
def handwritten() -> Field:
    """All digits of scikit-learn as float32 (1797, 8, 8) in [0, 1], 1 where the ink is."""
    from sklearn.datasets import load_digits

    return np.asarray(load_digits().images / 16, dtype=np.float32)  # (1797, 8, 8)


@cache
def _targets() -> npt.NDArray[np.int64]:
    from sklearn.datasets import load_digits

    return np.asarray(load_digits().target, dtype=np.int64)
