"""Weights to start from: every kind of file, accounted for tensor by tensor."""

import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from foveal.train import RunError, Settings, SettingsError
from foveal.train.models import build
from foveal.train.weights import common_prefix, load_weights
from training import TINY


def vit(seed: int, size: int = 32, **changes) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", img_size=size, **{"num_classes": 3, **TINY, **changes})


@pytest.fixture
def source() -> dict[str, torch.Tensor]:
    return vit(0).state_dict()


def as_safetensors(state, path: Path) -> Path:
    save_file(state, path / "w.safetensors")
    return path / "w.safetensors"


def as_pth(content, path: Path) -> Path:
    torch.save(content, path / "w.pth")
    return path / "w.pth"


def as_run(state, path: Path) -> Path:
    save_file(state, path / "model.safetensors")
    return path


def prefixed(state, prefix: str):
    return {prefix + name: tensor for name, tensor in state.items()}


KINDS = {
    "safetensors": as_safetensors,
    "run folder": as_run,
    "bare": as_pth,
    "state_dict": lambda s, p: as_pth({"state_dict": prefixed(s, "module."), "epoch": 3}, p),
    "model": lambda s, p: as_pth({"model": s, "optimizer": {"lr": 1.0}}, p),
    "teacher before student": lambda s, p: as_pth(
        {
            "student": prefixed({k: torch.zeros_like(v) for k, v in s.items()}, "module.backbone."),
            "teacher": prefixed(s, "backbone."),
        },
        p,
    ),
    "student": lambda s, p: as_pth({"student": prefixed(s, "module.backbone.")}, p),
    "Lightning": lambda s, p: as_pth({"state_dict": prefixed(s, "model.")}, p),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_file_fills_the_model(kind: str, source, tmp_path: Path):
    model = vit(1)
    loaded = load_weights(model, KINDS[kind](source, tmp_path))
    assert all(torch.equal(tensor, source[name]) for name, tensor in model.state_dict().items())
    assert set(loaded.loaded) == source.keys()
    assert not loaded.fresh
    assert not loaded.unused


def test_a_classifier_for_other_classes_stays_new(source, tmp_path: Path):
    model = vit(1, num_classes=5)
    head = model.head.weight.clone()
    extra = {"masked_embed": torch.zeros(1, 32), "head.last_layer": torch.zeros(2)}
    loaded = load_weights(model, as_pth({"state_dict": source | extra}, tmp_path))
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.blocks[1].attn.qkv.weight, source["blocks.1.attn.qkv.weight"])
    assert loaded.fresh == ("head.weight", "head.bias")
    assert loaded.unused == ("head.bias", "head.last_layer", "head.weight", "masked_embed")
    assert "new: head.weight, head.bias" in str(loaded)


def test_half_precision_is_widened(source, tmp_path: Path):
    model = vit(1)
    load_weights(model, as_safetensors({name: tensor.half() for name, tensor in source.items()}, tmp_path))
    assert model.head.weight.dtype == torch.float32
    assert torch.equal(model.head.weight, source["head.weight"].half().float())


def test_position_embeddings_follow_the_grid(source, tmp_path: Path):
    # a constant embedding stays constant whatever the interpolation; the class token's place is copied
    source["pos_embed"] = torch.full_like(source["pos_embed"], 0.5)
    source["pos_embed"][:, 0] = 2.0
    model = vit(1, size=48)
    loaded = load_weights(model, as_safetensors(source, tmp_path))
    assert loaded.resized == ("pos_embed",)
    assert model.pos_embed.shape == (1, 1 + 36, 32)
    assert torch.allclose(model.pos_embed[:, 1:], torch.tensor(0.5), atol=1e-6)
    assert torch.equal(model.pos_embed[:, :1], source["pos_embed"][:, :1])


def test_files_that_do_not_fit(source, tmp_path: Path):
    with pytest.raises(RunError, match=r"another architecture: .*blocks.0.attn.proj.bias \(32,\) here, \(64,\)"):
        load_weights(vit(1, embed_dim=64), as_safetensors(source, tmp_path))
    resnet = timm.create_model("resnet18", num_classes=3).state_dict()
    with pytest.raises(RunError, match=r"does not fit the model: \d+ of \d+ tensors found"):
        load_weights(vit(1), as_safetensors(resnet, tmp_path))
    with pytest.raises(RunError, match="there is no file"):
        load_weights(vit(1), tmp_path / "nothing.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="not a finished run"):
        load_weights(vit(1), tmp_path / "empty")
    with pytest.raises(RunError, match="no tensors by name"):
        load_weights(vit(1), as_pth({"state_dict": {"epoch": 1}}, tmp_path))


def test_code_in_a_file_is_not_run(tmp_path: Path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    (tmp_path / "w.pth").write_bytes(pickle.dumps({"state_dict": Trap()}, protocol=2))
    with pytest.raises(RunError, match="cannot read"):
        load_weights(vit(1), tmp_path / "w.pth")
    assert not (tmp_path / "sprung").exists()
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0")
    with pytest.raises(RunError, match="cannot read"):
        load_weights(vit(1), tmp_path / "cut.safetensors")


def test_the_prefix_is_what_most_names_share():
    own = dict.fromkeys(["cls_token", "norm.weight", "blocks.0.norm1.weight"])
    assert common_prefix(dict.fromkeys(own), own) == ""
    assert common_prefix({f"a.b.{name}": 0 for name in own} | {"cls_token": 0}, own) == "a.b."
    assert common_prefix({}, own) == ""


def test_the_starting_weights_depend_on_the_seed_only():
    settings = Settings(model="vit_tiny_patch16_224", model_args=TINY, image_size=32, init="none")
    first = build(settings, 3).model.state_dict()
    torch.rand(7)
    again, other = build(settings, 3).model.state_dict(), build(settings.replace(seed=1), 3).model.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_models_that_cannot_be_had():
    with pytest.raises(SettingsError, match="did you mean 'vit_tiny_patch16_224'"):
        build(Settings(model="vit_tiny_patch16_22"), 3)
    with pytest.raises(SettingsError, match="tag of vit_small_patch16_224 'dinoo': did you mean 'dino'"):
        build(Settings(model="vit_small_patch16_224.dinoo"), 3)
    with pytest.raises(SettingsError, match=r"cannot be built with .*'dept'"):
        build(Settings(model="vit_tiny_patch16_224", init="none", model_args={"dept": 2}), 3)
    with pytest.raises(RunError, match="no pretrained weights for vit_base_patch16_xp_224: give --init none"):
        build(Settings(model="vit_base_patch16_xp_224"), 3)


def test_no_network_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    settings = Settings(model="vit_tiny_patch16_224", out=str(tmp_path))
    with pytest.raises(RunError, match=r"neither on this machine nor can they be downloaded .*--init none"):
        build(settings, 3)
    assert constants.HF_HUB_OFFLINE is True
