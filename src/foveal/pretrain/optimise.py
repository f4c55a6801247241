"""MAE's learning rate and parameter groups.

    lr(e) = peak e / w  for e < w,  else  min + (peak - min) / 2 (1 + cos(pi (e - w) / (E - w)))        He et al., 2022

e counts epochs with fractions and is set at every iteration; peak = base x batch / 256.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn


def mae_rate(epoch_fraction: float, epochs: float, warmup: float, peak: float, minimum: float = 0.0) -> float:
    """Learning rate at a fractional epoch: linear from 0 over the warm-up, then half a cosine down to `minimum`.

    Raises ValueError for a warm-up that leaves no epoch after it.
    """
    if not 0 <= warmup < epochs:
        raise ValueError(f"warmup={warmup} of {epochs} epochs: use at least 0 and fewer than all of them")
    if epoch_fraction < warmup:
        return peak * epoch_fraction / warmup
    done = (epoch_fraction - warmup) / (epochs - warmup)
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * done))


def peak_rate(base: float, batch: int) -> float:
    """Peak learning rate for a batch of `batch` images over all devices and accumulated steps: base x batch / 256."""
    return base * batch / 256


def parameter_groups(model: nn.Module, weight_decay: float = 0.05) -> list[dict[str, Any]]:
    """AdamW's groups: what has more than one dimension is decayed, biases and norms are not; frozen ones are left out.

    Class, register and mask tokens have three dimensions and are decayed, as in MAE. Learnt rotary frequencies are not.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if p.dim() > 1 and not name.endswith("rope.freqs")]
    chosen = {id(p) for p in decayed}
    spared = [p for _, p in named if id(p) not in chosen]
    return [{"params": spared, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]
