"""Images without labels: any folder, or any data set as it would be split for training with labels."""

import numpy as np
import pytest
from PIL import Image

from foveal.data import DataError, DataWarning, load, load_unlabelled


def picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (12, 16, 3), dtype=np.uint8)).save(path)


def test_all_images_below_a_folder(tmp_path):
    for i in range(18):
        picture(tmp_path / "photos" / ("deep/er" if i % 3 else "") / f"{i:02d}.png", i)
    picture(tmp_path / "photos" / ".hidden" / "x.png")
    picture(tmp_path / "elsewhere.png")
    data = load_unlabelled(tmp_path / "photos", seed=1)
    assert (len(data.train), len(data.val), data.tests) == (17, 1, {})
    assert data.classes == ("images",)
    assert data.name == "photos"
    names = {*data.train.names, *data.val.names}
    assert len(names) == 18
    assert "00.png" in names
    assert "deep/er/01.png" in names
    assert data.train.image(0).shape == (3, 12, 16)
    again, other = load_unlabelled(tmp_path / "photos", seed=1), load_unlabelled(tmp_path / "photos", seed=3)
    assert again.split() == data.split() != other.split()


def test_a_data_set_with_labels_keeps_its_split(tmp_path):
    for i in range(20):
        picture(tmp_path / "ab"[i % 2] / f"{i}.png", i)
    assert load_unlabelled(tmp_path).split() == load(tmp_path).split()
    assert load_unlabelled("digits").split() == load("digits").split()


def test_one_folder_of_images_inside(tmp_path):
    for i in range(5):
        picture(tmp_path / "all" / f"{i}.png", i)
    assert len(load_unlabelled(tmp_path).train) == 4


def test_unreadable_images_are_left_out_and_named(tmp_path):
    for i in range(5):
        picture(tmp_path / f"{i}.png", i)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.warns(DataWarning, match=r"1 image cannot be read and left out: broken\.jpg"):
        data = load_unlabelled(tmp_path)
    assert len(data.train) + len(data.val) == 5
    assert any("broken.jpg" in note for note in data.notes)


@pytest.mark.parametrize(("make", "told"), [("", "no images below"), ("one.png", "has one image")])
def test_too_few_images(tmp_path, make, told):
    if make:
        picture(tmp_path / make)
    with pytest.raises(DataError, match=told):
        load_unlabelled(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(DataError, match="there is no data set"):
        load_unlabelled(tmp_path / "missing")
