"""What source classes have to do with target classes: the table p(s | t) of Co-Tuning.

    direct    p(s | t) = mean over images of class t of softmax(z)_s        z: the source's logits
    learned   p(t | s) of a regression from the source's probabilities to the target class, turned by Bayes' rule

You et al., 2020 (NeurIPS), section 3.2; the paper uses the learned one. Both come from training images that are not
augmented, once, before tuning.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from foveal.chance import generator

STRENGTHS = (1e4, 3e3, 1e3, 3e2, 1e2, 3e1, 1e1, 3e0, 1e0, 3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)  # C, tried
TABLES = ("direct", "learned")
HELD_OUT = 0.2  # share of each class, where no validation images are given
SCALES = (1e-2, 1e2)  # of the calibration: where every validation image is right, the best would be infinite
ROUNDS = 1000


def relate(
    logits: Tensor,
    labels: Tensor,
    classes: int,
    table: str = "direct",
    *,
    val: tuple[Tensor, Tensor] | None = None,
    scale: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """The table p(s | t), (C, S) float64, rows with sum 1.

    logits: (N, S) of the source.  labels: (N,) target classes.  classes: C.  table: "direct" or "learned".
    scale: of the logits, the source's calibration (the authors use 0.884 for their ResNet-50).
    val: logits and labels to choose and calibrate the regression by; None holds a fifth of each class out, by `seed`.
    Raises ValueError for an unknown table, labels that do not fit, or a class without an image.
    """
    if table not in TABLES:
        raise ValueError(f"table={table!r} is not known; use {' or '.join(TABLES)}")
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale={scale}: logits are multiplied by a number above 0")
    shares, labels = _checked(logits, labels, classes, scale)
    if table == "direct":
        return direct_table(shares, labels, classes)
    if val is None:
        held = _held_out(labels, classes, seed)
        return learned_table(shares[~held], labels[~held], shares[held], labels[held], classes)
    return learned_table(shares, labels, *_checked(*val, classes, scale), classes)


def direct_table(shares: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mean of the source's probabilities over the images of each class. shares: (N, S).  labels: (N,).

    Returns (C, S), rows with sum 1. Raises ValueError for a class without an image.
    """
    sizes = _class_sizes(labels, classes)
    sums = shares.new_zeros(classes, shares.shape[1]).index_add_(0, labels, shares)
    return sums / sizes[:, None]


def learned_table(shares: Tensor, labels: Tensor, val_shares: Tensor, val_labels: Tensor, classes: int) -> Tensor:
    """The paper's table: (C, S), rows with sum 1.

    A multinomial regression without intercept from the source's probabilities to the class, its C the best on the
    validation images of 17 (the largest of equals); its logits are calibrated by one scale a there. A source class
    alone, as input, gives p(t | s) = softmax_t(a W_ts); then p(s | t) = p(t | s) p(s) / sum, p(s) the mean over all
    images. shares, val_shares: (N, S), (M, S) probabilities.  labels, val_labels: (N,), (M,).
    Raises ValueError for a class without a training image, or no validation images.
    """
    _class_sizes(labels, classes)
    if not len(val_labels):
        raise ValueError("no validation images to choose the regression by: give val, or more images per class")
    best, hits = None, -1
    for strength in STRENGTHS:
        weight = _regression(shares, labels, classes, strength)
        right = int(((val_shares @ weight.T).argmax(1) == val_labels).sum())
        if right > hits:
            best, hits = weight, right
    assert best is not None
    given = (best * calibration(val_shares @ best.T, val_labels)).softmax(0)  # p(t | s), (C, S)
    joint = given * torch.cat([shares, val_shares]).mean(0)
    return joint / joint.sum(1, keepdim=True)


def calibration(logits: Tensor, labels: Tensor) -> float:
    """The factor in [0.01, 100] that makes the cross-entropy of the logits (N, C) smallest."""
    from scipy.optimize import minimize_scalar

    def loss(log: float) -> float:
        return float(F.cross_entropy(logits * torch.tensor(log, dtype=logits.dtype).exp(), labels))

    bounds = torch.tensor(SCALES, dtype=torch.float64).log().tolist()
    found: Any = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-8})
    return float(torch.tensor(float(found.x), dtype=torch.float64).exp())


def _regression(shares: Tensor, labels: Tensor, classes: int, strength: float) -> Tensor:
    """W (C, S) float64."""
    from sklearn.linear_model import LogisticRegression

    # of two classes scikit-learn fits one row w, the difference of ours, w/2 and -w/2: half the penalty for the same
    two = classes == 2
    model: Any = LogisticRegression(C=2 * strength if two else strength, fit_intercept=False, max_iter=ROUNDS)
    model.fit(shares.numpy(), labels.numpy())
    rows = torch.from_numpy(model.coef_)
    return torch.cat([-rows, rows]) / 2 if two else rows


def _checked(logits: Tensor, labels: Tensor, classes: int, scale: float) -> tuple[Tensor, Tensor]:
    """Probabilities (N, S) float64 and labels (N,) int64, on the CPU."""
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}: give (N, S) and (N,)")
    if classes < 2:
        raise ValueError(f"classes={classes}: a table relates two target classes or more")
    logits, labels = logits.detach().cpu().double(), labels.detach().cpu().long()
    if not logits.isfinite().all():
        raise ValueError("the source's logits are not all finite numbers")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels from {int(labels.min())} to {int(labels.max())} but classes={classes}")
    return (logits * scale).softmax(1), labels


def _class_sizes(labels: Tensor, classes: int) -> Tensor:
    sizes = torch.bincount(labels, minlength=classes)
    if not sizes.all():
        empty = (sizes == 0).nonzero().flatten().tolist()
        raise ValueError(
            f"no training image of class {', '.join(map(str, empty[:5]))}: its row of the table is unknown"
        )
    return sizes


def _held_out(labels: Tensor, classes: int, seed: int) -> Tensor:
    """(N,) bool: a fifth of each class, rounded up, but never its last image."""
    rng = generator(seed, "co_tuning")
    held = torch.zeros(len(labels), dtype=torch.bool)
    for c in range(classes):
        there = (labels == c).nonzero().flatten()
        number = min(-int(-len(there) * HELD_OUT // 1), len(there) - 1)
        if number > 0:
            held[there[torch.randperm(len(there), generator=rng)[:number]]] = True
    return held
