"""Who gives to whom: the pairs that gain the most saliency, every donor at most once.

    C_ij = sum_t max(S_jt - S_it - rho, 0)        maximise sum_{i easy} C_{i,sigma(i)} over injective sigma

    C_ij = 1/2 ( sum_t |D_jt - S_it| + sum_t D_jt - sum_t S_it ),  D = max(S - rho, 0)        as 2 max(x, 0) = |x| + x

Choi et al., 2022 (TokenMixup, arXiv 2210.07562), equations 6 and 7. The second form is one pairwise L1 distance: no
tensor of (B, B, N). Only what exceeds rho can be gained by an S of 0 or more, so that no sum is larger than S's own.
The assignment is exact, by scipy's shortest augmenting paths on the CPU, the one place where a training step waits for
the device.

B batch, N patches.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

PREPARED = 192  # rows from which preparing the problem pays


def pair_scores(saliency: Tensor, rho: float) -> Tensor:
    """C: what image i (row) would gain in saliency from image j (column), (B, B) >= 0 in float32.

    saliency: (B, N), 0 or more; float64 stays so.  rho: least gain of a token, 0 or more, so that the diagonal is 0.
    Rows that nothing can improve are exactly 0.
    """
    S = saliency if saliency.dtype == torch.float64 else saliency.float()
    D = (S - rho).clamp_min(0)
    scores = ((torch.cdist(S, D, p=1.0) + D.sum(-1)[None, :] - S.sum(-1)[:, None]) / 2).clamp_min(0)
    return scores * improvable(S, rho)[:, None]  # the difference of sums above leaves 1e-7 where there is nothing


def improvable(saliency: Tensor, rho: float) -> Tensor:
    """Images of which at least one token could be replaced by a more salient one: (B,) bool. saliency: (B, N)."""
    return (saliency.amax(0) - saliency - rho > 0).any(-1)


def assign(scores: Tensor, easy: Tensor) -> tuple[Tensor, bool]:
    """The best partner of every easy image, no partner twice: (B,) int64, on the device of the scores.

    scores: (B, B) >= 0.  easy: (B,) bool; the others are their own partners.  Also says, on the host, whether anything
    is gained at all. Among equally good assignments any is returned. Scores that are not numbers, of a model that
    diverges, gain nothing: its loss will tell.
    """
    B = len(scores)
    host = torch.cat([scores, easy[:, None].to(scores.dtype)], dim=1).cpu().double().numpy()  # one transfer
    C, wanted = host[:, :B], np.flatnonzero(host[:, B])
    partner = np.arange(B)
    gains = bool(C[wanted].any() and np.isfinite(C[wanted]).all())
    if gains:
        partner[wanted] = _solve(scores, C, wanted)
    return torch.from_numpy(partner).to(scores.device, non_blocking=True), gains


def _solve(scores: Tensor, C: Any, wanted: Any) -> Any:
    """The column of each wanted row. scores: on the device, C: the same on the host in float64."""
    B, rows = len(C), len(wanted)
    if rows < PREPARED or 4 * rows < 3 * B:
        return linear_sum_assignment(C[wanted], maximize=True)[1]
    # Subtracting a number from a row or a column of a square problem does not change which assignment is best, but with
    # good numbers nearly every row finds its column at once: 5 to 15 times faster at B = 1024
    C[np.setdiff1d(np.arange(B), wanted)] = 0.0
    u, v = (part.cpu().double().numpy() for part in prices(scores, torch.from_numpy(C.any(1))))
    return linear_sum_assignment(u[:, None] + v[None, :] - C)[1][wanted]


def prices(scores: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Nearly the dual prices u_i + v_j >= C_ij of the assignment, by entropic scaling on the device: two times (B,).

    scores: (B, B).  rows: (B,) bool, the others count as zero.
    """
    C = scores * rows.to(scores.device)[:, None]
    unit = C.std()
    u, v = C.new_zeros(len(C)), C.new_zeros(len(C))
    for softness in (0.3, 0.1, 0.1, 0.03, 0.03):
        eps = (unit * softness).clamp_min(torch.finfo(C.dtype).tiny)
        u = eps * torch.logsumexp((C - v[None, :]) / eps, 1)
        v = eps * torch.logsumexp((C - u[:, None]) / eps, 0)
    return u, v
