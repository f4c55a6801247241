"""Attention kept or left: how far it moves from where the source looks, and how hard the guidance pulls.

    drift   mean over images, blocks and heads of 1/2 sum_n |a_n - a'_n|: the share of the class token's attention that
            lies elsewhere than in the source, in [0, 1]
    ratio   norm of the guidance's gradient over that of the task's

Guidance that is too weak is ignored, guidance that is too strong makes the model rigid; the rules are those of
`foveal.report.words`. A plain arm is compared with only if it differs in nothing but the guidance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from foveal.report import chart
from foveal.report.axes import log_scale, number, scale
from foveal.report.gather import Arm, Subject
from foveal.report.tables import MISSING
from foveal.report.ways import is_guided, plain_of
from foveal.report.words import ATTENTIVE, HELD, SAME_DRIFT, STILL, STRONG, WEAK, percent
from foveal.train.run import Run

DRIFT, RATIO = "drift", "gradient_ratio"
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Panel:
    """Charts of the arms that share them; a chart is None where nothing was written down."""

    arms: tuple[Arm, ...]
    drift: Markup | None
    ratio: Markup | None


@dataclass(frozen=True)
class Plain:
    """What guidance is judged against: the end of plain training."""

    name: str
    drift: float
    accuracy: float  # on validation


@dataclass(frozen=True)
class Judged:
    """What is said of an arm's guidance: `word` is ignored, rigid, followed, or "" where it cannot be told.

    why: a sentence.  cells: the same as a row under COLUMNS.
    """

    name: str
    word: str
    why: str
    cells: tuple[str, ...]


COLUMNS = ("gradient ratio", "second half", "drift, %", "plain’s", "validation, %", "plain’s")


def panels(subject: Subject, pairs: Sequence[tuple[Arm, ...]]) -> list[Panel]:
    """A panel for each pair of a baseline and an arm that logged anything; the axes are common."""
    found = []
    for pair in pairs:
        drift = [line for arm in pair for line in _lines(arm, DRIFT, _kind(arm, pair))]
        ratio = [line for arm in pair for line in _lines(arm, RATIO, _kind(arm, pair))]
        if drift or ratio:
            found.append((pair, drift, ratio))
    if not found:
        return []
    up = scale([0.0, *(y for _, drift, _ in found for line in drift for y in line.ys)], 4, within=(0, 100))
    log = log_scale([WEAK, STRONG, *(y for _, _, ratio in found for line in ratio for y in line.ys)])
    return [
        Panel(
            pair,
            chart.curves(drift, label=_heard(pair, "drift", DRIFT, 100, " %"), unit="%", up=up) if drift else None,
            chart.curves(
                ratio, label=_heard(pair, "gradient ratio", RATIO, 1, ""), unit="", up=log, levels=(WEAK, STRONG)
            )
            if ratio
            else None,
        )
        for pair, drift, ratio in found
    ]


def judged(subject: Subject) -> list[Judged]:
    """A verdict on every arm with guidance; [] without any."""
    found = []
    for arm in subject.arms:
        if not is_guided(arm):
            continue
        plain = plain_of(subject, arm)
        seeds = [run.settings.seed for run in arm.runs]
        runs = arm.runs
        against = None
        if plain is not None:
            both = [seed for seed in seeds if seed in {run.settings.seed for run in plain.runs}]
            theirs = _of(plain.runs, both)
            if both and math.isfinite(_end(theirs)):
                runs, against = _of(arm.runs, both), Plain(plain.name, _end(theirs), _accuracy(theirs))
        ratios, drift, accuracy = [_series(run, RATIO)[1] for run in runs], _end(runs), _accuracy(runs)
        word, why = judge(ratios, drift, accuracy, against, arm.runs[0].settings.guide in ATTENTIVE)
        base = (against.drift, against.accuracy) if against else (math.nan, math.nan)
        shares = (_cell(100 * one, ".1f") for one in (drift, base[0], accuracy, base[1]))
        found.append(Judged(arm.name, word, why, (_cell(_median(ratios)), _cell(_late(ratios)), *shares)))
    return found


def judge(
    ratios: Sequence[Floats], drift: float, accuracy: float, plain: Plain | None, attentive: bool = True
) -> tuple[str, str]:
    """The verdict in a word, and what it rests on in a sentence.

    ratios: the gradient ratio of each epoch, one array a run, NaN where the guidance was off.  drift: where it ended,
    in [0, 1], NaN if unknown.  accuracy: on validation.  attentive: the guide aims at the attention itself.
    """
    median = _median(ratios)
    late = _late(ratios)
    known = math.isfinite(drift)
    rests = [_ratio_told(median, late)]
    if known:
        beside = f", with {plain.name} {percent(plain.drift)} %" if plain else ""
        rests.append(f"{percent(drift)} % of the attention ended elsewhere than in the source{beside}")
    else:
        rests.append("drift was not measured")
    weak = median < WEAK  # False for NaN
    unheld = attentive and known and plain is not None and not drift < (1 - SAME_DRIFT) * plain.drift
    still = known and (drift < HELD * plain.drift if plain else drift < STILL)
    no_better = plain is None or not accuracy > plain.accuracy
    if plain is not None and math.isfinite(accuracy) and math.isfinite(plain.accuracy):
        rests.append(f"validation accuracy {percent(accuracy)} %, with {plain.name} {percent(plain.accuracy)} %")
    said = "; ".join(rests)
    if plain is None:
        said += "; there is no plain arm with the same settings and seeds to compare with"
    elif not attentive:
        said += "; this guide does not aim at the attention, so drift alone does not make it ignored"
    said = f"{said[0].upper()}{said[1:]}."
    if not math.isfinite(median) and not (known and plain is not None and attentive):
        return "", said
    if weak or unheld:
        return "ignored", said
    return ("rigid" if late > STRONG and still and no_better else "followed"), said


def _ratio_told(median: float, late: float) -> str:
    if not math.isfinite(median):
        return "its gradient was not measured"
    second = f", {late:.2g} in the second half" if math.isfinite(late) else "; off in the second half"
    return f"median gradient ratio {median:.2g}{second}"


def _median(ratios: Sequence[Floats]) -> float:
    held = np.concatenate([*ratios, np.empty(0)])
    held = held[np.isfinite(held)]
    return float(np.median(held)) if len(held) else math.nan


def _late(ratios: Sequence[Floats]) -> float:
    return _median([each[len(each) // 2 :] for each in ratios])


def _cell(value: float, form: str = ".2g") -> str:
    return f"{value:{form}}" if math.isfinite(value) else MISSING


def _of(runs: Sequence[Run], seeds: Sequence[int]) -> tuple[Run, ...]:
    return tuple(run for run in runs if run.settings.seed in seeds)


def _end(runs: Sequence[Run]) -> float:
    """Mean over runs of the drift of the last epoch; NaN if a run has none."""
    ends = []
    for run in runs:
        ys = _series(run, DRIFT)[1]
        ends.append(ys[np.isfinite(ys)][-1] if np.isfinite(ys).any() else math.nan)
    return float(np.mean(ends)) if ends else math.nan


def _accuracy(runs: Sequence[Run]) -> float:
    """Mean over runs of the validation accuracy of the kept epoch."""
    found = [(run.results.get("val") or {}).get("accuracy", math.nan) for run in runs]
    return float(np.mean(found)) if found else math.nan


def _series(run: Run, column: str) -> tuple[Floats, Floats]:
    """(epochs, values) of a column; NaN where there is nothing to tell."""
    rows = [(row["epoch"], row.get(column)) for row in run.metrics]
    values = [math.nan if value is None else float(value) for _, value in rows]
    return np.array([float(epoch or 0) for epoch, _ in rows]), np.array(values, np.float64)


def _kind(arm: Arm, pair: tuple[Arm, ...]) -> str:
    return "arm" if arm is pair[-1] else "base"


def _lines(arm: Arm, column: str, kind: str) -> list[chart.Line]:
    """Thin lines of single runs and their mean, of ratios the geometric one; [] where no run has a value."""
    factor = 100.0 if column == DRIFT else 1.0
    held = [(xs, factor * ys) for xs, ys in (_series(run, column) for run in arm.runs) if np.isfinite(ys).any()]
    if not held:
        return []
    shortest = min(len(ys) for _, ys in held)
    rows = np.stack([ys[:shortest] for _, ys in held])
    if column == RATIO:
        with np.errstate(divide="ignore"):
            mean = np.exp(np.log(rows).mean(0))
    else:
        mean = rows.mean(0)
    thin = [chart.Line(kind, xs.tolist(), _above(column, ys), thin=True) for xs, ys in held] if len(held) > 1 else []
    return [*thin, chart.Line(kind, held[0][0][:shortest].tolist(), _above(column, mean))]


def _above(column: str, ys: Floats) -> list[float]:
    """A ratio of 0 has no place on a logarithmic axis: a gap."""
    return [math.nan if column == RATIO and not y > 0 else float(y) for y in ys]


def _heard(pair: tuple[Arm, ...], what: str, column: str, factor: float, unit: str) -> str:
    said = []
    for arm in pair:
        ends = [ys[np.isfinite(ys)] for _, ys in (_series(run, column) for run in arm.runs)]
        ends = [ys for ys in ends if len(ys)]
        if ends:
            first, last = (factor * float(np.mean([ys[at] for ys in ends])) for at in (0, -1))
            digits = 1 if unit else 3
            said.append(f"{arm.name} {number(first, digits)}{unit} at first, {number(last, digits)}{unit} at last")
    return f"{what} by epoch: {'; '.join(said)}"
