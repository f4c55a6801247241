"""`foveal explain`: pictures of image files from a trained model."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from foveal.data.config import ImageConfig, image_config
from foveal.data.errors import DataError
from foveal.data.images import Images
from foveal.explain import explain, frames, overlay, pictures, resize
from foveal.explain.files import SIDE, prediction


@dataclass
class SmallRun:
    net: nn.Module
    classes: tuple[str, ...] = ("cat", "$dog_{1}$")

    @property
    def config(self) -> ImageConfig:
        return image_config(self.net)

    def model(self) -> nn.Module:
        return self.net


@pytest.fixture
def run() -> SmallRun:
    torch.manual_seed(0)
    net = timm.create_model(
        "vit_tiny_patch16_224", img_size=(32, 48), patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=2
    )
    return SmallRun(net.eval())


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "holiday.png")
    return tmp_path / "holiday.png"


def test_each_image_gives_an_overlay_and_a_head_grid(run, photo, tmp_path):
    written = explain(run, [photo, str(photo)], tmp_path / "out")
    names = ["holiday-overlay.png", "holiday-heads.png", "holiday-2-overlay.png", "holiday-2-heads.png"]
    assert [path.name for path in written] == names
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)


def test_the_overlay_is_drawn_on_what_the_model_saw(run, photo, tmp_path):
    page = np.asarray(Image.open(explain(run, [photo], tmp_path)[0]))[..., :3]
    frame = frames(Images(torch.zeros(1, dtype=torch.int64), run.classes, files=(photo,)), run.config)
    image = frame.pixels[0]
    assert image.shape == (3, 32, 48)
    left, right = resize(image, SIDE), overlay(image, pictures(run.net, frame.inputs).look(0), side=SIDE)
    margin, gap, width = 20, 6, left.shape[1]
    assert np.array_equal(page[margin : margin + SIDE, margin : margin + width], left)
    start = margin + width + gap
    assert np.array_equal(page[margin : margin + SIDE, start : start + width], right)


def test_frames_show_what_goes_in(run, photo):
    frame = frames(Images(torch.zeros(1, dtype=torch.int64), run.classes, files=(photo,)), run.config)
    assert torch.allclose(run.config.normalise(torch.stack(frame.pixels)), frame.inputs, atol=1e-5)


def test_stored_pixels_are_shown_at_their_own_size(run):
    pixels = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    frame = frames(Images(torch.zeros(2, dtype=torch.int64), run.classes, pixels=pixels), run.config)
    assert frame.inputs.shape == (2, 3, 32, 48)
    assert torch.equal(torch.stack(frame.pixels), pixels)


def test_predictions_in_words():
    logits = torch.tensor([0.2, 0.7, 0.1]).log()
    assert prediction(logits, ("cat", "dog", "cow")) == "dog (70 %), then cat (20 %)"
    assert prediction(logits[:1], ("cat",)) == "cat (100 %)"


def test_an_unreadable_image_is_named_and_nothing_is_written(run, photo, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"broken\.jpg"):
        explain(run, [photo, broken], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="at least one"):
        explain(run, [], tmp_path / "out")
