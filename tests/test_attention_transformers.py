"""transformers models, against their own eager attention."""

import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

import foveal  # noqa: E402
from plain import plain_attention  # noqa: E402

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": 64, "patch_size": 16,
}  # fmt: skip
MODELS = {  # name: (config, model, prefix tokens, has a class token)
    "vit": ("ViTConfig", "ViTModel", 1, True),
    "vit classifier": ("ViTConfig", "ViTForImageClassification", 1, True),
    "deit": ("DeiTConfig", "DeiTModel", 2, True),
    "dinov2": ("Dinov2Config", "Dinov2Model", 1, True),
    "dinov2 registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", 5, True),
    "dinov3": ("DINOv3ViTConfig", "DINOv3ViTModel", 5, True),
    "clip": ("CLIPVisionConfig", "CLIPVisionModel", 1, True),
    "siglip": ("SiglipVisionConfig", "SiglipVisionModel", 0, False),
    "beit": ("BeitConfig", "BeitModel", 1, True),
}


def build(key, dtype=torch.float64, attention="sdpa"):
    config_name, model_name, *_ = MODELS[key]
    extra = {"use_relative_position_bias": True} if key == "beit" else {}
    extra |= {"num_register_tokens": 4} if key in ("dinov3", "dinov2 registers") else {}
    config = getattr(transformers, config_name)(**SMALL, **extra, attn_implementation=attention)
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(config).to(dtype).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("key", MODELS)
def test_rows_match_eager_attention(key, dtype):
    _, _, P, has_class = MODELS[key]
    model, eager = build(key, dtype), build(key, dtype, "eager")
    images = torch.randn(3, 3, 64, 64, dtype=dtype)
    what = ["received", "patch_received", "mean_query", "keys", "queries", *(["class_logits"] if has_class else [])]
    with torch.no_grad():
        before = model(images)[0]
        with foveal.read(model, layers="all", what=what) as seen:
            assert torch.equal(model(images)[0], before)
        if dtype == torch.float64:  # eager transformers round their softmax to float32: a plain twin does not
            with plain_attention() as logits:
                model(images)
            attentions = [x.softmax(-1) for x in logits if x.shape[-1] == x.shape[-2]]
        else:
            attentions = eager(images, output_attentions=True).attentions
    assert seen.layout.prefix == P
    limit = 1e-10 if dtype == torch.float64 else 2e-6
    assert len(seen.layers) == len(attentions) == 2
    for i, attn in enumerate(attentions):
        assert (seen.received()[i] - attn.mean(-2)[..., P:]).abs().max() < limit
        assert (seen.patch_received()[i] - attn[:, :, P:].mean(-2)[..., P:]).abs().max() < limit
        assert seen.keys()[i].shape == seen.queries()[i].shape == (3, 4, 16, 8)
        if has_class:
            assert (seen.class_attention(prefix=True)[i] - attn[:, :, 0]).abs().max() < limit
    assert seen.grid == [(4, 4), (4, 4)]
    assert seen.to_grid(seen.received())[0].shape == (3, 4, 4)


def test_eager_models_are_read_as_they_are():
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    rows = []
    for attention in ("sdpa", "eager"):
        model = build("vit", attention=attention)
        with torch.no_grad(), foveal.read(model, layers=0) as seen:  # eager rounds its softmax: later layers differ
            model(images)
        rows.append(seen.class_logits())
    assert torch.allclose(*rows, atol=1e-12)


def test_siglip_pooling_probe_is_read_by_name():
    model = build("siglip")
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    pool = next(name for name in foveal.supported(model).layers if "head" in name)
    with torch.no_grad(), foveal.read(model, layers=pool) as seen:
        model(images)
    head = model.get_submodule(pool.rpartition(".")[0]) if "." in pool else model.head
    asked = {}
    head.attention.register_forward_pre_hook(lambda m, args: asked.update(q=args[0], k=args[1]))
    with torch.no_grad():
        model(images)
        _, weights = head.attention(asked["q"], asked["k"], asked["k"], average_attn_weights=False)
    assert torch.allclose(seen.class_attention(), weights[:, :, 0], atol=1e-12)


def test_gradients_flow_through_a_checkpointed_model():
    model = build("dinov3").train()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)

    def gradient():
        model.zero_grad()
        with foveal.read(model, layers=-1) as seen:
            model(images)
        seen.class_logits().square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    torch.manual_seed(0)
    expected = gradient()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(0)
    for a, b in zip(gradient(), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_two_towers_are_not_guessed():
    vision = {k: v for k, v in SMALL.items() if k != "intermediate_size"}
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    support = foveal.supported(transformers.CLIPModel(config))
    assert support.family == "transformers CLIP vision"  # its text tower has no patches and is left alone
