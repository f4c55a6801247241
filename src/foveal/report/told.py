"""How the runs were made, in sentences and rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from foveal.report.gather import Arm, Subject
from foveal.report.ways import is_guided, weight_of
from foveal.report.words import (
    BG_GAP,
    MIXERS,
    PROBED,
    SCHEDULES,
    TOKEN_MIXERS,
    guided_by,
    level,
    listed,
    percent,
    tuned,
)
from foveal.train.run import Run


def arms_told(subject: Subject) -> list[str]:
    """What the arms have in common, then one sentence per arm on what is its own; of many arms, of each way once."""
    run = subject.first
    counts = sorted({arm.runs[0].results.get("images", 0) for arm in subject.arms})
    count = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    who = "Every run" if len(subject.arms) > 1 or len(subject.base.runs) > 1 else "It"
    told: list[str] = [
        f"{who} starts from {_start(run)} and sees {count} training images for {run.settings.epochs} epochs."
    ]
    if subject.is_wide:
        return told + _ways(subject)
    for arm in subject.arms:
        settings, sources, how = arm.runs[0].settings, ["the class labels"], []
        if settings.mix != "none":
            sources[0] = "mixed images and labels"
            how.append(f"{settings.mix}, {MIXERS.get(settings.mix, 'which mixes images and labels')}")
        if settings.token_mix != "none":
            sources[0] = "mixed images and labels"
            what = TOKEN_MIXERS.get(settings.token_mix, "tokens are mixed")
            how.append(f"inside the model {what}")
        if settings.guide != "none":
            sources.append("guidance")
            how.append(f"{settings.guide}{_weight(settings)}, {guided_by(settings.guide)}")
        if how:
            told.append(_named(arm, subject) + f" learns from {' and '.join(sources)}: {'; '.join(how)}.")
        elif subject.others:
            told.append(_named(arm, subject) + " learns from the class labels alone.")
        if own := _what_is_tuned(settings):
            told.append(own if len(subject.arms) == 1 else Markup("{}: {}").format(_named(arm, subject), own))
    return told


def source_told(subject: Subject) -> list[str]:
    """How well the source of the guidance looks at the objects, with the warnings: a sentence for what differs."""
    groups: dict[str, list[str]] = {}
    for arm in subject.arms:
        held = arm.runs[0].results.get("source") if is_guided(arm) else None
        if held:
            groups.setdefault(_gaze(held), []).append(arm.name)
    if len(groups) < 2:
        return list(groups)
    return [f"{listed(names)}: {said[0].lower()}{said[1:]}" for said, names in groups.items()]


def _gaze(held: Mapping[str, Any]) -> str:
    """What results.json says of the source's attention."""
    pointing, even, n = (held.get(name) for name in ("pointing", "even", "n"))
    warning = str(held.get("warning") or "").rstrip(".")
    if pointing is None:
        said = (
            "Where the source of the guidance looks was not measured: that takes object masks and readable attention."
        )
        return f"{said} Warning: {warning}." if warning else said
    share, over = percent(pointing, 0), f" ({n:,} images)" if n else ""
    beside = "" if even is None else f", an even map {percent(even, 0)} %"
    said = f"The source of the guidance puts {share} % of its attention on the objects{beside}{over}."
    if not warning:
        return said
    return f"Warning: {warning}{over}." if f"{share} %" in warning else f"{said} Warning: {warning}."


def table_note(subject: Subject) -> str:
    """What the numbers and brackets of the table are."""
    arm = subject.numbers[f"accuracy/{subject.main_test}"][subject.arms[-1].name]
    gap = "; BG-Gap in points" if BG_GAP.key in subject.numbers else ""
    note = f"In percent{gap}. In brackets the {level(arm.over_images)} interval over {arm.over_images.over}."
    if len(arm.values) > 1:
        note += f" Below: {level(arm.over_seeds)} interval over {arm.over_seeds.over}, then each seed."
    return note


def machine(run: Run) -> list[tuple[str, str]]:
    """Versions, device, precision, time: the conditions of the numbers."""
    held = run.results
    rows = [(name, str(value)) for name, value in run.card.get("versions", {}).items()]
    rows += [(name, str(held[name])) for name in ("device", "precision") if name in held]
    rows.append(("initial weights", str(run.card.get("init", run.settings.init))))
    if "parameters" in held:
        rows.append(("parameters", f"{held['parameters']:,}"))
    if "seconds" in held:
        rows.append(("training time of a run", f"{held['seconds']:,.0f} s"))
    if held.get("images_per_second"):
        rows.append(("training images per second", f"{held['images_per_second']:,.0f}"))
    if "finished" in held:
        rows.append(("finished", str(held["finished"])))
    return rows


def _ways(subject: Subject) -> list[str]:
    settings = [arm.runs[0].settings for arm in subject.arms]
    mixes = [mix for mix in dict.fromkeys(one.mix for one in settings) if mix in MIXERS]
    tokens = [token for token in dict.fromkeys(one.token_mix for one in settings) if token in TOKEN_MIXERS]
    guides = [guide for guide in dict.fromkeys(one.guide for one in settings) if guide != "none"]
    tunes = [said for said in dict.fromkeys(_what_is_tuned(one) for one in settings) if said]
    said: list[str] = [
        Markup("<strong>{}</strong>: {}.").format(mix, MIXERS[mix].removeprefix("which ")) for mix in mixes
    ]
    said += [Markup("<strong>{}</strong>: inside the model {}.").format(token, TOKEN_MIXERS[token]) for token in tokens]
    does = {guide: guided_by(guide).removeprefix("which ") for guide in guides}
    said += [Markup("<strong>{}</strong>: {}.").format(guide, what) for guide, what in does.items()]
    return [*said, *(f"In some arms: {one[0].lower()}{one[1:]}" for one in tunes)]


def _weight(settings: Any) -> str:
    """ " with weight 10, falling linearly to zero"; "" where neither is known."""
    weight, schedule = weight_of(settings), SCHEDULES.get(getattr(settings, "guide_schedule", "constant"), "")
    said = [] if weight is None else [f" with weight {weight:g}"]
    return ", ".join([*said, *([schedule] if schedule else [])])


def _what_is_tuned(settings: Any) -> str:
    probed = PROBED if getattr(settings, "head_start", "random") == "probe" else ""
    return " ".join(part for part in (tuned(getattr(settings, "tune", "all")), probed) if part)


def _named(arm: Arm, subject: Subject) -> Markup:
    return Markup("<strong>{}</strong>").format(arm.name) if subject.others else Markup("It")


def _start(run: Run) -> str:
    """Where the weights began, in words; the whole of it is among the versions."""
    init = run.settings.init
    if run.settings.model == "demo" and init == "pretrained":
        init = "demo"
    words = {"none": "random weights", "demo": "the encoder that comes with foveal", "pretrained": "pretrained weights"}
    return words.get(init, f"the weights {Path(init).name}")
