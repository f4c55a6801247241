"""What a mixer returns: mixed images, and the weights that mix their labels.

    targets = W_k ... W_1 Y        accuracy = 1/B sum_ij W_ij [pred_i = y_j]

Y holds one row per image and W = W_k ... W_1 is (B, B). One mixer gives one factor; mixers on top of each other (an
image mixer, then a token mixer) multiply. A factor has two entries per row, so it is kept as two weights and an index.

B batch, C classes, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LabelWeights:
    """One factor W: row i has `own[i]` on the diagonal and `partner[i]` in column `perm[i]`.

    The two usually sum to 1, but need not: some mixers give away less label than they paste.
    """

    own: Tensor  # (B,) float32
    perm: Tensor  # (B,) int64
    partner: Tensor  # (B,) float32

    def mix(self, rows: Tensor) -> Tensor:
        """W times the rows: (B, C) to (B, C)."""
        own, partner = self.own.to(rows.dtype), self.partner.to(rows.dtype)
        return own[:, None] * rows + partner[:, None] * rows[self.perm]


@dataclass(frozen=True)
class Mixed:
    """A mixed batch. How its labels are mixed is in `factors`, applied first to last."""

    images: Tensor  # (B, channels, H, W)
    perm: Tensor  # (B,) int64, partner of each image
    keep: Tensor  # (B, 1, H, W) float32 in [0, 1], share of each pixel that is the first image
    factors: tuple[LabelWeights, ...]
    # what can still be seen of the two images, each in its own frame; None where nothing was moved: keep and 1 - keep
    moved_own: Tensor | None = None  # (B, 1, H, W) float32 in [0, 1]
    moved_partner: Tensor | None = None  # (B, 1, H, W) float32 in [0, 1]

    @property
    def visible_own(self) -> Tensor:
        """Share of each pixel of the first image that can still be seen, in that image's frame: (B, 1, H, W)."""
        return self.keep if self.moved_own is None else self.moved_own

    @property
    def visible_partner(self) -> Tensor:
        """Share of each pixel of the partner that can be seen, in the partner's own frame: (B, 1, H, W)."""
        return 1.0 - self.keep if self.moved_partner is None else self.moved_partner

    def mix_labels(self, rows: Tensor) -> Tensor:
        """W_k ... W_1 times the rows: (B, C) to (B, C)."""
        for weights in self.factors:
            rows = weights.mix(rows)
        return rows

    def targets(
        self, labels: Tensor, num_classes: int | None = None, smoothing: float = 0.0, multi_label: bool = False
    ) -> Tensor:
        """Mixed targets (B, C). Arguments and errors as `label_rows`: smoothing comes before mixing."""
        return self.mix_labels(label_rows(labels, num_classes, smoothing, multi_label))

    def accuracy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Label weight of the predicted class, mean over the batch: a scalar.

        logits: (B, C).  labels: class indices (B,) or rows (B, C). Without mixing this is the usual accuracy.
        """
        rows = self.targets(labels, logits.shape[-1])
        return rows.gather(1, logits.argmax(-1, keepdim=True)).mean()


def label_rows(
    labels: Tensor, num_classes: int | None = None, smoothing: float = 0.0, multi_label: bool = False
) -> Tensor:
    """One row of class weights per image: (B, C), float32 (float64 rows stay so).

    labels: class indices (B,), or rows (B, C) that are soft labels or several labels at once.
    num_classes: C, needed for indices.  smoothing: s in [0, 1), share of the label spread evenly: on = 1 - s + s/C,
    off = s/C; with multi_label each entry moves towards 1/2 instead: t (1 - s) + s/2.
    Raises TypeError for indices that are not integers, ValueError for other shapes, sizes or smoothing.
    """
    if not 0.0 <= smoothing < 1.0:
        raise ValueError(f"smoothing={smoothing} but it is a share of the label: use a value in [0, 1)")
    if labels.dim() == 1:
        rows = _one_hot(labels, num_classes)
    elif labels.dim() == 2:
        if num_classes is not None and labels.shape[1] != num_classes:
            raise ValueError(f"labels have {labels.shape[1]} columns but there are {num_classes} classes")
        rows = labels if labels.dtype == torch.float64 else labels.float()
    else:
        raise ValueError(f"labels of shape {tuple(labels.shape)}: give class indices (B,) or rows (B, C)")
    if smoothing == 0.0:
        return rows
    return rows * (1.0 - smoothing) + smoothing * (0.5 if multi_label else 1.0 / rows.shape[1])


def _one_hot(labels: Tensor, num_classes: int | None) -> Tensor:
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(
            f"labels of shape {tuple(labels.shape)} are class indices and must be integers, not {labels.dtype}; "
            "soft labels and several labels at once have shape (B, C)"
        )
    if num_classes is None:
        raise ValueError("class indices need num_classes to become rows")
    if labels.device.type == "cpu" and len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(
            f"labels range from {int(labels.min())} to {int(labels.max())} but there are {num_classes} classes"
        )
    rows = torch.zeros(len(labels), num_classes, device=labels.device)
    return rows.scatter_(1, labels.long()[:, None], 1.0)
