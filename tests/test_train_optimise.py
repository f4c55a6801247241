"""Layer decay that acts, the schedule by hand, averaged weights against the plain recursion."""

import copy
import math

import pytest
import timm
import torch
from torch import nn

from foveal.train.optimise import Average, parameter_groups, set_rates, shape
from training import TINY


@pytest.fixture
def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, **TINY)


def moved(model: nn.Module, **options) -> dict[str, float]:
    """How far AdamW's first step moves each tensor: its largest change, which is the group's learning rate."""
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.0, **options), lr=1.0)
    set_rates(optimizer, lr=1e-3, share=0.5)
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    nn.functional.cross_entropy(model(images), torch.arange(8) % 3).backward()
    optimizer.step()
    return {name: float((tensor - before[name]).abs().max()) for name, tensor in model.state_dict().items()}


def test_the_first_block_learns_at_decay_to_the_k_of_the_head(vit: nn.Module):
    steps = moved(vit, layer_decay=0.5)
    head = steps["head.weight"]
    assert head == pytest.approx(0.5e-3, rel=1e-3)  # lr * share; Adam's epsilon takes off the last digits
    assert steps["blocks.1.mlp.fc1.weight"] == pytest.approx(head / 2, rel=1e-2)
    assert steps["blocks.0.mlp.fc1.weight"] == pytest.approx(head / 4, rel=1e-2)
    assert steps["patch_embed.proj.weight"] == pytest.approx(head / 8, rel=1e-2)
    assert steps["cls_token"] == pytest.approx(head / 8, rel=1e-2)


def test_the_new_classifier_may_be_faster(vit: nn.Module):
    steps = moved(vit, layer_decay=1.0, head_lr_factor=10)
    assert steps["head.weight"] == pytest.approx(10 * steps["blocks.0.mlp.fc1.weight"], rel=1e-2)
    assert steps["head.bias"] == pytest.approx(5e-3, rel=1e-2)


def test_every_parameter_is_in_one_group(vit: nn.Module):
    for factor in (1.0, 10.0):
        groups = parameter_groups(vit, 0.05, layer_decay=0.5, head_lr_factor=factor)
        held = [id(p) for group in groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in vit.parameters())


def test_biases_norms_and_embeddings_are_not_decayed(vit: nn.Module):
    decayed = {id(p) for group in parameter_groups(vit, 0.05, 0.75) if group["weight_decay"] for p in group["params"]}
    for name, parameter in vit.named_parameters():
        plain = name.endswith("bias") or "norm" in name or name in ("pos_embed", "cls_token")
        assert (id(parameter) in decayed) != plain, name


def test_frozen_parameters_are_left_out(vit: nn.Module):
    vit.patch_embed.requires_grad_(False)
    held = {id(p) for group in parameter_groups(vit, 0.05, 0.75) for p in group["params"]}
    assert not held & {id(p) for p in vit.patch_embed.parameters()}


def test_the_schedule_by_hand():
    rates = [shape(step, steps=10, warmup=4) for step in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[7] == pytest.approx(0.5)  # half of the six cosine steps
    assert rates[9] == pytest.approx(0.5 * (1 + math.cos(math.pi * 5 / 6)))
    assert shape(0, steps=10, warmup=0) == 1.0
    assert shape(10, steps=10, warmup=4) == pytest.approx(0.0)


def test_the_average_is_the_plain_recursion():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    average = Average(model, decay=0.3)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for k in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        model[1].num_batches_tracked += 1
        average.update(model)
        decay = min(0.3, (1 + k) / (10 + k))
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * tensor
            else:
                expected[name] = tensor.clone()
    assert all(torch.allclose(average.weights[name], expected[name], rtol=1e-12) for name in expected)
    other = Average(model, decay=0.3)
    other.restore(average.state())
    assert other.updates == 5
    assert torch.equal(other.weights["0.weight"], average.weights["0.weight"])
