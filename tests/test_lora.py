"""Adapters of low rank in timm models: reached by the forward, off without trace, merged exactly."""

import copy
import sys

import pytest
import timm
import torch
from torch import nn

import foveal
import foveal.models
from foveal.chance import generator
from foveal.transfer import lora
from foveal.transfer.lora import inject, is_adapted, merged_state, target_modules, without_adapters

SMALL = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
WINDOWS = {"window_size": 2, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "num_classes": 5}
MODELS = {
    "vit_tiny_patch16_224": SMALL,
    "vit_tiny_patch16_dinov3_qkvb": SMALL | {"dynamic_img_size": False},
    "eva02_tiny_patch14_224": SMALL,
    "eva02_base_patch14_224": SMALL,  # q_proj, k_proj, v_proj
    "beit_base_patch16_224": SMALL,
    "deit_tiny_distilled_patch16_224": SMALL,
    "vit_base_patch16_siglip_224": SMALL,
    "swin_tiny_patch4_window7_224": WINDOWS | {"img_size": 16, "window_size": 2},
    "swinv2_tiny_window8_256": WINDOWS | {"img_size": 16, "window_size": 2},
    "cct_2_3x2_32": {"num_classes": 5},
}
FUSED = ("vit_tiny_patch16_dinov3_qkvb", "eva02_tiny_patch14_224", "beit_base_patch16_224", "swinv2_tiny_window8_256")


def build(name="vit_tiny_patch16_224", dtype=torch.float64):
    """A model whose every weight matters: also layer scale, norms that start at 0, biases of q and v."""
    model = timm.create_model(name, **MODELS[name]).eval().to(dtype)
    rng = generator(0, "init")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=rng).to(dtype)
    return model


def images_for(model, count=3):
    like = next(model.parameters())
    side = 16 if "Swin" in type(model).__name__ else 32
    return torch.randn(count, 3, side, side, generator=generator(1, "init"), dtype=torch.float64).to(like.dtype)


def filled(model):
    """The adapted model with A and B as after some training."""
    rng = generator(2, "init")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))
    return model


def snapshot(model):
    """What leaving no trace keeps: names, values, modes, flags, gradients, attributes of modules."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()],
        [
            (name, type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
            for name, m in model.named_modules()
        ],
        [
            (name, sorted(key for key in m.__dict__), m.__dict__.get("qkv_bias_separate"))
            for name, m in model.named_modules()
        ],
    )


def same(a, b):
    return list(a[0]) == list(b[0]) and all(torch.equal(a[0][k], b[0][k]) for k in a[0]) and a[1:] == b[1:]


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def test_at_the_start_nothing_has_changed(name):
    model = build(name)
    images = images_for(model)
    before = model(images)
    inject(model)
    assert torch.allclose(model(images), before, rtol=0, atol=1e-12)  # biases may be added apart: other rounding


def test_gradient_of_each_adapter_is_that_of_its_weight_seen_through_the_other_factor(name):
    plain, model = build(name), build(name)
    inject(model, rank=3, alpha=6)
    filled(model)
    merged = merged_state(model)
    plain.load_state_dict(merged)
    images = images_for(model)
    plain(images).square().sum().backward()
    model(images).square().sum().backward()
    wanted = dict(plain.named_parameters())
    adapted = list(lora._adapted(model))
    assert len(adapted) == (6 if name == "eva02_base_patch14_224" else 2)
    for path, layer in adapted:
        G, A, B = wanted[f"{path}.weight"].grad, layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert G.abs().max() > 1e-6
        assert torch.allclose(B.grad, 2 * G @ A.T, rtol=1e-6, atol=1e-12)
        assert torch.allclose(A.grad, 2 * B.T @ G, rtol=1e-6, atol=1e-12)


def test_off_is_the_network_of_before(name):
    model = build(name)
    images = images_for(model)
    before = model(images)
    filled(inject_into(model))
    tuned = model(images)
    assert (tuned - before).abs().max() > 1e-4
    with without_adapters(model):
        assert torch.allclose(model(images), before, rtol=0, atol=1e-12)
    assert torch.equal(model(images), tuned)


def inject_into(model, **settings):
    inject(model, **settings)
    return model


def test_merged_state_is_the_plain_model(name):
    model = build(name)
    names = list(model.state_dict())
    filled(inject_into(model, rank=3, alpha=6))
    before = snapshot(model)
    state = merged_state(model)
    assert same(before, snapshot(model))
    assert list(state) == names
    fresh = timm.create_model(name, **MODELS[name]).eval().double()
    fresh.load_state_dict(state, strict=True)
    images = images_for(model)
    assert torch.allclose(fresh(images), model(images), rtol=0, atol=1e-10)


def test_merged_state_in_the_types_of_training():
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        model = filled(inject_into(build(dtype=dtype)))
        state = merged_state(model)
        assert {tensor.dtype for tensor in state.values()} == {dtype}
        fresh = timm.create_model("vit_tiny_patch16_224", **SMALL).eval().to(dtype)
        fresh.load_state_dict(state)
        images = images_for(model)
        with torch.no_grad():
            assert torch.allclose(fresh(images), model(images), rtol=0, atol=close * float(model(images).abs().max()))


def test_a_worked_example():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2, bias=False)))
    layer = model[0][0]
    layer.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    wrapped = nn.Module()
    wrapped.base_layer, wrapped.scaling = layer, {"default": 2.0}
    wrapped.lora_A = nn.ModuleDict({"default": nn.Linear(2, 1, bias=False)})
    wrapped.lora_B = nn.ModuleDict({"default": nn.Linear(1, 2, bias=False)})
    wrapped.lora_A["default"].weight.data = torch.tensor([[1.0, -1.0]])
    wrapped.lora_B["default"].weight.data = torch.tensor([[1.0], [0.5]])
    model[0][0] = wrapped
    # W + 2 B A
    assert merged_state(model)["0.0.weight"].tolist() == [[3.0, 0.0], [4.0, 3.0]]


def test_only_adapters_and_classifier_are_trained(name):
    model = build(name)
    chosen = inject(model)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    assert [key for key, p in model.named_parameters() if p.requires_grad] == list(chosen.trained)
    assert [key for key, p in model.named_parameters() if not p.requires_grad] == list(chosen.frozen)
    assert all(".lora_" in key or key.startswith("head") for key in chosen.trained)
    model(images_for(model)).square().sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    # A stands still in the first step: its gradient goes through B, which is 0
    assert moved == {key for key in chosen.trained if ".lora_A." not in key}


@pytest.mark.parametrize("fused", FUSED)
def test_fused_qkv_is_noticed_where_it_would_not_be_called(fused, monkeypatch):
    model = build(fused)
    before = snapshot(model)
    monkeypatch.setattr(lora, "_call_qkv", lambda model, modules: None)
    with pytest.raises(ValueError, match=r"adapters would not train.*attn\.qkv.*proj, fc1, fc2"):
        inject(model)
    assert same(before, snapshot(model))
    monkeypatch.undo()
    inject(model)
    assert all(m.qkv_bias_separate for m in model.modules() if hasattr(m, "qkv_bias_separate"))


def test_attention_that_is_never_called_is_noticed_and_nothing_stays():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
            self.used, self.idle = nn.ModuleList([nn.Module()]), nn.ModuleList([nn.Module()])
            self.used[0].qkv, self.idle[0].qkv = nn.Linear(3, 3), nn.Linear(3, 3)
            self.head = nn.Linear(3, 2)
            self.pretrained_cfg = {"input_size": (3, 8, 8)}

        def get_classifier(self):
            return self.head

        def forward(self, x):
            return self.head(self.used[0].qkv(x.mean((2, 3))))

    model = Idle().requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"does not call idle\.0\.qkv, or"):
        inject(model)
    assert same(before, snapshot(model))


def test_injecting_draws_nothing_and_adapters_are_in_the_mode_of_what_they_wrap():
    model = build().train()
    model.blocks[0].eval()
    state = torch.get_rng_state()
    inject(model, dropout=0.5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    for name, module in model.named_modules():
        assert module.training != name.startswith("blocks.0"), name


def interrupted(model, images):
    with without_adapters(model):
        model(images)
        raise KeyboardInterrupt


def test_off_nests_survives_errors_and_leaves_no_trace():
    model = filled(inject_into(build())).train()
    images = images_for(model)
    model(images).sum().backward()
    before, tuned = snapshot(model), model(images)
    with without_adapters(model):
        bare = model(images)
        with pytest.raises(KeyboardInterrupt):
            interrupted(model, images)
        assert torch.equal(model(images), bare)
        assert not torch.equal(bare, tuned)
    assert same(before, snapshot(model))
    assert torch.equal(model(images), tuned)


def test_off_between_forward_and_backward_changes_no_gradient():
    model = filled(inject_into(build()))
    images = images_for(model)
    model(images).sum().backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    loss = model(images).sum()
    with torch.no_grad(), without_adapters(model):
        model(images)
    loss.backward()
    assert wanted.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    assert all(torch.equal(p.grad, wanted[name]) for name, p in model.named_parameters() if name in wanted)


def test_attention_is_read_through_adapters_and_without():
    model = build()
    images = images_for(model)

    def seen():
        with foveal.read(model, layers="all") as rows:
            model(images)
        return torch.stack(rows.class_attention())

    before = seen()
    filled(inject_into(model))
    assert (seen() - before).abs().max() > 1e-4
    with without_adapters(model):
        assert torch.equal(seen(), before)


def test_the_start_comes_from_the_seed_alone():
    def start(seed, scramble):
        torch.manual_seed(scramble)
        model = build()
        state = torch.get_rng_state()
        inject(model, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return torch.cat([p.flatten() for name, p in model.named_parameters() if ".lora_A." in name])

    assert torch.equal(start(0, 1), start(0, 2))
    assert not torch.equal(start(0, 1), start(1, 1))


def test_dropout_acts_in_training_only():
    model = filled(inject_into(build(), dropout=0.5))
    images = images_for(model)
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))


def test_a_copy_is_adapted_on_its_own():
    model = filled(inject_into(build("beit_base_patch16_224")))
    twin = copy.deepcopy(model)
    images = images_for(model)
    with without_adapters(twin):
        assert not torch.equal(twin(images), model(images))
    assert torch.equal(twin(images), model(images))


def test_targets_are_linear_layers_of_the_blocks():
    model = build()
    assert target_modules(model) == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    assert target_modules(model, "proj") == ["blocks.0.attn.proj", "blocks.1.attn.proj"]  # not the patch embedding's
    assert target_modules(model, ["fc1", "mlp.fc2"])[:2] == ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]
    split = target_modules(build("eva02_base_patch14_224"))
    assert split[:3] == [f"blocks.0.attn.{part}_proj" for part in "qkv"]
    inject(model, targets=["proj", "fc1", "fc2"])
    assert len(list(lora._adapted(model))) == 6


def test_many_targets_reach_no_layer_of_the_pooling_head():
    model = timm.create_model("vit_base_patch16_siglip_224", **(SMALL | {"depth": 6}))
    targets = ("qkv", "proj", "fc1", "fc2")
    wanted = target_modules(model, targets)
    assert len(wanted) == 24
    inject(model, targets=targets)
    assert [name for name, _ in lora._adapted(model)] == wanted


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"alpha": 0}, "alpha=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"targets": ()}, "targets is empty"),
        ({"targets": "qvk"}, "did you mean 'qkv'"),
        ({"targets": ["qkv", "head"]}, r"target 'head' is no linear layer.*fc1, fc2, proj, qkv"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    model = build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        inject(model, **settings)
    assert same(before, snapshot(model))


def test_models_that_cannot_be_adapted():
    with pytest.raises(ValueError, match=r"'qkv'.*ResNet"):
        inject(timm.create_model("resnet18", num_classes=5))
    with pytest.raises(ValueError, match="num_classes above 0"):
        inject(timm.create_model("vit_tiny_patch16_224", **(SMALL | {"num_classes": 0})))
    model = inject_into(build())
    with pytest.raises(ValueError, match="adapters already"):
        inject(model)


def test_without_adapters_there_is_nothing_to_switch_off():
    model = build()
    assert not is_adapted(model)
    with pytest.raises(ValueError, match="no adapters"), without_adapters(model):
        pass
    assert merged_state(model).keys() == model.state_dict().keys()
    inject(model)
    assert is_adapted(model)
    with without_adapters(model):
        assert is_adapted(model)


def test_without_peft_the_way_to_get_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    model = build()
    with pytest.raises(ImportError, match=r"pip install"):
        inject(model)
    assert not is_adapted(model)
