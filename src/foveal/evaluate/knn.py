"""Weighted k-nearest neighbours on frozen features, as DINO votes.

    s_i = cos(query, image i of the database)
    score(c) = sum over the k largest s_i with y_i = c of exp(s_i / T)        Wu et al., 2018; Caron et al., 2021

One search with the largest k serves every k and T: a smaller k is a prefix of the neighbours in order.

M queries, N images in the database, D width, C classes of the database.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from foveal.evaluate.accuracy import mean_over_classes
from foveal.evaluate.features import Features

Setting = tuple[int, float]  # k, T

BLOCK = 2**25  # similarities at a time, 128 MB
RERANK = 2**20  # numbers at a time where candidates are looked at exactly, 8 MB: more than a cache holds is slower
SPARE = 32  # candidates beyond k: float32 sums differ in the last digit with the size of a block
CLOSE = 1e-5  # cosines that a search in float32 may put in the wrong order
VOTES = 2**22  # scores at a time, 32 MB


@dataclass(frozen=True, eq=False)
class KNN:
    """Accuracies of M queries under each (k, T), in [0, 1].

    accuracy, top5, balanced: {(k, T): share}; top5 counts the first min(5, k) classes by score, those without a vote in
    their order, as DINO does; balanced is the mean over the queries' classes.  correct: {(k, T): (M,) bool}.
    predicted: {(k, T): (M,) int64}, places in classes, the database's.  best: the most accurate setting on these very
    queries; choose on a validation set what you report on another.
    size: N.  per_class: (C,) images of the database.  unknown: queries whose class the database has no image of, wrong
    by definition.  notes: what else to know, a sentence each.
    """

    accuracy: dict[Setting, float]
    top5: dict[Setting, float]
    balanced: dict[Setting, float]
    correct: dict[Setting, Tensor]
    predicted: dict[Setting, Tensor]
    best: Setting
    size: int
    classes: tuple[str, ...]
    per_class: Tensor
    unknown: int
    definition: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        k, T = self.best
        of = f"k-NN, cosine, {self.size:,} images in the database; {self.definition}"
        return f"{100 * self.accuracy[self.best]:.1f} % (k={k}, T={T:g}); {of}"


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The k nearest of each query, nearest first.  similarity: (M, k) float64, cosines.  index: (M, k) int64."""

    similarity: Tensor
    index: Tensor


def knn(
    database: Features,
    queries: Features,
    k: Sequence[int] = (10, 20, 100, 200),
    temperature: Sequence[float] = (0.07,),
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    chunk: tuple[int, int] | None = None,
) -> KNN:
    """Accuracy of the queries for every k and temperature, from one search.

    Classes are matched by name, so the two sets may list them in other orders or have other ones. A k above N means all
    of the database, and a note says so. temperature: above 0; math.inf counts votes.
    device: where the search runs; the vote is the CPU's, in float64.  dtype: of the database during the search
    (torch.float16 halves its memory; products are summed in float32).  chunk: (queries, images) at a time; None fits
    BLOCK. Results do not depend on it.
    Raises ValueError for features that are not finite, of other widths or definitions, and settings that cannot be.
    """
    check_settings(k, temperature)
    _check(database, queries)
    labels = matched(queries.labels, queries.classes, database.classes)
    per_class = torch.bincount(database.labels, minlength=len(database.classes))
    known = (labels >= 0) & (per_class[labels] > 0)
    n = len(database)
    clipped = sorted({one for one in k if one > n})
    found = neighbours(database.values, queries.values, min(max(k), n), device=device, dtype=dtype, chunk=chunk)
    predicted: dict[Setting, Tensor] = {}
    right: dict[Setting, Tensor] = {}
    right5: dict[Setting, Tensor] = {}
    for one, T in itertools.product(k, temperature):
        place, chosen = _predicted(found, database.labels, labels, len(database.classes), min(one, n), T)
        predicted[one, T] = chosen
        right[one, T] = known & (place == 0)
        right5[one, T] = known & (place < min(5, one))
    accuracy = {setting: float(hit.double().mean()) for setting, hit in right.items()}
    return KNN(
        accuracy=accuracy,
        top5={setting: float(hit.double().mean()) for setting, hit in right5.items()},
        balanced={setting: mean_over_classes(hit, queries.labels) for setting, hit in right.items()},
        correct=right,
        predicted=predicted,
        best=max(accuracy, key=lambda setting: accuracy[setting]),
        size=n,
        classes=database.classes,
        per_class=per_class,
        unknown=int((~known).sum()),
        definition=database.definition or queries.definition,
        notes=_notes(clipped, n, known, queries),
    )


def neighbours(
    database: Tensor,
    queries: Tensor,
    k: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    chunk: tuple[int, int] | None = None,
) -> Neighbours:
    """The k most similar by cosine. database: (N, D).  queries: (M, D).  k in [1, N].

    A search in float32 finds k + SPARE candidates, whose cosines are taken again in float64, row by row; equal ones are
    put in the order of the database. Where candidates are too CLOSE for float32 to have chosen them (features of a
    fresh or collapsed model) the search is done in float64. So what comes out hangs neither on the chunks nor on the
    device, unless more than SPARE images are exact copies of each other.
    Memory: the database in `dtype`, chunk[0] x chunk[1] similarities, k + SPARE candidates for each query of a chunk.
    """
    N, M = len(database), len(queries)
    step_q, step_d = chunk or _chunk(N, M)
    if min(step_q, step_d) < 1 or not 1 <= k <= N:
        raise ValueError(f"chunk={chunk} must be 1 or more each, k={k} in [1, {N}]")
    held = F.normalize(database.float(), dim=1).to(dtype)
    unit = F.normalize(queries.float(), dim=1)
    most = min(k + SPARE, N)
    exact = torch.device("cpu") if torch.device(device).type == "mps" else device  # no float64 there
    parts = []
    for first in range(0, M, step_q):
        asked = unit[first : first + step_q]
        near, at = _exactly(held, asked, _candidates(held, asked.to(device), most, step_d))
        unsure = near[:, k - 1] - near[:, -1] < CLOSE
        if most < N and bool(unsure.any()):
            again = asked[unsure]
            better = _exactly(held, again, _candidates(held, again.to(exact, torch.float64), most, step_d))
            near[unsure], at[unsure] = better
        parts.append((near[:, :k].clone(), at[:, :k].clone()))
    return Neighbours(torch.cat([near for near, _ in parts]), torch.cat([at for _, at in parts]))


def _candidates(held: Tensor, asked: Tensor, most: int, step: int) -> Tensor:
    """(Q, most) int64 on the CPU: where the products with asked (Q, D) are largest, chunk after chunk, in its dtype."""
    best: tuple[Tensor, Tensor] | None = None
    for first in range(0, len(held), step):
        part = held[first : first + step].to(asked.device).to(asked.dtype)
        near, at = (asked @ part.T).topk(min(most, len(part)), dim=1, sorted=False)
        at = at + first
        if best is not None:
            near, at = torch.cat([best[0], near], 1), torch.cat([best[1], at], 1)
            near, kept = near.topk(min(most, near.shape[1]), dim=1, sorted=False)
            at = at.gather(1, kept)
        best = near, at
    assert best is not None
    return best[1].cpu()


def _exactly(held: Tensor, asked: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """The candidates' cosines in float64 and their places, nearest first, ties in the order of the database."""
    candidates = candidates.sort(dim=1).values
    step = max(1, RERANK // (candidates.shape[1] * held.shape[1]))
    near = [
        (held[at].double() * one[:, None].double()).sum(-1)
        for at, one in zip(candidates.split(step), asked.split(step), strict=True)
    ]
    similarity, order = torch.cat(near).sort(dim=1, descending=True, stable=True)
    return similarity, candidates.gather(1, order)


def vote(found: Neighbours, labels: Tensor, classes: int, k: int, temperature: float) -> Tensor:
    """Scores of the classes by the k nearest: (M, C) float64, each row up to a factor of its own.

    labels: (N,) of the database.  The factor exp(-s_1 / T) keeps a tiny T from running over.
    """
    near = found.similarity[:, :k].double()
    weight = ((near - near[:, :1]) / temperature).exp()
    scores = weight.new_zeros(len(near), classes)
    return scores.scatter_add_(1, labels[found.index[:, :k]], weight)


def ranked(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """How many classes come before each label, and the class that comes first; equal scores in the order of classes.

    scores: (M, C).  labels: (M,), negative for none of the classes: what is said of it means nothing.
    """
    at = labels.clamp_min(0)[:, None]
    own = scores.gather(1, at)
    before = torch.arange(scores.shape[1]) < at
    place = ((scores > own) | ((scores == own) & before)).sum(1)
    return place, (scores == scores.amax(1, keepdim=True)).to(torch.uint8).argmax(1)


def _predicted(
    found: Neighbours, labels: Tensor, truth: Tensor, classes: int, k: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """`ranked` of all queries, some at a time."""
    step = max(1, VOTES // classes)
    parts = [
        ranked(vote(Neighbours(near, at), labels, classes, k, temperature), true)
        for near, at, true in zip(found.similarity.split(step), found.index.split(step), truth.split(step), strict=True)
    ]
    return torch.cat([place for place, _ in parts]), torch.cat([chosen for _, chosen in parts])


def matched(labels: Tensor, classes: Sequence[str], others: Sequence[str]) -> Tensor:
    """labels, places in `classes`, as places in `others` by name; -1 where that has no such class."""
    places = {name: place for place, name in enumerate(others)}
    return torch.tensor([places.get(name, -1) for name in classes])[labels]


def _chunk(N: int, M: int) -> tuple[int, int]:
    images = min(N, 2**16)
    return min(M, max(1, BLOCK // images)), images


def check_settings(k: Sequence[int], temperature: Sequence[float]) -> None:
    """Raise ValueError for settings that cannot be."""
    if not k or min(k) < 1:
        raise ValueError(f"k={tuple(k)}: give one or several numbers of neighbours, 1 or more")
    if not temperature or not min(temperature) > 0:
        raise ValueError(f"temperature={tuple(temperature)}: give one or several above 0")


def _check(database: Features, queries: Features) -> None:
    if database.values.shape[1] != queries.values.shape[1]:
        raise ValueError(f"the database is {database.values.shape[1]} wide, the queries {queries.values.shape[1]}")
    told = {one.definition for one in (database, queries)} - {""}
    if len(told) > 1:
        raise ValueError(
            f"features of different definitions: the database has {database.definition!r}, the queries"
            f" {queries.definition!r}"
        )
    database.checked("database")
    queries.checked("query")


def _notes(clipped: list[int], n: int, known: Tensor, queries: Features) -> tuple[str, ...]:
    notes = [f"k={one} is more than the {n:,} images of the database: all of them vote" for one in clipped]
    if not bool(known.all()):
        lost = sorted({queries.classes[c] for c in queries.labels[~known].tolist()})
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        notes.append(
            f"{int((~known).sum()):,} of {len(known):,} queries are of classes that the database has no image of"
            f" ({', '.join(lost[:5])}{more}): counted as wrong"
        )
    return tuple(notes)
