"""DINO's mass mask: the patches that hold most of the class token's attention.

    sort a_n / sum a ascending;  keep n while the cumulative sum up to and with n exceeds 1 - m        m = 0.6

Caron et al., 2021 (arXiv 2104.14294); the box around its largest piece is LOST's baseline DINO-seg. The release looks
for the largest piece among all but the last and, where there is one only, takes the background; here it is among all.

B batch, N patches, h x w grid.
"""

from __future__ import annotations

from torch import Tensor

from foveal.attention.rows import widen
from foveal.maps.discover.components import boxes_of, corners, largest_component
from foveal.maps.discover.discovered import Discovered
from foveal.maps.found import found


def mass_mask(attn: Tensor, keep: float = 0.6) -> Tensor:
    """The patches that together hold about the share `keep` of the attention: (..., N) bool, of attn (..., N).

    attn: zero or more, any scale; the sum is over its patches. The patch that crosses the line is kept, so that no less
    than about `keep` is. Of equal ones the first in order are left out. None of a row that is zero.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep} is a share of the attention: use a value in (0, 1], such as 0.6")
    mass, order = widen(attn).sort(dim=-1, stable=True)
    kept = (mass / mass.sum(-1, keepdim=True)).cumsum(-1) > 1 - keep
    return kept.gather(-1, order.argsort(-1))


def dino_mass(attn: Tensor, grid: tuple[int, int], *, keep: float = 0.6) -> Discovered:
    """The largest piece of the mass mask; the map is the attention itself.

    attn: (B, N) of one head, or a mean over heads; row-major, zero or more.  grid: (h, w) with h w = N.
    The seed is the patch of most attention, in that piece or not. `inverted`: the piece has three or four of the grid's
    corners. Attention that is the same everywhere is degenerate.
    """
    h, w = grid
    if attn.dim() != 2 or attn.shape[1] != h * w:
        raise ValueError(f"attention of shape {tuple(attn.shape)} does not fill a {h} x {w} grid: (B, h w) is needed")
    base = found(attn.reshape(-1, h, w))
    mask = largest_component(mass_mask(attn.detach(), keep).view(-1, h, w) & ~base.blank[:, None, None])
    return Discovered(
        map=base.map,
        blank=base.blank,
        mask=mask,
        boxes=boxes_of(mask),
        seed=attn.argmax(1).masked_fill(base.blank, -1),
        degenerate=base.blank,
        inverted=corners(mask) >= 3,
    )
