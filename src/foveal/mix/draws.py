"""The random parts that mixers share: who is mixed, with whom, and how much.

    partner of i = B - 1 - i        lam ~ Beta(alpha, alpha), as I^-1_u(alpha, alpha) of a uniform u

The inverse of the regularised incomplete beta function turns one uniform number into one weight, so a draw takes the
same amount of chance whatever comes out of it, and needs no generator but torch's.

`mode` says what shares a draw: the whole batch (`batch`), an image and its partner (`pair`), nobody (`elem`).
"""

from __future__ import annotations

import difflib
from typing import Literal, get_args

import torch
from scipy.special import betaincinv
from torch import Tensor

Mode = Literal["batch", "pair", "elem"]


def reversed_partners(batch: int) -> Tensor:
    """Partner of each image, (B,) int64: the batch backwards. The middle of an odd batch is its own partner."""
    if batch < 1:
        raise ValueError(f"a batch of {batch} images cannot be mixed")
    return torch.arange(batch - 1, -1, -1)


def sharing(batch: int, mode: Mode) -> Tensor:
    """Which draw each image uses, (B,) int64 counted from 0."""
    index = torch.arange(batch)
    if mode == "batch":
        return torch.zeros_like(index)
    if mode == "pair":
        return torch.minimum(index, index.flip(0))
    return index


def draw_uniform(batch: int, mode: Mode, rng: torch.Generator) -> Tensor:
    """Uniform in [0, 1), (B,) float64, equal where a draw is shared."""
    index = sharing(batch, mode)
    return torch.rand(int(index.max()) + 1, generator=rng, dtype=torch.float64)[index]


def draw_beta(alpha: float, batch: int, mode: Mode, rng: torch.Generator) -> Tensor:
    """Weights from Beta(alpha, alpha), (B,) float64 in [0, 1], equal where a draw is shared."""
    u = draw_uniform(batch, mode, rng)
    return torch.as_tensor(betaincinv(alpha, alpha, u.numpy()))


def draw_mixes(prob: float, perm: Tensor, mode: Mode, rng: torch.Generator) -> Tensor:
    """Which images are mixed at all, (B,) bool. An image that would meet itself is left alone."""
    batch = len(perm)
    return (draw_uniform(batch, mode, rng) < prob) & (perm != torch.arange(batch))


def check_share(name: str, value: float) -> None:
    """Raise ValueError unless the setting is a probability."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}={value} is a probability: use a value in [0, 1]")


def check_alpha(name: str, value: float, *, zero: str) -> None:
    """Raise ValueError unless alpha makes a Beta distribution. zero: what to do at alpha = 0, empty if it is legal."""
    if not 0.0 <= value < float("inf"):
        raise ValueError(f"{name}={value} but Beta({name}, {name}) needs a positive, finite number")
    if value == 0.0 and zero:
        raise ValueError(f"{name}=0 never mixes: {zero}")


def check_mode(mode: str) -> None:
    """Raise ValueError unless the mode is known."""
    known = get_args(Mode)
    if mode not in known:
        near = difflib.get_close_matches(mode, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"mode={mode!r} is not known; {hint}use one of {', '.join(known)}")
