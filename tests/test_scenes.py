"""Digit scenes: what is drawn, what is painted, and what two sets never share."""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from foveal.data import scenes
from foveal.data.errors import DataError
from foveal.data.handwriting import pool_digits, shape
from foveal.data.photographs import PHOTOGRAPHS, POOLS, photograph, tiles
from foveal.data.scenes import Scene, Scenes

SMALL = Scenes(train=40, val=20, test=30, shortcut=0.8)


def inside(box, tile):
    return tile[0] <= box[0] < box[2] <= tile[2] and tile[1] <= box[1] < box[3] <= tile[3]


def test_same_seed_same_pixels_and_another_seed_others():
    first, again, other = (scenes.load(SMALL, seed=s) for s in (3, 3, 4))
    assert torch.equal(first.train.pixels, again.train.pixels)
    assert torch.equal(first.val.pixels, again.val.pixels)
    assert not torch.equal(first.train.pixels, other.train.pixels)
    assert not torch.equal(first.val.pixels, other.val.pixels)


def test_the_tests_are_the_same_under_every_seed():
    first, other = (scenes.load(SMALL, seed=s).tests for s in (3, 4))
    assert all(torch.equal(first[name].pixels, other[name].pixels) for name in ("mixed_same", "mixed_rand"))


def test_fewer_scenes_are_a_prefix_of_more():
    few, many = scenes.load(SMALL), scenes.load(replace(SMALL, train=60))
    assert torch.equal(few.train.pixels, many.train.pixels[:40])
    assert torch.equal(few.val.pixels, many.val.pixels)


@pytest.mark.parametrize("size", [32, 45, 224])
def test_any_size_from_32_pixels(size):
    data = scenes.load(Scenes(train=10, val=10, test=10, size=size))
    assert data.train.pixels.shape == (10, 3, size, size)
    assert data.train.masks.shape == (10, size, size)
    share = data.train.masks.float().mean((1, 2))
    assert (share > 0.05).all()
    assert (share < 0.7).all()


def test_the_mask_is_what_the_digit_painted():
    # Outside the mask the image is the bare photograph, inside every pixel has been painted on.
    for scene in scenes.plan(replace(SMALL, digits=2, size=64))["train"][:10]:
        image, mask = scenes.paint(scene, 64)
        bare, nothing = scenes.paint(replace(scene, digits=()), 64)
        assert not nothing.any()
        assert np.array_equal(image[~mask], bare[~mask])
        covers = np.zeros((64, 64))
        for placed in scene.digits:
            at = np.s_[placed.top : placed.top + placed.side, placed.left : placed.left + placed.side]
            covers[at] += shape(placed.digit, placed.side)[1]
        assert np.array_equal(mask, covers > 0)


def test_the_mask_does_not_know_the_background():
    data = scenes.load(SMALL)
    same, rand = data.tests["mixed_same"], data.tests["mixed_rand"]
    assert torch.equal(same.masks, rand.masks)
    assert torch.equal(same.labels, rand.labels)


def test_mixed_same_and_mixed_rand_are_pairs():
    plan = scenes.plan(replace(SMALL, test=300))
    for same, rand in zip(plan["mixed_same"], plan["mixed_rand"], strict=True):
        assert same.digits == rand.digits
        assert same.photo == PHOTOGRAPHS[same.label]
        if same.photo == rand.photo:
            assert same == rand
    photos = Counter(scene.photo for scene in plan["mixed_rand"])
    assert set(photos) == set(PHOTOGRAPHS)
    own = sum(scene.photo == PHOTOGRAPHS[scene.label] for scene in plan["mixed_rand"]) / 300
    assert abs(own - 0.1) < 4 * (0.1 * 0.9 / 300) ** 0.5  # four standard deviations of a fair draw


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("shortcut", [0.0, 0.5, 0.8, 1.0])
def test_the_share_of_own_backgrounds_is_the_shortcut(shortcut, split):
    n, classes = 1000, 5
    options = Scenes(train=n, val=n, test=5, shortcut=shortcut, classes=tuple(range(5, 10)))
    drawn = scenes.plan(options)[split]
    own = sum(scene.photo == PHOTOGRAPHS[5 + scene.label] for scene in drawn) / n
    expected = shortcut + (1 - shortcut) / classes
    assert abs(own - expected) <= 4 * (expected * (1 - expected) / n) ** 0.5


def test_only_backgrounds_of_the_chosen_classes_appear():
    drawn = scenes.plan(Scenes(train=100, classes=(2, 7)))
    photos = {scene.photo for set_ in drawn.values() for scene in set_}
    assert photos == {PHOTOGRAPHS[2], PHOTOGRAPHS[7]}


def test_pools_share_no_digit_and_hold_them_all():
    held = [number for pool in POOLS for digit in range(10) for number in pool_digits(pool, digit)]
    assert sorted(held) == list(range(1797))


def test_digits_of_a_pool_are_of_their_class():
    target = load_digits().target
    assert all(target[i] == digit for pool in POOLS for digit in range(10) for i in pool_digits(pool, digit))


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_tiles_of_a_photograph_cover_it_once(name):
    count = np.zeros(photograph(name).shape[:2], dtype=int)
    for pool in POOLS:
        assert tiles(name, pool)
        for top, left, bottom, right in tiles(name, pool):
            count[top:bottom, left:right] += 1
    assert (count == 1).all()


def used(plan: list[Scene]):
    return {p.digit for scene in plan for p in scene.digits}, {(s.photo, s.crop) for s in plan}


def test_splits_and_stages_share_no_digit_and_no_background_pixel():
    drawn = {}
    for stage, seed in (("source", 0), ("target", 1)):
        plan = scenes.plan(Scenes(train=200, val=100, test=100, stage=stage), seed)
        for split, name in (("train", "train"), ("val", "val"), ("test", "mixed_rand")):
            drawn[f"{stage}/{split}"] = used(plan[name])
    for one, two in combinations(drawn, 2):
        assert not drawn[one][0] & drawn[two][0], (one, two)
    for pool, (_, crops) in drawn.items():
        assert all(any(inside(crop, tile) for tile in tiles(photo, pool)) for photo, crop in crops)


def test_both_stages_together_keep_the_splits_apart():
    plan = scenes.plan(Scenes(train=300, val=100, test=100))
    sets = [used(plan[name])[0] for name in ("train", "val", "mixed_same")]
    assert not any(one & two for one, two in combinations(sets, 2))


def test_every_handwriting_of_a_pool_comes_before_any_comes_again():
    plan = scenes.plan(Scenes(train=180, classes=tuple(range(5, 10)), stage="target"))["train"]
    count = Counter(scene.digits[0].digit for scene in plan)
    assert max(count.values()) <= 2
    assert len(count) >= 170  # 34 to 36 of each of the five classes are in the pool


@pytest.mark.parametrize("number", [1, 2, 4, 5])
def test_digits_lie_within_the_image_without_overlap(number):
    for scene in scenes.plan(replace(SMALL, digits=number, size=96))["train"]:
        assert len(scene.digits) == number
        covered = np.zeros((96, 96), dtype=int)
        for placed in scene.digits:
            assert min(placed.top, placed.left) >= 0
            assert max(placed.top, placed.left) + placed.side <= 96
            covered[placed.top : placed.top + placed.side, placed.left : placed.left + placed.side] += 1
        assert covered.max() == 1


def test_strokes_can_be_told_from_their_line():
    for scene in scenes.plan(Scenes(train=200))["train"]:
        placed = scene.digits[0]
        assert abs(np.mean(placed.fill) - np.mean(placed.line)) > 0.4
        assert all(0 <= value <= 1 for value in (*placed.fill, *placed.line))


def test_options_as_text():
    spec = "scenes:shortcut=0.8,train=180,classes=5-9,size=48,digits=2,stage=target"
    expected = Scenes(0.8, train=180, classes=(5, 6, 7, 8, 9), size=48, digits=2, stage="target")
    assert scenes.parse(spec) == expected
    assert scenes.parse("scenes") == Scenes()
    assert scenes.parse("scenes:classes=1+4+7-9").classes == (1, 4, 7, 8, 9)
    assert scenes.parse("scenes", image_size=64).size == 64
    assert scenes.parse("scenes:size=40", image_size=64).size == 40


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("scenes:shortcut=1.5", "from 0 to 1"),
        ("scenes:shortcut=nan", "from 0 to 1"),
        ("scenes:shortcut=much", "write it like shortcut=0.8"),
        ("scenes:shortkut=0.5", "the keys are shortcut"),
        ("scenes:train", "the keys are"),
        ("scenes:train=10,train=20", "twice"),
        ("scenes:train=5", "10 scenes or more"),
        ("scenes:size=31", "32 pixels or more"),
        ("scenes:classes=7", "at least two"),
        ("scenes:classes=5-10", "from 0 to 9"),
        ("scenes:classes=3+3", "different"),
        ("scenes:digits=0", "1 or more"),
        ("scenes:digits=5", "size=48 or more"),
        ("scenes:stage=middle", "source, target"),
        ("digits", "does not begin"),
    ],
)
def test_bad_options_say_what_fits(spec, message):
    with pytest.raises(DataError, match=message):
        scenes.parse(spec)


def test_scenes_need_no_download_and_no_home(tmp_path):
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise OSError('no network')\n"
        "socket.socket.connect = refuse\n"
        "from foveal.data import scenes\n"
        "print(len(scenes.load('scenes:train=10,val=10,test=10').train))\n"
    )
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    keep = {key: value for key, value in os.environ.items() if key in ("PATH", "PYTHONPATH", "SYSTEMROOT")}
    done = subprocess.run([sys.executable, "-c", code], env=keep | home, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "10", done.stderr
