"""Class folders as people have them: found, split, reported, and explained where they cannot be used."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from foveal.data import DataError, DataWarning, load


@pytest.fixture(autouse=True)
def warnings_are_errors():
    """A warning nobody expects fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        yield


def fill(root: Path, **classes: int) -> Path:
    """root/<class>/<i>.png, so many of each."""
    for name, number in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(number):
            Image.fromarray(np.full((4, 5, 3), i, np.uint8)).save(root / name / f"{i}.png")
    return root


def test_flat_class_folders_are_split_by_the_seed(tmp_path):
    fill(tmp_path / "photos", dog=20, cat=20)
    data = load(tmp_path / "photos", seed=3)
    assert data.name == "photos"
    assert data.classes == ("cat", "dog")
    assert data.flip
    sets = (data.train, data.val, data.tests["test"])
    assert [len(s) for s in sets] == [28, 6, 6]
    assert all(s.class_sizes().tolist() == [len(s) // 2] * 2 for s in sets)
    names = [name for images in data.split().values() for name in images]
    assert sorted(names) == sorted(f"{c}/{i}.png" for c in ("cat", "dog") for i in range(20))
    assert data.notes == ("split by seed 3: 28 train, 6 val, 6 test",)
    assert data.split() == load(tmp_path / "photos", seed=3).split()
    assert data.split() != load(tmp_path / "photos", seed=4).split()


def test_labels_follow_the_folders(tmp_path):
    data = load(fill(tmp_path, dog=5, cat=5))
    for images in (data.train, data.val, data.tests["test"]):
        for i in range(len(images)):
            assert images.files[i].parent.name == images.classes[images.labels[i]]
            assert images.names[i] == f"{images.files[i].parent.name}/{images.files[i].name}"
    assert data.train.image(0).shape == (3, 4, 5)


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("Training", "Validation", "Testing"), ("TRAIN", "valid", "tests")]
)
def test_splits_are_found_by_name(tmp_path, names):
    for name, number in zip(names, (4, 2, 3), strict=True):
        fill(tmp_path / name, a=number, b=number)
    data = load(tmp_path)
    assert [len(data.train), len(data.val), len(data.tests["test"])] == [8, 4, 6]
    assert data.notes == ()


def test_val_alone_is_the_test_set(tmp_path):
    fill(tmp_path / "train", a=20, b=20)
    fill(tmp_path / "val", a=2, b=2)
    data = load(tmp_path)
    assert list(data.tests) == ["val"]
    assert all(name.startswith("val/") for name in data.tests["val"].names)
    assert all(name.startswith("train/") for name in (*data.train.names, *data.val.names))
    assert len(data.val) == 6
    assert "val is the test set" in data.notes[0]


def test_without_val_or_test_they_are_held_out_of_train(tmp_path):
    fill(tmp_path / "a" / "train", a=20, b=20)
    fill(tmp_path / "a" / "test", a=2, b=2)
    data = load(tmp_path / "a")
    assert [len(data.train), len(data.val), len(data.tests["test"])] == [34, 6, 4]
    fill(tmp_path / "b" / "train", a=20, b=20)
    data = load(tmp_path / "b")
    assert [len(data.train), len(data.val), len(data.tests["test"])] == [28, 6, 6]


def test_test_sets_of_the_backgrounds_challenge(tmp_path):
    fill(tmp_path / "train", a=10, b=10)
    fill(tmp_path / "original" / "val", a=1, b=1)
    fill(tmp_path / "mixed_rand" / "val", a=1, b=1)
    fill(tmp_path / "mixed_same" / "val", a=1, b=1)
    fill(tmp_path / "test_rain", a=1, b=1)
    data = load(tmp_path)
    assert list(data.tests) == ["mixed_same", "mixed_rand", "original", "test_rain"]
    assert data.tests["mixed_same"].names == ("mixed_same/val/a/0.png", "mixed_same/val/b/0.png")


def test_hidden_files_and_depth_and_case(tmp_path):
    fill(tmp_path, a=4, b=4)
    (tmp_path / "a" / "more" / "deep").mkdir(parents=True)
    (tmp_path / "a" / "0.png").rename(tmp_path / "a" / "more" / "deep" / "X.PNG")
    (tmp_path / "a" / ".hidden.png").write_bytes(b"?")
    fill(tmp_path / ".ipynb_checkpoints", a=1)
    fill(tmp_path / "__MACOSX", a=1)
    data = load(tmp_path)
    assert data.classes == ("a", "b")
    assert "a/more/deep/X.PNG" in {name for part in data.split().values() for name in part}


def test_imbalance_is_noted(tmp_path):
    data = load(fill(tmp_path, a=40, b=10))
    assert data.notes[-1].startswith("classes are uneven: 28 training images of a, 6 of b")


def test_unreadable_images_are_left_out_counted_and_named(tmp_path):
    fill(tmp_path, a=10, b=10)
    (tmp_path / "a" / "3.png").write_bytes(b"")
    (tmp_path / "b" / "4.png").write_bytes((tmp_path / "b" / "4.png").read_bytes()[:50])
    with pytest.warns(DataWarning, match=r"2 images cannot be read and left out: a/3\.png \(the file is empty\), b/4"):
        data = load(tmp_path)
    assert "2 images cannot be read" in data.notes[0]
    assert sum(map(len, (data.train, data.val, data.tests["test"]))) == 18


def test_nothing_readable_is_an_error(tmp_path):
    for path in fill(tmp_path, a=2, b=2).rglob("*.png"):
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match=r"4 of 4 images .* cannot be read: a/0\.png \(a Git LFS pointer"):
        load(tmp_path)


def test_no_images(tmp_path):
    with pytest.raises(DataError, match="no images below"):
        load(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.HEIC").write_bytes(b"?")
    with pytest.raises(DataError, match=r"there are 1 \.heic: convert them"):
        load(tmp_path)


def test_images_without_class_folders(tmp_path):
    fill(tmp_path, a=3)
    with pytest.raises(DataError, match="3 images but no class folders"):
        load(tmp_path / "a")


def test_loose_images_and_other_files_are_reported(tmp_path):
    fill(tmp_path, a=4, b=4)
    Image.new("RGB", (2, 2)).save(tmp_path / "loose.png")
    (tmp_path / "a" / "notes.txt").write_text("x")
    with pytest.warns(DataWarning, match="1 image beside the class folders"):
        data = load(tmp_path)
    assert any("1 .txt" in note for note in data.notes)


def test_one_class(tmp_path):
    with pytest.raises(DataError, match=r"one class only, a: two are needed$"):
        load(fill(tmp_path, a=4))


def test_one_folder_too_high_is_pointed_out(tmp_path):
    fill(tmp_path / "photos", a=4, b=4)
    with pytest.raises(DataError, match=r"did you mean .*photos\?"):
        load(tmp_path)


def test_empty_class_is_left_out_with_a_warning(tmp_path):
    fill(tmp_path, a=4, b=4, c=0)
    with pytest.warns(DataWarning, match="1 class folder without images left out: c"):
        assert load(tmp_path).classes == ("a", "b")


def test_unknown_class_in_val_is_an_error_with_the_nearest_name(tmp_path):
    fill(tmp_path / "train", cat=4, dog=4)
    fill(tmp_path / "test", Cat=2, dog=2)
    with pytest.raises(DataError, match=r"1 class that train has no images of: Cat; .* is Cat the same as cat\?"):
        load(tmp_path)


def test_class_missing_in_val_is_a_warning(tmp_path):
    fill(tmp_path / "train", a=4, b=4, c=4)
    fill(tmp_path / "test", a=2, c=2)
    with pytest.warns(DataWarning, match="test has no images of 1 of 3 classes: b"):
        data = load(tmp_path)
    assert data.tests["test"].labels.tolist() == [0, 0, 2, 2]
    assert data.tests["test"].classes == ("a", "b", "c")


def test_two_folders_for_one_split(tmp_path):
    fill(tmp_path / "train", a=2, b=2)
    fill(tmp_path / "training", a=2, b=2)
    with pytest.raises(DataError, match=r"both train/ and training/"):
        load(tmp_path)


def test_test_without_train(tmp_path):
    fill(tmp_path / "test", a=2, b=2)
    with pytest.raises(DataError, match=r"has test/ but no train/"):
        load(tmp_path)


def test_folders_beside_the_splits_are_named(tmp_path):
    fill(tmp_path / "train", a=10, b=10)
    fill(tmp_path / "extra", a=2)
    assert "not used: extra/" in load(tmp_path).notes[0]


def test_many_photographs_are_not_decoded(tmp_path, monkeypatch):
    fill(tmp_path, a=100, b=100)
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("decoded"))
    assert len(load(tmp_path).train) == 140


def test_a_class_may_be_called_like_a_test_of_the_challenge(tmp_path):
    assert load(fill(tmp_path, original=4, copy=4)).classes == ("copy", "original")


def test_labels_are_int64_in_every_set(tmp_path):
    data = load(fill(tmp_path, a=4, b=4))
    assert {s.labels.dtype for s in (data.train, data.val, data.tests["test"])} == {torch.int64}
