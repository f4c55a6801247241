"""The demo compares like with like, on scenes that its encoder has never seen any part of."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from foveal.data import scenes
from foveal.data.photographs import photograph
from foveal.demo import arms
from foveal.train import Settings

RECIPE = Path(__file__).parents[1] / "recipes" / "demo_source.py"


def test_the_arms_differ_in_the_guide_only():
    plain, guided = arms().values()
    assert (plain.guide, guided.guide) == ("none", "gta")
    assert guided.replace(guide="none") == plain


def test_plain_comes_first_and_is_the_baseline():
    assert next(iter(arms())) == "plain"


def test_the_guide_has_its_default_weight():
    assert arms()["guided"].guide_weight == Settings().guide_weight


@pytest.mark.skipif(not RECIPE.is_file(), reason="the recipe is in the checkout, not in the installed package")
def test_the_encoder_was_trained_on_other_handwriting_and_other_parts_of_the_photographs():
    spec = importlib.util.spec_from_file_location("demo_source", RECIPE)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    source = scenes.plan(replace(recipe.SCENES, train=2000, val=200, test=200), recipe.SEED)
    target = scenes.plan(scenes.parse(arms()["plain"].data), seed=0)
    assert recipe.SCENES.stage == "source"

    assert len(digits(source)) > 700  # most of what the pool holds
    assert not digits(source) & digits(target)
    for photo in scenes.PHOTOGRAPHS:
        ours, theirs = shown(target, photo), shown(source, photo)
        assert not (ours & theirs).any()
        assert theirs.mean() > 0.4


def digits(plan):
    return {placed.digit for drawn in plan.values() for scene in drawn for placed in scene.digits}


def shown(plan, photo):
    """Pixels of a photograph that are in the background of any scene."""
    seen = np.zeros(photograph(photo).shape[:2], dtype=bool)
    for drawn in plan.values():
        for top, left, bottom, right in (scene.crop for scene in drawn if scene.photo == photo):
            seen[top:bottom, left:right] = True
    return seen
