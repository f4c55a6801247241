"""Objects drawn over images: colours and boxes in their places, files, words, and `foveal explain --discover`."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from fake_runs import fake_run
from foveal.cli import main
from foveal.data.config import ImageConfig
from foveal.data.errors import DataError
from foveal.explain import discover, objects
from foveal.explain.discovered import COLOURS, masks_of, told
from foveal.explain.map_sheet import map_sheet
from foveal.explain.whole import whole_frames
from foveal.maps import ClassAttention, MapModelError, MaskCut, TokenCut
from foveal.train.models import Built, write_model
from map_models import everything, resnet, same, vit
from test_map_store import of, pixels

BLACK = torch.zeros(3, 60, 90, dtype=torch.uint8)


def nearest_colour(pixel):  # on black
    return int(np.abs(0.6 * np.array(COLOURS) - pixel).sum(1).argmin())


def test_each_object_has_its_colour_and_its_box():
    masks = torch.zeros(3, 6, 9, dtype=torch.bool)
    masks[0, 0, 1], masks[0, 1, 0], masks[2, 3:6, 4:7] = True, True, True  # the second was not found
    picture = objects(BLACK, masks)
    assert picture.shape == (60, 90, 3)
    assert nearest_colour(picture[5, 15]) == 0
    assert nearest_colour(picture[45, 55]) == 2
    assert (picture[45, 20] == 20).all()  # quiet
    assert (picture[5, 5] == 20).all()  # in the box, not on the object
    assert (picture[0, 0] == COLOURS[0]).all()  # corners of the boxes
    assert (picture[19, 19] == COLOURS[0]).all()
    assert (picture[20, 20] == 20).all()
    assert (picture[30, 40] == COLOURS[2]).all()
    assert (picture[59, 69] == COLOURS[2]).all()
    assert not any((picture == np.array(COLOURS[1])).all(-1).flatten())


@pytest.mark.parametrize("grid", [(1, 1), (7, 5), (60, 90), (200, 100)])
def test_masks_of_any_grid_span_the_image(grid):
    everywhere = objects(BLACK, torch.ones(1, *grid, dtype=torch.bool))
    assert (everywhere[[0, 0, -1, -1], [0, -1, 0, -1]] == COLOURS[0]).all()
    assert nearest_colour(everywhere[30, 45]) == 0
    nothing = objects(BLACK, torch.zeros(2, *grid, dtype=torch.bool))
    assert (nothing == 20).all()


def test_more_objects_than_colours_and_larger_pictures():
    masks = torch.eye(8, dtype=torch.bool)[:, None]  # eight columns
    picture = objects(BLACK, masks, side=120)
    assert picture.shape == (120, 180, 3)
    assert nearest_colour(picture[60, 7 * 22 + 11]) == 1
    with pytest.raises(ValueError, match=r"\(K, h, w\)"):
        objects(BLACK, masks[0])


def test_what_is_found_in_words():
    model = vit()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images[1] = 0
    one = TokenCut(model)(images)
    assert told(one, 0).startswith(f"one object, {100 * float(one.mask[0].float().mean()):.0f} % of the image")
    assert ("what surrounds" in told(one, 0)) == bool(one.inverted[0])
    several = MaskCut(model)(images)
    number = int(several.masks[0].flatten(1).any(1).sum())
    assert told(several, 0).startswith(f"{number} object")
    assert "orange" in told(several, 0)
    assert told(ClassAttention(model)(images), 0).startswith("no object")
    assert masks_of(ClassAttention(model)(images), 0) is None
    nothing = TokenCut(model, tau=-0.99)(images[1:])
    assert not nothing.degenerate[0] or told(nothing, 0) == "no object: the image's features prefer no place"
    soft = TokenCut(model, variant="soft", mean=(0.5,) * 3, std=(0.2,) * 3)(images)
    assert masks_of(soft, 0).shape == (1, 32, 32)


class SmallRun:
    classes = ("a", "b")
    config = ImageConfig((32, 32))

    def __init__(self, net):
        self.net = net

    def model(self):
        return self.net


@pytest.fixture
def photo(tmp_path):
    shown = np.zeros((50, 90, 3), np.uint8)
    shown[10:30, 50:80] = (250, 200, 10)
    shown += np.random.default_rng(0).integers(0, 5, shown.shape, np.uint8)
    Image.fromarray(shown).save(tmp_path / "holiday.png")
    return tmp_path / "holiday.png"


@pytest.mark.parametrize("method", ["tokencut", "maskcut", "lost", "dino"])
def test_one_picture_for_each_image(photo, tmp_path, method):
    model = vit()
    before = everything(model)
    written = discover(SmallRun(model), [photo, photo], tmp_path / "out", method)
    assert [path.name for path in written] == ["holiday-discover.png", "holiday-2-discover.png"]
    page = np.asarray(Image.open(written[0]))[..., :3]
    assert page.shape[1] > 3 * 448 * 90 // 50  # three pictures in the image's own shape
    assert page.std() > 20
    assert same(before, everything(model))


def test_the_whole_image_is_looked_at(photo):
    frame = whole_frames(of([photo]), ImageConfig((32, 32), (0, 0, 0), (1, 1, 1)))
    assert frame.inputs.shape == (1, 3, 32, 32)
    assert frame.pixels[0].shape == (3, 50, 90)
    bright = (frame.inputs[0, 0] > 0.5).nonzero()
    assert abs(float(bright[:, 1].float().mean()) - 65 / 90 * 32) < 1
    assert abs(float(bright[:, 0].float().mean()) - 20 / 50 * 32) < 1
    held = whole_frames(pixels(2, (20, 24)), ImageConfig((32, 32)))
    assert held.inputs.shape == (2, 3, 32, 32)
    assert torch.equal(held.pixels[1], pixels(2, (20, 24)).pixels[1])


def test_what_cannot_be_drawn(photo, tmp_path):
    run = SmallRun(vit())
    with pytest.raises(ValueError, match="discovery 'tokencutt' is not known"):
        discover(run, [photo], tmp_path, "tokencutt")
    with pytest.raises(ValueError, match="at least one image"):
        discover(run, [], tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no")
    with pytest.raises(DataError, match=r"cannot read image .*broken.png"):
        discover(run, [photo, tmp_path / "broken.png"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(MapModelError):
        discover(SmallRun(resnet()), [photo], tmp_path)


def test_a_sheet_of_maps():
    images = [BLACK, BLACK.transpose(1, 2), torch.zeros(3, 20, 400, dtype=torch.uint8)]
    maps = [torch.rand(30, 30) for _ in images]
    page = map_sheet(images, maps, [None] * 3, "maps", "of three").canvas
    page.draw()
    shown = np.asarray(page.buffer_rgba())[..., :3]
    assert shown.shape[1] < 4 * 240 + 100  # two images across, their maps beside them, the panorama cut
    found = TokenCut(vit())(torch.randn(1, 3, 32, 32))
    wider = map_sheet(images[:1], maps[:1], [found], "maps", "of one").canvas
    wider.draw()
    assert np.asarray(wider.buffer_rgba()).shape[1] > 3 * 240


def test_explain_discover(tmp_path, photo, capsys):
    run = fake_run(tmp_path / "run")
    arguments = {"embed_dim": 24, "depth": 1, "num_heads": 3, "img_size": 32, "patch_size": 8, "num_classes": 4}
    net = timm.create_model("vit_tiny_patch16_224", **arguments)
    built = Built(net, "vit_tiny_patch16_224", arguments, ImageConfig((32, 32)), "random weights")
    write_model(run.folder, built, ("a", "b", "c", "d"), {})
    words = ["explain", str(run.folder), str(photo), "--output", str(tmp_path / "out"), "--discover"]
    assert main(words) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / "holiday-discover.png")]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["holiday-discover.png"]
    assert main([*words, "maskcut:objects=2,tau=0.3"]) == 0
    capsys.readouterr()
    for given, message in (
        ("maskcutt", "discovery 'maskcutt' is not known"),
        ("tokencut:taw=1", "did you mean 'tau'?"),
        ("tokencut:tau", "write key=value"),
        ("tokencut:tau=3", "tau=3 is compared with cosines"),
    ):
        assert main([*words, given]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
