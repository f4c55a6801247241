"""load(spec): one way to any data set, and help where there is none."""

from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from foveal.data import DataError, load
from foveal.data.cifar import cifar


def test_digits_keep_their_strokes():
    data = load("digits", image_size=24)
    sets = (data.train, data.val, data.tests["test"])
    assert sum(map(len, sets)) == 1797
    assert data.classes == tuple("0123456789")
    assert not data.flip
    test, original = data.tests["test"], load_digits()
    at = [int(name) for name in test.names]
    assert torch.equal(test.labels, torch.from_numpy(original.target[at]))
    small = torch.nn.functional.interpolate(test.pixels[:, :1].float(), (8, 8), mode="area")[:, 0] * 16 / 255
    distance = torch.cdist(small.flatten(1).double(), torch.from_numpy(original.images[at]).flatten(1))
    assert torch.equal(distance.argmin(1), torch.arange(len(test)))  # each is closest to its own original
    assert data.train.pixels.shape[1:] == (3, 24, 24)


def test_digits_are_32_pixels_and_the_test_set_does_not_move():
    a, b = load("digits", seed=0), load("digits", seed=1)
    assert a.train.pixels.shape[1:] == (3, 32, 32)
    assert a.tests["test"].names == b.tests["test"].names
    assert a.val.names != b.val.names
    names = [name for part in a.split().values() for name in part]
    assert sorted(map(int, names)) == list(range(1797))


def test_scenes_take_options_and_size():
    data = load("scenes:train=12, val=10,test=10,shortcut=0.5", image_size=40)
    assert len(data.train) == 12
    assert list(data.tests)[:2] == ["mixed_same", "mixed_rand"]
    assert data.train.pixels.shape == (12, 3, 40, 40)
    assert data.train.masks.shape == (12, 40, 40)


def fake_cifar(size: int = 20):
    """Stands for torchvision's class: 10 images of each of two classes, test images all 7."""

    def dataset(root, train, download):
        assert root.name == "here"
        data = (
            np.arange(size * 12, dtype=np.uint8).reshape(size, 2, 2, 3) if train else np.full((2, 2, 2, 3), 7, np.uint8)
        )
        return SimpleNamespace(data=data, targets=[i % 2 for i in range(len(data))], classes=["a", "b"])

    return dataset


def test_cifar_is_torchvisions(tmp_path):
    data = cifar("cifar10", fake_cifar())({"root": str(tmp_path / "here")}, 0, None)
    assert (len(data.train), len(data.val), len(data.tests["test"])) == (18, 2, 2)
    i = int(data.train.names[3])
    whole = np.arange(240, dtype=np.uint8).reshape(20, 2, 2, 3)
    assert torch.equal(data.train.pixels[3], torch.from_numpy(whole[i]).permute(2, 0, 1))
    assert int(data.train.labels[3]) == i % 2
    assert data.flip


def test_cifar_not_there(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"cifar10 is not \(whole\) in .*cifar10:download=yes.*cifar10:root=FOLDER"):
        load(f"cifar10:root={tmp_path}")
    monkeypatch.setenv("FOVEAL_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(DataError, match="elsewhere"):
        load("cifar100")


def test_cifar_offline(tmp_path):
    def offline(root, train, download):
        assert download
        raise URLError("no route to host")

    with pytest.raises(DataError, match=r"could not be downloaded .*no route to host.* Is there a network\?"):
        cifar("cifar10", offline)({"root": str(tmp_path), "download": "yes"}, 0, None)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digitz", r"no data set 'digitz' \(did you mean digits\?\)"),
        ("cifar-10", r"did you mean cifar10\?"),
        ("digits:seed=1", "digits has no option 'seed'; it has none"),
        ("cifar10:rot=x", "cifar10 has no option 'rot'; did you mean root?"),
        ("cifar10:download=maybe", "neither yes nor no"),
        ("cifar10:download", "'download' in 'cifar10:download' is not an option"),
        ("cifar10:root=a,root=b", "root is given twice"),
        ("", "no data given; data can be scenes, digits"),
    ],
)
def test_specs_that_name_nothing(spec, message):
    with pytest.raises(DataError, match=message):
        load(spec)


def test_missing_folder_suggests_its_neighbour(tmp_path):
    (tmp_path / "Flowers").mkdir()
    with pytest.raises(DataError, match=r"did you mean .*/Flowers\?"):
        load(str(tmp_path / "flower"))
    with pytest.raises(DataError, match=r"did you mean .*/Flowers\?"):
        load(str(tmp_path / "flowrs" / "train" / "deep"))
    with pytest.raises(DataError, match=r"\(.* has no xyz\)"):
        load(str(tmp_path / "xyz" / "train"))


def test_a_file_is_not_a_folder(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png is an image; give the folder that holds the class folders"):
        load(tmp_path / "a.png")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"a\.csv is a file"):
        load(tmp_path / "a.csv")


def test_size_that_makes_no_sense():
    with pytest.raises(DataError, match="image_size=0"):
        load("digits", image_size=0)
