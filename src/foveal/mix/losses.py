"""Losses of mixed labels: per sample first, then the mean over the batch.

    soft cross-entropy = 1/B sum_i - sum_c t_ic log softmax(z_i)_c
    paired             = 1/B sum_i [ own_i l(z_i, y_i) + partner_i l(z_i, y_perm(i)) ]

For a loss that is linear in the target (cross-entropy is) both are the same number. Weighing the batch mean instead of
each sample's own loss is a bug that has been published more than once: it is right only when all weights are equal.

B batch, C classes. Sums are in float32 or wider: a bfloat16 sum over 1000 classes keeps two digits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.mix.mixed import LabelWeights


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with soft targets, mean over the batch: a scalar.

    logits, targets: (B, C); target rows need not sum to 1.
    """
    logits = _wide(_same_shape(logits, targets))
    return -(targets * logits.log_softmax(-1)).sum(-1).mean()


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """One sigmoid per class, mean over classes and batch: a scalar. logits, targets: (B, C), targets in [0, 1]."""
    logits = _wide(_same_shape(logits, targets))
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))


def softmax_binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of the softmax, mean over classes and batch: a scalar. logits, targets: (B, C).

    What the released code of Manifold Mixup trains on; about 1/C of the soft cross-entropy.
    """
    logp = _wide(_same_shape(logits, targets)).log_softmax(-1)
    rest = (-logp.expm1()).clamp_min(torch.finfo(logp.dtype).tiny).log()
    return -(targets * logp + (1.0 - targets) * rest).mean()


def paired(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor, weights: LabelWeights) -> Tensor:
    """Any loss of plain labels, under mixed ones: a scalar.

    loss: (logits, labels) -> (B,), one value per sample.  labels: whatever `loss` takes, first dimension B.
    Raises ValueError for a loss that has averaged already.
    """
    logits = _wide(logits)
    first, second = loss(logits, labels), loss(logits, labels[weights.perm])
    if first.shape != weights.own.shape:
        raise ValueError(
            f"the loss gave shape {tuple(first.shape)} for {len(weights.own)} samples: it must give one value per "
            "sample (reduction='none'), or weights meet the wrong samples"
        )
    return (weights.own * first + weights.partner * second).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": soft_cross_entropy,
    "bce": binary_cross_entropy,
    "softmax_bce": softmax_binary_cross_entropy,
}


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _same_shape(logits: Tensor, targets: Tensor) -> Tensor:
    if logits.shape != targets.shape or logits.dim() != 2:
        raise ValueError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} must both be (B, C)")
    return logits
