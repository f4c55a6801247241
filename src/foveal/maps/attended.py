"""Bottom-up maps: what attention lands on, whatever the label.

    class     a_n = mean_h A_h[class, n]                       where the class token looks (TransMix)
    received  a_n = mean_h mean_i A_h[i, n],  i over patches   what the patches look at (SMMix; needs no class token)

A is the softmax over all tokens of one block, the last by default; prefix tokens (class, distillation, registers) are
dropped afterwards. No threshold.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from foveal.attention import Seen, UnsupportedModelError, read
from foveal.maps.asking import as_wanted, asking
from foveal.maps.errors import MapModelError
from foveal.maps.found import Found, found

Kind = Literal["class", "received"]
WHAT = {"class": "class_logits", "received": "patch_received"}


def reader(model: nn.Module, kind: Kind, layer: int | str = -1) -> Seen:
    """A reader of what `attention_map` needs. Raises MapModelError where the model does not have it."""
    try:
        return read(model, layers=layer, what=WHAT[kind])
    except UnsupportedModelError as error:
        raise MapModelError(
            f"no attention to make a map of: {error}. head_cosine and input_gradient fit models without attention"
        ) from error
    except ValueError as error:
        if kind == "received":
            raise
        raise MapModelError(
            f"class_attention needs the class token's row: {error}. received_attention fits models without one"
        ) from error


def attention_map(seen: Seen, kind: Kind) -> Tensor:
    """(B, h, w) of the forward that was read, mean over heads."""
    if isinstance(seen.grid, list):
        raise MapModelError("images with patch grids of their own have no common map: give all images one size")
    attn = seen.class_attention() if kind == "class" else seen.patch_received()
    map: Tensor = seen.to_grid(attn)
    return map


def logits_of(output: Any) -> Tensor | None:
    """Logits (B, C) of what a model returned, None if it returned something else."""
    logits = getattr(output, "logits", output)
    return logits if isinstance(logits, Tensor) and logits.dim() == 2 else None


class _Attended:
    kind: Kind

    def __init__(self, model: nn.Module, *, layer: int | str = -1) -> None:
        self.model = model
        self.layer = layer
        reader(model, self.kind, layer)  # says now, not in the first step, if it cannot be read

    def __call__(self, images: Tensor, labels: Tensor | None = None, given: Tensor | None = None) -> Found:
        """Maps (B, h, w) of normalised images; labels are not looked at."""
        with asking(self.model):
            with reader(self.model, self.kind, self.layer) as seen:
                output = self.model(as_wanted(self.model, images))
            return found(attention_map(seen, self.kind), logits_of(output))


class ClassAttention(_Attended):
    """Where the class token of block `layer` looks. layer: as in `foveal.read`; a name reaches a pooling head.

    Raises MapModelError for a model without class token or one that cannot be read.
    """

    kind: Kind = "class"


class ReceivedAttention(_Attended):
    """What attention the patches of block `layer` receive from patches. Works without a class token.

    Raises MapModelError for a model that cannot be read.
    """

    kind: Kind = "received"
