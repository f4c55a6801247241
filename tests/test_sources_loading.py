"""Pre-trained sources: published files, the head under a guide of the class token, and what a guide keeps to."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from foveal.data.config import ImageConfig, image_config
from foveal.models.likeness import likeness
from foveal.models.published import under_timm_names
from foveal.train import RunError, Settings, SettingsError
from foveal.train.models import build, create, read_model, write_model
from foveal.train.sources import guide_source, see_as
from foveal.train.weight_files import read_weights
from foveal.train.weights import load_weights
from training import TINY

DINOV3 = TINY | {"init_values": 0.1}


def model_of(name: str, seed: int, size: int = 32, **changes) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model(name, **{"img_size": size, "num_classes": 0, **TINY, **changes}).eval()
    with torch.no_grad():
        for p in model.parameters():  # also what starts at zero or one: a tensor that is left out must show
            p.add_(0.2 * torch.randn_like(p))
    return model


def images(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def same_features(model: nn.Module, donor: nn.Module) -> bool:
    return torch.equal(model.forward_features(images()), donor.forward_features(images()))


def prefixed(state, prefix: str):
    return {prefix + name: tensor for name, tensor in state.items()}


def projection(width: int = 32):
    return {"mlp.0.weight": torch.ones(8, width), "last_layer.weight_v": torch.ones(4, 8)}


def ibot(state):
    return {"state_dict": state | {"masked_embed": torch.ones(1, 32)} | prefixed(projection(), "head.")}


def dino_full(state):
    student = prefixed({name: tensor + 1 for name, tensor in state.items()} | projection(), "module.backbone.")
    return {
        "student": student,
        "teacher": prefixed(state, "backbone.") | prefixed(projection(), "head."),
        "optimizer": {"param_groups": [{"lr": np.float64(0.1)}]},
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_small", patch_size=8),
        "dino_loss": {"center": torch.zeros(1, 4)},
    }


def mae(state):
    decoder = {"mask_token": torch.ones(1, 1, 16), "decoder_pos_embed": torch.ones(1, 17, 16),
               "decoder_embed.weight": torch.ones(16, 32), "decoder_blocks.0.attn.qkv.weight": torch.ones(48, 16),
               "decoder_pred.bias": torch.ones(192)}  # fmt: skip
    return {"model": state | decoder, "args": argparse.Namespace(blr=1e-3), "scaler": {"scale": 1.0}}


def one_dictionary(state):
    both = prefixed({name: tensor + 1 for name, tensor in state.items()}, "student.backbone.")
    return {"model": both | prefixed(state, "teacher.backbone.")}


PUBLISHED = {  # name: (file, where the tensors were found, names that are dropped)
    "iBOT backbone": (ibot, "[state_dict]", {"masked_embed", "head.mlp.0.weight", "head.last_layer.weight_v"}),
    "DINO backbone": (dict, "", set()),
    "DINO checkpoint": (dino_full, "[teacher, not student], under backbone", {"head.mlp.0.weight",
                                                                             "head.last_layer.weight_v"}),
    "MAE": (mae, "[model]", {"mask_token", "decoder_pos_embed", "decoder_embed.weight",
                             "decoder_blocks.0.attn.qkv.weight", "decoder_pred.bias"}),
    "teacher beside student": (one_dictionary, "[model], under teacher.backbone", None),
    "teacher beside state_dict": (lambda s: {"state_dict": {"x": torch.ones(1)}, "teacher": s}, "[teacher]", set()),
    "timm with an average": (lambda s: {"state_dict": {}, "state_dict_ema": s}, "[state_dict_ema]", set()),
}  # fmt: skip


@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_published_file_gives_the_donors_features(kind: str, tmp_path: Path):
    content, place, dropped = PUBLISHED[kind]
    donor, model = model_of("vit_small_patch16_224", 0), model_of("vit_small_patch16_224", 1)
    torch.save(content(donor.state_dict()), tmp_path / "w.pth")
    loaded = load_weights(model, tmp_path / "w.pth")
    assert same_features(model, donor)
    assert f"w.pth{place}" in str(loaded)
    assert not loaded.fresh
    assert dropped is None or set(loaded.unused) == dropped


def test_numbers_as_numpy_1_wrote_them_can_be_read(tmp_path: Path):
    state = model_of("vit_small_patch16_224", 0).state_dict()
    torch.save({"teacher": state, "lr": np.float64(0.5), "epoch": np.int64(3)}, tmp_path / "w.pth",
               _use_new_zipfile_serialization=False)  # fmt: skip
    content = (tmp_path / "w.pth").read_bytes()
    assert b"numpy._core.multiarray" in content
    (tmp_path / "old.pth").write_bytes(content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    assert read_weights(tmp_path / "old.pth").tensors.keys() == state.keys()


def test_dinov2_with_nested_blocks_and_a_larger_grid(tmp_path: Path):
    donor = model_of("vit_small_patch14_dinov2", 0)
    nested = {
        f"blocks.{int(n.split('.')[1]) // 2}.{n.removeprefix('blocks.')}" if n.startswith("blocks.") else n: t
        for n, t in donor.state_dict().items()
    }
    assert "blocks.0.1.ls1.gamma" in nested
    torch.save(nested | {"mask_token": torch.ones(1, 32)}, tmp_path / "w.pth")
    model = model_of("vit_small_patch14_dinov2", 1)
    loaded = load_weights(model, tmp_path / "w.pth")
    assert same_features(model, donor)
    assert loaded.unused == ("mask_token",)
    smaller = model_of("vit_small_patch14_dinov2", 1, size=24)
    loaded = load_weights(smaller, tmp_path / "w.pth")
    assert loaded.resized == ("pos_embed",)
    assert torch.equal(smaller.pos_embed[:, :1], donor.pos_embed[:, :1])
    assert smaller.pos_embed.shape == (1, 1 + 9, 32)


@pytest.mark.parametrize("gated", [False, True])
def test_dinov2_with_registers_folds_the_class_position(gated: bool, tmp_path: Path):
    name = "vit_giant_patch14_reg4_dinov2" if gated else "vit_small_patch14_reg4_dinov2"
    donor, model = (model_of(name, seed) for seed in (0, 1))
    state = dict(donor.state_dict())
    share = torch.full((1, 1, 32), 0.5)
    state["register_tokens"] = state.pop("reg_token")
    state["pos_embed"] = torch.cat([share, state["pos_embed"]], 1)
    state["cls_token"] = state["cls_token"] - share
    if gated:
        state = {n.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): t for n, t in state.items()}
    torch.save({"teacher": prefixed(state, "backbone.")}, tmp_path / "w.pth")
    loaded = load_weights(model, tmp_path / "w.pth")
    assert not loaded.fresh + loaded.unused
    with torch.no_grad():  # 0.5 away and back: one rounding
        assert torch.allclose(model(images()), donor(images()), atol=1e-5)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3_qkvb"])
def test_dinov3_of_its_authors(name: str, tmp_path: Path):
    donor, model = (model_of(name, seed) for seed in (0, 1))
    state = {}
    for key, tensor in donor.state_dict().items():
        key = key.replace("reg_token", "storage_tokens").replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        key = key.replace("mlp.fc1_g", "mlp.w1").replace("mlp.fc1_x", "mlp.w2")
        state[key.replace("mlp.fc2", "mlp.w3") if "plus" in name else key] = tensor
    for i in range(2):
        q, v = (state.pop(f"blocks.{i}.attn.{part}_bias") for part in "qv")
        state[f"blocks.{i}.attn.qkv.bias"] = torch.cat([q, torch.full_like(q, 7.0), v])  # masked: never added
        state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.cat([q * 0 + 1, q * 0, v * 0 + 1])
    state |= {"rope_embed.periods": torch.ones(4), "mask_token": torch.ones(1, 32)}
    torch.save(state, tmp_path / "w.pth")
    loaded = load_weights(model, tmp_path / "w.pth")
    assert not loaded.fresh
    assert same_features(model, donor)


def test_timm_names_stay():
    for name in ("vit_small_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3_qkvb"):
        state = model_of(name, 0).state_dict()
        assert under_timm_names(state).keys() == state.keys()
        assert all(under_timm_names(state)[key] is tensor for key, tensor in state.items())


def test_a_file_of_another_architecture_names_its_own(tmp_path: Path):
    def file(model: nn.Module) -> Path:
        save_file(model.state_dict(), tmp_path / "w.safetensors")
        return tmp_path / "w.safetensors"

    with pytest.raises(RunError, match=r"width 32, depth 2, patch 8: model=vit_small_patch8_224 with model_args"):
        load_weights(model_of("vit_base_patch16_224", 1, embed_dim=64), file(model_of("vit_small_patch16_224", 0)))
    with pytest.raises(RunError, match="2 blocks here, 3 in the model"):
        load_weights(model_of("vit_small_patch16_224", 1, depth=3), file(model_of("vit_small_patch16_224", 0)))
    with pytest.raises(RunError, match=r"the model has no blocks\.0\.ls1\.gamma"):
        load_weights(model_of("vit_small_patch16_224", 1), file(model_of("vit_small_patch14_dinov2", 0)))
    with pytest.raises(RunError, match=r"the file has no blocks\.0\.ls1\.gamma.*model=vit_small_patch8_224"):
        load_weights(model_of("vit_small_patch14_dinov2", 1), file(model_of("vit_small_patch16_224", 0)))
    with pytest.raises(
        RunError, match=r"pos_embed \(1, 18, 32\) here, \(1, 17, 32\).*model=deit_small_distilled_patch16_224"
    ):
        load_weights(model_of("vit_small_patch16_224", 1), file(model_of("deit_small_distilled_patch16_224", 0)))


def test_a_shorter_model_takes_the_first_blocks(tmp_path: Path):
    donor, model = model_of("vit_small_patch16_224", 0, depth=3), model_of("vit_small_patch16_224", 1)
    save_file(donor.state_dict(), tmp_path / "w.safetensors")
    loaded = load_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(model.blocks[1].mlp.fc2.weight, donor.blocks[1].mlp.fc2.weight)
    assert all(name.startswith("blocks.2.") for name in loaded.unused)
    assert "not used: blocks.2." in str(loaded)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_base_patch16_224", "deit_small_distilled_patch16_224",
             "vit_base_patch16_clip_224", "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2",
             "vit_small_patch8_224"]
)  # fmt: skip
def test_a_state_tells_its_model(name: str):
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    assert likeness(state).endswith(f": model={name}")


def test_likeness_of_no_vit():
    assert likeness(timm.create_model("resnet18").state_dict()) == ""


# the head under a guide of the class token


def guided(model: str, **changes) -> Settings:
    values = {"model": model, "model_args": TINY, "image_size": 32, "init": "none", "guide": "gta",
              "guide_source": "none"}  # fmt: skip
    return Settings.from_dict(values | changes)


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        ("vit_small_patch16_dinov3", {"global_pool": "token"}),
        ("vit_tiny_patch16_dinov3_qkvb", {"global_pool": "token"}),
        ("eva02_tiny_patch14_224", {"global_pool": "token", "use_fc_norm": True}),
        ("beit_base_patch16_224", {"global_pool": "token", "use_fc_norm": True}),
    ],
)
def test_the_classifier_reads_the_class_token_under_a_guide(model: str, arguments, tmp_path: Path):
    built = build(guided(model), 3)
    assert built.model.global_pool == "token"
    assert arguments.items() <= built.arguments.items()
    assert "global_pool=token" in built.notes[0]
    assert "gta guides" in built.notes[0]
    # the same tensors as without, so that pretrained weights fit
    plain = build(guided(model, guide="none", guide_source="init"), 3)
    assert plain.model.state_dict().keys() == built.model.state_dict().keys()
    assert plain.model.global_pool == "avg"
    assert not plain.notes
    # and the export is the same model again
    write_model(tmp_path, built, ("a", "b", "c"), {})
    again = read_model(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(images()), built.model.eval()(images()))


def test_the_head_stays_where_it_reads_the_class_token_or_the_user_says():
    assert not build(guided("vit_tiny_patch16_224"), 3).notes
    said = guided("vit_small_patch16_dinov3", model_args=TINY | {"global_pool": "avg"})
    assert build(said, 3).model.global_pool == "avg"
    gap = build(guided("vit_wee_patch16_reg1_gap_256", model_args=TINY, guide_args={"query": "mean"}), 3)
    assert gap.model.global_pool == "avg"  # registers, but no class token


def test_normalisation_of_a_file_that_does_not_tell(tmp_path: Path):
    torch.save(ibot(model_of("vit_tiny_patch16_224", 0).state_dict()), tmp_path / "ibot.pth")
    common = {"model_args": TINY, "image_size": 32, "init": str(tmp_path / "ibot.pth")}
    built = build(Settings(model="vit_tiny_patch16_224", **common), 3)
    assert "mean 0.5" in built.notes[0]
    assert "vit_small_patch16_224.dino" in built.notes[0]
    tagged = build(Settings(model="vit_small_patch16_224.dino", **common), 3)
    assert tagged.image.mean == (0.485, 0.456, 0.406)
    assert not tagged.notes


# what a guide keeps to


ARGUMENTS = {**TINY, "img_size": 32, "num_classes": 3}


def run_folder(path: Path, size: int = 32, mean: float = 0.5, classes: int = 4) -> nn.Module:
    settings = Settings(model="vit_tiny_patch16_224", model_args=TINY, image_size=size, init="none", seed=5)
    built = build(settings, classes)
    image = ImageConfig((size, size), (mean,) * 3, (0.5,) * 3)
    path.mkdir()
    write_model(path, type(built)(built.model, built.architecture, built.arguments, image, "x"), ("c",) * classes, {})
    return built.model.eval()


def test_a_random_source_is_a_control():
    model, origin = guide_source("none", "vit_tiny_patch16_224", ARGUMENTS, seed=1)
    same, _ = guide_source("none", "vit_tiny_patch16_224", ARGUMENTS, seed=1)
    other, _ = guide_source("none", "vit_tiny_patch16_224", ARGUMENTS, seed=2)
    assert origin == "random weights"
    assert same_features(model, same)
    assert not same_features(model, other)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("classes", [4, 0])
def test_a_run_is_a_source_with_its_own_head(classes: int, tmp_path: Path):
    donor = run_folder(tmp_path / "run", classes=classes)
    model, origin = guide_source(str(tmp_path / "run"), "vit_small_patch16_224", ARGUMENTS)
    with torch.no_grad():
        assert torch.equal(model(images()), donor(images()))
    assert model.num_classes == classes
    assert "vit_tiny_patch16_224 of" in origin
    larger, origin = guide_source(str(tmp_path / "run"), "vit_tiny_patch16_224", ARGUMENTS | {"img_size": 48})
    assert larger.patch_embed.grid_size == (6, 6)
    assert "resized: pos_embed" in origin


def test_a_source_sees_the_images_as_it_learnt_to(tmp_path: Path):
    donor = run_folder(tmp_path / "run", mean=0.5)
    given = ImageConfig((32, 32))
    model, origin = guide_source(str(tmp_path / "run"), "vit_tiny_patch16_224", ARGUMENTS, image=given)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    own = ImageConfig((32, 32), (0.5,) * 3, (0.5,) * 3)
    with torch.no_grad():  # rounding of other sums in the patch embedding
        assert torch.allclose(model(given.normalise(pixels)), donor(own.normalise(pixels)), atol=1e-5)
        assert not torch.allclose(model(own.normalise(pixels)), donor(own.normalise(pixels)), atol=1e-2)
    assert "part of its patch embedding" in origin
    clip = model_of("vit_base_patch16_clip_224", 0)
    kept = clip.patch_embed.proj.weight.clone()
    assert "it now sees" in see_as(clip, own, given)
    assert torch.equal(clip.patch_embed.proj.weight, kept)


@pytest.mark.parametrize("classes", [5, 0])
def test_a_file_is_a_source_in_the_models_architecture(classes: int, tmp_path: Path):
    donor = model_of("vit_tiny_patch16_224", 0, num_classes=classes)
    torch.save({"teacher": prefixed(donor.state_dict(), "backbone.")}, tmp_path / "w.pth")
    model, origin = guide_source(str(tmp_path / "w.pth"), "vit_tiny_patch16_224", ARGUMENTS)
    with torch.no_grad():
        assert torch.equal(model(images()), donor(images()))
    assert "[teacher]" in origin


def test_a_transformers_folder_is_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
                                    image_size=32, patch_size=8, layer_norm_eps=1e-6)  # fmt: skip
    donor = transformers.ViTModel(config).eval()
    donor.save_pretrained(tmp_path)
    for spec in (str(tmp_path), f"transformers:{tmp_path}"):
        model, origin = guide_source(spec, "vit_tiny_patch16_224", ARGUMENTS)
        with torch.no_grad():
            assert torch.allclose(model.forward_features(images()), donor(images()).last_hidden_state, atol=1e-6)
        assert "(transformers vit)" in origin


def test_the_bundled_encoder_is_a_source():
    from foveal.assets import demo_encoder

    donor = demo_encoder().eval()
    size = image_config(donor).size[0]
    model, _ = guide_source("demo", "vit_tiny_patch16_224", ARGUMENTS | {"img_size": size})
    with torch.no_grad():
        assert torch.equal(model.forward_features(images(size)), donor.forward_features(images(size)))


def test_sources_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    ask = "vit_tiny_patch16_224", ARGUMENTS
    with pytest.raises(SettingsError, match=r"guide_source=vit_tiny_patch16_22: .*did you mean 'vit_tiny_patch16_224'"):
        guide_source("vit_tiny_patch16_22", *ask)
    with pytest.raises(RunError, match="neither on this machine nor can they be downloaded"):
        guide_source("vit_small_patch16_224.dino", *ask)
    with pytest.raises(RunError, match="there is no file"):
        guide_source("nothing.pth", *ask)
    with pytest.raises(RunError, match="holds no finished run"):
        guide_source(str(tmp_path), *ask)
    with pytest.raises(RunError, match="neither a folder, nor on this machine"):
        guide_source("transformers:facebook/dino-vits16", *ask)
    save_file(model_of("vit_small_patch16_224", 0, embed_dim=64).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(RunError, match=r"guide_source: .*another architecture.*put into the model that is trained"):
        guide_source(str(tmp_path / "w.safetensors"), *ask)


def test_a_timm_source_keeps_the_models_arguments(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def fake(name, arguments, remedy):
        asked.append((name, arguments))
        return create(name.partition(".")[0], arguments | {"depth": 1}), "weights"

    monkeypatch.setattr("foveal.train.sources.pretrained", fake)
    arguments = ARGUMENTS | {"global_pool": "token"}
    guide_source("vit_tiny_patch16_224.augreg_in21k", "vit_tiny_patch16_224", arguments)
    guide_source("vit_small_patch16_224.dino", "vit_tiny_patch16_224", arguments)
    assert asked == [
        ("vit_tiny_patch16_224.augreg_in21k", {**TINY, "img_size": 32, "global_pool": "token"}),
        ("vit_small_patch16_224.dino", {"img_size": 32}),
    ]
