"""Co-Tuning: keep the source's classifier and teach it, softly, what its classes have to do with the new ones.

    L = L_task + lambda mean_b ( -sum_s p(s | y_b) log softmax(g(f_b))_s )        You et al., 2020 (NeurIPS), section 3

f_b is what enters the classifier of the model being tuned, g the source's own classifier, trained on; p(s | t) is a
fixed table of source classes s given target classes t (`foveal.transfer.relations`). lambda is 2.3 in the paper.

It needs a source that classifies: models pre-trained without labels (DINO, iBOT, MAE, ...) have no classes to relate.
"""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal.transfer.guide import Guide, Guided
from foveal.transfer.head import classifier, entering
from foveal.transfer.relations import relate

NO_CLASSES = "Co-Tuning relates the source's classes to the new ones (sources trained without labels have none)"


def co_tuning_loss(logits: Tensor, labels: Tensor, table: Tensor) -> Tensor:
    """Cross-entropy of the source's classifier with soft labels: the table's row of each image's class.

    logits: (B, S) of the source's classes.  labels: (B,) target classes.  table: (C, S), rows with sum 1.
    Returns a float32 (or wider) scalar, the mean over images.
    """
    wide = torch.promote_types(torch.float32, logits.dtype)
    logits = logits.to(wide)
    return -(table.to(logits)[labels] * F.log_softmax(logits, dim=-1)).sum(-1).mean()


class CoTuning(Guide):
    """Co-Tuning.

    table: (C, S) probability of source class s given target class t, rows with sum 1.  head: the source's classifier,
    copied; it is trained with the model (`learned()`) and not exported.  weight: lambda.
    Images show one class each: no mixing. Of a distilled model what enters the class token's head counts.
    Raises ValueError for a table that does not fit the head or is not one of probabilities, and in the forward for a
    model without a classifier or of another width.

    >>> guide = co_tuning_of(source, logits, labels, classes=37)      # doctest: +SKIP
    """

    name: ClassVar[str] = "co_tuning"
    unmixed: ClassVar[bool] = True

    def __init__(self, table: Tensor, head: nn.Module, weight: float = 2.3) -> None:
        super().__init__(weight)
        _check_head(head)
        if table.dim() != 2 or table.shape[1] != getattr(head, "out_features", table.shape[1]):
            raise ValueError(
                f"the table is {tuple(table.shape)}, but the source's classifier has "
                f"{getattr(head, 'out_features', '?')} classes: a row per target class, a column per source class"
            )
        sums = table.sum(1)
        if not (table >= 0).all() or not torch.allclose(sums, torch.ones_like(sums), atol=1e-4):
            raise ValueError("the table holds probabilities of source classes: no negative ones, each row with sum 1")
        self.table = table.detach().to(torch.promote_types(torch.float32, table.dtype)).clone()
        self._head = (copy.deepcopy(head).requires_grad_(True),)  # in a tuple: the task registers it, once

    @property
    def head(self) -> nn.Module:
        """The source's classifier, as it is trained."""
        return self._head[0]

    def learned(self) -> nn.Module:
        """The source's classifier: trained with the model, never exported."""
        return self.head

    def on(self, model: nn.Module, images: Tensor, labels: Tensor | None = None, relax: float = 1.0) -> Guided:
        """Listen to what enters the classifier of `model` inside the block. labels: (B,) classes."""
        strength = self.weight * relax
        if strength and (labels is None or labels.dim() != 1 or labels.is_floating_point()):
            raise ValueError("Co-Tuning needs the class of every image, (B,) integers: unmixed images and their labels")
        return _Guided(self, model, labels, strength)


def co_tuning_of(
    source: nn.Module,
    logits: Tensor,
    labels: Tensor,
    classes: int,
    table: str = "direct",
    weight: float = 2.3,
    *,
    val: tuple[Tensor, Tensor] | None = None,
    scale: float = 1.0,
    seed: int = 0,
) -> CoTuning:
    """The guide of a source, from what it says of the training images.

    source: with its own classifier.  logits: (N, S) of the source on the training images, not augmented.
    labels: (N,) target classes.  classes: C.  table: "direct", or "learned", the paper's; val, scale and seed are for
    it, see `foveal.transfer.relations`.
    Raises ValueError for a source without a classifier, logits that are not of its classes, and as `relate`.
    """
    head = classifier(source, NO_CLASSES)
    S = getattr(head, "out_features", logits.shape[-1])
    if logits.dim() != 2 or logits.shape[1] != S:
        raise ValueError(f"logits are {tuple(logits.shape)}, but the source has {S} classes: give ({len(labels)}, {S})")
    return CoTuning(relate(logits, labels, classes, table, val=val, scale=scale, seed=seed), head, weight)


class _Guided(Guided):
    """One forward that is listened to."""

    def __init__(self, guide: CoTuning, model: nn.Module, labels: Tensor | None, strength: float) -> None:
        super().__init__(guide.name, strength)
        self._guide, self._model, self._labels = guide, model, labels

    def open(self) -> None:
        self._entered = entering(self._model, "Co-Tuning feeds what enters it to the source's").__enter__()

    def close(self, *error: object) -> None:
        self._entered.__exit__(*error)

    def term(self) -> Tensor:
        guide, features = self._guide, self._entered.features
        assert self._labels is not None
        width = getattr(guide.head, "in_features", features.shape[1])
        if features.shape[1] != width:
            raise ValueError(
                f"the source's classifier reads {width} features, but {features.shape[1]} enter that of "
                f"{type(self._model).__name__}: source and model need the same width and pooling"
            )
        if guide.table.device != features.device:  # float64, as it is computed, is not on every device
            guide.table = guide.table.to(features.device, torch.promote_types(torch.float32, features.dtype))
        like = next((p for p in guide.head.parameters()), features)
        if like.device != features.device:
            guide.head.to(features.device)  # where no task has moved it
        return co_tuning_loss(guide.head(features.to(like.dtype)), self._labels, guide.table)


def _check_head(head: object) -> None:
    if not isinstance(head, nn.Module) or isinstance(head, nn.Identity):
        raise ValueError(f"no classifier of the source was given, and {NO_CLASSES}")
