"""One self-contained HTML page per run or comparison: no network, no JavaScript, light and dark, any width."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import foveal
from foveal.data import Data, Images
from foveal.explain import save
from foveal.report import classes, sections, tables, tiles
from foveal.report.gather import Arm, Subject, even_gaze, of_comparison, of_run, test_images
from foveal.report.words import (
    BG_GAP,
    GUIDES,
    MIXERS,
    TESTS,
    accuracy_of,
    between,
    evidence,
    level,
    percent,
    pointing_of,
    verdict,
)
from foveal.train.comparing import Comparison
from foveal.train.run import Run

MOST_TESTS = 3  # sets whose pictures are shown


def run_page(run: Run, *, data: Data | None = None) -> Path:
    """Write report.html of a run into its folder; the path.

    data: the run's data set if it is at hand already; else it is loaded from the settings for the pictures.
    A piece that is missing (no masks, no attention, images gone) is left out, and the page says so.
    """
    return save(render(of_run(run), data).encode(), run.folder / "report.html")


def comparison_page(comparison: Comparison, *, data: Data | None = None, command: str | None = None) -> Path:
    """Write report.html of a comparison into its folder; the path.

    data: as for `run_page`.  command: what makes the whole comparison; else the page lists those of its runs.
    """
    return save(render(of_comparison(comparison, command), data).encode(), comparison.folder / "report.html")


def render(subject: Subject, data: Data | None = None) -> str:
    """The page as text."""
    found = data if data is not None else test_images(subject.first)
    missing = [] if isinstance(found, Data) else [found]
    tests = found.tests if isinstance(found, Data) else {}
    even = {name: even_gaze(images) for name, images in tests.items()}
    differ, shared = tables.setting_rows(subject.arms)
    context = _headline(subject) | {
        "subject": subject,
        "run": subject.first,
        "forest": sections.forest(subject),
        "backgrounds": sections.backgrounds(subject),
        "gazes": sections.gazes(subject, even),
        "even": even,
        "pictures": _pictures(subject, tests, missing),
        "looks": _looks(subject),
        "curves": sections.curves(subject),
        "classes": classes.by_class(subject),
        "confusion": None if subject.others else classes.confusion(subject.first, subject.main_test),
        "lessons": _lessons(subject),
        "table": tables.numbers(subject),
        "table_note": _table_note(subject),
        "arms_told": _arms_told(subject),
        "differ": differ,
        "shared": shared,
        "machine": _machine(subject.first),
        "missing": missing,
        "words": {"tests": TESTS},
        "version": foveal.__version__,
        "style": Markup(_style()),
    }
    if not context["gazes"]:
        missing.append("Attention on the object is left out: it needs object masks and attention that can be read.")
    if not context["curves"]:
        missing.append("Learning curves are left out: no epoch was written down.")
    if not context["lessons"]:
        missing.append("Training images are left out: the run kept none.")
    return _environment().get_template("page.html").render(context)


def _headline(subject: Subject) -> dict[str, Any]:
    """Title, sentences below it, and the large numbers."""
    test = subject.main_test
    measures = [m for m in (accuracy_of(test), BG_GAP, pointing_of(test)) if m.key in subject.numbers]
    name, where = subject.first.split["data"], subject.first.card["architecture"]
    if not subject.others:
        accuracy = subject.numbers[f"accuracy/{test}"][subject.base.name].over_images
        measures = [m for m in subject.measures if m.key.split("/")[0] in ("accuracy", "bg_gap")] + measures[2:]
        return {
            "kicker": f"a run on {name}",
            "title": f"{where} is right on {percent(accuracy.mean)} % of {_the(test)}.",
            "verdicts": [("", f"{level(accuracy)} interval {between(accuracy)} over {accuracy.over}")],
            "lede": [],
            "facts": sections.facts(subject, measures),
        }
    verdicts = []
    for arm in subject.others:
        found = subject.numbers[f"accuracy/{test}"][arm.name]
        assert found.difference is not None
        said = verdict(arm.name, subject.base.name, test, found.difference, found.difference_over_seeds)
        verdicts.append((said, evidence(found.difference, found.difference_over_seeds)))
    kicker = f"a comparison on {name}, {_seeds(subject)}"
    if len(subject.others) > 1:
        title = f"{len(subject.arms)} ways to train {where}, compared on {name}"
        return {"kicker": kicker, "title": title, "verdicts": verdicts, "lede": [], "facts": []}
    return {
        "kicker": kicker,
        "title": verdicts[0][0],
        "verdicts": [("", verdicts[0][1])],
        "lede": _arms_told(subject),
        "facts": sections.facts(subject, measures),
    }


def _pictures(subject: Subject, tests: Mapping[str, Images], missing: list[str]) -> list[tuple[str, list[tiles.Group]]]:
    """Overlays per test set; those of a set without attention are missing."""
    found = []
    for name in sorted(tests.keys() & set(subject.tests), key=lambda name: name != subject.main_test)[:MOST_TESTS]:
        predictions = [arm.runs[0].predictions(name) for arm in subject.arms]
        if any(one.attention is None for one in predictions):
            missing.append(f"Pictures of {name} are left out: the attention of the model cannot be read.")
        else:
            found.append((name, tiles.groups(subject.arms, name, tests[name])))
    return found


def _looks(subject: Subject) -> str:
    kind = subject.first.predictions(subject.main_test).attention_kind
    what = {
        "class": "the attention of the class token, from which the answer is read",
        "received": "the attention that each patch receives from all others, as this model has no class token",
    }.get(kind or "", "the attention")
    return f"The pictures show {what}: last layer, mean over its heads."


def _lessons(subject: Subject) -> list[tuple[Arm, str, list[tiles.Sample]]]:
    """Training images with their labels, once per way of mixing."""
    found, seen = [], set()
    for arm in subject.arms:
        settings = arm.runs[0].settings
        if settings.mix in seen:
            continue
        seen.add(settings.mix)
        told = "Training images as the model got them, cropped at random and not mixed."
        if settings.mix != "none":
            told = f"Mixed by {settings.mix}, {MIXERS.get(settings.mix, 'which mixes images and labels')}."
        if drawn := tiles.samples(arm.runs[0]):
            found.append(
                (
                    arm,
                    f"{told} Below each image its label{'s with their weights' if settings.mix != 'none' else ''}.",
                    drawn,
                )
            )
    return found


def _arms_told(subject: Subject) -> list[str]:
    """What the arms have in common, then one sentence per arm on what is its own."""
    run = subject.first
    count = run.results.get("images", 0)
    who = "Every run" if len(subject.arms) > 1 or len(subject.base.runs) > 1 else "It"
    told: list[str] = [
        f"{who} starts from {_start(run)} and sees {count:,} training images for {run.settings.epochs} epochs."
    ]
    for arm in subject.arms:
        settings, sources, how = arm.runs[0].settings, ["the class labels"], []
        if settings.mix != "none":
            sources[0] = "mixed images and labels"
            how.append(f"{settings.mix}, {MIXERS.get(settings.mix, 'which mixes images and labels')}")
        if settings.guide != "none":
            sources.append("guidance")
            what = GUIDES.get(settings.guide, "a loss beside that of the task")
            how.append(f"{settings.guide} with weight {settings.guide_weight:g}, {what}")
        if how:
            told.append(_named(arm, subject) + f" learns from {' and '.join(sources)}: {'; '.join(how)}.")
        elif subject.others:
            told.append(_named(arm, subject) + " learns from the class labels alone.")
    return told


def _named(arm: Arm, subject: Subject) -> Markup:
    return Markup("<strong>{}</strong>").format(arm.name) if subject.others else Markup("It")


def _start(run: Run) -> str:
    """Where the weights began, in words; the whole of it is among the versions."""
    init = run.settings.init
    if run.settings.model == "demo" and init == "pretrained":
        init = "demo"
    words = {"none": "random weights", "demo": "the encoder that comes with foveal", "pretrained": "pretrained weights"}
    return words.get(init, f"the weights {Path(init).name}")


def _table_note(subject: Subject) -> str:
    arm = subject.numbers[f"accuracy/{subject.main_test}"][subject.arms[-1].name]
    gap = "; BG-Gap in points" if BG_GAP.key in subject.numbers else ""
    note = f"In percent{gap}. In brackets the {level(arm.over_images)} interval over {arm.over_images.over}."
    if len(arm.values) > 1:
        note += f" Below: {level(arm.over_seeds)} interval over {arm.over_seeds.over}, then each seed."
    return note


def _machine(run: Run) -> list[tuple[str, str]]:
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


def _seeds(subject: Subject) -> str:
    count = len(subject.base.runs)
    return f"{count} seeds each" if count > 1 else "one seed each"


def _the(test: str) -> str:
    return "the test images" if test == "test" else test


def _style() -> str:
    return files("foveal.report").joinpath("templates/style.css").read_text("utf-8")


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("foveal.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
