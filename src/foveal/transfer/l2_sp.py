"""L2-SP: stay near the weights one started from, not near zero.

    L = L_task + alpha/2 ||w - w0||^2 + beta/2 ||w_new||^2        Li et al., 2018 (arXiv 1802.01483), section 3

w are the parameters that model and source share, w0 their pre-trained values, w_new the new classifier. It takes the
place of weight decay, which should be 0. alpha and beta are 0.01 in the paper's common setting, to be tuned over powers
of ten (0.1 on Stanford Dogs).

With Adam the gradient of a loss term is rescaled by the adaptive step, as with L2 and decoupled weight decay. The
decoupled form acts on the weights instead, after every optimiser step:

    w <- w - lr * alpha * (w - w0),    w_new <- w_new - lr * beta * w_new        lr: of the parameter's own group
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveal.attention.door import bare
from foveal.transfer.guide import Guide, Guided
from foveal.transfer.head import classifiers


def l2_sp(weights: Sequence[Tensor], starts: Sequence[Tensor] | None = None) -> Tensor:
    """Half the squared distance, 1/2 sum ||w - w0||^2, over all tensors. Its gradient is w - w0.

    weights, starts: tensors of any shapes, equal in pairs; starts is constant. None: zero.
    Returns a float32 (or wider) scalar. Raises ValueError for no tensors or shapes that differ.
    """
    if not weights or (starts is not None and [w.shape for w in weights] != [s.shape for s in starts]):
        raise ValueError(
            f"{len(weights)} weights against {'no' if starts is None else len(starts)} starts: give one or more, "
            "each with a start of its own shape"
        )
    half: Tensor = _HalfSquares.apply(None if starts is None else tuple(starts), *weights)
    return half


class _HalfSquares(torch.autograd.Function):
    """A few fused passes over all weights; autograd would take several kernels per tensor.

    The differences become the gradient in place, so they are allocated once; asked again, they are computed again.
    """

    @staticmethod
    def forward(ctx: Any, starts: tuple[Tensor, ...] | None, *weights: Tensor) -> Tensor:
        away = _away(weights, starts)
        ctx.save_for_backward(*weights)
        ctx.starts, ctx.away = starts, away if starts is not None else None  # without starts they are the weights
        return torch.stack(torch._foreach_norm(away)).square().sum() / 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        weights, away = ctx.saved_tensors, ctx.away
        ctx.away = None
        if away is None:
            away = torch._foreach_mul(_away(weights, ctx.starts), gradient)
        else:
            torch._foreach_mul_(away, gradient)
        return None, *(g.to(w.dtype) for g, w in zip(away, weights, strict=True))


def _away(weights: Sequence[Tensor], starts: Sequence[Tensor] | None) -> list[Tensor]:
    """w - w0 in float32 or wider: differences of nearby half-precision weights have few digits left."""
    types = [torch.promote_types(torch.float32, w.dtype) for w in weights]
    wide = [w.detach().to(t) for w, t in zip(weights, types, strict=True)]
    if starts is None:
        return wide
    return list(torch._foreach_sub(wide, [s.detach().to(t) for s, t in zip(starts, types, strict=True)]))


@dataclass(frozen=True)
class _Held:
    """Parameters of a model under the penalty."""

    names: tuple[str, ...]
    shared: list[nn.Parameter]  # of these names
    new: list[nn.Parameter]  # the classifier's


class L2SP(Guide):
    """L2-SP as a loss term, or decoupled from the optimiser's step.

    source: the model whose parameters are the start; they are copied.  weight: alpha.  head: beta, of the classifier.
    decoupled: no loss term; the weights are pulled back after each optimiser step.
    biases: False leaves all but kernels free, as the authors' code does: only tensors named weight with two or more
    dimensions count, neither biases nor norms, tokens, position tables or embeddings.

    Shared is what has the same name and shape and is not the classifier; other parameters (a position table of another
    input size) are left free, and `excluded` names them once the guide has met the model. So are frozen ones, without
    a word. Buffers never count. A schedule relaxes both parts; weight 0 switches both off.
    Raises ValueError in `on` and `after_step` for a model that shares no trained parameter with the source.
    """

    name: ClassVar[str] = "l2_sp"
    replaces_decay: ClassVar[bool] = True

    def __init__(
        self,
        source: nn.Module,
        weight: float = 0.01,
        head: float = 0.01,
        decoupled: bool = False,
        biases: bool = True,
    ) -> None:
        super().__init__(weight)
        if not 0 <= head < float("inf"):
            raise ValueError(f"head={head}: the weight of the classifier's penalty is 0 (off) or positive")
        if not isinstance(source, nn.Module):
            raise ValueError(
                "L2-SP needs a source model to copy the start from; tuned by adapters (LoRA) the weights do not move "
                "and there is nothing to hold"
            )
        self.head, self.decoupled, self.biases = head, decoupled, biases
        self.excluded: tuple[str, ...] = ()
        self._met: tuple[nn.Module, set[int], list[nn.Parameter], list[bool], _Held] | None = None
        top = _classifier_ids(source)
        self._starts = {n: p.detach().clone() for n, p in bare(source).named_parameters() if id(p) not in top}

    def on(self, model: nn.Module, images: Tensor, labels: Tensor | None = None, relax: float = 1.0) -> Guided:
        """The penalty of `model` as it is when `losses()` is asked; no term where it is decoupled."""
        return _Guided(self, model, 0.0 if self.decoupled else self.weight * relax)

    @torch.no_grad()
    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, relax: float = 1.0) -> None:
        """Where it is decoupled: pull the weights back, by their group's learning rate."""
        if not self.decoupled or not self.weight * relax:
            return
        held = self._held(model)
        starts = dict(zip(map(id, held.shared), self._starts_of(held), strict=True))
        new = set(map(id, held.new))
        for group in optimizer.param_groups:
            rate = float(group["lr"]) * relax
            back = [p for p in group["params"] if id(p) in starts]
            if back:
                torch._foreach_lerp_(back, [starts[id(p)].to(p.dtype) for p in back], rate * self.weight)
            shrink = [p for p in group["params"] if id(p) in new]
            if shrink:
                torch._foreach_mul_(shrink, 1 - rate * self.head)

    def _held(self, model: nn.Module) -> _Held:
        """What of `model` is under the penalty now. Walked through once, and again when something was frozen or
        thawed, or the classifier replaced: the walk would be felt in every step of a small model."""
        model = bare(model)
        top = _classifier_ids(model)
        if self._met is not None:
            known, its_top, parameters, trained, held = self._met
            if known is model and its_top == top and [p.requires_grad for p in parameters] == trained:
                return held
        tables = set() if self.biases else {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        names, shared, new, excluded = [], [], [], []
        for name, p in model.named_parameters():
            is_kernel = p.dim() >= 2 and name.endswith("weight") and id(p) not in tables
            if not p.requires_grad or not (self.biases or is_kernel):
                continue
            if id(p) in top:
                new.append(p)
            elif name in self._starts and self._starts[name].shape == p.shape:
                names.append(name)
                shared.append(p)
            else:
                excluded.append(name)
        if not shared:
            raise ValueError(
                f"{type(model).__name__} has no trained parameter of a name and shape that the source has: L2-SP would "
                "hold nothing. Tune its own weights (all, attention, bias, the last blocks; not adapters or the head "
                "alone) and give a source of the same architecture"
            )
        self.excluded = tuple(excluded)
        held = _Held(tuple(names), shared, new)
        parameters = list(model.parameters())
        self._met = (model, top, parameters, [p.requires_grad for p in parameters], held)
        return held

    def _starts_of(self, held: _Held) -> list[Tensor]:
        """w0 of the shared parameters, on their devices."""
        for name, p in zip(held.names, held.shared, strict=True):
            if self._starts[name].device != p.device:
                self._starts[name] = self._starts[name].to(p.device)
        return [self._starts[name] for name in held.names]


class _Guided(Guided):
    """One penalised forward: the forward itself is not touched."""

    def __init__(self, guide: L2SP, model: nn.Module, strength: float) -> None:
        super().__init__(guide.name, strength)
        self._guide, self._model = guide, model

    def open(self) -> None:
        self._held = self._guide._held(self._model)  # now: what cannot be held is said before the forward

    def term(self) -> Tensor:
        held, guide = self._held, self._guide
        term = l2_sp(held.shared, guide._starts_of(held))
        if held.new and guide.head:
            term = term + guide.head / guide.weight * l2_sp(held.new)
        return term


def _classifier_ids(model: nn.Module) -> set[int]:
    return {id(p) for part in classifiers(model) for p in part.parameters()}
