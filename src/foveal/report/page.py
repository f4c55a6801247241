"""One self-contained HTML page per run or comparison: no network, no JavaScript, light and dark, any width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import foveal
from foveal.data import Data, Images
from foveal.explain import save
from foveal.report import classes, drift, sections, tables, tiles, told
from foveal.report.chosen import chosen
from foveal.report.curriculum import curricula
from foveal.report.gather import Arm, Subject, even_gaze, of_comparison, of_run, test_images
from foveal.report.headline import headline
from foveal.report.lambdas import lambda_curves
from foveal.report.matrix import matrix
from foveal.report.shares import learning_curves
from foveal.report.words import JUDGED, MIXERS, RULES, TESTS, listed
from foveal.train.comparison import Comparison
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
    shown = chosen(subject)
    found = data if data is not None else test_images(shown.arms[0].runs[0])
    missing = [] if isinstance(found, Data) else [found]
    tests = found.tests if isinstance(found, Data) else {}
    even = {name: even_gaze(images) for name, images in tests.items()}
    differ, shared = tables.setting_rows(subject.arms)
    mixed = matrix(subject)
    context = headline(subject) | {
        "subject": subject,
        "run": subject.first,
        "forests": sections.forests(subject),
        "costs_told": f"Cost: {subject.costs}; that of the baseline is given in milliseconds." if subject.costs else "",
        "glance": tables.glance(subject) if len(subject.arms) > 2 else None,
        "shown": shown,
        "backgrounds": sections.backgrounds(subject, shown.arms),
        "gazes": sections.gazes(subject, shown.arms, even),
        "even": even,
        "pictures": _pictures(subject, shown.arms, tests, missing),
        "looks": _looks(subject),
        "curves": sections.curves(subject, shown.arms),
        "curricula": curricula(subject),
        "sources": told.source_told(subject),
        "drifts": drift.panels(subject, sections.pairs_of(shown.arms)),
        "judged": drift.judged(subject),
        "judged_columns": drift.COLUMNS,
        "shares": learning_curves(subject),
        "lambdas": lambda_curves(subject),
        "classes": classes.by_class(subject, shown.arms),
        "confusion": None if subject.others else classes.confusion(subject.first, subject.main_test),
        "matrix": mixed,
        "lessons": _lessons(subject) if mixed is None else [],
        "table": [] if subject.is_wide else tables.numbers(subject),
        "tables": tables.by_measure(subject) if subject.is_wide else [],
        "table_note": told.table_note(subject),
        "arms_told": told.arms_told(subject),
        "differ": differ,
        "shared": shared,
        "machine": told.machine(subject.first),
        "missing": missing,
        "words": {"tests": TESTS, "judged": JUDGED, "rules": RULES},
        "version": foveal.__version__,
        "style": Markup(_style()),
    }
    if not context["gazes"]:
        missing.append("Attention on the object is left out: it needs object masks and attention that can be read.")
    if not context["curves"]:
        missing.append("Learning curves are left out: no epoch was written down.")
    if not context["lessons"] and mixed is None:
        missing.append("Training images are left out: the run kept none.")
    return _environment().get_template("page.html").render(context)


def _pictures(
    subject: Subject, arms: Sequence[Arm], tests: Mapping[str, Images], missing: list[str]
) -> list[tuple[str, list[tiles.Group]]]:
    """Overlays per test set, of the arms whose attention can be read; those of a set without are missing."""
    found = []
    most, each = (2, 2) if len(arms) > 2 else (MOST_TESTS, 3)
    for name in sorted(tests.keys() & set(subject.tests), key=lambda name: name != subject.main_test)[:most]:
        tested = [arm.runs[0].split["sets"][f"test/{name}"]["images"] for arm in arms]
        same = [arm for arm, images in zip(arms, tested, strict=True) if images == tested[0]]
        looking = [arm for arm in same if arm.runs[0].predictions(name).attention is not None]
        if not looking:
            missing.append(f"Pictures of {name} are left out: the attention of the model cannot be read.")
            continue
        if blind := [arm.name for arm in same if arm not in looking]:
            missing.append(f"Pictures of {name} are without {listed(blind)}, whose attention cannot be read.")
        found.append((name, tiles.groups(looking, name, tests[name], each)))
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
