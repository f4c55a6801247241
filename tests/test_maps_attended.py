"""Class and received attention against the same model unfused."""

import pytest
import timm
import torch
import torchvision
from timm.models.cait import Cait

from foveal import maps
from map_models import MODELS, batch, resnet, vit
from plain import plain_attention


def plain_map(model, images, layer=-1):
    """Attention of one block from plain operations: (B, H, T, T)."""
    with plain_attention() as logits, torch.no_grad():
        model.eval()(images)
    return logits[layer].softmax(-1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layer", [-1, 0])
def test_received_is_the_mean_over_heads_and_patches(name, layer):
    build, size, grid = MODELS[name]
    model = build()
    images, _ = batch(3, size)
    P = model.num_prefix_tokens
    attn = plain_map(model, images, layer)[:, :, P:, P:]
    expected = attn.mean((1, 2)).unflatten(1, grid)
    got = maps.ReceivedAttention(model, layer=layer)(images)
    assert torch.allclose(got.map, expected, atol=1e-6)
    assert (got.map.sum((1, 2)) < 1 if P else (got.map.sum((1, 2)) - 1).abs() < 1e-5).all()


def test_received_leaves_the_prefix_queries_out():
    model = MODELS["registers"][0]()
    images, _ = batch(2, (28, 20))
    over_all = plain_map(model, images)[:, :, :, 3:].mean((1, 2)).unflatten(1, (7, 5))
    assert not torch.allclose(maps.ReceivedAttention(model)(images).map, over_all, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in MODELS if n != "pooled"])
@pytest.mark.parametrize("layer", [-1, "blocks.1"])
def test_class_attention_is_the_class_tokens_row(name, layer):
    build, size, grid = MODELS[name]
    model = build()
    images, _ = batch(3, size)
    expected = plain_map(model, images, -1 if layer == -1 else 1)[:, :, 0, model.num_prefix_tokens :].mean(1)
    got = maps.ClassAttention(model, layer=layer)(images)
    assert torch.allclose(got.map, expected.unflatten(1, grid), atol=1e-6)


def test_by_hand_on_two_patches():
    """One head; queries (0 0), (1 0), (0 2) of class and patches against keys (0 0), (2 0), (0 2)."""
    model = vit(img_size=(4, 8), depth=1, num_heads=1, embed_dim=2)
    attention = model.blocks[0].attn
    model.blocks[0].norm1 = torch.nn.Identity()
    with torch.no_grad():
        for p in (
            model.patch_embed.proj.weight,
            model.patch_embed.proj.bias,
            model.cls_token,
            *attention.qkv.parameters(),
        ):
            p.zero_()
        model.pos_embed.copy_(torch.tensor([[[0.0, 0], [1, 0], [0, 1]]]))
        attention.qkv.weight[0:2] = torch.tensor([[1.0, 0], [0, 2]]) * 2**0.5  # undoes the scale of attention
        attention.qkv.weight[2:4] = torch.eye(2) * 2
    images = torch.zeros(1, 3, 4, 8)
    first, second = (torch.tensor([0.0, logit, 0]).softmax(0) for logit in (2.0, 4.0))  # its own patch in the middle
    expected = torch.tensor([[[first[1] + second[0], first[0] + second[1]]]]) / 2
    assert torch.allclose(maps.ReceivedAttention(model)(images).map, expected)
    found = maps.ClassAttention(model)(images)
    assert found.blank.all()  # its query is zero: every key alike
    assert found.map.sum() == 0


def test_labels_do_not_matter():
    model = vit()
    images, labels = batch(2, (32, 32))
    for source in (maps.ReceivedAttention(model), maps.ClassAttention(model)):
        assert torch.equal(source(images).map, source(images, labels).map)


def test_swin_received_on_its_last_grid():
    torch.manual_seed(0)
    settings = {"img_size": (56, 84), "depths": (2, 2), "embed_dim": 24, "num_heads": (2, 4), "num_classes": 5}
    model = timm.create_model("swin_tiny_patch4_window7_224", **settings)
    images, _ = batch(2, (56, 84))
    found = maps.ReceivedAttention(model)(images)
    assert found.map.shape == (2, 7, 11)
    assert found.logits.shape == (2, 5)
    assert maps.LabelBiased(model)(images, torch.tensor([0, 1])).map.shape == (2, 7, 11)


def test_class_attention_of_other_layers_by_name():
    torch.manual_seed(0)
    cait = Cait(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=6)
    assert maps.ClassAttention(cait, layer="blocks_token_only.1")(batch(2, (32, 32))[0]).map.shape == (2, 4, 4)
    pooled = vit(global_pool="map", class_token=False)
    found = maps.ClassAttention(pooled, layer="attn_pool")(batch(2, (32, 32))[0])
    assert found.map.shape == (2, 8, 8)
    with plain_attention() as logits, torch.no_grad():
        pooled.eval()(batch(2, (32, 32))[0])
    assert torch.allclose(found.map, logits[-1].softmax(-1)[:, :, 0].mean(1).unflatten(1, (8, 8)), atol=1e-6)


def test_torchvision():
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5)
    for source in (maps.ReceivedAttention(model), maps.ClassAttention(model)):
        found = source(batch(2, (32, 32))[0])
        assert found.map.shape == (2, 4, 4)
        assert found.logits.shape == (2, 5)


def test_a_model_without_logits_has_none():
    import transformers

    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    found = maps.ReceivedAttention(transformers.CLIPVisionModel(config))(batch(2, (32, 32))[0])
    assert found.map.shape == (2, 4, 4)
    assert found.logits is None


def test_models_that_do_not_fit_name_what_does():
    with pytest.raises(maps.MapModelError, match=r"needs the class token's row.*received_attention fits"):
        maps.ClassAttention(MODELS["pooled"][0]())
    for source in (maps.ClassAttention, maps.ReceivedAttention):
        with pytest.raises(maps.MapModelError, match=r"head_cosine and input_gradient fit models without attention"):
            source(resnet())
    with pytest.raises(ValueError, match="layers=3 but the model has 3"):
        maps.ReceivedAttention(vit(), layer=3)


def test_images_with_grids_of_their_own():
    torch.manual_seed(0)
    model = timm.create_model("naflexvit_base_patch16_gap", depth=1, embed_dim=64, num_heads=2, num_classes=5)
    source = maps.ReceivedAttention(model)
    assert source(batch(2, (64, 48))[0]).map.shape == (2, 4, 3)  # plain images have one
