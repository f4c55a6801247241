"""The top of a page: what was found in a sentence, what it rests on, and the large numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from foveal.report import sections
from foveal.report.axes import number
from foveal.report.gather import Arm, Subject
from foveal.report.told import arms_told
from foveal.report.words import (
    BG_GAP,
    NOTHING,
    THESE,
    WHERE,
    accuracy_of,
    between,
    evidence,
    judgement,
    level,
    listed,
    percent,
    pointing_of,
    verdict,
)

# of an arm's accuracy -> the sentence on all arms of which that may be said
SAID = {
    "better": "{arms} beat {base} {where}. The interval over the test images and that over the seeds leave out zero.",
    f"better{THESE}": "{arms} beat {base} {where}, in these runs: with other seeds that need not be so.",
    NOTHING: "{arms} against {base}: no difference can be claimed {where}.",
    f"worse{THESE}": "{arms} lost to {base} {where}, in these runs: with other seeds that need not be so.",
    "worse": "{arms} lost to {base} {where}. The interval over the test images and that over the seeds leave out zero.",
}


def headline(subject: Subject) -> dict[str, Any]:
    """Title, sentences below it, and the large numbers."""
    test = subject.main_test
    name, where = subject.first.split["data"], subject.first.card["architecture"]
    if not subject.others:
        return _of_one(subject)
    kicker = f"a comparison on {name}, {_seeds(subject)}"
    title = f"{len(subject.arms)} ways to train {where}, compared on {name}"
    if subject.is_wide:
        return {"kicker": kicker, "title": title, "verdicts": _grouped(subject), "lede": [], "facts": []}
    verdicts = []
    for arm in subject.arms:
        found = subject.numbers[f"accuracy/{test}"][arm.name]
        if arm.base is not None and found.difference is not None:
            said = verdict(arm.name, arm.base, test, found.difference, found.difference_over_seeds)
            verdicts.append((said, evidence(found.difference, found.difference_over_seeds)))
    if len(subject.others) > 1 or not verdicts:
        return {"kicker": kicker, "title": title, "verdicts": verdicts, "lede": [], "facts": []}
    measures = [m for m in (accuracy_of(test), BG_GAP, pointing_of(test)) if m.key in subject.numbers]
    return {
        "kicker": kicker,
        "title": verdicts[0][0],
        "verdicts": [("", verdicts[0][1])],
        "lede": arms_told(subject),
        "facts": sections.facts(subject, measures),
    }


def _of_one(subject: Subject) -> dict[str, Any]:
    test, arm = subject.main_test, subject.base
    accuracy = subject.numbers[f"accuracy/{test}"][arm.name].over_images
    measures = [m for m in subject.measures if m.key.split("/")[0] in ("accuracy", "bg_gap")]
    measures += [m for m in (pointing_of(test),) if m.key in subject.numbers]
    what = "the test images" if test == "test" else test
    return {
        "kicker": f"a run on {subject.first.split['data']}",
        "title": f"{subject.first.card['architecture']} is right on {percent(accuracy.mean)} % of {what}.",
        "verdicts": [("", f"{level(accuracy)} interval {between(accuracy)} over {accuracy.over}")],
        "lede": [],
        "facts": sections.facts(subject, measures),
    }


def _grouped(subject: Subject) -> list[tuple[Markup, str]]:
    """What can be said of many arms: a sentence for each judgement and baseline, and a word on chance."""
    measure = accuracy_of(subject.main_test)
    where = WHERE.get(subject.main_test, f"on {subject.main_test}")
    held, verdicts, count = subject.numbers[measure.key], [], 0
    for base in subject.bases:
        groups: dict[str, list[Arm]] = {said: [] for said in SAID}
        for arm in subject.arms:
            found = held[arm.name]
            if arm.base == base and found.difference is not None:
                groups[judgement(measure, found.difference, found.difference_over_seeds)].append(arm)
                count += 1
        for judged, arms in groups.items():
            if arms:
                names = Markup(_named(subject, arms, sizes=judged != NOTHING))
                verdicts.append((Markup(SAID[judged]).format(arms=names, base=base, where=where), ""))
    if count > 2:
        verdicts.append(
            (
                Markup(""),
                f"There are {count} differences here, each with a 95 % interval: where nothing differs, about one such"
                " interval in 20 leaves out zero by chance.",
            )
        )
    return verdicts


def _named(subject: Subject, arms: Sequence[Arm], sizes: bool) -> str:
    held = subject.numbers[f"accuracy/{subject.main_test}"]
    names = []
    for arm in arms:
        found = held[arm.name].difference
        size = f" ({number(100 * found.mean, sign=True)})" if sizes and found is not None else ""
        names.append(Markup('<span class="arm">{}</span>{}').format(arm.name, size))
    return listed(names)


def _seeds(subject: Subject) -> str:
    counts = {len(arm.runs) for arm in subject.arms}
    if len(counts) > 1:
        return f"{min(counts)} to {max(counts)} seeds each"
    count = counts.pop()
    return f"{count} seeds each" if count > 1 else "one seed each"
