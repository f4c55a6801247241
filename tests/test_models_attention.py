"""The door on CCT, CVT and ViT-Lite: blocks and sequence pooling, against the plain twin's maps."""

import pytest
import timm
import torch

import foveal
import foveal.models
from foveal.evaluate.predict import attention_source
from foveal.explain import pictures
from foveal.maps import HeadCosine
from foveal.mix import TransMix
from test_models import FORMS, images_of, plain, tiny


@pytest.mark.parametrize("form", FORMS)
def test_blocks_match_the_plain_twin(form):
    model = tiny(**FORMS[form])
    images = images_of(model)
    _, maps, _ = plain(model, images)
    P = model.num_prefix_tokens
    what = ["received", "full", "mean_query", *(["class_logits"] if P else [])]
    with torch.no_grad():
        before = model(images)
        with foveal.read(model, layers="all", what=what) as seen:
            assert torch.equal(model(images), before)
    assert seen.layers == ["blocks.0", "blocks.1"]
    h, w = model.patch_embed.grid_size
    assert seen.grid == [(h, w)] * 2
    for i, attn in enumerate(maps):
        assert torch.allclose(seen.full()[i], attn, rtol=0, atol=1e-10)
        assert torch.allclose(seen.received()[i], attn.mean(-2)[..., P:], rtol=0, atol=1e-10)
        assert torch.allclose(seen.full()[i].sum(-1), torch.ones_like(attn[..., 0]))
        if P:
            assert torch.allclose(seen.class_attention()[i], attn[:, :, 0, 1:], rtol=0, atol=1e-10)
    picture = seen.to_grid(seen.received())[0]
    assert picture.shape == (3, h, w)
    assert torch.equal(picture.flatten(1), seen.received()[0].mean(1))


@pytest.mark.parametrize("form", [form for form in FORMS if "class token" not in form])
def test_sequence_pooling_is_a_row_of_attention(form):
    model = tiny(**FORMS[form])
    images = images_of(model)
    _, _, weights = plain(model, images)
    with torch.no_grad(), foveal.read(model, layers="seq_pool", what=["class_logits", "full"]) as seen:
        model(images)
    row = seen.class_attention()
    h, w = model.patch_embed.grid_size
    assert row.shape == (3, 1, h * w)
    assert torch.allclose(row[:, 0], weights, rtol=0, atol=1e-10)
    assert torch.allclose(row.sum(-1), torch.ones(3, 1, dtype=torch.float64))
    assert torch.equal(seen.full()[:, :, 0], row)
    assert torch.equal(seen.to_grid(row).flatten(1), row[:, 0])
    assert seen.grid == (h, w)
    normed = model.forward_features(images)
    logits = normed @ model.seq_pool.score.weight[0] + model.seq_pool.score.bias
    assert torch.allclose(seen.class_logits()[:, 0], logits, rtol=0, atol=1e-10)  # a0 included


def test_pooling_row_has_a_gradient_and_survives_checkpointing():
    model = tiny().train()
    images = images_of(model)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(3)
        with foveal.read(model, layers=["seq_pool", "blocks.1"], what="full") as seen:
            model(images)
        pool, block = seen.full()
        (pool.square().sum() + block.square().sum()).backward()
        gradients.append([p.grad.clone() for p in model.blocks.parameters() if p.grad is not None])
    assert len(gradients[0]) > 12
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_pooling_is_read_through_a_compiled_model():
    model = tiny(torch.float32)
    images = images_of(model)
    with torch.no_grad(), foveal.attach(model):
        compiled = torch.compile(model, backend="eager")
        with foveal.read(compiled, layers=["seq_pool"]) as seen:
            compiled(images)
        rows = seen.class_attention()[0]
    with torch.no_grad(), foveal.read(model, layers="seq_pool") as plainly:
        model(images)
    assert torch.allclose(rows, plainly.class_attention(), atol=1e-6)


def test_what_is_supported():
    support = foveal.supported(timm.create_model("cct_2_3x2_32"))
    assert support.layers == ("blocks.0", "blocks.1", "seq_pool")
    assert support.what["seq_pool"] == ("class_logits", "full")
    assert "class_logits" not in support.what["blocks.0"]
    assert support.layout == foveal.TokenLayout(0)
    assert not support.reason
    lite = foveal.supported(timm.create_model("vit_lite_2_4_32"))
    assert lite.layers == ("blocks.0", "blocks.1")
    assert "class_logits" in lite.what["blocks.1"]
    assert lite.layout == foveal.TokenLayout(1, 0)


def test_the_class_row_of_a_model_without_one_names_the_pooling():
    model = timm.create_model("cct_2_3x2_32")
    with pytest.raises(ValueError, match=r"no class token.*received.*layers='seq_pool'"):
        foveal.read(model)
    with pytest.raises(ValueError, match="it offers class_logits, full"):
        foveal.read(model, layers="seq_pool", what="received")


def test_rooms_that_use_attention_take_these_models():
    model = timm.create_model("cct_2_3x2_32", num_classes=4, img_size=(32, 48)).eval()
    images, labels = images_of(model, B=4), torch.arange(4)
    seen = pictures(model, images)
    assert seen.kinds == ("received", "received", "pool")
    assert [tuple(x.shape) for x in seen.attention] == [(4, 2, 8, 12), (4, 2, 8, 12), (4, 1, 8, 12)]
    source = attention_source(model)
    assert (source.layer, source.kind) == (-1, "received")
    found = HeadCosine(model)(images, labels)
    assert found.map.shape == (4, 8, 12)
    with TransMix(layer="seq_pool").on(model, images, labels, num_classes=4) as step:
        logits = model(step.images)
        step.loss(logits).backward()
    assert torch.allclose(step.targets(4).sum(-1), torch.ones(4))
    lite = timm.create_model("vit_lite_2_4_32", num_classes=4).eval()
    with foveal.transfer.GTA(source=lite).on(lite, images[..., :32]) as guided:
        lite(images[..., :32])
    assert guided.losses()["gta"].item() == 0.0
