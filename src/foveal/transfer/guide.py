"""What all guidance shares: one named term beside the task loss, from one forward of the model that is tuned.

    L = L_task + weight * relax * term           relax in [0, 1]: a schedule's share, 0 at its end

>>> with guide.on(model, images, labels) as g:            # doctest: +SKIP
...     logits = model(images)
>>> (task + sum(g.losses().values())).backward()          # doctest: +SKIP
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Self

import torch
from torch import Tensor, nn


class Guide(ABC):
    """A way of guiding. `weight` is the factor of its term beside the task loss.

    name: of the term.  unmixed: it needs images that show one class each, so no mixer.  replaces_decay: the weight
    decay of the optimiser should be 0 with it.
    """

    name: ClassVar[str]
    unmixed: ClassVar[bool] = False
    replaces_decay: ClassVar[bool] = False

    def __init__(self, weight: float) -> None:
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weight={weight}: the weight of {self.name} is 0 (off) or positive")
        self.weight = weight

    @abstractmethod
    def on(self, model: nn.Module, images: Tensor, labels: Tensor | None = None, relax: float = 1.0) -> Guided:
        """Guide the one forward of `model` on `images` (B, 3, H, W) inside the block; then ask `losses()`.

        labels: (B,) classes, for guides that need them.  relax: share of the weight that counts now, in [0, 1].
        """

    def learned(self) -> nn.Module | None:
        """Parameters of its own: trained and checkpointed with the model, never exported. None: it has none."""
        return None

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, relax: float = 1.0) -> None:
        """What it does to the weights after an optimiser step: nothing, unless it is a decoupled penalty."""
        return None


class Guided(ABC):
    """One guided forward, as a `with` block. With strength 0 nothing is read and no source runs."""

    def __init__(self, name: str, strength: float) -> None:
        self.name, self.strength = name, strength

    def __enter__(self) -> Self:
        if self.strength:
            self.open()
        return self

    def __exit__(self, *error: object) -> None:
        if self.strength:
            self.close(*error)

    def losses(self) -> dict[str, Tensor]:
        """The named term, weighted: {"gta": weight * relax * term}, a scalar in float32 or wider. Empty at 0."""
        return {self.name: self.strength * self.term()} if self.strength else {}

    def open(self) -> None:
        """Before the forward."""
        return None

    def close(self, *error: object) -> None:
        """After the forward, or where it raised."""
        return None

    @abstractmethod
    def term(self) -> Tensor:
        """The term, not weighted: a scalar."""
