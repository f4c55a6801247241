"""The normalised cut of a graph: the second smallest eigenvector.

    (D - W) y = lambda D y,   lambda_1 = 0 <= lambda_2 <= ...,   y' D y = 1        Shi & Malik, 2000

y = D^-1/2 z where z belongs to the second largest eigenvalue 1 - lambda of D^-1/2 W D^-1/2; the largest is known, so it
is projected out and Lanczos takes few steps for the next (`lanczos`). What float32 cannot tell goes to float64 on the
CPU, and what does not converge there to a dense solver. Forgetting D (the eigenvectors of D - W) is another cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from foveal.maps.discover.exactly import exactly
from foveal.maps.discover.lanczos import FLOAT64, Array, Ritz, lanczos

COINCIDE = 1e-6  # eigenvalues that differ by less are one
SMALL = 16  # patches up to which the dense solver is as fast


@dataclass(frozen=True)
class Cut:
    """Second eigenvectors of a batch, on the device of the graphs."""

    vector: Tensor  # (B, N) y, of either sign; zero where degenerate
    eigenvalue: Tensor  # (B,) lambda_2 in [0, 2]
    gap: Tensor  # (B,) lambda_3 - lambda_2, at most: small means two cuts that are about as good
    degenerate: Tensor  # (B,) bool: all eigenvalues but the first coincide, so that any vector would do


def normalised_cut(weights: Tensor) -> Cut:
    """The second eigenvector of each graph.

    weights: (B, N, N) float32 or float64, symmetric, rows with a positive sum. An eigenvalue that occurs twice exactly
    has no vector of its own: one of its plane is given, always the same.
    Raises ValueError for another shape and for graphs of one patch.
    """
    shape, on_cpu = weights.shape, weights.device.type == "cpu"
    if len(shape) != 3 or shape[1] != shape[2] or shape[1] < 2:
        raise ValueError(f"weights of shape {tuple(shape)}: (B, N, N) of two or more patches is needed")
    weights = weights.detach()
    if on_cpu or weights.dtype != torch.float32 or shape[1] <= SMALL:
        cut = _one_by_one(weights.cpu().numpy())
        return cut if on_cpu else Cut(*(part.to(weights.device) for part in vars(cut).values()))
    return _at_once(weights)


def _one_by_one(weights: Array) -> Cut:
    """Each image with its graph in the cache. weights: (B, N, N) numpy."""
    B, N, _ = weights.shape
    vector, degenerate = np.empty((B, N), weights.dtype), np.empty(B, np.bool_)
    eigenvalue, gap = np.empty(B, weights.dtype), np.empty(B, weights.dtype)
    for i, graph in enumerate(weights):
        found = _in_float32(graph) if graph.dtype == np.float32 else None
        found = _in_float64(graph.astype(np.float64)) if found is None else found
        theta, gap[i] = float(found.value[0]), found.gap[0]
        degenerate[i] = no_cut = _coincide(theta, found.spread, N)
        vector[i] = 0 if no_cut else found.vector
        eigenvalue[i] = abs(1 - theta)  # exceeds 1 by rounding only
    return Cut(*(torch.from_numpy(part) for part in (vector, eigenvalue, gap, degenerate)))


def _at_once(weights: Tensor) -> Cut:
    """A batch on its device; images that need more than float32 on the CPU. weights: (B, N, N) float32."""
    with exactly(weights):
        found = lanczos(weights)
    degenerate = _coincide(found.value, found.spread, weights.shape[1])  # (B, 1)
    cut = Cut(found.vector.masked_fill(degenerate, 0), (1 - found.value[:, 0]).abs(), found.gap[:, 0], degenerate[:, 0])
    for i in (~found.sure & ~degenerate)[:, 0].nonzero().flatten().tolist():
        exact = _one_by_one(weights[i : i + 1].cpu().numpy().astype(np.float64))
        for name, part in vars(cut).items():
            part[i] = getattr(exact, name)[0].to(part)
    return cut


def _coincide(theta: Array, spread: Array, N: int) -> Array:
    """Do all eigenvalues but the first coincide? Of two patches there is one, which prefers a cut unless it is 0."""
    return (theta < COINCIDE) | ((spread <= COINCIDE) & (N > 2))


def _in_float32(weights: Array) -> Ritz | None:
    """weights: (N, N) numpy. None where it does not converge."""
    if len(weights) <= SMALL:
        return None
    found = lanczos(weights)
    return found if found.sure or _coincide(float(found.value[0]), found.spread, len(weights)) else None


def _in_float64(weights: Array) -> Ritz:
    """weights: (N, N) numpy."""
    if len(weights) > SMALL:
        found = lanczos(weights, FLOAT64)
        if found.sure or found.spread <= COINCIDE:
            return found
    r = weights.sum(-1) ** -0.5
    values, z = np.linalg.eigh(weights * r * r[:, None])
    gap = values[-2:-1] - values[-3:-2] if len(values) > 2 else np.array([np.inf])  # of two patches there is one cut
    return Ritz(values[-2:-1], z[:, -2] * r, gap, float(values[-2] - values[0]), np.True_)
