"""Attention Transfer: a model learns to attend as a frozen source, over all heads and all queries; distil or copy.

    L = L_task + 3 * sum_l mean_{b,h,i} ( -sum_j S_ij log T_ij )          distil; T, S: maps of target and source
    out_l = S_l V_l                                                       copy              Li et al., 2024 (2411.09702)

l runs over the chosen blocks, in the paper all but the last 6 of 24. The distilled term is a cross entropy: where the
maps agree it is the entropy of the source's, not 0. Both models see the same images and need the same heads, grid and
prefix tokens; a source whose parts the target lacks (layer scale, registers, norms) can do harm (arXiv 2605.07191).
Here the source runs in evaluation; the authors run it with the target's draws of drop path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveal import attention
from foveal.attention.door import bare
from foveal.attention.factors import Factors, cross_entropy
from foveal.attention.replace import replace
from foveal.transfer.guide import Guide, Guided
from foveal.transfer.source import Source


def attention_transfer_loss(target: Sequence[Factors], source: Sequence[Factors]) -> Tensor:
    """Sum over layers of the cross entropy of the source's maps with the target's, each a mean over all its rows.

    target, source: one per layer, `what="factors"` of `foveal.read`. No T x T map is made where attention is fused.
    Returns a float32 (or wider) scalar without gradient to the source. Raises ValueError where layers, heads or tokens
    differ.
    """
    if not target or len(target) != len(source):
        raise ValueError(
            f"{len(target)} target layers against {len(source)} source layers; one or more of each, equal: models of "
            "other depths need layers=[...] of both in common"
        )
    return torch.stack([cross_entropy(t, s) for t, s in zip(target, source, strict=True)]).sum()


class AttentionTransfer(Guide):
    """Distilled attention.

    source: the model to attend like, copied and frozen; None: the tuned model with its adapters (LoRA) off.
    weight: 3 in the paper.  layers: blocks, as in `foveal.read`.  skip_last: with layers="all", blocks at the end that
    are left free (the paper's end_layer=-6: skip_last=6).

    Raises UnsupportedModelError or ValueError if the source's maps cannot be read, and in the first forward where the
    model's heads, tokens or depth are others.
    """

    name: ClassVar[str] = "attention_transfer"

    def __init__(
        self, source: nn.Module | None, weight: float = 3.0, layers: attention.Layers = "all", *, skip_last: int = 0
    ) -> None:
        super().__init__(weight)
        self.layers, self.skip_last = layers, skip_last
        self.frozen = Source(source)
        if source is not None:
            self.frozen.check(_chosen(source, layers, skip_last), "factors")

    def on(self, model: nn.Module, images: Tensor, labels: Tensor | None = None, relax: float = 1.0) -> Guided:
        """Guide the forward of `model` on `images` inside the block; then ask `losses()`."""
        return _Guided(self, model, images, self.weight * relax)


class _Guided(Guided):
    """One guided forward."""

    def __init__(self, guide: AttentionTransfer, model: nn.Module, images: Tensor, strength: float) -> None:
        super().__init__(guide.name, strength)
        self._guide, self._model, self._images = guide, model, images

    def open(self) -> None:
        self._source = _maps(self._guide.frozen, self._guide.layers, self._guide.skip_last, self._model, self._images)
        layers = _chosen(self._model, self._guide.layers, self._guide.skip_last)
        self._seen = attention.read(self._model, layers, "factors").__enter__()

    def close(self, *error: object) -> None:
        self._seen.__exit__(*error)  # type: ignore[arg-type]

    def term(self) -> Tensor:
        return attention_transfer_loss(self._seen.factors(), self._source)


class AttentionCopy:
    """Copied attention: the chosen blocks attend with the source's maps, in training and at test.

    Arguments as `AttentionTransfer`. For the library only, not a guide of `foveal train`: a model that was trained so
    needs its source whenever it runs, so it cannot be saved and used alone.

    >>> copied = AttentionCopy(source, skip_last=6)           # doctest: +SKIP
    >>> with copied.on(model, images):                        # doctest: +SKIP
    ...     logits = model(images)

    In these blocks gradient flows through the values only: queries and keys get none. Run the backward of a
    checkpointed model inside the block.
    """

    def __init__(self, source: nn.Module, layers: attention.Layers = "all", *, skip_last: int = 0) -> None:
        self.layers, self.skip_last = layers, skip_last
        self.frozen = Source(source)
        self.frozen.check(_chosen(source, layers, skip_last), "factors")

    @contextmanager
    def on(self, model: nn.Module, images: Tensor) -> Iterator[None]:
        """The one forward of `model` on `images` in here attends as the source does on them.

        Raises UnsupportedModelError for a model whose maps cannot be replaced (compiled; windows, pooling heads),
        ValueError where heads, tokens or depth are others, ReadError if a block runs twice.
        """
        given = _maps(self.frozen, self.layers, self.skip_last, model, images)
        with replace(model, _chosen(model, self.layers, self.skip_last), given):
            yield


def _chosen(model: nn.Module, layers: attention.Layers, skip_last: int) -> Any:
    """The layers as a list for `foveal.read`, so that one layer gives a list too."""
    if not skip_last:
        return [layers] if isinstance(layers, int) or (isinstance(layers, str) and layers != "all") else layers
    if layers != "all":
        raise ValueError(f"skip_last={skip_last} leaves out blocks of all, but layers={layers!r} names them: give one")
    depth = len(attention.read(bare(model), "all", "factors").layers)
    if not 0 < skip_last < depth:
        raise ValueError(f"skip_last={skip_last} of {depth} blocks; use 0 to {depth - 1}")
    return list(range(depth - skip_last))


def _maps(frozen: Source, layers: attention.Layers, skip_last: int, model: nn.Module, images: Tensor) -> list[Factors]:
    """The source's maps on these images, as factors, one per layer."""
    source = model if frozen.model is None else frozen.model
    found: list[Factors] = frozen.look(images, _chosen(source, layers, skip_last), "factors", model).factors()
    return found
