"""Subsets that nest and keep class shares; splits where no image serves twice."""

import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from foveal.data import DataError, DataWarning, Images, listed, load, subset
from foveal.data.splits import complete, hold_out, imbalance, split_by_seed


def images(*sizes: int, seed: int = 0) -> Images:
    """One image of one pixel for each class member, in shuffled order."""
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(sizes)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    pixels = torch.zeros(len(labels), 3, 1, 1, dtype=torch.uint8)
    return Images(labels, tuple(f"c{c}" for c in range(len(sizes))), pixels)


def counts(whole: Images, index: torch.Tensor) -> list[int]:
    return whole.subset(index).class_sizes().tolist()


@pytest.mark.parametrize("percent", [1, 7, 14, 15, 28, 29, 30, 50, 55, 57, 58, 99, 100])
def test_share_is_the_integer_ceiling(percent):
    sizes = (1, 2, 7, 20, 29, 30, 100)
    whole = images(*sizes)
    expected = [(n * percent + 99) // 100 for n in sizes]
    assert counts(whole, subset(whole, share=percent / 100)) == expected


def test_float_product_would_be_wrong():
    assert math.ceil(100 * 0.07) == 8  # the rule says 7
    whole = images(100, 100)
    assert counts(whole, subset(whole, share=0.07)) == [7, 7]


def test_birds_of_the_published_protocol():
    """CUB-200's classes of 29 or 30 images: 15 % = 5, 30 % = 9, 50 % = 15."""
    whole = images(29, 30)
    for share, each in [(0.15, 5), (0.3, 9), (0.5, 15)]:
        assert counts(whole, subset(whole, share=share)) == [each, each]


def test_smaller_subsets_lie_inside_larger_ones():
    whole = images(10, 23, 40)
    shares = [set(subset(whole, share=p, seed=3).tolist()) for p in (0.05, 0.15, 0.3, 0.5, 1)]
    numbers = [set(subset(whole, per_class=k, seed=3).tolist()) for k in (1, 2, 5, 10)]
    for chain in (shares, numbers):
        assert all(a < b for a, b in pairwise(chain))
    assert shares[-1] == set(range(73))


def test_subset_is_seeded_and_rising():
    whole = images(50, 50)
    first = subset(whole, per_class=10, seed=1)
    assert torch.equal(first, subset(whole, per_class=10, seed=1))
    assert not torch.equal(first, subset(whole, per_class=10, seed=2))
    assert torch.equal(first, first.sort().values)
    assert counts(whole, first) == [10, 10]


def test_a_class_does_not_depend_on_the_others():
    labels = torch.tensor([0] * 20 + [1] * 5)
    small = Images(labels, ("a", "b"), torch.zeros(25, 3, 1, 1, dtype=torch.uint8))
    large = Images(torch.cat([labels, labels.new_tensor([1] * 30)]), ("a", "b"), torch.zeros(55, 3, 1, 1).byte())
    a, b = (subset(x, share=0.5, seed=4) for x in (small, large))
    assert torch.equal(a[a < 20], b[b < 20])


def test_small_classes_give_all_with_a_warning():
    whole = images(3, 8, 0)
    with pytest.warns(DataWarning, match="1 class has fewer than 5 images and gives all: c0"):
        assert counts(whole, subset(whole, per_class=5)) == [3, 5, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        subset(whole, per_class=3)


@pytest.mark.parametrize("bad", [{}, {"share": 0.5, "per_class": 1}, {"share": 0}, {"share": 15}, {"per_class": 0}])
def test_what_is_no_subset(bad):
    with pytest.raises(ValueError, match=r"share|per_class"):
        subset(images(2, 2), **bad)


def test_subsets_of_a_folder_are_the_same_every_time_and_nest(tmp_path):
    for c, number in (("cat", 40), ("dog", 23)):
        (tmp_path / c).mkdir()
        for i in range(number):
            Image.fromarray(np.full((2, 2, 3), i, np.uint8)).save(tmp_path / c / f"{i}.png")
    drawn = []
    for share in (0.15, 0.15, 0.3, 1):
        data = load(tmp_path, seed=5)
        drawn.append(data.train.subset(subset(data.train, share=share, seed=5)).names)
        assert not set(drawn[-1]) & {*data.val.names, *data.tests["test"].names}
    assert drawn[0] == drawn[1]
    assert set(drawn[1]) < set(drawn[2]) < set(drawn[3])
    assert len(drawn[0]) == 5 + 3  # of the 28 and 17 left to train on: ceil(4.2) and ceil(2.55)


def test_a_saved_list_gives_its_subset_back():
    whole = images(20, 30)
    index = subset(whole, share=0.3, seed=2)
    names = whole.subset(index).names
    assert torch.equal(listed(whole, names), index)
    assert torch.equal(listed(whole, names[::-1]), index)
    assert torch.equal(listed(whole, "\n".join((*names, "", "")).splitlines()), index)
    assert torch.equal(listed(whole, [f" {name}\n" for name in names]), index)
    assert torch.equal(listed(whole, whole.names), torch.arange(50))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "the list names no images"),
        ([" ", ""], "the list names no images"),
        (["a/1.png", "a/2.png", "a/1.png"], r"1 name is on the list more than once: a/1\.png"),
        (
            ["a/1.png", "a/3.pgn"],
            r"1 of the 2 names on the list is of none of the 4 images: a/3\.pgn; did you mean a/3",
        ),
        (
            ["q", "a/1.png", "z"],
            r"2 of the 3 names on the list are of none of .*: q, z; images are called like a/0\.png",
        ),
    ],
)
def test_lists_that_fit_no_images(names, message):
    whole = Images(
        torch.tensor([0, 0, 1, 1]),
        ("a", "b"),
        torch.zeros(4, 3, 1, 1, dtype=torch.uint8),
        names=tuple(f"a/{i}.png" for i in range(4)),
    )
    with pytest.raises(DataError, match=message):
        listed(whole, names)


def test_a_list_cannot_tell_images_of_one_name():
    pixels = torch.zeros(3, 3, 1, 1, dtype=torch.uint8)
    whole = Images(torch.tensor([0, 0, 1]), ("a", "b"), pixels, names=("x", "y", "x"))
    with pytest.raises(DataError, match="several images have the same name, so a list cannot tell them: x"):
        listed(whole, ["x", "y"])
    with pytest.warns(DataWarning, match="the list has no images of 1 class: b"):
        assert listed(whole, ["y"]).tolist() == [1]


@pytest.mark.parametrize("sizes", [(1, 2, 3, 4, 5), (20, 100), (7,) * 9])
def test_split_is_a_partition_and_train_has_every_class(sizes):
    whole = images(*sizes)
    parts = split_by_seed(whole.labels, len(sizes), {"val": 15, "test": 15}, 0)
    assert torch.equal(torch.cat(list(parts.values())).sort().values, torch.arange(sum(sizes)))
    assert min(counts(whole, parts["train"])) >= 1


def test_split_by_hand():
    whole = images(1, 2, 3, 10, 100)
    parts = split_by_seed(whole.labels, 5, {"val": 15, "test": 15}, 0)
    assert counts(whole, parts["test"]) == [0, 1, 1, 2, 15]  # round half up: 1.5 -> 2
    assert counts(whole, parts["val"]) == [0, 0, 1, 2, 15]
    assert counts(whole, parts["train"]) == [1, 1, 1, 6, 70]


def test_split_and_subset_are_drawn_apart():
    whole = images(100, 100)
    train = set(split_by_seed(whole.labels, 2, {"test": 50}, 0)["train"].tolist())
    overlap = len(train & set(subset(whole, share=0.5).tolist()))
    assert 30 < overlap < 70  # one order for both would give 0 or 100; chance gives 50 +- 5


def test_too_few_to_split():
    with pytest.raises(DataError, match=r"2 images of 2 classes are too few.*nothing is left for val and test"):
        hold_out(images(1, 1), {"val": 15, "test": 15}, 0)


def test_classes_too_small_for_every_part_are_counted():
    _, how = hold_out(images(1, 2, 10, 10), {"val": 15, "test": 15}, 7)
    assert how == (
        "split by seed 7: 14 train, 4 val, 5 test; 2 classes too small to have one in val;"
        " 1 class too small to have one in test"
    )


def test_complete_fills_what_is_missing():
    whole, other = images(20, 20), images(5, 5)
    both = complete("x", whole, None, {}, 0, [])
    assert [len(s) for s in (both.train, both.val, both.tests["test"])] == [28, 6, 6]
    held_val = complete("x", whole, None, {"rand": other}, 0, [])
    assert (len(held_val.train), len(held_val.val), held_val.tests["rand"] is other) == (34, 6, True)
    lone_val = complete("x", whole, other, {}, 0, [])
    assert lone_val.tests == {"val": other}
    assert (len(lone_val.train), len(lone_val.val)) == (34, 6)
    assert "val is the test set" in lone_val.notes[0]
    full = complete("x", whole, other, {"test": other}, 0, ["seen"])
    assert (full.train is whole, full.val is other, full.notes) == (True, True, ("seen",))


def test_imbalance_is_reported_from_twice_on():
    assert imbalance(images(10, 19)) == []
    assert imbalance(images(10, 20)) == [
        "classes are uneven: 20 training images of c1, 10 of c0; read balanced accuracy beside accuracy"
    ]
