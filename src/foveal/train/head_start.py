"""LP-FT: the classifier starts as a linear probe of the frozen features, then everything is fine-tuned.

    x = (f - m) / s              f: what enters the classifier; m, s: mean and deviation of all its numbers, one each
    min over W, b of  C sum_i -log softmax(W x_i + b)[y_i]  +  1/2 |W|^2
    logits = (W / s) f + b - (m / s) W 1                                     Kumar et al., 2022 (arXiv 2202.10054)

A random classifier's first gradients bend the features, and the attention, before it knows the classes. The authors
try 100 values of C from 1e-7 to 1e2; here it is every eleventh of them, one per decade. Each fit starts from the one
before.

n images, D width, C classes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveal.data.batches import Batches
from foveal.data.config import ImageConfig
from foveal.data.images import Images
from foveal.evaluate.features import Features
from foveal.evaluate.knn import matched
from foveal.evaluate.probe import Trial, accuracy_and_loss, check, hold_out
from foveal.evaluate.running import device_of
from foveal.maps.asking import as_wanted, asking
from foveal.transfer.head import classifiers

STRENGTHS = tuple(10.0**e for e in range(-7, 3))  # scikit-learn's C: small is a strong penalty
ROUNDS = 200  # of L-BFGS, as the authors; where it stops sooner than it converges, that is the probe


@dataclass(frozen=True)
class ProbeStart:
    """The probe that became the classifier. Accuracies are in [0, 1].

    strength: C, chosen among `trials` on `chosen_on`, where its accuracy is `val`.  train: on the training images.
    absent: classes without a training image, whose logit is the same for all images and never the largest.
    """

    strength: float
    chosen_on: str
    val: float
    train: float
    trials: tuple[Trial, ...]
    absent: tuple[str, ...] = ()

    def __str__(self) -> str:
        return (
            f"the classifier starts as a linear probe: {100 * self.val:.1f} % on {self.chosen_on},"
            f" C {self.strength:g} of {len(self.trials)}"
        )


@dataclass(frozen=True, eq=False)
class Decision:
    """logits = weight features + bias. weight: (C, D) float64.  bias: (C,) float64."""

    weight: Tensor
    bias: Tensor

    def __call__(self, values: Tensor) -> Tensor:
        return values.double() @ self.weight.T + self.bias


def probe_head(
    model: nn.Module,
    images: Images,
    config: ImageConfig,
    *,
    val: Images | None = None,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    seed: int = 0,
    strengths: Sequence[float] = STRENGTHS,
    workers: int = 0,
) -> ProbeStart:
    """Fit the probe on `images`, framed as for evaluation, and write it into the classifier of a timm `model`.

    In place; nothing else of the model changes. Distilled models, whose logits are the mean of two classifiers, get one
    probe of both features: each half of it, doubled.  val: chooses C by accuracy, then by less loss; None holds 15 % of
    the training images out by `seed`, and fits all of them with the C chosen.  device: where to compute; None: where
    the model is.
    Memory: the features in float64.
    Raises ValueError for a classifier that is not linear with a bias or has other classes than the images, one class,
    features that are not finite or all alike, strengths not above 0, and logits that are not what the classifier
    gives; then the model is as it was. DataError for unreadable images.
    """
    asked = sorted(set(strengths))
    if not asked or not all(0 < one < math.inf for one in asked):
        raise ValueError(f"strengths={tuple(strengths)}: give one or several above 0")
    heads = linear_heads(model, len(images.classes))
    home, where = device_of(model), device_of(model, device)
    model.to(where)
    try:
        train = entering(model, images, config, batch_size=batch_size, workers=workers)
        held = None if val is None else entering(model, val, config, batch_size=batch_size, workers=workers)
        start, decision = choose(train, held, asked, seed)
        kept = [(p, p.detach().clone()) for head in heads for p in (head.weight, head.bias)]
        try:
            write(heads, decision)
            _check_logits(model, Batches(images, config, batch_size, train=False, device=where), train, decision)
        except BaseException:
            with torch.no_grad():
                for parameter, value in kept:
                    parameter.copy_(value)
            raise
    finally:
        model.to(home)
    return start


def linear_heads(model: nn.Module, classes: int) -> list[nn.Linear]:
    """The classifiers of a timm model, one or two. Raises ValueError unless they are linear, with a bias and C rows."""
    found = classifiers(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no classifier: build it with num_classes={classes}")
    heads: list[nn.Linear] = []
    for head in found:
        if not isinstance(head, nn.Linear) or head.bias is None:
            raise ValueError(
                f"the classifier of {type(model).__name__} is {type(head).__name__}, not a linear layer with a bias:"
                " a probe cannot be written into it; start from a random one"
            )
        if head.out_features != classes:
            raise ValueError(
                f"the classifier has {head.out_features} classes, the images {classes}: build the model with"
                f" num_classes={classes}"
            )
        heads.append(head)
    return heads


def entering(
    model: nn.Module, images: Images, config: ImageConfig, *, batch_size: int = 64, workers: int = 0
) -> Features:
    """What enters the classifier, (n, D) float32 on the CPU; of two classifiers side by side. Leaves no trace."""
    heads = linear_heads(model, len(images.classes))
    caught: dict[int, Tensor] = {}
    values: Tensor | None = None
    where = device_of(model)
    with ExitStack() as stack:
        for i, head in enumerate(heads):
            hook = head.register_forward_pre_hook(lambda _, given, i=i: caught.__setitem__(i, given[0]))
            stack.callback(hook.remove)
        for batch in Batches(images, config, batch_size, train=False, workers=workers, device=where):
            caught.clear()
            with asking(model):
                model(as_wanted(model, batch.images))
            rows = [caught[i].float().cpu() for i in range(len(heads))]
            if any(row.dim() != 2 for row in rows):
                raise ValueError(f"what enters the classifier is {tuple(rows[0].shape)}, not one vector per image")
            found = torch.cat(rows, 1)
            if values is None:
                values = torch.empty(len(images), found.shape[1])
            values[batch.index] = found
    assert values is not None  # Batches refuses an empty set
    return Features(values, images.labels.cpu(), classes=images.classes, definition="what enters the classifier")


def choose(
    train: Features, val: Features | None, strengths: Sequence[float], seed: int = 0
) -> tuple[ProbeStart, Decision]:
    """The probe with the strength (ascending) that is best on val, for features as they are (not standardised)."""
    check(train, {} if val is None else {"val": val})
    fitted_on, chosen_on = train, "the validation images"
    if val is None:
        fitted_on, val, chosen_on = hold_out(train, seed)
    mean, std = float(train.values.double().mean()), float(train.values.double().std(correction=0))
    if not std > 0:
        raise ValueError("all features of all images are the same number: the weights of the model are broken")
    labels = matched(val.labels, val.classes, train.classes)
    tried = [folded(one, mean, std) for one in regressions(standardised(fitted_on, mean, std), strengths)]
    judged = [accuracy_and_loss(one(val.values), labels) for one in tried]
    best = max(range(len(tried)), key=lambda i: (judged[i][0], -judged[i][1]))
    decision = tried[best]
    if fitted_on is not train:
        decision = folded(regressions(standardised(train, mean, std), [strengths[best]])[0], mean, std)
    there = set(train.labels.tolist())
    start = ProbeStart(
        strength=strengths[best],
        chosen_on=chosen_on,
        val=judged[best][0],
        train=accuracy_and_loss(decision(train.values), train.labels)[0],
        trials=tuple(Trial(f"C {c:g}", acc, acc) for c, (acc, _) in zip(strengths, judged, strict=True)),
        absent=tuple(name for place, name in enumerate(train.classes) if place not in there),
    )
    return start, decision


def standardised(features: Features, mean: float, std: float) -> Features:
    """Features (f - m) / s, in float64."""
    values = (features.values.double() - mean) / std
    return Features(values, features.labels, features.index, features.classes, features.definition)


def folded(decision: Decision, mean: float, std: float) -> Decision:
    """What was fitted on (f - m) / s, for f."""
    weight = decision.weight / std
    return Decision(weight, decision.bias - mean * weight.sum(1))


def regressions(train: Features, strengths: Sequence[float]) -> list[Decision]:
    """Logistic regression for each C, ascending, each from where the one before ended. Classes without images are last.

    Rows of W and b sum to 0 over the classes, so an image's largest logit is 0 or more: a class without images gets no
    weights and a bias below 0, as of one image less than one in all, and is never the largest.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    there = train.labels.unique()
    # of two classes scikit-learn fits one row w, the difference of ours, w/2 and -w/2: half the penalty for the same
    factor = 2 if len(there) == 2 else 1
    model: Any = LogisticRegression(warm_start=True, max_iter=ROUNDS)
    found = []
    for strength in strengths:
        model.C = factor * strength
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(train.values.numpy(), train.labels.numpy())
        rows, offsets = torch.from_numpy(model.coef_.copy()), torch.from_numpy(model.intercept_.copy())
        if len(there) == 2:
            rows, offsets = torch.cat([-rows, rows]) / 2, torch.cat([-offsets, offsets]) / 2
        weight = rows.new_zeros(len(train.classes), rows.shape[1])
        bias = offsets.new_full((len(train.classes),), float(offsets.min()) - math.log(len(train) + 1))
        weight[there], bias[there] = rows, offsets
        found.append(Decision(weight, bias))
    return found


@torch.no_grad()
def write(heads: Sequence[nn.Linear], decision: Decision) -> None:
    """Put the probe in the classifiers, whose mean it then is. decision: of their features side by side."""
    for head, weight in zip(heads, decision.weight.chunk(len(heads), 1), strict=True):
        head.weight.copy_(len(heads) * weight)
        head.bias.copy_(decision.bias)


def _check_logits(model: nn.Module, batches: Batches, train: Features, decision: Decision) -> None:
    """Raise ValueError where the model's logits on a batch are not the decision's: it does more than its classifier."""
    batch = next(iter(batches))
    with asking(model):
        logits = model(as_wanted(model, batch.images))
    wanted = decision(train.values[batch.index])
    exact = torch.finfo(logits.dtype).eps ** 0.5 * max(1.0, float(wanted.abs().max()))
    if not torch.allclose(logits.double().cpu(), wanted, rtol=0, atol=exact):
        raise ValueError(
            f"{type(model).__name__} changes what its classifier gives, or has one that is not used:"
            " a probe cannot be written into it; start from a random one"
        )
