"""A model's classifier: which modules it is, and the features that enter it.

>>> with entering(model) as entered:                     # doctest: +SKIP
...     logits = model(images)
>>> entered.features                                     # (B, D), in the graph  doctest: +SKIP
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from foveal.attention import ReadError
from foveal.attention.door import bare

NAMES = ("head", "heads", "fc", "classifier")  # of the classifier where a model has no get_classifier


def classifiers(model: nn.Module) -> tuple[nn.Module, ...]:
    """The classifier, as timm's `get_classifier` or the usual attribute gives it.

    Two for distilled models, the class token's first; none for a model without one.
    """
    model = bare(model)
    asked = getattr(model, "get_classifier", None)
    found: Any = asked() if callable(asked) else next((getattr(model, n) for n in NAMES if hasattr(model, n)), None)
    parts = found if isinstance(found, tuple | list) else (found,)
    return tuple(part for part in parts if isinstance(part, nn.Module) and not isinstance(part, nn.Identity))


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the classifier's parameters, of both where there are two; empty for a model without one."""
    own = {id(p) for part in classifiers(model) for p in part.parameters()}
    return tuple(name for name, p in model.named_parameters() if id(p) in own)


def classifier(model: nn.Module, use: str) -> nn.Module:
    """The classifier, of a distilled model the class token's. Raises ValueError, naming the `use`, if there is none."""
    found = classifiers(model)
    if not found:
        raise ValueError(
            f"{type(bare(model)).__name__} has no classifier, and {use}: build it with num_classes above 0 "
            "(timm.create_model(..., num_classes=C))"
        )
    return found[0]


class entering:
    """Hear what enters the classifier of `model` inside the block. The model is left as it was.

    Raises ValueError for a model without a classifier.
    """

    def __init__(self, model: nn.Module, use: str = "what enters it is asked") -> None:
        self._module = classifier(model, use)
        self._heard: list[Tensor] = []

    def __enter__(self) -> entering:
        self._heard = []
        self._hook = self._module.register_forward_pre_hook(self._hear, with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    @property
    def features(self) -> Tensor:
        """(B, D) of the one forward. Raises ReadError if the classifier ran never or several times."""
        if len(self._heard) != 1:
            raise ReadError(
                f"the classifier ran {len(self._heard)} times inside the block; run the model once in it, and compile "
                "it only after its first forward here, or its blocks one by one, since compiled code passes by hooks"
                if not self._heard
                else f"the classifier ran {len(self._heard)} times inside the block: run the model once in it"
            )
        return self._heard[0].flatten(1)  # a 1 x 1 convolution's input is (B, D, 1, 1)

    def _hear(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._heard.append(next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)))
