"""Subsets for few-label training: seeded, class by class, the smaller inside the larger.

    share p of a class with n images:  ceil(n p) images, in integers        (thuml's low-label protocol)

Each class is put in one seeded order and every subset is a prefix of it.
"""

import warnings
from fractions import Fraction

import torch
from torch import Tensor

from foveal.chance import generator
from foveal.data.errors import DataWarning, counted
from foveal.data.images import Images


def subset(images: Images, share: float | None = None, per_class: int | None = None, seed: int = 0) -> Tensor:
    """Positions of a stratified subset: (n,) int64, rising. Give a share in (0, 1] or a number per class.

    share is read as the decimal it is written as: 0.15 of 20 images is ceil(3) = 3, never a rounding up of
    3.0000000000000004. A class with fewer than per_class images gives all it has, with a DataWarning.
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
    short = [name for name, n in zip(images.classes, sizes, strict=True) if per_class and 0 < n < per_class]
    if short:
        warnings.warn(
            f"{counted(len(short), 'class has', 'classes have')} fewer than {per_class} images"
            f" and give{'s' if len(short) == 1 else ''} all: {', '.join(short[:5])}",
            DataWarning,
            stacklevel=2,
        )
    picked = []
    for c, order in enumerate(class_orders(images.labels, len(sizes), seed, "subset")):
        n = sizes[c]
        picked.append(order[: -(-n * part.numerator // part.denominator) if part is not None else per_class])
    return torch.cat(picked).sort().values


def class_orders(labels: Tensor, classes: int, seed: int, purpose: str) -> list[Tensor]:
    """For each class its images' positions in a seeded order."""
    orders = []
    for c in range(classes):
        at = (labels == c).nonzero()[:, 0]
        orders.append(at[torch.randperm(len(at), generator=generator(seed, purpose, c))])
    return orders
