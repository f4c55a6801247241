"""Frozen features: what exactly is read, of which models, in words, and without a trace."""

import pytest
import timm
import torch
import torchvision
import transformers
from PIL import Image
from torch import nn

import foveal
import foveal.models
from foveal.attention.norms import final_norms
from foveal.data import ImageConfig, Images, image_config
from foveal.evaluate import Features, features
from foveal.evaluate.features import Reader
from map_models import MODELS, everything, same, vit

TINY = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 4}
HF = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64,
      "image_size": 28, "patch_size": 4}  # fmt: skip
PLAIN = ImageConfig(size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def images(n, size=(32, 32), classes=3):
    g = torch.Generator().manual_seed(n)
    pixels = torch.randint(0, 256, (n, 3, *size), generator=g, dtype=torch.uint8)
    return Images(torch.arange(n) % classes, tuple("abc"[:classes]), pixels=pixels)


def hf(kind, **config):
    torch.manual_seed(0)
    settings = getattr(transformers, kind.removesuffix("ForImageClassification").removesuffix("Model") + "Config")
    return getattr(transformers, kind)(settings(**{**HF, **config})).eval()


def inputs(size):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_the_last_block_after_the_norm_is_what_timm_gives_its_head(name):
    make, size, _ = MODELS[name]
    model, x = make().eval(), inputs(size)
    prefix = model.num_prefix_tokens
    with torch.no_grad():
        tokens = model.forward_features(x)
        before = model.blocks(model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x)))))
    if name == "pooled":  # no class token; its norm follows pooling
        assert torch.equal(Reader(model)(x), model.fc_norm(before[:, prefix:].mean(1)))
        assert "mean of the patch tokens (there is no class token), after the norm that" in Reader(model).definition
    else:
        assert torch.equal(Reader(model)(x), tokens[:, 0])
        assert torch.equal(Reader(model, tokens="both")(x), torch.cat([tokens[:, 0], tokens[:, prefix:].mean(1)], 1))
        assert torch.equal(Reader(model, norm=False)(x), before[:, 0])
    mean = Reader(model, tokens="mean", norm=False)(x)
    assert torch.equal(mean, before[:, prefix:].mean(1))


def test_the_mean_of_a_pooling_model_is_what_its_head_reads():
    model, x = vit(global_pool="avg", class_token=True).eval(), inputs((32, 32))
    read = Reader(model, tokens="mean")(x)
    assert torch.equal(read, model.forward_head(model.forward_features(x), pre_logits=True))


def test_several_blocks_side_by_side_each_through_the_final_norm():
    model, x = vit().eval(), inputs((32, 32))
    outs = []
    handles = [block.register_forward_hook(lambda _m, _i, out: outs.append(out)) for block in model.blocks]
    with torch.no_grad():
        model(x)
        each = [model.norm(out)[:, 0] for out in outs]
    for handle in handles:
        handle.remove()
    assert torch.equal(Reader(model, block=range(-3, 0))(x), torch.cat(each, 1))
    assert torch.equal(Reader(model, block=[2, 0])(x), torch.cat([each[2], each[0]], 1))


def test_the_definition_says_which_features():
    model = vit().eval()
    assert Reader(model).definition == "block 2 of 0-2, class token, after the final norm"
    assert Reader(model, block=0, tokens="mean", norm=False).definition == (
        "block 0 of 0-2, mean of the patch tokens, before the final norm"
    )
    assert Reader(model, block=range(-2, 0), tokens="both").definition == (
        "blocks 1, 2 side by side of 0-2, class token beside the mean of the patch tokens, after the final norm"
    )


def test_distillation_token():
    model, size, _ = MODELS["distilled"]
    model, x = model().eval(), inputs(size)
    assert torch.equal(Reader(model, tokens="distillation")(x), model.forward_features(x)[:, 1])


def test_cct_has_no_class_token():
    model = timm.create_model("cct_2_3x2_32", num_classes=0).eval()
    x = inputs((32, 32))
    reader = Reader(model)
    assert torch.allclose(reader(x), model.forward_features(x).mean(1), atol=1e-6)  # order of the sum
    assert "there is no class token" in reader.definition


def test_torchvision():
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 3, 2, 32, 64).eval()
    model.heads = nn.Identity()
    x = inputs((32, 32))
    assert torch.allclose(Reader(model)(x), model(x), atol=1e-6)  # other kernels with gradient


@pytest.mark.parametrize(
    "kind",
    ["ViTModel", "ViTForImageClassification", "DeiTModel", "Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel"],
)
def test_transformers(kind):
    model, x = hf(kind), inputs((28, 28))
    with torch.no_grad():
        last = (model if kind.endswith("Model") else model.vit)(x).last_hidden_state
    assert torch.allclose(Reader(model)(x), last[:, 0], atol=1e-6)  # other kernels under no_grad


def test_clip_normalises_what_it_pooled():
    model, x = hf("CLIPVisionModel", projection_dim=16), inputs((28, 28))
    assert torch.allclose(Reader(model)(x), model(x).pooler_output, atol=1e-6)


def test_siglip_has_no_class_token():
    model, x = hf("SiglipVisionModel"), inputs((28, 28))
    assert torch.allclose(Reader(model)(x), model(x).last_hidden_state.mean(1), atol=1e-6)


@pytest.mark.parametrize("kind", ["ViTModel", "DeiTModel", "DINOv3ViTModel", "CLIPVisionModel"])
def test_the_norm_is_one_module_of_the_model(kind):
    norms = final_norms(hf(kind))
    assert sum(isinstance(one, nn.LayerNorm) for one in (norms.tokens, norms.pooled)) == 1


def test_images_come_back_in_order_whatever_the_batches(tmp_path):
    model = vit().eval()
    config = image_config(model)
    held = images(7)
    whole = features(model, held, config, batch_size=7)
    for batch_size in (1, 3):
        again = features(model, held, config, batch_size=batch_size)
        assert torch.allclose(again.values, whole.values, atol=1e-6)  # kernels differ with the batch
        assert torch.equal(again.labels, held.labels)
    picked = features(model, held.subset([5, 0, 3]), config)
    assert torch.allclose(picked.values, whole.values[[5, 0, 3]], atol=1e-6)
    assert whole.values.shape == (7, 32)
    assert whole.values.dtype == torch.float32
    assert whole.classes == ("a", "b", "c")
    files = []
    for i, picture in enumerate(held.pixels):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(files[-1])
    from_files = Images(held.labels, held.classes, files=tuple(files))
    one, two = (features(model, from_files, config, batch_size=2, workers=w) for w in (0, 2))
    assert torch.equal(one.values, two.values)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training):
    model = vit(drop_path_rate=0.5, proj_drop_rate=0.5).train(training)
    before = everything(model)
    first = features(model, images(3), PLAIN)
    assert same(everything(model), before)
    assert torch.equal(features(model, images(3), PLAIN).values, first.values)  # no dropout: evaluated
    with pytest.raises(RuntimeError):
        Reader(model)(torch.zeros(1, 4, 32, 32))
    assert same(everything(model), before)


def test_readers_from_outside_do_not_see_it():
    model = vit().eval()
    with foveal.read(model) as seen:
        model(inputs((32, 32)))
        Reader(model)(inputs((32, 32)))
    assert len(seen.calls) == 1


def test_half_precision():
    model = vit().eval()
    exact = features(model, images(4), PLAIN).values
    cast = features(model, images(4), PLAIN, autocast=torch.bfloat16)
    assert cast.values.dtype == torch.float32
    assert not torch.equal(cast.values, exact)
    assert torch.allclose(cast.values, exact, atol=0.1)  # bfloat16 has 8 bits
    for tokens in ("class", "mean"):
        assert features(vit(dtype=torch.bfloat16), images(4), PLAIN, tokens=tokens).values.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 3}, r"block=3 but the model has 3 blocks; use values in \[-3, 2\]"),
        ({"block": []}, "no block asked"),
        ({"tokens": "patch"}, "tokens='patch' is not known; use auto, class"),
        ({"tokens": "distillation"}, "no distillation token"),
    ],
)
def test_what_is_not_there_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        Reader(vit(), **options)


def test_models_without_a_class_token_say_so():
    make, _, _ = MODELS["pooled"]
    with pytest.raises(ValueError, match="this model has no class token: use tokens='mean'"):
        Reader(make(), tokens="class")


def test_models_whose_blocks_are_not_known_are_refused():
    with pytest.raises(foveal.UnsupportedModelError, match="ResNet is not a model"):
        Reader(torchvision.models.resnet18())
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1), embed_dim=24, num_heads=(2, 4))
    with pytest.raises(foveal.UnsupportedModelError, match="give no sequence of tokens"):
        Reader(swin)
    branches = timm.create_model("vit_small_patch16_18x2_224", depth=2, embed_dim=48)
    with pytest.raises(foveal.UnsupportedModelError, match="one of several branches"):
        Reader(branches)


def test_features_fit_together():
    with pytest.raises(ValueError, match=r"\(N, D\) and \(N,\)"):
        Features(torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="labels run from 0 to 2 but there are 2 classes"):
        Features(torch.zeros(3, 2), torch.arange(3), classes=("a", "b"))
    with pytest.raises(ValueError, match="at least one"):
        Features(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
    some = Features(torch.arange(6.0).view(3, 2), torch.tensor([0, 1, 1]))
    assert some.classes == ("0", "1")
    assert some.subset(torch.tensor([2, 0])).index.tolist() == [2, 0]
