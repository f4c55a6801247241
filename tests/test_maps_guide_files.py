"""Guides in files: AbSViT's names and shapes, what `save` writes, and what is refused."""

import argparse

import pytest
import torch
from safetensors.torch import save_file
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from foveal import maps
from foveal.maps.feedback import Decoders
from foveal.maps.topdown import TopDown
from map_models import MODELS, batch, same, vit


def tensors_of(model, prompt=True):
    """As a release stores them: timm's names, decoders.N.linear.weight, decoders.N.linear2.weight, prompt."""
    D, g = model.embed_dim, torch.Generator().manual_seed(3)
    out = {name: value.clone() for name, value in model.state_dict().items()}
    for l in range(len(model.blocks)):
        for part in ("linear", "linear2"):
            out[f"decoders.{l}.{part}.weight"] = 0.3 * torch.randn(D, D, generator=g)
    if prompt:
        out["prompt"] = torch.randn(D, generator=g)
    return out


def wide(**settings):
    """Width 64: one head is what its width says."""
    return vit(embed_dim=64, num_heads=1, **settings)


def write(path, tensors, how):
    if how == "safetensors":
        save_file(tensors, path.with_suffix(".safetensors"))
        return path.with_suffix(".safetensors")
    content = {
        "plain": tensors,
        "training script": {
            "model": tensors,
            "epoch": 299,
            "args": argparse.Namespace(lr=5e-4),
            "optimizer": {"state": {}},
        },
        "parallel": {"state_dict": {f"module.{name}": value for name, value in tensors.items()}},
    }[how]
    torch.save(content, path)
    return path


@pytest.mark.parametrize("how", ["safetensors", "plain", "training script", "parallel"])
@pytest.mark.parametrize("end", [".pth", ".bin"])
def test_a_released_checkpoint(tmp_path, how, end):
    model = wide(img_size=28)
    tensors = tensors_of(model)
    guide = TopDown.load(write(tmp_path / f"guide{end}", tensors, how))
    assert guide.sigma == 1.0
    assert guide.feedback_bias
    assert guide.threshold
    assert not guide.model.training
    assert guide.model.blocks[0].attn.num_heads == 1
    assert same(dict(guide.model.state_dict()), dict(model.state_dict()))
    assert torch.equal(guide.prompt, tensors["prompt"])
    for l, decoder in enumerate(guide.decoders):
        assert torch.equal(decoder.linear.weight, tensors[f"decoders.{l}.linear.weight"])
        assert torch.equal(decoder.linear2.weight, tensors[f"decoders.{l}.linear2.weight"])
    images, labels = batch(2, (28, 28))
    direct = TopDown(model, guide.decoders, prompt=guide.prompt)
    assert torch.equal(guide(images, labels).map, direct(images, labels).map)
    assert torch.equal(guide(images).map, direct(images).map)


RELEASED = (  # sigma, sums of the two maps for labels 2 and 0, sums for the prompt
    (0.0, (2.4885247690, 0.6017967378), (0.0841489086, 0.0747602250)),
    (1.0, (2.3720604802, 0.5732223406), (0.0838050577, 0.0743555915)),
    (3.0, (2.0586216589, 0.5131184321), (0.0836923041, 0.0740730515)),
)


def test_the_map_of_the_released_code():
    """Sums of maps that the released guide (TdAttenMix, commit 9c0412c) gives for these weights, in float64."""

    def wave(like, k):
        return 0.25 * torch.sin(torch.arange(like.numel(), dtype=torch.float64) * (1 + 0.37 * k) + k).reshape(
            like.shape
        )

    model = VisionTransformer(img_size=56, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3).double()
    decoders = Decoders(2, 16).double()
    with torch.no_grad():
        named = [*sorted(model.named_parameters()), *sorted(decoders.named_parameters())]
        for k, (_, p) in enumerate(named):
            p.copy_(wave(p, k + 1) + (1 if p.dim() == 1 and k % 7 == 0 else 0))
        for p in decoders.parameters():
            p.mul_(6)
    images, labels = 4 * wave(torch.empty(2, 3, 56, 56), 0.05), torch.tensor([2, 0])
    for sigma, by_label, by_prompt in RELEASED:
        guide = TopDown(model, decoders, sigma=sigma, prompt=wave(torch.empty(16), 99))
        for labels_or_none, expected in ((labels, by_label), (None, by_prompt)):
            got = guide(images, labels_or_none).map.double().sum((1, 2))
            assert torch.allclose(got, torch.tensor(expected, dtype=torch.float64), atol=1e-6)  # 196 cells of float32


SAVED = {
    **{name: build for name, (build, _, _) in MODELS.items() if name != "distilled"},
    "layer scale": lambda: vit(img_size=(28, 20), init_values=0.5),
    "normed queries": lambda: vit(img_size=(28, 20), qk_norm=True),
    "no value bias": lambda: vit(img_size=(28, 20), qkv_bias=False),
    "positions of patches only": lambda: vit(img_size=(28, 20), no_embed_class=True),
    "class token pooled by mean": lambda: vit(img_size=(28, 20), global_pool="avg", fc_norm=False),
    "norm before": lambda: vit(img_size=(28, 20), pre_norm=True),
    "narrow mlp": lambda: vit(img_size=(28, 20), mlp_ratio=1.5),
    "dropout": lambda: vit(img_size=(28, 20), drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.2),
}


@pytest.mark.parametrize("name", SAVED)
def test_save_and_load(tmp_path, name):
    model = SAVED[name]()
    size = model.patch_embed.img_size
    images, labels = batch(2, size)
    guide = TopDown.fresh(model, seed=2, feedback_bias=name != "registers", sigma=2.0)
    state = torch.get_rng_state()
    guide.save(tmp_path / "guide.safetensors")
    again = TopDown.load(tmp_path / "guide.safetensors", sigma=2.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.feedback_bias == guide.feedback_bias
    assert torch.equal(again(images, labels).map, guide(images, labels).map)
    assert torch.equal(again(images).map, guide(images).map)
    assert torch.equal(again(images).logits, guide(images).logits)
    assert TopDown.load(tmp_path / "guide.safetensors", feedback_bias=False, threshold=False).feedback_bias is False
    assert [p.name for p in tmp_path.iterdir()] == ["guide.safetensors"]


def test_a_guide_without_prompt(tmp_path):
    model = vit()
    TopDown(model, TopDown.fresh(model).decoders).save(tmp_path / "guide.safetensors")
    assert TopDown.load(tmp_path / "guide.safetensors").prompt is None


def test_models_that_could_not_be_loaded_again_are_not_saved(tmp_path):
    for model, text in (
        (vit(act_layer="relu"), "activation"),
        (vit(norm_layer="rmsnorm"), "activation, norm"),
        (vit(VisionTransformerDistilled), "has a distillation token"),
        (vit(global_pool="avg", fc_norm=True, reg_tokens=1, pool_include_prefix=True), "pooling"),
    ):
        with pytest.raises(maps.MapModelError, match=text):
            TopDown.fresh(model).save(tmp_path / "guide.safetensors")
    assert list(tmp_path.iterdir()) == []


# -- files that do not fit


def test_heads_must_be_told_where_the_width_does_not(tmp_path):
    model = vit(img_size=28)  # width 32, two heads
    path = write(tmp_path / "guide.pth", tensors_of(model), "plain")
    with pytest.raises(maps.MapModelError, match="width 32 is no multiple of 64: give heads"):
        TopDown.load(path)
    images, labels = batch(2, (28, 28))
    told = TopDown.load(path, heads=2)
    assert torch.equal(told(images, labels).map, TopDown(model, told.decoders)(images, labels).map)


def test_the_grid_must_be_told_where_it_is_no_square(tmp_path):
    path = write(tmp_path / "guide.pth", tensors_of(wide(img_size=(28, 20))), "plain")
    with pytest.raises(
        maps.MapModelError, match=r"36 positions, 1 of them no patches: no square grid, give image_size"
    ):
        TopDown.load(path)  # 36 is a square, but one is the class token's
    assert TopDown.load(path, image_size=(28, 20)).model.patch_embed.grid_size == (7, 5)
    assert TopDown.load(path, image_size=(20, 28)).model.patch_embed.grid_size == (5, 7)
    with pytest.raises(maps.MapModelError, match=r"do not fit images of \(32, 32\)"):
        TopDown.load(path, image_size=(32, 32))


def test_labels_must_be_the_guides_classes(tmp_path):
    path = write(tmp_path / "guide.pth", tensors_of(wide()), "plain")
    assert TopDown.load(path, classes=5).sigma == 1.0
    with pytest.raises(maps.MapModelError, match="has 5 classes but the data have 10"):
        TopDown.load(path, classes=10)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop("blocks.1.norm1.weight"), r"lacks blocks\.1\.norm1\.weight: it is no guide"),
        (lambda t: t.pop("decoders.2.linear2.weight"), r"lacks decoders\.2\.linear2\.weight"),
        (lambda t: t.update({"dist_token": torch.zeros(1, 1, 64)}), "has a distillation token"),
        (lambda t: t.update({"blocks.0.attn.rope": torch.zeros(3)}), r"also holds blocks\.0\.attn\.rope"),
        (lambda t: t.update({"decoders.0.linear.weight": torch.zeros(32, 32)}), r"has another shape of decoders\.0"),
        (
            lambda t: [t.pop(k) for k in list(t) if k.startswith("decoders")],
            "no feedback decoders.*head_cosine needs none",
        ),
        (lambda t: t.pop("head.weight"), r"has no head\.weight: it holds no vision transformer with a classifier"),
        (lambda t: t.pop("pos_embed"), "has no pos_embed"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, text):
    tensors = tensors_of(wide())
    change(tensors)
    with pytest.raises(maps.MapModelError, match=text):
        TopDown.load(write(tmp_path / "guide.pth", tensors, "plain"))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(maps.MapModelError, match="there is no file"):
        TopDown.load(tmp_path / "absent.pth")
    for name in ("cut.safetensors", "cut.pth"):
        (tmp_path / name).write_bytes(b"not a checkpoint")
        with pytest.raises(maps.MapModelError, match="cannot read"):
            TopDown.load(tmp_path / name)
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "code.pth")  # would run code when read
    with pytest.raises(maps.MapModelError, match="as plain tensors"):
        TopDown.load(tmp_path / "code.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(maps.MapModelError, match="holds no tensors by name"):
        TopDown.load(tmp_path / "empty.pth")
