"""Mix tokens inside the model, on top of a mixer of images.

    targets = W_token W_image Y

A token mixer wraps an image mixer (`over`, by default none) and is used like one. Its part of the labels is known when
the forward has run through the mixed blocks; nothing else changes in a training step.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from foveal.attention.blocks import Blocks
from foveal.mix.mixed import LabelWeights, Mixed
from foveal.mix.mixer import DrawT, Mixer, Step, Term
from foveal.mix.none import NoMix

Factors = Callable[[], tuple[LabelWeights, ...]]
Measure = Callable[[], Mapping[str, Tensor]]


class TokenStep(Step):
    """The step of the image mixer, with the label weights, losses and measures of the tokens.

    mixed: of the images.  factors: asked when the labels are; raises where no forward has run.
    """

    def __init__(
        self,
        under: Step,
        mixed: Mixed,
        labels: Tensor,
        num_classes: int | None,
        factors: Factors,
        terms: Mapping[str, Term] | None = None,
        measure: Measure | None = None,
    ) -> None:
        super().__init__(mixed, labels, num_classes, relabel=self._with_factors, terms=terms)
        self._under, self._factors, self._measure = under, factors, measure

    def _with_factors(self, mixed: Mixed) -> Mixed:
        return replace(mixed, factors=(*self._under._final().factors, *self._factors()))

    def losses(self, logits: Tensor, smoothing: float = 0.0, kind: str = "ce") -> dict[str, Tensor]:
        """See Step.losses: the task's with the labels of images and tokens, the image mixer's terms, one's own."""
        losses = super().losses(logits, smoothing, kind)
        image = self._under._final()
        return losses | {name: term(image, logits, smoothing) for name, term in self._under._terms.items()}

    def measures(self) -> dict[str, Tensor]:
        """See Step.measures."""
        return self._under.measures() | dict(self._measure() if self._measure is not None else {})


@dataclass(kw_only=True)
class TokenMixer(Mixer[DrawT]):
    """Settings of a way to mix tokens. over: the mixer of the images; not another token mixer."""

    over: Mixer[Any] = field(default_factory=NoMix)
    _examined: Any = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.over, Mixer) or isinstance(self.over, TokenMixer):
            raise TypeError(
                f"over={self.over!r} but it is the mixer of the images, such as foveal.mix.MixupCutMix(); two token "
                "mixers on one model are not composed"
            )

    @abstractmethod
    def first_mixed_block(self, model: nn.Module) -> int | None:
        """The first block that may be given tokens of other images, counted from 0; None where none is.

        What is compared with the unmixed model, as a guide does, is comparable before it.
        """

    @abstractmethod
    def mixing(
        self, model: nn.Module, under: Step, draw: DrawT, labels: Tensor, num_classes: int | None
    ) -> AbstractContextManager[Step]:
        """Around the forward: edits the model and gives the step.

        under: of the image mixer.  labels: class indices (B,) or rows (B, C), unmixed.
        """

    @property
    def terms(self) -> tuple[str, ...]:
        """Those of the image mixer."""
        return self.over.terms

    @property
    def measures(self) -> tuple[str, ...]:
        """Those of the image mixer."""
        return self.over.measures

    def learned(self, model: nn.Module, num_classes: int) -> nn.Module | None:
        """What the image mixer learns."""
        return self.over.learned(model, num_classes)

    def blocks(self, model: nn.Module) -> Blocks:
        """The blocks of the model, examined once. Raises UnsupportedModelError for one without."""
        if self._examined is None or self._examined[0]() is not model:
            self._examined = (weakref.ref(model), Blocks(model))
        blocks: Blocks = self._examined[1]
        return blocks

    def __getstate__(self) -> dict[str, Any]:
        """Without the model that was examined: a copy of a mixer holds no copy of a model."""
        return {**self.__dict__, "_examined": None}

    @contextmanager
    def on(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        rng: torch.Generator | None = None,
        num_classes: int | None = None,
        given: Tensor | None = None,
        trusted: bool = True,
    ) -> Iterator[Step]:
        """One training step on images mixed by `over` and on mixed tokens; see Mixer.on.

        The images are drawn first: they are what `over` alone makes of the same generator. While the model is in
        evaluation nothing but the images is mixed. The backward of a checkpointed model belongs inside the block.
        """
        rng = self._begin(images, labels, rng)
        with self.over.on(model, images, labels, rng, num_classes, given, trusted) as under:
            if not model.training:
                yield under
                return
            size = (images.shape[-2], images.shape[-1])
            draw = self.draw(len(images), size, rng=rng)
            with self.mixing(model, under, draw, labels, num_classes) as step:
                yield step
