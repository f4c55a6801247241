"""Accuracy, and balanced accuracy: the mean over classes of the accuracy within each.

accuracy = mean_i [argmax_c logits_ic = y_i]
balanced = mean_{c present} mean_{i: y_i = c} [argmax logits_i = c]
"""

import torch
from torch import Tensor


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """logits: (N, C).  labels: (N,) int64.  Returns (N,) bool; a row with a NaN is wrong, whatever its label."""
    if len(logits) != len(labels):
        raise ValueError(f"{len(logits)} rows of logits but {len(labels)} labels")
    return (logits.argmax(-1) == labels) & ~logits.isnan().any(-1)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is that of their label, in [0, 1]. Raises ValueError for none."""
    some(labels)
    return float(correct(logits, labels).double().mean())


def balanced_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Mean over the classes that occur in labels of their accuracy, in [0, 1]. Raises ValueError for none."""
    return mean_over_classes(correct(logits, labels), labels)


def mean_over_classes(right: Tensor, labels: Tensor) -> float:
    """Mean over the classes that occur of the share that is right within each. right: (N,) bool."""
    some(labels)
    sizes = torch.bincount(labels)
    sums = torch.zeros(len(sizes), dtype=torch.float64, device=labels.device).index_add_(0, labels, right.double())
    return float((sums / sizes)[sizes > 0].mean())


def some(labels: Tensor) -> None:
    """Raise ValueError where there is no image to measure."""
    if len(labels) == 0:
        raise ValueError("there are no images to average over")
