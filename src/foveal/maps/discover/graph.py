"""Which patches look alike: the graph that TokenCut and MaskCut cut in two.

    W_ij = 1 if cos(f_i, f_j) > tau else eps                          binary, as published
    W_ij = cos(f_i, f_j) if cos(f_i, f_j) >= tau else eps             weighted, an ablation; no less than eps

Wang et al., 2022 (arXiv 2202.11539). The threshold is strict, so the diagonal is 1 (of a zero vector: eps), and through
eps every patch is joined to every other. Cosines within rounding of tau may fall on either side on another machine.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from foveal.attention.rows import widen
from foveal.maps.discover.exactly import exactly


def graph(features: Tensor, tau: float = 0.2, eps: float = 1e-5, binary: bool = True) -> Tensor:
    """Weights (B, N, N) between patches, in float32 (float64 for float64 features). Symmetric, above 0.

    features: (B, N, D), any scale: each is divided by its length. tau: in [-1, 1), from 0 on for a weighted graph.
    A feature that is not finite resembles nothing. Raises ValueError for settings or a shape that make no graph.
    """
    check_settings(tau, eps, binary)
    if features.dim() != 3:
        raise ValueError(f"features of shape {tuple(features.shape)}: (B, N, D), a vector per patch, is needed")
    x = F.normalize(widen(features.detach()), dim=-1)
    with exactly(x):
        cosine = x @ x.mT
    if binary:
        return (cosine > tau).to(x.dtype).clamp_min_(eps)
    return cosine.masked_fill_(~(cosine >= tau), eps).clamp_min_(eps)  # `not at least` also holds for NaN


def check_settings(tau: float, eps: float, binary: bool = True) -> None:
    """Raise ValueError for settings that make no graph."""
    if not -1 <= tau < 1:
        raise ValueError(f"tau={tau} is compared with cosines: use a value in [-1, 1), such as 0.2")
    if not 0 < eps < 1:
        raise ValueError(f"eps={eps} joins patches that do not look alike: use a small value above 0, such as 1e-5")
    if not binary and tau < 0:
        raise ValueError(f"tau={tau} would leave negative weights in a graph that is not binary: use tau from 0 on")
