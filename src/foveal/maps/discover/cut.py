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
    if weights.dim() != 3 or weights.shape[1] != weights.shape[2] or weights.shape[1] < 2:
        raise ValueError(f"weights of shape {tuple(weights.shape)}: (B, N, N) of two or more patches is needed")
    weights = weights.detach()
    if weights.device.type == "cpu" or weights.dtype != torch.float32 or weights.shape[1] <= SMALL:
        return Cut(*(torch.from_numpy(x).to(weights.device) for x in _cut(*_one_by_one(weights.cpu().numpy()))))
    return Cut(*_cut(*_at_once(weights)))


def _cut(vector: Array, numbers: Array) -> tuple[Array, Array, Array, Array]:
    """The fields of Cut. vector: (B, N).  numbers: (B, 3) theta, gap, spread. numpy or torch."""
    value, gap, spread = numbers[:, 0], numbers[:, 1], numbers[:, 2]
    degenerate = value < COINCIDE
    if vector.shape[1] > 2:  # of two patches there is one eigenvalue, which coincides with itself
        degenerate = degenerate | (spread <= COINCIDE)
    return vector * ~degenerate[:, None], (1 - value).clip(0, 2), gap, degenerate


def _one_by_one(weights: Array) -> tuple[Array, Array]:
    """Each image with its graph in the cache. weights: (B, N, N) numpy.  Returns vectors (B, N), numbers (B, 3)."""
    vector = np.empty(weights.shape[:2], weights.dtype)
    numbers = np.empty((len(weights), 3), weights.dtype)
    for i, graph in enumerate(weights):
        found = _in_float32(graph) if graph.dtype == np.float32 else None
        found = _in_float64(graph.astype(np.float64)) if found is None else found
        vector[i], numbers[i] = found.vector[0], (found.value, found.gap, found.spread)
    return vector, numbers


def _at_once(weights: Tensor) -> tuple[Array, Array]:
    """A batch on its device; images that need more than float32 on the CPU. weights: (B, N, N) float32."""
    with exactly(weights):
        found = lanczos(weights)
    vector, numbers = found.vector[:, 0], torch.stack([found.value, found.gap, found.spread], 1)
    for i in (~found.sure & (found.spread > COINCIDE)).nonzero().flatten().tolist():
        exact = _in_float64(weights[i].cpu().numpy().astype(np.float64))
        vector[i] = torch.from_numpy(exact.vector[0]).to(vector)
        numbers[i] = torch.tensor([float(x) for x in (exact.value, exact.gap, exact.spread)])
    return vector, numbers


def _in_float32(weights: Array) -> Ritz | None:
    """weights: (N, N) numpy. None where it does not converge."""
    if len(weights) <= SMALL:
        return None
    found = lanczos(weights)
    return found if found.sure or found.spread <= COINCIDE else None


def _in_float64(weights: Array) -> Ritz:
    """weights: (N, N) numpy."""
    if len(weights) > SMALL:
        found = lanczos(weights, FLOAT64)
        if found.sure or found.spread <= COINCIDE:
            return found
    r = weights.sum(-1) ** -0.5
    values, z = np.linalg.eigh(weights * r * r[:, None])
    gap = values[-2] - values[-3] if len(values) > 2 else np.inf  # of two patches there is no other cut
    return Ritz(values[-2], z[:, -2] * r[None], gap, values[-2] - values[0], np.True_)
