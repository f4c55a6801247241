"""transformers models as timm models: the same features from the same images, or a refusal that says what fits."""

import json
import os
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

from foveal.models.converted import FAMILIES, converted, vision_config  # noqa: E402
from foveal.train import RunError, Settings  # noqa: E402
from foveal.train.models import build  # noqa: E402
from foveal.train.weight_files import read_weights  # noqa: E402
from foveal.train.weights import load_weights  # noqa: E402

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6,
}  # fmt: skip
DINOV2 = {name: value for name, value in SMALL.items() if name != "intermediate_size"} | {"mlp_ratio": 2}
TIMM = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2, "img_size": 32, "num_classes": 0}
SCALED = {"init_values": 0.1}
EPS = SMALL | {"layer_norm_eps": 1e-5}
REGISTERS = {"num_register_tokens": 4}
CASES = {  # name: (config, model, its settings, timm's name, its arguments)
    "vit": ("ViTConfig", "ViTModel", SMALL, "vit_tiny_patch16_224", {}),
    "vit without bias": ("ViTConfig", "ViTModel", SMALL | {"qkv_bias": False}, "vit_tiny_patch16_224",
                         {"qkv_bias": False}),
    "deit": ("DeiTConfig", "DeiTModel", SMALL, "deit_tiny_distilled_patch16_224", {}),
    "mae": ("ViTMAEConfig", "ViTMAEForPreTraining", SMALL | {"mask_ratio": 0.0, "decoder_hidden_size": 16,
            "decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 1, "decoder_intermediate_size": 16},
            "vit_base_patch16_224", {}),
    "msn": ("ViTMSNConfig", "ViTMSNModel", SMALL, "vit_small_patch16_224", {}),
    "dinov2": ("Dinov2Config", "Dinov2Model", DINOV2, "vit_small_patch14_dinov2", SCALED),
    "dinov2 gated": ("Dinov2Config", "Dinov2Model", DINOV2 | {"use_swiglu_ffn": True, "mlp_ratio": 4},
                     "vit_giant_patch14_dinov2", {"mlp_ratio": 5.5}),
    "dinov2 registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", DINOV2 | REGISTERS,
                         "vit_small_patch14_reg4_dinov2", SCALED),
    "beit": ("BeitConfig", "BeitModel", SMALL | {"use_relative_position_bias": True}, "beit_base_patch16_224", {}),
    "clip": ("CLIPVisionConfig", "CLIPVisionModel", EPS, "vit_base_patch16_clip_quickgelu_224", {}),
    "dinov3": ("DINOv3ViTConfig", "DINOv3ViTModel", EPS | REGISTERS, "vit_small_patch16_dinov3_qkvb", {}),
    "dinov3 gated": ("DINOv3ViTConfig", "DINOv3ViTModel", EPS | REGISTERS | {"use_gated_mlp": True,
                     "hidden_act": "silu"}, "vit_small_plus_patch16_dinov3_qkvb", {}),
}  # fmt: skip


def theirs(case: str, **changes):
    config_name, model_name, settings, _, _ = CASES[case]
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(getattr(transformers, config_name)(**(settings | changes))).eval()
    with torch.no_grad():
        for p in model.parameters():  # also what starts at zero or one: a tensor that is left out must show
            p.add_(0.2 * torch.randn_like(p))
    return model


def ours(case: str, **changes):
    torch.manual_seed(1)
    *_, name, arguments = CASES[case]
    return timm.create_model(name, **{**TIMM, **arguments, **changes}).eval()


def images(size: int = 32) -> torch.Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def features(model, case: str, x: torch.Tensor) -> torch.Tensor:
    """Tokens after the last norm, as transformers gives them."""
    if case == "mae":
        sorted_noise = torch.arange(16.0).expand(len(x), -1)  # else the patches come back in another order
        return model.vit(x, noise=sorted_noise).last_hidden_state
    found = model(x).last_hidden_state
    return model.post_layernorm(found) if case == "clip" else found


def saved(model, path: Path) -> Path:
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("case", CASES)
def test_features_are_the_same(case: str, tmp_path: Path):
    donor, model = theirs(case), ours(case)
    loaded = load_weights(model, saved(donor, tmp_path))
    donor, model, x = donor.double(), model.double(), images().double()
    expected = features(donor, case, x)
    with torch.no_grad():
        found = model.forward_features(x)
    # angles of rotation, and the class token with its position, are rounded to float32 on the way
    atol = 1e-6 if case in ("dinov2 registers", "dinov3", "dinov3 gated") else 1e-12
    assert torch.allclose(found, expected, atol=atol)
    assert expected.std() > 0.3
    assert not loaded.resized + loaded.fresh + loaded.notes


@pytest.mark.parametrize("case", ["vit", "dinov2 registers"])
def test_positions_follow_the_grid(case: str, tmp_path: Path):
    model = ours(case, img_size=48)
    loaded = load_weights(model, saved(theirs(case), tmp_path))
    assert loaded.resized == ("pos_embed",)
    assert not loaded.fresh


def test_a_classifier_comes_along_where_the_classes_agree(tmp_path: Path):
    torch.manual_seed(0)
    donor = transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, num_labels=5)).eval()
    model = ours("vit", num_classes=5)
    load_weights(model, saved(donor, tmp_path))
    with torch.no_grad():
        assert torch.allclose(model(images()), donor(images()).logits, atol=1e-5)
    other = load_weights(ours("vit", num_classes=3), tmp_path)
    assert other.fresh == ("head.weight", "head.bias")


def test_the_vision_tower_of_a_clip_model(tmp_path: Path):
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    donor = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=EPS)).eval()
    model = ours("clip")
    loaded = load_weights(model, saved(donor, tmp_path))
    with torch.no_grad():
        assert torch.allclose(model(images()), donor.vision_model(images()).pooler_output, atol=2e-5)
    assert not loaded.fresh
    assert all(not name.startswith("vision_model.encoder") for name in loaded.unused)


def test_shards_and_old_files_and_normalisation(tmp_path: Path):
    donor = theirs("vit")
    whole, parts, old = tmp_path / "whole", tmp_path / "parts", tmp_path / "old"
    saved(donor, whole)
    donor.save_pretrained(parts, max_shard_size="20KB")
    assert not (parts / "model.safetensors").exists()
    old.mkdir()
    (old / "config.json").write_text((whole / "config.json").read_text())
    torch.save(load_file(whole / "model.safetensors"), old / "pytorch_model.bin")
    (whole / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    expected = read_weights(whole)
    assert (expected.mean, expected.std) == ((0.5,) * 3, (0.25,) * 3)
    for folder in (parts, old):
        found = read_weights(folder)
        assert found.tensors.keys() == expected.tensors.keys()
        assert all(torch.equal(tensor, expected.tensors[name]) for name, tensor in found.tensors.items())
        assert found.mean is None
    arguments = {n: v for n, v in TIMM.items() if n not in ("img_size", "num_classes")}
    common = {"model": "vit_tiny_patch16_224.augreg_in21k", "model_args": arguments, "image_size": 32}
    built = build(Settings(**common, init=str(whole)), 3)
    assert (built.image.mean, built.image.std) == ((0.5,) * 3, (0.25,) * 3)
    assert "(transformers vit)" in built.origin


def test_eps_that_differs_is_told(tmp_path: Path):
    loaded = load_weights(ours("vit"), saved(theirs("vit", layer_norm_eps=1e-12), tmp_path))
    assert loaded.notes == ("eps of its layer norms is 1e-12, the model's 1e-06: features differ in the fifth digit",)


def test_what_does_not_fit_names_what_would(tmp_path: Path):
    vit = saved(theirs("vit"), tmp_path / "vit")
    fitting = r"model_args \{patch_size: 8, embed_dim: 32, depth: 2, num_heads: 4\}"
    with pytest.raises(RunError, match=rf"\(32,\) here, \(64,\) in the model.*width 32, depth 2.*{fitting}"):
        load_weights(ours("vit", embed_dim=64), vit)
    with pytest.raises(RunError, match=r"4 heads, the model 2: give model_args \{num_heads: 4\}"):
        load_weights(ours("vit", num_heads=2), vit)
    with pytest.raises(RunError, match="2 blocks here, 3 in the model"):
        load_weights(ours("vit", depth=3), vit)
    with pytest.raises(RunError, match="quick_gelu, the model's gelu: give a timm model with quickgelu in its name"):
        load_weights(timm.create_model("vit_base_patch16_clip_224", **TIMM), saved(theirs("clip"), tmp_path / "clip"))
    with pytest.raises(RunError, match=r"the model has no blocks\.0\.ls1\.gamma.*model=vit_small_patch14_dinov2 with"):
        load_weights(ours("vit"), saved(theirs("dinov2"), tmp_path / "dinov2"))
    dinov3 = saved(theirs("dinov3"), tmp_path / "dinov3")
    with pytest.raises(
        RunError, match=r"the model has no blocks\.0\.attn\.q_bias.*model=vit_small_patch16_dinov3_qkvb"
    ):
        load_weights(timm.create_model("vit_small_patch16_dinov3", **TIMM), dinov3)
    with pytest.raises(RunError, match="rotates with a base of 100, the model with 50"):
        load_weights(ours("dinov3", rope_temperature=50.0), dinov3)


def test_biases_of_zero_need_no_place(tmp_path: Path):
    donor = theirs("dinov3")
    with torch.no_grad():
        for name, p in donor.named_parameters():
            if name.endswith(("q_proj.bias", "v_proj.bias")):
                p.zero_()
    model = timm.create_model("vit_small_patch16_dinov3", **TIMM).eval()
    load_weights(model, saved(donor, tmp_path))
    with torch.no_grad():
        assert torch.allclose(model.forward_features(images()), features(donor, "dinov3", images()), atol=2e-5)


def test_families_that_are_not_known(tmp_path: Path):
    config = transformers.SiglipVisionConfig(**SMALL)
    saved(transformers.SiglipVisionModel(config), tmp_path)
    with pytest.raises(RunError, match=r"type 'siglip_vision_model' are not converted \(known: vit, deit"):
        load_weights(ours("vit"), tmp_path)
    with pytest.raises(ValueError, match=r"'encoder\.layer\.0\.gate\.weight' is no known name"):
        converted({"encoder.layer.0.gate.weight": torch.zeros(1)}, {"model_type": "vit"})
    assert vision_config({"model_type": "clip", "vision_config": {"hidden_size": 3}})["model_type"] in FAMILIES


def test_a_hub_name_without_network_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        RunError, match=r"someone/vit is neither a folder, nor on this machine, nor can it be downloaded"
    ):
        load_weights(ours("vit"), "transformers:someone/vit")
    with pytest.raises(RunError, match="neither a folder"):
        load_weights(ours("vit"), "transformers:no/such/name")
    snapshot = tmp_path / "models--someone--vit" / "snapshots" / ("a" * 40)
    saved(theirs("vit"), snapshot)
    (tmp_path / "models--someone--vit" / "refs").mkdir()
    (tmp_path / "models--someone--vit" / "refs" / "main").write_text("a" * 40)
    model = ours("vit")
    assert not load_weights(model, "transformers:someone/vit").fresh
    assert torch.equal(model.cls_token, load_file(snapshot / "model.safetensors")["embeddings.cls_token"])
    same = ours("vit")
    load_weights(same, f"transformers:{snapshot}")
    assert torch.equal(same.pos_embed, model.pos_embed)


def test_a_timm_folder_of_the_hub_is_a_plain_file(tmp_path: Path):
    donor = ours("vit")
    save_file(donor.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224"}))
    model = ours("vit")
    assert not load_weights(model, tmp_path).unused
    assert torch.equal(model.pos_embed, donor.pos_embed)
