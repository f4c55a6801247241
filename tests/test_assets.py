"""The bundled encoder: small, whole, as its card says, and able to find a digit it never saw."""

import hashlib
from importlib.resources import files

import pytest
import torch
from safetensors.torch import load_file

from foveal.assets import demo_card, demo_encoder
from foveal.attention import read
from foveal.data import image_config, scenes
from foveal.evaluate.pointing import energy_share

ASSETS = files("foveal.assets")


@pytest.fixture(scope="module")
def card():
    return demo_card()


def test_it_is_under_a_megabyte_and_the_one_of_its_card(card):
    weights = (ASSETS / "model.safetensors").read_bytes()
    assert len(weights) < 1_000_000
    assert hashlib.sha256(weights).hexdigest() == card["sha256"]


def test_its_images_are_those_of_the_card(card):
    config = image_config(demo_encoder())
    assert config.size == (32, 32)
    assert list(config.mean) == card["image"]["mean"]
    assert list(config.std) == card["image"]["std"]


def test_every_tensor_comes_from_the_file():
    stored = load_file(str(ASSETS / "model.safetensors"))
    own = demo_encoder().state_dict()
    assert own.keys() == stored.keys()
    assert all(torch.equal(own[name], stored[name].float()) for name in own)
    assert all(tensor.dtype == torch.float32 for tensor in own.values())


def test_a_new_classifier_depends_on_the_seed_only():
    one, again, other = (demo_encoder(5, seed=seed).get_classifier().weight for seed in (1, 1, 2))
    assert one.shape == (5, 64)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_it_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    demo_encoder(5)
    assert torch.equal(before, torch.get_rng_state())


def test_it_looks_at_digits_and_backgrounds_it_was_never_shown(card):
    # Scenes of the other stage. Uniform attention would put the object's share of the area on the object.
    data = scenes.load("scenes:train=10,val=10,test=200,stage=target")
    images = data.tests["mixed_rand"]
    model = demo_encoder().eval()
    with torch.no_grad(), read(model, layers=-1) as seen:
        model(image_config(model).normalise(images.pixels))
    share = energy_share(seen.to_grid(seen.class_attention()), images.masks).mean()
    assert share > 1.7 * images.masks.float().mean()
    assert abs(float(share) - card["results"]["attention_on_object"]) < 0.05  # other digits, other backgrounds
