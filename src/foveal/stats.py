"""Intervals that say what they are over.

    over images:  percentile bootstrap of the mean over N images, the seeds as they are
                  -> how the number would move with other test images
    over seeds:   mean +- t_{S-1} s / sqrt(S), Student's t over S runs
                  -> how it would move with other seeds
    paired:       the same for the differences a - b on the same images, or with the same seeds

Where the data cannot tell (one image, one seed, all values equal) low and high are NaN and `over` says why; an
interval of zero width would claim certainty. S seeds, N images.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import stdtrit  # Student's quantile; scipy.stats takes a second to import

from foveal.chance import generator

Values = Any  # whatever torch.as_tensor takes: a tensor, an array, nested lists
CHUNK = 2**22  # image draws at a time, to bound memory


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval in the units of the values.

    low, high: NaN where no interval is available.  level: its coverage, 0.95.  over: what it is over, in words.
    """

    mean: float
    low: float
    high: float
    level: float
    over: str

    @property
    def available(self) -> bool:
        """Whether there is an interval, and not only a mean."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def scaled(self, factor: float) -> "Interval":
        """In other units: 100 for points of a share."""
        return Interval(self.mean * factor, self.low * factor, self.high * factor, self.level, self.over)

    def __str__(self) -> str:
        if not self.available:
            return f"{self.mean:.4g} (no interval)"
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def over_images(values: Values, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """Bootstrap over images, the seeds kept as they are.

    values: (S, N) or (N,), the value of each image (1 or 0 for right or wrong, its pointing share) under each
    seed, columns in the same order of images. An image is drawn with its values under all seeds, as they are
    not independent. Images with a value that is not finite under any seed have none and are left out.
    Raises ValueError for no values or a level outside (0, 1).
    """
    return _over_images(_rows(values, 2), "", level, resamples, seed)


def over_seeds(values: Values, *, level: float = 0.95) -> Interval:
    """Student's t over seeds. values: (S,), one number for each seed. Raises ValueError if one is not finite."""
    return _over_seeds(_rows(values, 1)[0], "", level)


def paired_over_images(a: Values, b: Values, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """Bootstrap over images of the mean of a - b; a, b: (S, N) or (N,), same seeds and images in the same order."""
    return _over_images(_difference(a, b, 2), "differences on ", level, resamples, seed)


def paired_over_seeds(a: Values, b: Values, *, level: float = 0.95) -> Interval:
    """Student's t over seeds of a - b; a, b: (S,), row k of both from seed k (the paired t test's interval)."""
    return _over_seeds(_difference(a, b, 1)[0], "differences over ", level)


def _over_images(values: npt.NDArray[np.float64], prefix: str, level: float, resamples: int, seed: int) -> Interval:
    _check_level(level)
    kept = values[:, np.isfinite(values).all(0)]
    if kept.shape[1] == 0:
        raise ValueError("no image has a finite value under every seed: there is nothing to average")
    image_means = kept.mean(0)  # (N,)
    mean, n, seeds = float(image_means.mean()), len(image_means), len(kept)
    what = f"{prefix}{n:,} images, {'one seed' if seeds == 1 else f'the {seeds} seeds as they are'}"
    why = "one image" if n == 1 else "all images have the same value" if np.ptp(image_means) == 0 else ""
    if why:
        return Interval(mean, math.nan, math.nan, level, f"not available: {why} ({what})")
    means = bootstrap_means(image_means, resamples, seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high), level, f"{what} (bootstrap, {resamples:,} resamples)")


def bootstrap_means(values: npt.NDArray[np.float64], resamples: int, seed: int) -> npt.NDArray[np.float64]:
    """Means of `resamples` draws of N values out of N with replacement. values: (N,).  Returns (resamples,)."""
    rng, x = generator(seed, "bootstrap", len(values)), torch.from_numpy(values)
    at_once = max(1, CHUNK // len(x))
    means = [
        x[torch.randint(len(x), (min(at_once, resamples - done), len(x)), generator=rng)].mean(1)
        for done in range(0, resamples, at_once)
    ]
    return torch.cat(means).numpy()


def _over_seeds(values: npt.NDArray[np.float64], prefix: str, level: float) -> Interval:
    _check_level(level)
    if not np.isfinite(values).all():
        raise ValueError(f"values of seeds must be finite, not {values.tolist()}: leave out runs that failed")
    mean, n = float(values.mean()), len(values)
    why = "one seed" if n == 1 else "all seeds have the same value" if np.ptp(values) == 0 else ""
    if why:
        over = f"not available: {why}" + ("" if n == 1 else f" ({prefix}{n} seeds)")
        return Interval(mean, math.nan, math.nan, level, over)
    half = float(stdtrit(n - 1, (1 + level) / 2) * values.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, level, f"{prefix}{n} seeds (Student's t)")


def _difference(a: Values, b: Values, dims: int) -> npt.NDArray[np.float64]:
    first, second = _rows(a, dims), _rows(b, dims)
    if first.shape != second.shape:
        raise ValueError(f"pairs need equal shapes, not {first.shape} and {second.shape} (seeds, images)")
    return first - second


def _rows(values: Values, most: int) -> npt.NDArray[np.float64]:
    """values as (S, N) float64, or (1, S) where seeds are asked."""
    x = torch.as_tensor(values).detach().to("cpu", torch.float64).numpy()
    if x.ndim < 1 or x.ndim > most or x.size == 0:
        shapes = "(S, N) or (N,)" if most == 2 else "(S,)"
        raise ValueError(f"values of shape {x.shape} cannot be used: give {shapes}, not empty")
    return np.atleast_2d(x)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level={level} is not in (0, 1): 95 % is 0.95")
