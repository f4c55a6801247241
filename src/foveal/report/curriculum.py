"""The curriculum of horizontal token mixing: how many images were easy, and how many tokens made way, by epoch.

Choi et al., 2022 (TokenMixup), figure 4: few images at first, many after the warm-up, then level. A panel for every arm
that mixes so, all on one axis, and a sentence on each, which says so where the mixing did next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from foveal.report import chart
from foveal.report.axes import number, scale
from foveal.report.gather import Arm, Subject
from foveal.report.sections import lines_of

EASY, REPLACED, GAIN = "train_token_easy", "train_token_replaced", "train_token_gain"
INERT = 0.1  # percent of the tokens; of 256 that is one in every four images


@dataclass(frozen=True)
class Curriculum:
    """An arm's chart and what it says."""

    arm: Arm
    chart: Markup
    says: str


def curricula(subject: Subject) -> list[Curriculum]:
    """One for every arm whose runs wrote the shares down; [] where none did."""
    found = [(arm, lines_of(arm, EASY, "base", 100), lines_of(arm, REPLACED, "arm", 100)) for arm in subject.arms]
    found = [(arm, easy, replaced) for arm, easy, replaced in found if easy and replaced]
    if not found:
        return []
    drawn = [line for _, easy, replaced in found for line in (*easy, *replaced)]
    up = scale([0.0, *(y for line in drawn for y in line.ys)], 4, within=(0, 100))
    made = []
    for arm, easy, replaced in found:  # the last line of each is the mean over the seeds
        gain = lines_of(arm, GAIN, "arm", 100)
        says = reading(easy[-1].ys, replaced[-1].ys, gain[-1].ys if gain else [])
        label = f"{arm.name}, easy images and replaced tokens by epoch"
        made.append(Curriculum(arm, chart.curves([*easy, *replaced], label=label, unit="%", up=up), says))
    return made


def reading(easy: Sequence[float], replaced: Sequence[float], gain: Sequence[float] = ()) -> str:
    """What a curve says, in a sentence or two. All in percent, an entry per epoch: of images, of tokens, of attention.

    Epochs that count as idle are those in which fewer than INERT percent of the tokens were replaced.
    """
    most = max(replaced)
    if most < INERT:
        at_most = f"at most {_share(most)} of the tokens" if most > 0 else "not one token"
        why = (
            "attention hardly differed between images by more than rho: lower rho, or give it in means (rho_unit)"
            if max(easy) >= 1
            else "hardly any image was ever easy: raise tau, or give ScoreNet a larger score_weight"
        )
        return f"Inert: in no epoch was more than {_share(INERT)} of the tokens replaced ({at_most}), as {why}."
    if len(easy) == 1:
        said = f"In the only epoch {_share(easy[0])} of the images were easy and {_share(replaced[0])} of the tokens"
        return f"{said} were replaced{_worth(gain)}."
    said = (
        f"Easy were {_share(easy[0])} of the images in the first epoch and {_share(easy[-1])} in the last, in which "
        f"{_share(replaced[-1])} of the tokens were replaced{_worth(gain)}"
    )
    idle = int(np.argmax(np.asarray(replaced) >= INERT))
    return f"{said}; before epoch {idle + 1} next to none were." if idle else f"{said}."


def _worth(gain: Sequence[float]) -> str:
    return f", which won {_share(gain[-1])} of all attention for the average image" if len(gain) else ""


def _share(percent: float) -> str:
    return f"{number(percent, 2 if 0 < percent < 0.95 else 1)}\u00a0%"
