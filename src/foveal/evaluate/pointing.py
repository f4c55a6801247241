"""Energy-based pointing game: the share of a model's attention that falls on the object.

    share = sum_n a_n m_n / sum_n a_n        m_n: share of patch n's area that is object      Wang et al., 2020

Uniform attention scores the object's share of the image: compare with that, not with 0.
"""

import torch
from torch import Tensor

from foveal.maps.found import overlaps


def energy_share(attn: Tensor, masks: Tensor) -> Tensor:
    """Share of attention on the object: (B,) float32 in [0, 1].

    attn: (B, h, w) non-negative, any scale, any float type; its grid spans the whole image.
    masks: (B, H, W) bool, or float in [0, 1], True on the object, in any size.
    A row of zeros has no preference and falls back to the object's share of the area; an image without object
    scores 0 (there is nothing to point at: leave such images out).
    Raises ValueError for shapes that do not fit and for negative or non-finite attention.
    """
    if attn.dim() != 3 or masks.dim() != 3 or len(attn) != len(masks):
        raise ValueError(f"attn {tuple(attn.shape)} and masks {tuple(masks.shape)} must be (B, h, w) and (B, H, W)")
    attn = attn.float()  # sums of half precision lose the third digit
    if not bool(((attn >= 0) & attn.isfinite()).all()):
        raise ValueError("attention must be finite and not negative: give probabilities, not logits")
    m = coverage(masks, (attn.shape[1], attn.shape[2]))
    mass = attn.sum((1, 2))
    share = (attn * m).sum((1, 2)) / mass.clamp_min(torch.finfo(attn.dtype).tiny)
    return torch.where(mass > 0, share, m.mean((1, 2)))


def coverage(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Share of each patch's area that is object. masks: (B, H, W).  Returns float32 (B, h, w) in [0, 1].

    Exact for any grid: where h does not divide H, a row of pixels is divided between the patches it lies in.
    """
    rows = overlaps(masks.shape[1], grid[0]).to(masks.device, torch.float32)
    columns = overlaps(masks.shape[2], grid[1]).to(masks.device, torch.float32)
    return rows @ masks.float() @ columns.T
