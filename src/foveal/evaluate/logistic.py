"""Logistic regression on frozen features, as DINO and iBOT measure few labels.

    min over W of  1/n sum_i -log softmax(W x_i / |x_i|)[y_i]  +  penalty / 2 |W|^2        no intercept

scikit-learn's L-BFGS with C = 1 / (n penalty). Features are taken once, without augmentation. The gradient of this mean
is small from the start (features have length 1), so it is followed to 1e-6: scikit-learn's 1e-4 would stop too early.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from foveal.evaluate.features import Features
from foveal.evaluate.knn import matched
from foveal.evaluate.probe import Probe, Trial, accuracy_and_loss, check, hold_out, named, scored

TOLERANCE, ROUNDS = 1e-6, 1000


def logistic_probe(
    train: Features,
    test: Features | Mapping[str, Features],
    penalties: Sequence[float] = (0.01, 0.1, 1.0),
    val: Features | None = None,
    *,
    seed: int = 0,
) -> Probe:
    """The regression with the penalty that is best on val, on each test set.

    val: None holds 15 % of train out by `seed`, chooses, and fits all of train with the penalty chosen.
    Memory: the training features in float64.
    Raises ValueError for penalties that are not above 0, one class, or features that are not finite or of one kind.
    """
    check_penalties(penalties)
    tests = named(test)
    check(train, tests | ({} if val is None else {"val": val}))
    fitted_on, chosen_on = train, "val"
    if val is None:
        fitted_on, val, chosen_on = hold_out(train, seed)
    labels = matched(val.labels, val.classes, train.classes)
    weights = [fit_logistic(fitted_on.values, fitted_on.labels, len(train.classes), one) for one in penalties]
    judged = [accuracy_and_loss(scores_of(w, val.values), labels) for w in weights]
    best = max(range(len(penalties)), key=lambda i: (judged[i][0], -judged[i][1]))
    chosen = weights[best]
    if fitted_on is not train:
        chosen = fit_logistic(train.values, train.labels, len(train.classes), penalties[best])
    tried = ", ".join(f"{one:g}" for one in penalties)
    return Probe(
        kind="logistic regression on cached features",
        definition=train.definition,
        recipe="features of length 1, no intercept, no augmentation",
        setting=f"penalty {penalties[best]:g}" + (f" of {tried}" if len(penalties) > 1 else ""),
        epoch=None,
        chosen_on=chosen_on,
        val=judged[best][0],
        trials=tuple(Trial(f"penalty {p:g}", acc, acc) for p, (acc, _) in zip(penalties, judged, strict=True)),
        tests={
            name: scored(scores_of(chosen, one.values).argmax(1), one, train.classes) for name, one in tests.items()
        },
        last={},
    )


def check_penalties(penalties: Sequence[float]) -> None:
    """Raise ValueError for penalties that cannot be."""
    if not penalties or not min(penalties) > 0:
        raise ValueError(f"penalties={tuple(penalties)}: give one or several above 0")


def fit_logistic(values: Tensor, labels: Tensor, classes: int, penalty: float) -> Tensor:
    """W (C, D) float64, NaN in the rows of classes without an image. values: (n, D).  labels: (n,)."""
    from sklearn.linear_model import LogisticRegression

    there = labels.unique()
    strength = 1 / (len(values) * penalty)
    # of two classes scikit-learn fits one row w, the difference of ours, w/2 and -w/2: half the penalty for the same
    model: Any = LogisticRegression(
        C=2 * strength if len(there) == 2 else strength, fit_intercept=False, tol=TOLERANCE, max_iter=ROUNDS
    )
    model.fit(F.normalize(values.double(), dim=1).numpy(), labels.numpy())
    rows = torch.from_numpy(model.coef_)
    if len(there) == 2:
        rows = torch.cat([-rows, rows]) / 2
    weight = rows.new_full((classes, values.shape[1]), torch.nan)
    weight[there] = rows
    return weight


def scores_of(weight: Tensor, values: Tensor) -> Tensor:
    """(N, C) float64; -inf for classes that the regression was not fitted on. They are never predicted."""
    scores = F.normalize(values.double(), dim=1) @ weight.T
    return scores.masked_fill(weight.isnan().any(1), -torch.inf)
