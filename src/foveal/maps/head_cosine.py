"""Head-cosine: where the tokens look like the label's row of the classifier.

    m_n = clamp( <z_n, u_y> / (|z_n| |u_y|), 0, 1 )        the prior of Shi et al., 2023 (AbSViT, arXiv 2303.13043)
    A_n = max( m_n - (0.7 max m + 0.3 min m), 0 )          with threshold, as in TdAttenMix (arXiv 2501.15409)

z are the patch tokens after the last norm, u_y the row of the label's class in the last linear layer, without bias. One
forward, which also gives the logits; any vision transformer or convolutional network with a linear head. Where the head
reads the mean of the patch tokens they live in the head's space; where it reads a class token they were never trained
against u, and the map is what their residual stream shares with it.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from foveal.maps.asking import as_wanted, asking
from foveal.maps.found import Found, found
from foveal.maps.label_term import LabelTerm, Vectors, above


class HeadCosine:
    """Cosine of each patch token with the row of the label's class; see above.

    threshold: keep what exceeds 0.7 max + 0.3 min. On by default: the map stands in for the top-down guide's in the
    same mixer, whose last step this is; without it nearly every patch has some mass and windows hardly differ.
    classes: how many classes the data have, checked against the head.
    label_vectors, vectors, layer, seed: what is compared instead, see LabelTerm; with `class_mean` call `fit` first.

    Raises MapModelError where the head does not fit, ValueError without labels.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        threshold: bool = True,
        classes: int | None = None,
        label_vectors: Vectors = "row",
        vectors: Tensor | None = None,
        layer: int | str | None = None,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.threshold = threshold
        self.term = LabelTerm(
            model, classes=classes, label_vectors=label_vectors, vectors=vectors, layer=layer, seed=seed
        )

    def fit(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Class means from (images, labels), for label_vectors='class_mean'."""
        self.term.fit(batches)

    def __call__(self, images: Tensor, labels: Tensor | None = None, given: Tensor | None = None) -> Found:
        """Maps (B, h, w) of normalised images for their labels, indices (B,) or rows (B, C)."""
        with asking(self.model):
            seen = self.term.features(as_wanted(self.model, images))
            map = self.term.cosine(seen.tokens, labels)
            return found((above(map) if self.threshold else map).unflatten(1, seen.grid), seen.logits)
