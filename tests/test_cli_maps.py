"""`foveal maps`: what it writes and says; masks of one's own; stopping and going on; clear lines."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from foveal.cli import main
from foveal.data import DataError, load
from foveal.maps import MAPS, Given, MapStore, make_store
from foveal.maps.mask_files import mask_files
from foveal.maps.store import quantised
from foveal.train import map_making
from foveal.train.map_making import make_maps
from foveal.train.map_settings import MapSettings
from test_map_store import of, pixels, write_images

SMALL = [
    "--model",
    "vit_tiny_patch16_224",
    "--model-args",
    "depth=1,embed_dim=24,img_size=32,patch_size=8",
    "--init",
    "none",
]


@pytest.fixture(autouse=True)
def quiet_settings(monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with warnings.catch_warnings():
        yield


@pytest.fixture
def photos(tmp_path):
    write_images(tmp_path / "photos" / "cat", 3)
    write_images(tmp_path / "photos" / "dog" / "deep", 2, seed=1, size=(30, 14))
    return tmp_path / "photos"


def said(capsys):
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_maps_of_a_folder(photos, tmp_path, capsys):
    out = tmp_path / "kept"
    words = ["maps", str(photos), "--map", "tokencut", *SMALL, "--out", str(out), "--side", "12"]
    assert main(words) == 0
    told, err = said(capsys)
    assert f"tokencut of 5 of 5 images in {out}; 5 made now" in told
    assert "images/s" in told
    assert str(out / "contact-sheet.png") in told
    assert "tokencut of 5 images" in err
    sheet = np.asarray(Image.open(out / "contact-sheet.png"))
    assert sheet.shape[0] > 160
    assert sheet.std() > 10
    paths = sorted(photos.rglob("*.png"))
    store = MapStore.open(out, of(paths), settings={"map": "tokencut", "options": {}, "side": 12})
    assert store.found.all()
    assert store.settings["model"] == "vit_tiny_patch16_224"
    assert len(store.settings["weights"]) == 32
    assert main([*words, "--sheet", "0"]) == 0
    told, err = said(capsys)
    assert "all were there" in told
    assert "sheet" not in told


def test_added_and_changed_images_only(photos, tmp_path, capsys):
    words = ["maps", str(photos), "--map", "centre_surround", "--out", str(tmp_path / "m"), "--sheet", "0"]
    assert main(words) == 0
    write_images(photos / "new", 2, seed=5)
    write_images(photos / "cat", 1, seed=7)
    assert main(words) == 0
    told, _ = said(capsys)
    assert "centre_surround of 7 of 7 images" in told.splitlines()[-1]
    assert "3 made now" in told.splitlines()[-1]


def test_images_that_cannot_be_read_are_named(photos, tmp_path, capsys):
    whole = (photos / "cat" / "000.png").read_bytes()
    (photos / "cat" / "half.png").write_bytes(whole[: len(whole) // 2] + whole[-12:])  # begins and ends as it should
    (photos / "cat" / "none.png").write_bytes(b"")
    assert main(["maps", str(photos), "--map", "centre_surround", "--out", str(tmp_path / "m"), "--sheet", "0"]) == 0
    told, err = said(capsys)
    assert "centre_surround of 5 of 6 images" in told
    assert "5 made now" in told
    assert "1 left out, cannot be read: cat/half.png (" in told
    assert "cat/none.png (the file is empty)" in err


def test_what_was_found_in_words(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (32, 32), "grey").save(tmp_path / "photos" / "a.png")
    words = ["maps", str(tmp_path / "photos"), *SMALL, "--map-args", "tau=-0.9", "--out", str(tmp_path / "m")]
    assert main(words) == 0
    assert "1 no object found" in said(capsys)[0]
    assert (tmp_path / "m" / "contact-sheet.png").is_file()
    black = tmp_path / "masks"
    black.mkdir()
    Image.new("L", (8, 8), 0).save(black / "a.png")
    words = ["maps", str(tmp_path / "photos"), "--map", "given", "--masks", str(black), "--out", str(tmp_path / "g")]
    assert main(words) == 0
    assert "1 prefer no place" in said(capsys)[0]


def test_ctrl_c_keeps_what_was_made_and_says_how_to_go_on(photos, tmp_path, capsys, monkeypatch):
    asked = []

    class Stops(MAPS["centre_surround"]):
        def __call__(self, images, labels=None, given=None):
            if len(asked) == 2:
                raise KeyboardInterrupt
            asked.append(len(images))
            return super().__call__(images, labels, given)

    words = ["maps", str(photos), "--map", "centre_surround", "--out", str(tmp_path / "m"), "--batch-size", "2"]
    with monkeypatch.context() as patch:
        patch.setitem(MAPS, "centre_surround", Stops)
        assert main(words) == 130
    told = said(capsys)[1]
    assert f"stopped after 4 of 5 images; their maps are kept in {tmp_path / 'm'}: the same command goes on" in told
    assert main(words) == 0
    assert "centre_surround of 5 of 5 images" in (told := said(capsys)[0])
    assert "1 made now" in told


def test_a_set_with_a_name(tmp_path, capsys):
    data = "scenes:train=9,val=3,test=3,classes=1+4+7,size=32"
    assert main(["maps", data, "--map", "given", "--out", str(tmp_path / "m"), "--sheet", "4"]) == 0
    sets = load(data)
    store = MapStore.open(tmp_path / "m", sets.train)
    assert store.found.all()
    for i in range(3):
        wanted = quantised(sets.train.masks[i][None].float(), 30)[0][0].float() / 255
        assert torch.equal(store.map(i), wanted)
    for images in sets.tests.values():
        assert MapStore.open(tmp_path / "m", images).found.all()


def test_labels_are_told_where_asked(photos, tmp_path, capsys):
    write_images(photos / "cat", 8)
    write_images(photos / "dog", 8, seed=3)
    told = []

    class Labelled(MAPS["centre_surround"]):
        def __call__(self, images, labels=None, given=None):
            told.append(labels)
            return super().__call__(images, labels, given)

    settings = MapSettings(data=str(photos), map="centre_surround", out=str(tmp_path / "m"), labels=True)
    before = MAPS["centre_surround"]
    try:
        MAPS["centre_surround"] = Labelled
        made = make_maps(settings)
    finally:
        MAPS["centre_surround"] = before
    assert made.images.classes == ("cat", "dog")
    assert sorted(torch.cat(told).tolist()) == sorted(made.images.labels.tolist())
    assert len(made.images) == 18


def test_each_process_makes_its_share(photos, tmp_path, capsys, monkeypatch):
    words = ["maps", str(photos), "--map", "centre_surround", "--out", str(tmp_path / "m")]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(words) == 0
    assert said(capsys) == ("", "")  # one speaks
    assert MapStore.open(tmp_path / "m").found.sum() == 3
    monkeypatch.setenv("RANK", "0")
    assert main(words) == 0
    assert "centre_surround of 5 of 5 images" in said(capsys)[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no images given"),
        (["{tmp}/nowhere"], "there is no data set"),
        (["{photos}", "--map", "tokencutt"], "did you mean 'tokencut'?"),
        (["{photos}", "--map-args", "taw=1"], "did you mean 'tau'?"),
        (["{photos}", "--map-args", "tau=7", *SMALL], "tau=7 is compared with cosines"),
        (["{photos}", "--map", "given"], "give --masks FOLDER"),
        (["{photos}", "--map", "given", "--masks", "{tmp}/none"], "there is no folder"),
        (["{photos}", "--masks", "{photos}"], "give map=given, not tokencut"),
        (["{photos}", "--model", "vit_tiny_patch61_224"], "did you mean 'vit_tiny_patch16_224'"),
        (["{photos}", "--map", "topdown"], "needs a network with feedback decoders"),
        (["{photos}", "--map", "grad_cam", *SMALL], "no classifier"),
        (["{photos}", "--map", "head_cosine", "--model", "resnet10t", "--init", "none"], "a map for a label needs"),
        (["{photos}", "--side", "0"], "side must be 1 or more"),
        (["{photos}", "--device", "tpu"], "device='tpu'"),
        (["{photos}", *SMALL, "--out", "{photos}"], "not empty and no map store"),
        (["{photos}", "--sides", "3"], "did you mean --side?"),
    ],
)
def test_a_mistake_is_one_clear_line(photos, tmp_path, capsys, words, message):
    words = [word.format(photos=photos, tmp=tmp_path) for word in words]
    if "--out" not in words:
        words += ["--out", str(tmp_path / "m")]
    assert main(["maps", *words]) == 2
    told = [line for line in said(capsys)[1].splitlines() if line.startswith("foveal: ")]
    assert len(told) == 1
    assert message in told[0]


def test_other_settings_are_refused_by_name(photos, tmp_path, capsys):
    words = ["maps", str(photos), *SMALL, "--out", str(tmp_path / "m"), "--sheet", "0"]
    assert main(words) == 0
    assert main([*words, "--map-args", "tau=0.3"]) == 2
    assert 'options was {}, now {"tau": 0.3}' in said(capsys)[1]
    assert main([*words, "--seed", "1"]) == 2  # other random weights
    assert "weights was" in said(capsys)[1]


def test_a_network_for_larger_images(photos, tmp_path):
    settings = MapSettings(data=str(photos), model="demo", image_size=48, out=str(tmp_path / "m"))
    made = make_maps(settings)
    assert made.config.size == (48, 48)
    assert made.store.settings["image"]["size"] == [48, 48]
    assert made.store.found.all()
    own = map_making.network_of(MapSettings(model="demo"))
    assert own[1].size == (32, 32)


# -- masks that one has


def test_masks_by_relative_name_whatever_the_ending(tmp_path):
    for name in ("a/1.png", "a/2.JPG", "3.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "notes.txt").write_text("")
    found = mask_files(["a/1.jpg", "a/2.jpeg", "3.png", "b/1.jpg"], tmp_path)
    assert found == (tmp_path / "a/1.png", tmp_path / "a/2.JPG", tmp_path / "3.gif", None)
    with pytest.raises(DataError, match=r"no mask of any of the 1 images, such as 9.png: it has 3, a/1, a/2"):
        mask_files(["9.jpg"], tmp_path)
    (tmp_path / "a/1.bmp").write_bytes(b"")
    with pytest.raises(DataError, match="which is the mask"):
        mask_files(["a/1.jpg"], tmp_path)


def test_given_maps_are_the_mask_files(tmp_path, capsys):
    paths = write_images(tmp_path / "photos", 3, size=(40, 60))
    (tmp_path / "masks").mkdir()
    for i, path in enumerate(paths[:2]):
        mask = np.zeros((40, 60), np.uint8)
        mask[10:30, 20 * i : 20 * i + 20] = 255
        Image.fromarray(mask).convert("1").save(tmp_path / "masks" / path.name)
    words = ["maps", str(tmp_path / "photos"), "--map", "given", "--masks", str(tmp_path / "masks")]
    words += ["--out", str(tmp_path / "m")]
    assert main(words) == 0
    told = said(capsys)[0]
    assert "given of 2 of 3 images" in told
    assert "1 left out, no mask: 002.png" in told
    store = MapStore.open(tmp_path / "m", of(paths), missing="weigh")
    for i in range(2):
        map = store.map(i)
        assert map[15, 10 * i + 5] == 1
        assert not map[:, 10 * i + 13 :].any()
        assert not map[:6].any()
        assert abs(float(map.mean()) - 1 / 6) < 0.02
    Image.new("L", (60, 40), 255).save(tmp_path / "masks" / "000.png")  # another mask of the same image
    assert main(words) == 0
    assert "1 made now" in said(capsys)[0]
    assert MapStore.open(tmp_path / "m", of(paths[:1])).blank.tolist() == [True]


def test_mask_files_of_images_held_as_pixels(tmp_path):
    images = pixels(2, (16, 16))
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 0, 8, 16))
    mask.save(tmp_path / "0.png")
    from test_map_store import CONFIG, SETTINGS

    store = make_store(tmp_path / "s", images, Given(), SETTINGS, config=CONFIG, masks=[tmp_path / "0.png", None])
    assert store.found.tolist() == [True, False]
    assert store.map(0)[:, :14].min() == 1
    assert store.map(0)[:, 16:].max() == 0
    with pytest.raises(ValueError, match="3 masks for 2 images"):
        make_store(tmp_path / "s", images, Given(), SETTINGS, config=CONFIG, masks=[None] * 3)


def test_images_with_an_unreadable_mask_are_left_out(tmp_path):
    paths = write_images(tmp_path / "photos", 2)
    (tmp_path / "bad.png").write_bytes(b"no")
    from test_map_store import CONFIG, SETTINGS

    with pytest.warns(UserWarning, match=r"1 image left out: 000.png"):
        store = make_store(
            tmp_path / "s", of(paths), Given(), SETTINGS, config=CONFIG, masks=[tmp_path / "bad.png", paths[1]]
        )
    assert store.found.tolist() == [False, True]
