"""What a class looks like to a model: one vector per class, and the tokens to compare it with.

The default is the classifier's own row and the tokens it reads. What else a map for a label could be made of, to see
what the row is worth: means of the class's tokens at an earlier block, rows of the wrong classes, random vectors.

B batch, N patches or cells, C classes, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal import chance
from foveal.attention import UnsupportedModelError, read
from foveal.maps.asking import as_wanted, asking
from foveal.maps.errors import MapModelError
from foveal.maps.features import Features, classifier, features, width

Vectors = Literal["row", "class_mean", "permuted", "random"]


def label_cosine(tokens: Tensor, rows: Tensor) -> Tensor:
    """Cosine of every token with its image's row, negative ones as 0.

    tokens: (B, N, D).  rows: (B, D).  Returns (B, N) in [0, 1], float32 or wider. A token or row of zeros gives 0.
    """
    wide = torch.promote_types(torch.float32, tokens.dtype)
    with torch.autocast(tokens.device.type, enabled=False):
        t = F.normalize(tokens.to(wide), dim=-1, eps=1e-12)
        r = F.normalize(rows.to(wide), dim=-1, eps=1e-12)
        return torch.einsum("bnd,bd->bn", t, r).clamp(0, 1)


def above(map: Tensor, share: float = 0.7) -> Tensor:
    """What of each map exceeds `share` of the way from its smallest to its largest value.

    max(m - (share max m + (1 - share) min m), 0)

    map: (B, ...).  Returns the same shape; a constant map gives zeros.
    """
    low, high = map.flatten(1).aminmax(dim=1)
    level = share * high + (1 - share) * low
    over = (map - level.view(-1, *(1,) * (map.dim() - 1))).clamp_min(0)
    # the level of a constant map may round to just below it
    return over.masked_fill((high == low).view(-1, *(1,) * (map.dim() - 1)), 0.0)


def label_rows(vectors: Tensor, labels: Tensor) -> Tensor:
    """The vector of each image's label: (B, D).

    vectors: (C, D).  labels: indices (B,), or rows (B, C) that weigh the vectors of several classes.
    Raises ValueError for rows of another number of classes and, on the CPU, for an index that is none.
    """
    C = len(vectors)
    if labels.dim() == 2:
        if labels.shape[1] != C:
            raise ValueError(f"rows of {labels.shape[1]} classes but there are {C} class vectors")
        return labels.to(vectors.dtype) @ vectors
    if labels.dim() != 1 or labels.is_floating_point():
        raise ValueError(
            f"labels of shape {tuple(labels.shape)}, {labels.dtype}: give class indices (B,) or rows (B, {C})"
        )
    if labels.device.type == "cpu" and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < C:
        raise ValueError(
            f"labels from {int(labels.min())} to {int(labels.max())} but there are {C} classes, 0 to {C - 1}"
        )
    return vectors[labels]


def permuted_vectors(vectors: Tensor, seed: int = 0) -> Tensor:
    """The vectors, each given to another class: one random cycle through all, so no class keeps its own. (C, D)."""
    order = torch.randperm(len(vectors), generator=chance.generator(seed, "label_vectors"))
    source = torch.empty_like(order)
    source[order] = order.roll(1)
    return vectors[source.to(vectors.device)]


def random_vectors(classes: int, width: int, seed: int = 0) -> Tensor:
    """Standard normal vectors on the CPU: (classes, width)."""
    return torch.randn(classes, width, generator=chance.generator(seed, "label_vectors"))


def class_means(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    classes: int,
    layer: int | str | None = None,
) -> Tensor:
    """Mean token of every class over all cells of all its images: (C, D) float32.

    batches: (images (B, 3, H, W), labels (B,)).  layer: the block whose tokens are meant, None for those that the
    classifier reads.  Raises ValueError for classes without an image.
    """
    total: Tensor | None = None
    count = torch.zeros(classes, dtype=torch.float64)
    for images, labels in batches:
        with asking(model):
            tokens = features_at(model, as_wanted(model, images), layer).tokens
        mean = tokens.double().mean(1) if tokens.device.type != "mps" else tokens.float().mean(1)
        total = mean.new_zeros(classes, mean.shape[1]) if total is None else total
        total.index_add_(0, labels.to(mean.device), mean)
        count += torch.bincount(labels.cpu(), minlength=classes)
    missing = (count == 0).nonzero().flatten().tolist()
    if total is None or missing:
        raise ValueError(f"no image of class {missing[:5]}: every class needs at least one to have a mean")
    return (total / count.to(total)[:, None]).float()


def features_at(model: nn.Module, images: Tensor, layer: int | str | None) -> Features:
    """`features` with the tokens of an earlier block in place of the final ones, from the same forward."""
    if layer is None:
        return features(model, images)
    with read(model, layers=layer, what="block_out") as seen:
        whole = features(model, images)
    return Features(seen.block_out(), seen.grid, whole.logits)


class LabelTerm:
    """Class vectors of a model and the tokens they are compared with.

    label_vectors: `row` (the classifier's, asked anew each time, so they follow training), `class_mean` (call `fit`
    first), `permuted` (rows of other classes), `random`.  vectors: (C, D) given instead.  layer: tokens of an earlier
    block.  classes: how many classes the data have, checked.  seed: of permuted and random.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        classes: int | None = None,
        label_vectors: Vectors = "row",
        vectors: Tensor | None = None,
        layer: int | str | None = None,
        seed: int = 0,
    ) -> None:
        if label_vectors not in get_args(Vectors):
            raise ValueError(f"label_vectors={label_vectors!r} is not known; use one of {', '.join(get_args(Vectors))}")
        self.model, self.classes, self.layer, self.seed = model, classes, layer, seed
        self.label_vectors, self.given = label_vectors, vectors
        self.width = width(model)  # a model that is not known fails here
        if layer is not None:
            try:
                read(model, layers=layer, what="block_out")
            except UnsupportedModelError as error:
                raise MapModelError(f"layer={layer!r} asks for the tokens of a block: {error}") from error
        if vectors is not None:
            self._check_given(vectors)
        elif label_vectors in ("row", "permuted") or classes is None:
            self.classes = len(classifier(model, classes))

    def _check_given(self, vectors: Tensor) -> None:
        if vectors.dim() != 2 or (self.classes is not None and len(vectors) != self.classes):
            raise ValueError(f"vectors of shape {tuple(vectors.shape)}; give one per class, ({self.classes or 'C'}, D)")
        self.classes = len(vectors)

    def fit(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Take the class means of these (images, labels) as the vectors. For label_vectors='class_mean'."""
        if self.label_vectors != "class_mean":
            raise ValueError(f"label_vectors={self.label_vectors!r} needs no fit; only 'class_mean' does")
        assert self.classes is not None
        self.given = class_means(self.model, batches, self.classes, self.layer)

    def vectors(self) -> Tensor:
        """(C, D) as they are now."""
        if self.given is not None:
            return self.given
        if self.label_vectors == "class_mean":
            raise ValueError("label_vectors='class_mean' has no means yet: call fit(batches of (images, labels)) first")
        if self.label_vectors == "random":
            assert self.classes is not None
            self.given = random_vectors(self.classes, self.width, self.seed)
            return self.given
        rows = classifier(self.model, self.classes).detach()
        return permuted_vectors(rows, self.seed) if self.label_vectors == "permuted" else rows

    def features(self, images: Tensor) -> Features:
        """One forward. Call inside `asking`."""
        return features_at(self.model, images, self.layer)

    def cosine(self, tokens: Tensor, labels: Tensor | None) -> Tensor:
        """(B, N) cosines of the tokens with the vectors of the labels."""
        if labels is None:
            raise ValueError("this map looks for the label's class: give labels, indices (B,) or rows (B, C)")
        rows = label_rows(self.vectors().to(tokens.device), labels.to(tokens.device))
        if rows.shape[1] != tokens.shape[2]:
            raise MapModelError(
                f"class vectors have width {rows.shape[1]} but the tokens compared with them {tokens.shape[2]}: "
                "vectors and layer must belong together"
            )
        return label_cosine(tokens, rows)
