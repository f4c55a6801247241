"""How the runs were made, in sentences and rows."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from foveal.report.gather import Arm, Subject
from foveal.report.words import BG_GAP, GUIDES, MIXERS, TOKEN_MIXERS, level
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
            what = GUIDES.get(settings.guide, "a loss beside that of the task")
            how.append(f"{settings.guide} with weight {settings.guide_weight:g}, {what}")
        if how:
            told.append(_named(arm, subject) + f" learns from {' and '.join(sources)}: {'; '.join(how)}.")
        elif subject.others:
            told.append(_named(arm, subject) + " learns from the class labels alone.")
    return told


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
    guides = [guide for guide in dict.fromkeys(one.guide for one in settings) if guide in GUIDES]
    said: list[str] = [
        Markup("<strong>{}</strong>: {}.").format(mix, MIXERS[mix].removeprefix("which ")) for mix in mixes
    ]
    said += [Markup("<strong>{}</strong>: inside the model {}.").format(token, TOKEN_MIXERS[token]) for token in tokens]
    return said + [Markup("<strong>{}</strong>: {}.").format(guide, GUIDES[guide]) for guide in guides]


def _named(arm: Arm, subject: Subject) -> Markup:
    return Markup("<strong>{}</strong>").format(arm.name) if subject.others else Markup("It")


def _start(run: Run) -> str:
    """Where the weights began, in words; the whole of it is among the versions."""
    init = run.settings.init
    if run.settings.model == "demo" and init == "pretrained":
        init = "demo"
    words = {"none": "random weights", "demo": "the encoder that comes with foveal", "pretrained": "pretrained weights"}
    return words.get(init, f"the weights {Path(init).name}")
