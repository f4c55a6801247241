"""Subsets for few-label training: seeded, class by class, the smaller inside the larger.

    share p of a class with n images:  ceil(n p) images, in integers        (thuml's low-label protocol)

Each class is put in one seeded order and every subset is a prefix of it. n counts the images given; where they come
from a published training set of which some are validation now (`Images.published`), n counts the published ones, so
that 15 % of CUB-200 is 1,000 images as in the protocol, and validation lies outside of it.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches
from fractions import Fraction

import torch
from torch import Tensor

from foveal.chance import generator
from foveal.data.errors import DataError, DataWarning, counted
from foveal.data.errors import listed as _some
from foveal.data.images import Images


def subset(images: Images, share: float | None = None, per_class: int | None = None, seed: int = 0) -> Tensor:
    """Positions of a stratified subset: (n,) int64, rising. Give a share in (0, 1] or a number per class.

    share is read as the decimal it is written as: 0.15 of 20 images is ceil(3) = 3, never a rounding up of
    3.0000000000000004. A class that has fewer images than asked for (per_class, or a share near 1 of a published set of
    which some are held out) gives all it has, with a DataWarning.
    Raises ValueError unless exactly one of share and per_class is given, and fits.
    """
    if (share is None) == (per_class is None):
        raise ValueError("give either share (0.15) or per_class (5)")
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"share={share} is not in (0, 1]: 15 % is 0.15")
    if per_class is not None and per_class < 1:
        raise ValueError(f"per_class={per_class} must be at least 1")
    part = None if share is None else Fraction(str(share))
    sizes = images.class_sizes().tolist()
    if part is None:
        wanted = [per_class or 0] * len(sizes)
    else:
        wanted = [-(-n * part.numerator // part.denominator) for n in images.published or sizes]
    short = [i for i, (n, most) in enumerate(zip(wanted, sizes, strict=True)) if 0 < most < n]
    if short and part != 1:  # all of what there is needs no warning
        than = f"{per_class} images" if part is None else f"{float(100 * part):g} % of the published images beside val"
        warnings.warn(
            f"{counted(len(short), 'class has', 'classes have')} fewer than {than}"
            f" and give{'s' if len(short) == 1 else ''} all: {', '.join(images.classes[i] for i in short[:5])}",
            DataWarning,
            stacklevel=2,
        )
    orders = class_orders(images.labels, len(sizes), seed, "subset")
    return torch.cat([order[:n] for order, n in zip(orders, wanted, strict=True)]).sort().values


def listed(images: Images, names: Sequence[str]) -> Tensor:
    """Positions of the images that a saved list names: (n,) int64, rising. The names of a subset give the subset.

    names: as in Images.names and in a run's split.json, in any order; a list that a file holds, line by line, may have
    empty lines and blanks around a name. Classes without an image on the list are told in a DataWarning.
    Raises DataError for a list without names, a name that is twice on the list or among the images, and one that no
    image has, with the nearest there is.
    """
    wanted = [name.strip() for name in names if name.strip()]
    if not wanted:
        raise DataError("the list names no images: one name a line, as in split.json")
    twice = [name for name, n in Counter(wanted).items() if n > 1]
    if twice:
        raise DataError(f"{counted(len(twice), 'name is', 'names are')} on the list more than once: {_some(twice)}")
    at = {name: i for i, name in enumerate(images.names)}
    missing = [name for name in wanted if name not in at]
    if missing:
        near = get_close_matches(missing[0], at, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; images are called like {images.names[0]}" if at else ""
        raise DataError(
            f"{len(missing):,} of the {counted(len(wanted), 'name')} on the list"
            f" {'is' if len(missing) == 1 else 'are'} of none of the {len(images):,} images: {_some(missing)}{hint}"
        )
    if len(at) < len(images):
        shared = {name for name, n in Counter(images.names).items() if n > 1} & set(wanted)
        if shared:
            raise DataError(f"several images have the same name, so a list cannot tell them: {_some(sorted(shared))}")
    index = torch.tensor(sorted(at[name] for name in wanted), dtype=torch.int64)
    left = (images.subset(index).class_sizes() == 0) & (images.class_sizes() > 0)
    without = [name for name, none in zip(images.classes, left.tolist(), strict=True) if none]
    if without:
        warnings.warn(
            f"the list has no images of {counted(len(without), 'class', 'classes')}: {_some(without)}",
            DataWarning,
            stacklevel=2,
        )
    return index


def class_orders(labels: Tensor, classes: int, seed: int, purpose: str) -> list[Tensor]:
    """For each class its images' positions in a seeded order."""
    orders = []
    for c in range(classes):
        at = (labels == c).nonzero()[:, 0]
        orders.append(at[torch.randperm(len(at), generator=generator(seed, purpose, c))])
    return orders
