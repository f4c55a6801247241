"""Tokens, classifier rows and grids of the libraries' models; models whose head does not fit are refused by name."""

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

from foveal import maps
from foveal.maps.features import last_norm
from map_models import MODELS, batch, everything, resnet, same, vit

TINY_HF = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": (28, 20), "patch_size": 4, "num_labels": 5,
}  # fmt: skip


def hf(kind, **config):
    torch.manual_seed(0)
    settings = getattr(transformers, f"{kind.removesuffix('WithTeacher').removesuffix('ForImageClassification')}Config")
    return getattr(transformers, kind)(settings(**{**TINY_HF, **config}))


def tv_swin():
    return torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=5)


def tv_resnet():
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)


def timm_model(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **kwargs)


SWIN = {"img_size": (56, 84), "depths": (1, 1), "embed_dim": 24, "num_heads": (2, 4)}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
# name -> model, image size, grid, width
KNOWN = {
    **{f"timm vit {name}": (model, size, grid, 32) for name, (model, size, grid) in MODELS.items()},
    "timm swin": (lambda: timm_model("swin_tiny_patch4_window7_224", **SWIN), (56, 84), (7, 11), 48),
    "timm convnext": (lambda: timm_model("convnext_atto", **CONVNEXT), (96, 64), (3, 2), 32),
    "timm resnet": (resnet, (96, 64), (3, 2), 512),
    "timm efficientnet": (lambda: timm_model("tf_efficientnetv2_b0"), (96, 64), (3, 2), 1280),
    "timm eva": (lambda: timm_model("eva02_tiny_patch14_224", img_size=(56, 42), depth=2), (56, 42), (4, 3), 192),
    "torchvision vit": (lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5),
                        (32, 32), (4, 4), 32),
    "torchvision swin": (tv_swin, (64, 96), (8, 12), 32),
    "torchvision resnet": (tv_resnet, (96, 64), (3, 2), 512),
    "transformers vit": (lambda: hf("ViTForImageClassification"), (28, 20), (7, 5), 32),
    "transformers deit": (lambda: hf("DeiTForImageClassification"), (28, 20), (7, 5), 32),
    "transformers distilled": (lambda: hf("DeiTForImageClassificationWithTeacher"), (28, 20), (7, 5), 32),
    "transformers dinov2": (lambda: hf("Dinov2ForImageClassification", image_size=28), (28, 28), (7, 7), 32),
}  # fmt: skip
POOLED = ("timm vit pooled", "timm swin", "timm resnet", "timm efficientnet", "torchvision swin", "torchvision resnet")


def logits_of(output):
    return getattr(output, "logits", output)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("B", [1, 3])
def test_one_forward_gives_tokens_grid_and_the_models_own_logits(name, B):
    build, size, grid, D = KNOWN[name]
    model = build().eval()
    images, _ = batch(B, size)
    ran = []
    stem = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    handle = stem.register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        seen = maps.features(model, images)
        assert len(ran) == 1
        handle.remove()
        assert torch.equal(seen.logits, logits_of(model(images)))
    assert seen.grid == grid
    assert seen.tokens.shape == (B, grid[0] * grid[1], D)


@pytest.mark.parametrize("name", [n for n in KNOWN if n != "transformers dinov2"])
def test_rows_are_those_of_the_classifier(name):
    build, _, _, D = KNOWN[name]
    assert maps.classifier(build()).shape == (5, D)
    assert maps.classifier(build(), classes=5).shape == (5, D)


@pytest.mark.parametrize("name", POOLED)
def test_pooled_tokens_times_rows_are_the_logits(name):
    """Where the head reads the mean of normalised tokens. A norm after pooling would not commute with the mean."""
    build, size, _, _ = KNOWN[name]
    model = build().eval()
    if name == "timm vit pooled":
        model.norm, model.fc_norm = model.fc_norm, nn.Identity()
    images, _ = batch(2, size)
    head = (
        model.get_classifier()
        if hasattr(model, "get_classifier")
        else getattr(model, "head", getattr(model, "fc", None))
    )
    with torch.no_grad():
        seen = maps.features(model, images)
        again = seen.tokens.mean(1) @ maps.classifier(model).T + head.bias
    assert torch.allclose(again, seen.logits, atol=1e-5)


def test_tokens_go_through_the_norm_of_the_head():
    model, images = MODELS["pooled"][0]().eval(), batch(2, (28, 20))[0]
    with torch.no_grad():
        seen = maps.features(model, images)
        plain = model.forward_features(images)[:, 2:]
    assert not torch.allclose(seen.tokens, plain)
    assert torch.equal(seen.tokens, model.fc_norm(plain))
    convnext, images = KNOWN["timm convnext"][0]().eval(), batch(2, (96, 64))[0]
    with torch.no_grad():
        seen, plain = maps.features(convnext, images), convnext.forward_features(images)
        assert torch.equal(seen.tokens, convnext.head.norm(plain).flatten(2).mT)


def test_prefix_tokens_are_dropped_in_their_order():
    """The tokens of an image with one patch changed before the first block differ most at that patch."""
    for name in ("8x8", "registers", "distilled", "pooled"):
        build, size, grid = MODELS[name]
        model = build().eval()
        images, _ = batch(1, size)
        other = images.clone()
        other[:, :, 8:12, 12:16] += 3.0  # patch (2, 3)
        with torch.no_grad():
            change = (maps.features(model, images).tokens - maps.features(model, other).tokens).norm(dim=-1)[0]
        assert int(change.argmax()) == 2 * grid[1] + 3


def test_rows_of_a_distilled_model_are_the_class_tokens():
    model = MODELS["distilled"][0]()
    assert maps.classifier(model) is model.head.weight
    model = hf("DeiTForImageClassificationWithTeacher")
    assert maps.classifier(model) is model.cls_classifier.weight


@pytest.mark.parametrize(
    "name",
    ["timm vit 7x5", "timm vit pooled", "timm eva", "torchvision vit", "transformers vit", "transformers dinov2"],
)
def test_the_last_norm_brings_the_last_block_to_the_tokens(name):
    import foveal

    build, size, _, _ = KNOWN[name]
    model = build().eval()
    images, _ = batch(2, size)
    with torch.no_grad(), foveal.read(model, what="block_out") as seen:
        tokens = maps.features(model, images).tokens
        assert torch.allclose(last_norm(model)(seen.block_out()), tokens, atol=1e-6)


# -- heads that do not fit


def refused():
    no_head = vit(num_classes=0)
    hidden = timm_model("convnext_atto", **CONVNEXT, head_hidden_size=32)
    mlp = vit()
    mlp.head = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 5))
    both = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5, representation_size=16)
    two_poolings = timm.models.ResNet(
        timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=5, global_pool="catavgmax"
    )
    return {
        "no head": (no_head, r"head of VisionTransformer is missing.*num_classes"),
        "a hidden layer as wide as the tokens": (hidden, r"NormMlpClassifierHead.*one linear layer"),
        "a multi-layer head": (mlp, r"Sequential of Linear, GELU, Linear.*class_mean"),
        "torchvision's representation": (both, "Sequential of Linear, Tanh, Linear"),
        "a hidden layer of another width": (timm_model("mobilenetv3_small_050"), r"reads 1024 numbers.*have 288"),
        "two poolings": (two_poolings, r"reads 1024 numbers but its tokens have 512"),
        "class token and mean": (hf("Dinov2ForImageClassification"), r"reads 64 numbers but its tokens have 32"),
        "a pooling query": (vit(global_pool="map", class_token=False), r"attn_pool.*class_attention"),
        "a model without grid of tokens": (nn.Linear(2, 2), r"Linear are not known; known are models with timm's"),
    }


@pytest.mark.parametrize("case", refused())
def test_heads_that_do_not_fit_are_refused_by_name(case):
    model, text = refused()[case]
    with pytest.raises(maps.MapModelError, match=text):
        maps.HeadCosine(model)


def test_heads_in_a_wrapper_of_dropout_fit():
    model = vit()
    model.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(32, 5))
    assert maps.classifier(model) is model.head[1].weight
    torchvision_vit = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5)
    assert maps.classifier(torchvision_vit) is torchvision_vit.heads.head.weight


@pytest.mark.parametrize("classes", [4, 6, 1000])
@pytest.mark.parametrize("source", [maps.HeadCosine, maps.LabelBiased])
def test_a_head_of_other_classes_is_refused(source, classes):
    with pytest.raises(maps.MapModelError, match=f"has 5 classes but the data have {classes}.*linear probe"):
        source(vit(), classes=classes)


def test_a_map_of_logits_is_refused():
    model = timm_model("convnext_atto", **CONVNEXT, global_pool="")
    with pytest.raises(maps.MapModelError, match=r"returns \(2, 5, 1, 1\), not one row of logits"), torch.no_grad():
        maps.features(model.eval(), torch.zeros(2, 3, 32, 32))


def test_tokens_that_fill_no_grid_are_refused():
    model = vit(patch_drop_rate=0.5)  # in training: half of the patches go
    with pytest.raises(maps.MapModelError, match=r"32 tokens .* do not fill its \(8, 8\) grid"):
        maps.features(model, torch.zeros(1, 3, 32, 32))


# -- cells


@pytest.mark.parametrize("name", KNOWN)
def test_cells_are_the_grid(name):
    build, size, grid, _ = KNOWN[name]
    model = build().train()
    before = everything(model)
    assert maps.cells(model, size) == grid
    assert same(before, everything(model))


def test_cells_are_asked_once_per_size():
    model = resnet()
    ran = []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    model.conv1.register_forward_pre_hook(lambda *_: ran.append(1))
    assert [maps.cells(model, size) for size in ((64, 64), (64, 96), (64, 64), [64, 96])] == [(2, 2), (2, 3)] * 2
    assert len(ran) == 2


def test_cells_of_a_model_that_only_the_door_knows():
    hiera = timm_model("hiera_tiny_224", img_size=(128, 64), embed_dim=16, num_heads=1, abs_win_pos_embed=False)
    assert maps.cells(hiera, (128, 64)) == (4, 2)
    naflex = timm_model("naflexvit_base_patch16_gap", depth=1, embed_dim=64, num_heads=2)
    assert maps.cells(naflex, (64, 48)) == (4, 3)


def test_cells_of_a_model_that_nobody_knows():
    with pytest.raises(maps.MapModelError, match="the grid of Linear is not known"):
        maps.cells(nn.Linear(2, 2), (32, 32))


def test_cells_of_a_half_precision_model():
    assert maps.cells(vit(dtype=torch.bfloat16), (32, 32)) == (8, 8)
