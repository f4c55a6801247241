"""GTA: keep looking where the pre-trained model looked.

    L = L_task + lambda * mean_{b,l,h,j} (a_T - a_S)^2          Seo et al., 2024 (arXiv 2401.02656), section 3

a is the class token's row of attention logits q k^T / sqrt(d) of every block and head, before softmax, patch columns
only; T is the model being tuned, S the frozen pre-trained source, both on the same input. Nothing changes at inference.

The paper's reduction and its lambda per data set are not published in any source that could be read: the mean over
everything and lambda 1 are this project's defaults.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import foveal.attention as attention
from foveal.attention.door import bare


def gta_loss(target: Sequence[Tensor], source: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of class-row logits over images, layers, heads and patches.

    target, source: one (B, H, N) tensor per layer, logits of the patch columns. Padding (-inf) does not count.
    Returns a float32 (or wider) scalar; the gradient stops at the source. Raises ValueError where shapes differ.
    """
    if not target or len(target) != len(source):
        raise ValueError(f"{len(target)} target layers against {len(source)} source layers; one or more of each, equal")
    losses = []
    for i, (t, s) in enumerate(zip(target, source, strict=True)):
        if t.shape != s.shape:
            raise ValueError(
                f"layer {i}: target rows are {tuple(t.shape)}, source rows {tuple(s.shape)} (images, heads, patches); "
                "source and target need the same heads, patch size and input size, and no patch dropout"
            )
        s = s.detach()
        wide = torch.promote_types(torch.float32, t.dtype)
        padding = s == float("-inf")
        square = (t.to(wide) - s.to(wide)).masked_fill(padding, 0.0).square()
        losses.append(square.sum() / (~padding).sum())
    return torch.stack(losses).mean()


class GTA:
    """Guided Transfer of spatial Attention.

    source: the pre-trained model. It is copied, frozen and set to evaluation, so the model that will be tuned may be
    given itself before tuning starts.  weight: lambda.  layers: blocks to guide, as in `foveal.read`.

    >>> guide = GTA(source=model)                             # doctest: +SKIP
    >>> with guide.on(model, images) as g:                    # doctest: +SKIP
    ...     loss = task(model(images), labels)
    >>> (loss + sum(g.losses().values())).backward()          # doctest: +SKIP

    Raises UnsupportedModelError or ValueError if the source has no class-token attention that can be read.
    """

    name = "gta"

    def __init__(self, source: nn.Module, weight: float = 1.0, layers: str | int | Sequence[int | str] = "all") -> None:
        if not 0 <= weight < float("inf"):
            raise ValueError(
                f"weight={weight}: GTA's lambda is 0 (off) or positive; the paper tries 0.1, 1, 10 and 100"
            )
        self.weight = weight
        self.layers = [layers] if isinstance(layers, int) or (isinstance(layers, str) and layers != "all") else layers
        attention.read(source, self.layers, "class_logits")  # says now, not in the first step, if it cannot be read
        self.source = copy.deepcopy(bare(source)).eval().requires_grad_(False)

    def on(self, model: nn.Module, images: Tensor) -> Guided:
        """Guide the forward of `model` on `images` inside the block; then ask `losses()`."""
        return Guided(self, model, images)


class Guided:
    """One guided forward."""

    def __init__(self, guide: GTA, model: nn.Module, images: Tensor) -> None:
        self._guide, self._model, self._images = guide, model, images
        self._seen: attention.Seen | None = None
        self._rows: list[Tensor] = []

    def __enter__(self) -> Guided:
        if not self._guide.weight:
            return self  # lambda 0: the source does not run
        # the source runs first: its activations are gone before the target's graph is built
        source = self._guide.source.to(self._images.device)
        dtype = next(p.dtype for p in source.parameters() if p.is_floating_point())  # the target may train in another
        with torch.no_grad(), attention.read(source, self._guide.layers, "class_logits") as seen:
            source(self._images.to(dtype))
        self._rows = seen.class_logits()
        self._seen = attention.read(self._model, self._guide.layers, "class_logits").__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._seen is not None:
            self._seen.__exit__(*error)  # type: ignore[arg-type]

    def losses(self) -> dict[str, Tensor]:
        """Named terms to add to the task loss, weighted: {"gta": lambda * L}. Empty where lambda is 0."""
        if self._seen is None:
            return {}
        return {"gta": self._guide.weight * gta_loss(self._seen.class_logits(), self._rows)}
