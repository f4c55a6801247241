"""The largest eigenvalue of a graph besides the one that is known, by Lanczos.

    S = D^-1/2 W D^-1/2        S u = u,  u = D^1/2 1 / |D^1/2 1|        D: sums of W's rows
    w = S q_k less its part in u, q_1 ... q_k, taken out again where little was left;  q_k+1 = w / |w|
    H_ij = q_i . S q_j,   H s = theta s,   z = sum_i s_i q_i,   |S z - theta z| = |w| |s_k|

Lanczos (1950) with full re-orthogonalisation; Parlett, The Symmetric Eigenvalue Problem, chapter 13. The start is
1/sqrt of the degrees (what is unlike the rest has few neighbours) and a tenth of noise, so that no symmetry of a
picture hides the answer; the noise has a key of its own, so that every call gives the same.

The steps are written for what numpy arrays and torch tensors have in common: numpy takes one image at a time on a CPU,
where its calls cost a third of torch's and an image's graph stays in the cache; torch a batch on other devices.
A row times W: W times a column runs ten times slower in some libraries.

B images (torch; none for numpy), N patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from foveal import chance

Array = Any  # np.ndarray or torch.Tensor
NOISE = 0.1
LITTLE = 0.01  # what is left of a vector of length 1 or less, less than which has lost digits to what was taken out
TINY = 1e-30  # a length of 0 divides nothing


@dataclass(frozen=True)
class Precision:
    """How far to go in one float type, and what can be told in it."""

    checks: tuple[int, ...]  # steps after which to look whether it is enough
    tolerance: float  # |residual| / gap, which bounds the sine of the angle to the eigenvector
    faint: float  # |residual| where the graph all but falls apart: more would leave its parts unresolved
    gap: float  # narrower ones are within rounding
    rounding: float  # |residual| that no further step makes smaller
    nothing: float  # a length that is rounding: the start's space is exhausted, and its vector says nothing


FLOAT32 = Precision((6, 7, 9, 12, 16, 21, 27), tolerance=3e-4, faint=2e-6, gap=1e-3, rounding=4e-7, nothing=1e-6)
FLOAT64 = Precision(
    (8, 12, 16, 22, 30, 40, 54, 72, 96), tolerance=1e-7, faint=1e-9, gap=1e-9, rounding=1e-15, nothing=1e-14
)
FALLS_APART = 1e-2  # an eigenvalue 1 - theta below this is that of parts which little more than faint edges join


class Ritz(NamedTuple):
    """What was found: numbers of shape (1,), or (B, 1)."""

    value: Array  # theta
    vector: Array  # (N,) or (B, N) D^-1/2 z with |z| = 1
    gap: Array  # to the next lower eigenvalue, from above: that one may not have converged
    spread: Array  # |S q - theta q| of the start: 0 if all eigenvalues coincide, and then no direction is preferred
    sure: Array  # bool: as good as the float type can be asked for


def lanczos(weights: Array, precision: Precision = FLOAT32) -> Ritz:
    """The pair of the largest eigenvalue below the known one of each graph.

    weights: (N, N) numpy or (B, N, N) torch, float, symmetric, rows with a positive sum; N above the first check.
    Stops at the first check that satisfies all images; an image's result is that of the first check that satisfies it.
    """
    N, batched = weights.shape[-1], weights.ndim == 3  # a batch is not asked how much is left, but always gets both
    checks = [min(k, N - 1) for k in precision.checks]
    noise, ones = _rows_like(weights)
    root = _times(ones, weights) ** 0.5
    r = 1 / root
    basis = _zeros(weights, checks[-1] + 1, N)  # u, q_1, q_2, ...
    projected = _zeros(weights, checks[-1], checks[-1])
    basis[..., 0, :] = root / _length(root)
    w = r / _length(r) + noise
    w = w - _times(_times(w, _t(basis[..., :1, :])), basis[..., :1, :])
    length, best, spread = _length(w), None, None
    for k in range(1, checks[-1] + 1):
        basis[..., k, :] = q = w * ((length > precision.nothing) / (length + TINY))
        known = basis[..., : k + 1, :]
        across = _t(known)
        w = _times(q * r, weights) * r
        h = _times(w, across)  # (..., k + 1)
        projected[..., k - 1, :k] = h[..., 1:]  # the lower triangle, which is all that eigh looks at
        w = w - _times(h, known)
        length = _length(w)
        if batched or length < LITTLE:
            w = w - _times(_times(w, across), known)
            length = _length(w)
        if spread is None:
            spread = length
        if k in checks:
            now, over = _ritz(projected[..., :k, :k], known[..., 1:, :], length, spread, precision)
            best = now if best is None else _first_sure(best, now)
            if bool((best.sure | over).all()):
                break
    assert best is not None
    return Ritz(best.value, best.vector * r, best.gap, best.spread, best.sure)


def _ritz(projected: Array, basis: Array, length: Array, spread: Array, precision: Precision) -> tuple[Ritz, Array]:
    """The best pair in the space so far, its vector z; and whether more steps in this float type would bring nothing.

    projected: (..., k, k).  basis: (..., k, N).  length, spread: of what the last and the first step left over.
    """
    values, s = (np.linalg if isinstance(projected, np.ndarray) else torch.linalg).eigh(projected)
    top = values[..., -1:]
    gap = top - values[..., -2:-1]
    residual = length * abs(s[..., -1, -1:])
    near = (residual <= precision.tolerance * gap) & ((residual <= precision.faint) | (1 - top >= FALLS_APART))
    sure = near & (gap >= precision.gap)
    return Ritz(top, _times(s[..., -1], basis), gap, spread, sure), near | (residual <= precision.rounding)


def _first_sure(before: Ritz, now: Ritz) -> Ritz:
    """Per image: what was sure before stays, so that an image's result does not depend on the others."""
    if isinstance(before.vector, np.ndarray):
        return now  # one image: its first sure check was its last
    old = before.sure
    return Ritz(
        torch.where(old, before.value, now.value),
        torch.where(old, before.vector, now.vector),
        torch.where(old, before.gap, now.gap),
        now.spread,
        old | now.sure,
    )


def _times(row: Array, matrix: Array) -> Array:
    """(m,) times (m, n), or (B, m) times (B, m, n)."""
    return row @ matrix if row.ndim == 1 else (row[:, None] @ matrix)[:, 0]


def _t(x: Array) -> Array:
    return x.swapaxes(-1, -2)


def _length(row: Array) -> Array:
    """A number, or (B, 1)."""
    return float(row @ row) ** 0.5 if row.ndim == 1 else torch.linalg.vector_norm(row, dim=1, keepdim=True)


def _zeros(like: Array, rows: int, columns: int) -> Array:
    shape = (*like.shape[:-2], rows, columns)
    return np.zeros(shape, like.dtype) if isinstance(like, np.ndarray) else like.new_zeros(shape)


def _rows_like(weights: Array) -> tuple[Array, Array]:
    """Noise of length NOISE, about, and ones: (N,), or (B, N) of a batch."""
    noise, ones = _rows(weights.shape[-1], weights.dtype)
    if isinstance(weights, np.ndarray):
        return noise, ones
    return noise.to(weights.device), ones.to(weights.device).expand(len(weights), -1)


@lru_cache(maxsize=16)
def _rows(N: int, dtype: Any) -> tuple[Array, Array]:
    """Noise and ones of a float type of numpy's or torch's, (N,) each."""
    noise = NOISE / N**0.5 * torch.randn(N, generator=chance.generator(0, "lanczos", N), dtype=torch.float64)
    if isinstance(dtype, torch.dtype):
        return noise.to(dtype), torch.ones(N, dtype=dtype)
    return noise.numpy().astype(dtype), np.ones(N, dtype)
