"""The image configuration comes from the model, its size from what the model was built for."""

import pytest
import timm
import timm.data
import torchvision
from torch import nn

from foveal.data import DataError, ImageConfig, image_config


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "eva02_tiny_patch14_224", "swin_tiny_patch4_window7_224"]
)
def test_agrees_with_timm(name):
    model = timm.create_model(name)
    ours, theirs = image_config(model), timm.data.resolve_data_config(model=model)
    assert ours.size == theirs["input_size"][1:]
    assert (ours.mean, ours.std) == (theirs["mean"], theirs["std"])
    assert (ours.interpolation, ours.crop_pct) == (theirs["interpolation"], theirs["crop_pct"])


@pytest.mark.parametrize("size", [(32, 32), (48, 64)])
def test_size_is_the_one_built_for(size):
    model = timm.create_model("vit_tiny_patch16_224", img_size=size, patch_size=8, depth=1)
    assert image_config(model).size == size


def test_models_without_timms_configuration():
    torchvision_vit = torchvision.models.VisionTransformer(48, 16, 1, 2, 16, 16)
    assert image_config(torchvision_vit) == ImageConfig((48, 48), crop_pct=0.875)

    class Config:
        image_size = 30

    like_transformers = nn.Identity()
    like_transformers.config = Config()
    assert image_config(like_transformers).size == (30, 30)


def test_model_that_does_not_tell():
    with pytest.raises(DataError, match=r"Linear does not tell.*ImageConfig\(size="):
        image_config(nn.Linear(2, 2))


def test_grey_model():
    with pytest.raises(DataError, match="takes 1 channels"):
        image_config(timm.create_model("vit_tiny_patch16_224", in_chans=1, depth=1))


def test_lists_from_json_become_tuples():
    config = ImageConfig([8, 9], [0.1, 0.2, 0.3], [1, 1, 1])
    assert config == ImageConfig((8, 9), (0.1, 0.2, 0.3), (1, 1, 1))
    assert hash(config)


@pytest.mark.parametrize(
    "bad", [{"size": (8,)}, {"size": (0, 8)}, {"std": (0, 1, 1)}, {"mean": (0, 0)}, {"crop_pct": 0}]
)
def test_values_that_make_no_sense(bad):
    with pytest.raises(DataError):
        ImageConfig(**({"size": (8, 8)} | bad))
