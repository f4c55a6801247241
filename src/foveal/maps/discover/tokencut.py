"""TokenCut: cut the patches in two where they look least alike; one side is the object.

    W_ij = 1 if cos(k_i, k_j) > tau else eps,   (D - W) y = lambda D y,   second smallest lambda
    side = y > mean(y),   seed = argmax |y|,   the seed's side is the object,   mask = its piece that holds the seed

Wang et al., 2022 (arXiv 2202.11539). sum_i d_i y_i = 0, so the seed lies on the side of the smaller sum of degrees: an
object that fills most of the picture is turned into its border. `inverted` says where a second opinion disagrees:

    corners     the seed's side has three or four of the grid's corners     (MaskCut's rule, for either sign of y)
    attention   the other side has more class attention per patch

B batch, N patches, D width, h x w grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from foveal.maps.discover.components import boxes_of, component_of, corners
from foveal.maps.discover.cut import Cut, normalised_cut
from foveal.maps.discover.discovered import Discovered
from foveal.maps.discover.graph import graph
from foveal.maps.found import found

Foreground = Literal["smaller", "corners", "attention"]
Variant = Literal["clipped", "eigenvector", "mask"]
CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 1 << 30}
"""Graphs held at once: on a CPU few enough for the cache, elsewhere enough to fill the device."""


@dataclass(frozen=True)
class Side:
    """Which side of a cut is the object."""

    eigenvector: Tensor  # (B, N) of the sign that makes the object's side positive, about
    side: Tensor  # (B, N) bool
    seed: Tensor  # (B,) its largest entry, which lies on the side
    inverted: Tensor  # (B,) bool: the second opinion disagrees with the seed's side


def tokencut(
    features: Tensor,
    grid: tuple[int, int],
    *,
    tau: float = 0.2,
    eps: float = 1e-5,
    binary: bool = True,
    foreground: Foreground = "smaller",
    attention: Tensor | None = None,
    variant: Variant = "clipped",
) -> Discovered:
    """The object of each image.

    features: (B, N, D) of the patches, row-major, any scale and float type; keys of the last block as published.
    grid: (h, w) with h w = N.  tau, eps, binary: see `graph`.
    foreground: `smaller`, as published: the seed's side, however inverted it looks; `corners` or `attention`: the
    other side where that opinion disagrees.  attention: (B, N) of the class token, for `attention`.
    variant: of the map. `clipped`: how far the eigenvector exceeds its mean, 0 on the other side; `eigenvector`: how
    far it exceeds its smallest value; `mask`: 1 on the object.

    The object is in `mask`, the cut in `eigenvector`, `eigenvalue` and `gap`. An image whose patches are all alike, or
    all different, is degenerate: no mask, a blank map.
    Raises ValueError for settings that are not known and shapes that do not fit.
    """
    h, w = checked_grid(features, grid)
    if variant not in get_args(Variant):
        raise ValueError(f"variant={variant!r} is not known; use one of {', '.join(get_args(Variant))}")
    cut = cut_features(features, tau, eps, binary)
    chosen = object_side(cut.vector, grid, foreground, attention)
    live = ~cut.degenerate
    side, seed = chosen.side & live[:, None], chosen.seed.masked_fill(cut.degenerate, -1)
    mask = component_of(side.unflatten(1, grid), seed)
    y = chosen.eigenvector
    if variant == "clipped":
        map = (y - y.mean(1, keepdim=True)).clamp_min(0)
    elif variant == "eigenvector":
        map = y - y.amin(1, keepdim=True)
    else:
        map = mask.flatten(1).float()
    base = found(map.masked_fill(cut.degenerate[:, None], 0).view(-1, h, w))
    return Discovered(
        map=base.map,
        blank=base.blank,
        mask=mask,
        boxes=boxes_of(mask),
        seed=seed,
        degenerate=cut.degenerate,
        inverted=chosen.inverted & live,
        eigenvector=y.float().view(-1, h, w),
        eigenvalue=cut.eigenvalue.float(),
        gap=cut.gap.float(),
    )


def cut_features(features: Tensor, tau: float = 0.2, eps: float = 1e-5, binary: bool = True) -> Cut:
    """The normalised cut of each image's graph, a chunk of images at a time. features: (B, N, D)."""
    B, N, _ = features.shape
    budget = CHUNK_BYTES.get(features.device.type, CHUNK_BYTES["cuda"])
    images = max(1, budget // (4 * N * N))
    cuts = [normalised_cut(graph(features[i : i + images], tau, eps, binary)) for i in range(0, max(B, 1), images)]
    return cuts[0] if len(cuts) == 1 else Cut(*(torch.cat([getattr(c, f) for c in cuts]) for f in Cut.__annotations__))


def object_side(
    vector: Tensor, grid: tuple[int, int], foreground: Foreground = "smaller", attention: Tensor | None = None
) -> Side:
    """Which side of each cut is the object; see above. vector: (B, N) of any sign, on the grid (h, w)."""
    check_foreground(foreground)
    above = vector > vector.mean(1, keepdim=True)
    seed = vector.abs().argmax(1, keepdim=True)
    flip = ~above.gather(1, seed)
    y, side = torch.where(flip, -vector, vector), above ^ flip
    if foreground == "attention":
        if attention is None or attention.shape != vector.shape:
            shape = None if attention is None else tuple(attention.shape)
            raise ValueError(f"foreground='attention' needs the attention of each patch, (B, N), and got {shape}")
        inverted = _mean_on(attention, side) < _mean_on(attention, ~side)
    else:
        inverted = corners(side.unflatten(1, grid)) >= 3
    if foreground == "smaller":
        return Side(y, side, seed[:, 0], inverted)
    y, side = torch.where(inverted[:, None], -y, y), side ^ inverted[:, None]
    return Side(y, side, y.argmax(1), inverted)


def check_foreground(foreground: str) -> None:
    """Raise ValueError for a rule that is not known."""
    if foreground not in get_args(Foreground):
        raise ValueError(f"foreground={foreground!r} is not known; use one of {', '.join(get_args(Foreground))}")


def _mean_on(values: Tensor, side: Tensor) -> Tensor:
    return (values.float() * side).sum(1) / side.sum(1)


def checked_grid(features: Tensor, grid: tuple[int, int]) -> tuple[int, int]:
    """(h, w), if features (B, N, D) fill it."""
    h, w = grid
    if features.dim() != 3 or features.shape[1] != h * w:
        raise ValueError(
            f"features of shape {tuple(features.shape)} do not fill a {h} x {w} grid: (B, h w, D) is needed"
        )
    return h, w
