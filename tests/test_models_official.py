"""Checkpoints of the authors' code, made here under their names."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from foveal.models import from_official, resize_table, sine_table
from foveal.models.official import is_official, renamed
from foveal.train import RunError
from foveal.train.weights import load_weights
from test_models import images_of, plain, tiny

CCT, LITE = {"conv_layers": 2}, {"conv_layers": 0, "kernel_size": 4, "class_token": True}


def theirs(model) -> dict[str, torch.Tensor]:
    """The weights of `model` under the names of the authors' modules, written out one by one."""
    w = model.state_dict()
    out = {}
    if "cls_token" in w:
        out["tokenizer.conv_layers.0.0.weight"] = w["patch_embed.proj.weight"]
        out["tokenizer.conv_layers.0.0.bias"] = w["patch_embed.proj.bias"]
        out["classifier.class_emb"] = w["cls_token"]
    else:
        for i in range(len(model.patch_embed.conv_layers)):
            out[f"tokenizer.conv_layers.{i}.0.weight"] = w[f"patch_embed.conv_layers.{i}.0.weight"]
        out["classifier.attention_pool.weight"] = w["seq_pool.score.weight"]
        out["classifier.attention_pool.bias"] = w["seq_pool.score.bias"]
    out["classifier.positional_emb"] = w["pos_embed"]
    for i in range(len(model.blocks)):
        block, ours = f"classifier.blocks.{i}", f"blocks.{i}"
        out[f"{block}.self_attn.qkv.weight"] = w[f"{ours}.attn.qkv.weight"]
        for part in ("weight", "bias"):
            out[f"{block}.pre_norm.{part}"] = w[f"{ours}.norm1.{part}"]
            out[f"{block}.self_attn.proj.{part}"] = w[f"{ours}.attn.proj.{part}"]
            out[f"{block}.linear1.{part}"] = w[f"{ours}.mlp.fc1.{part}"]
            out[f"{block}.norm1.{part}"] = w[f"{ours}.norm2.{part}"]
            out[f"{block}.linear2.{part}"] = w[f"{ours}.mlp.fc2.{part}"]
    for part in ("weight", "bias"):
        out[f"classifier.norm.{part}"] = w[f"norm.{part}"]
        out[f"classifier.fc.{part}"] = w[f"head.{part}"]
    return {name: tensor.clone() for name, tensor in out.items()}


@pytest.mark.parametrize("form", [CCT, LITE])
def test_every_tensor_finds_its_place(form):
    source, model = tiny(**form), tiny(seed=1, **form)
    checkpoint = theirs(source)
    assert is_official(checkpoint)
    assert not is_official(source.state_dict())
    assert renamed(checkpoint).keys() == source.state_dict().keys()
    model.load_state_dict(from_official(checkpoint, model), strict=True)
    images = images_of(model)
    with torch.no_grad():
        assert torch.equal(model(images), source(images))


@pytest.mark.parametrize("form", [CCT, LITE])
def test_another_size_and_other_classes(form):
    source = tiny(**form)
    model = tiny(seed=1, **form, img_size=(64, 48), num_classes=7)
    head = model.head.weight.detach().clone()
    model.load_state_dict(from_official(theirs(source), model), strict=True)
    P, old = source.num_prefix_tokens, source.patch_embed.grid_size
    expected = resize_table(source.pos_embed.detach(), old, model.patch_embed.grid_size, P)
    assert torch.equal(model.pos_embed, expected)
    assert torch.equal(model.pos_embed[:, :P], source.pos_embed[:, :P])
    assert torch.equal(model.head.weight, head)
    images = images_of(model)
    with torch.no_grad():
        assert torch.allclose(model(images), plain(model, images)[0], atol=1e-10, rtol=0)
    headless = tiny(**form, num_classes=0)
    headless.load_state_dict(from_official(theirs(source), headless), strict=True)


def test_a_table_of_sines_stays_one_and_a_learned_one_is_kept():
    sines = tiny(**CCT, pos_embed="sine")
    larger = tiny(seed=1, **CCT, pos_embed="sine", img_size=64)
    larger.load_state_dict(from_official(theirs(sines), larger), strict=True)
    assert torch.equal(larger.pos_embed, sine_table(256, 32).double())
    learned = tiny(**CCT)  # what the authors' "_sine" builders make
    same = tiny(seed=1, **CCT, pos_embed="sine")
    same.load_state_dict(from_official(theirs(learned), same), strict=True)
    assert torch.equal(same.pos_embed, learned.pos_embed)
    larger.load_state_dict(from_official(theirs(learned), larger), strict=True)
    assert torch.equal(larger.pos_embed, resize_table(learned.pos_embed.detach(), (8, 8), (16, 16)))


def test_another_architecture_is_refused():
    checkpoint = theirs(tiny(**CCT))
    with pytest.raises(ValueError, match=r"another architecture: cls_token missing in the checkpoint.*and \d+ more"):
        from_official(checkpoint, tiny(**LITE))
    with pytest.raises(ValueError, match=r"blocks\.2\.norm1\.weight missing in the checkpoint, \(32,\) in the model"):
        from_official(checkpoint, tiny(**CCT, depth=3))
    with pytest.raises(ValueError, match=r"'classifier\.gate' is no name"):
        from_official(checkpoint | {"classifier.gate": torch.zeros(1)}, tiny(**CCT))


def test_training_starts_from_such_a_file(tmp_path):
    source = tiny(torch.float32, **CCT)
    torch.save({"state_dict": theirs(source), "arch": "cct"}, tmp_path / "official.pth")
    model = tiny(torch.float32, seed=1, **CCT, img_size=64, num_classes=3)
    loaded = load_weights(model, tmp_path / "official.pth")
    assert loaded.resized == ("pos_embed",)
    assert set(loaded.fresh) == {"head.weight", "head.bias"}
    assert torch.equal(model.blocks[1].norm2.weight, source.blocks[1].norm2.weight)
    assert torch.equal(model.pos_embed, resize_table(source.pos_embed.detach(), (8, 8), (16, 16)))
    save_file(theirs(source) | {"classifier.gate": torch.zeros(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(RunError, match="is no name of a Compact-Transformers checkpoint"):
        load_weights(model, tmp_path / "odd.safetensors")


def test_timm_loads_such_a_file(tmp_path):
    torch.manual_seed(0)
    source = timm.create_model("cct_2_3x2_32")
    torch.save(theirs(source), tmp_path / "official.pth")
    overlay = {"file": str(tmp_path / "official.pth")}
    loaded = timm.create_model("cct_2_3x2_32", pretrained=True, pretrained_cfg_overlay=overlay)
    for name, tensor in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    other = timm.create_model("cct_2_3x2_32", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)
    assert torch.equal(other.seq_pool.score.weight, source.seq_pool.score.weight)
    assert other.head.weight.shape == (3, 128)
