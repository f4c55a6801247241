"""Of many arms a handful whose pictures and curves are shown, by a rule that leaves nothing to taste."""

from __future__ import annotations

from dataclasses import dataclass, replace

from foveal.report.gather import Arm, Subject
from foveal.report.words import listed, pointing_of


@dataclass(frozen=True)
class Chosen:
    """Arms in the order of the comparison, first the run of a seed that all have; why: a sentence, "" if all arms."""

    arms: tuple[Arm, ...]
    why: str


def chosen(subject: Subject) -> Chosen:
    """All arms while they are few; else the baseline, the best, the worst, and the one that looks at the object most.

    Best and worst by mean accuracy on the main test set, of the arms that are compared with the first.
    """
    if not subject.is_wide:
        return Chosen(_same_seed_first(subject.arms), "")
    test, base = subject.main_test, subject.base
    there = [arm for arm in subject.others if arm.base == base.name] or list(subject.others)
    accuracy = {arm.name: _mean(subject, f"accuracy/{test}", arm) for arm in there}
    pointing = {arm.name: _mean(subject, pointing_of(test).key, arm) for arm in there}
    reasons: dict[str, list[str]] = {base.name: ["the baseline" if base.name in subject.bases else "the first"]}
    for held, pick, reason in (
        (accuracy, max, f"the highest accuracy on {test}"),
        (accuracy, min, "the lowest"),
        (pointing, max, "the most attention on the object"),
    ):
        known = {name: value for name, value in held.items() if value is not None}
        if known:
            reasons.setdefault(pick(known, key=lambda name: known[name]), []).append(reason)
    told = [f"{name} ({listed(why)})" for name, why in list(reasons.items())[1:]]
    arms = tuple(arm for arm in subject.arms if arm.name in reasons)
    return Chosen(
        _same_seed_first(arms),
        f"Shown are {base.name}, {reasons[base.name][0]}, and of the {len(subject.others)} others {listed(told)}.",
    )


def _same_seed_first(arms: tuple[Arm, ...]) -> tuple[Arm, ...]:
    shared = set.intersection(*({run.settings.seed for run in arm.runs} for arm in arms))
    first = min(shared, default=None)
    return tuple(replace(arm, runs=tuple(sorted(arm.runs, key=lambda run: run.settings.seed != first))) for arm in arms)


def _mean(subject: Subject, key: str, arm: Arm) -> float | None:
    found = subject.numbers.get(key, {}).get(arm.name)
    return None if found is None else found.over_images.mean
