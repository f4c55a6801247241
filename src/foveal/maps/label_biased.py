"""Label-biased attention: where attention lands, plus sigma times where the label's class shows.

    A_n = ( b_n / sum b + sigma a_n / sum a ) / (1 + sigma)

b is the bottom-up map (attention of the class token, or attention received, mean over heads), a the head-cosine of the
label (thresholded): both are shares of the whole image before they are added, so sigma says how much the label counts.
At sigma 0 the map is bottom-up and no label is looked at; at 1 both count alike; a large sigma is head-cosine alone.
Where one of the two prefers no place (a sum of zero) the other stands alone. A sums to 1.

Ours: the reading of TdAttenMix (arXiv 2501.15409) in which sigma balances bottom-up against top-down attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import get_args

import torch
from torch import Tensor, nn

from foveal.maps.asking import as_wanted, asking
from foveal.maps.attended import Kind, attention_map, logits_of, reader
from foveal.maps.found import Found, found, on_grid
from foveal.maps.label_term import LabelTerm, Vectors, above


def balanced(bottom_up: Tensor, label_term: Tensor, sigma: float) -> Tensor:
    """The formula above. bottom_up, label_term: (B, h, w), zero or more, any scale. Returns (B, h, w), sums of 1.

    A map whose sum is zero leaves the other alone; both zero give zero.
    """
    both = _share(bottom_up) + sigma * _share(label_term)
    return _share(both)


def _share(map: Tensor) -> Tensor:
    map = map.float()
    return map / map.sum((1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


class LabelBiased:
    """Bottom-up attention biased towards the label's class; see above.

    sigma: strength of the label term, 0 (label-free) or more.  bottom_up: `received` fits every model that can be read,
    `class` needs a class token.  bottom_layer: the block it is read from.
    threshold, classes, label_vectors, vectors, layer, seed: of the label term, as in HeadCosine.

    One forward gives both terms and the logits. Raises MapModelError where the model has no such attention or head.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sigma: float = 1.0,
        bottom_up: Kind = "received",
        bottom_layer: int | str = -1,
        threshold: bool = True,
        classes: int | None = None,
        label_vectors: Vectors = "row",
        vectors: Tensor | None = None,
        layer: int | str | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 <= sigma < math.inf:
            raise ValueError(f"sigma={sigma}: the label term counts 0 (not at all) or more; 1 as much as attention")
        if bottom_up not in get_args(Kind):
            raise ValueError(f"bottom_up={bottom_up!r} is not known; use one of {', '.join(get_args(Kind))}")
        self.model = model
        self.sigma, self.threshold = sigma, threshold
        self.bottom_up, self.bottom_layer = bottom_up, bottom_layer
        reader(model, bottom_up, bottom_layer)  # says now, not in the first step, if it cannot be read
        self.term: LabelTerm | None = None
        if sigma:
            self.term = LabelTerm(
                model, classes=classes, label_vectors=label_vectors, vectors=vectors, layer=layer, seed=seed
            )

    def fit(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Class means from (images, labels), for label_vectors='class_mean'; nothing to do at sigma 0."""
        if self.term is not None:
            self.term.fit(batches)

    def __call__(self, images: Tensor, labels: Tensor | None = None, given: Tensor | None = None) -> Found:
        """Maps (B, h, w) of normalised images for their labels, indices (B,) or rows (B, C); at sigma 0 for none."""
        images = as_wanted(self.model, images)
        with asking(self.model):
            with reader(self.model, self.bottom_up, self.bottom_layer) as seen:
                if self.term is None:
                    logits = logits_of(self.model(images))
                else:
                    looked = self.term.features(images)
                    logits = looked.logits
            bottom_up = attention_map(seen, self.bottom_up)
            if self.term is None:
                return found(_share(bottom_up), logits)
            map = self.term.cosine(looked.tokens, labels).unflatten(1, looked.grid)
            label_term = on_grid(above(map) if self.threshold else map, (bottom_up.shape[1], bottom_up.shape[2]))
            return found(balanced(bottom_up, label_term, self.sigma), logits)
