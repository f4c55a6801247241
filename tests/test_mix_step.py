"""`mixer.on`: the same training step with every mixer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from foveal import chance
from foveal.mix import MIXERS, CutMix, MapMixer, Mixup, NoMix, label_rows, soft_cross_entropy

PLAIN = [name for name, kind in MIXERS.items() if name != "transmix" and not issubclass(kind, MapMixer)]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))


def batch(B=5):
    g = torch.Generator().manual_seed(1)
    return torch.randn(B, 3, 8, 8, generator=g), torch.randint(5, (B,), generator=g)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("B", [1, 2, 5])
def test_the_step_is_draw_apply_and_soft_cross_entropy(name, B):
    mixer, net, (images, labels) = MIXERS[name](), model(), batch(B)
    draw = mixer.draw(B, (8, 8), rng=chance.generator(7, "mix", 0))
    expected = mixer.apply(images, draw)
    with mixer.on(net, images, labels, rng=chance.generator(7, "mix", 0), num_classes=5) as step:
        logits = net(step.images)
    assert torch.equal(step.images, expected.images)
    targets = expected.mix_labels(label_rows(labels, 5, 0.1))
    assert torch.equal(step.loss(logits, smoothing=0.1), soft_cross_entropy(logits, targets))
    assert torch.equal(step.targets(), expected.targets(labels, 5))
    assert torch.equal(step.targets(7), expected.targets(labels, 7))
    assert torch.equal(step.accuracy(logits), expected.accuracy(logits, labels))
    assert torch.equal(step.mixed.keep, expected.keep)


def test_without_mixing_the_step_is_an_ordinary_one():
    net, (images, labels) = model(), batch()
    with NoMix().on(net, images, labels) as step:
        logits = net(step.images)
    assert step.images is images
    assert torch.isclose(step.loss(logits), F.cross_entropy(logits, labels))
    assert torch.isclose(step.loss(logits, 0.1), F.cross_entropy(logits, labels, label_smoothing=0.1))
    assert torch.isclose(step.accuracy(logits), (logits.argmax(-1) == labels).float().mean())


@pytest.mark.parametrize("name", PLAIN)
def test_gradients_reach_the_model(name):
    net, (images, labels) = model(), batch()
    with MIXERS[name]().on(net, images, labels) as step:
        step.loss(net(step.images)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def first_images(mixer, steps=3):
    images, labels = batch()
    seen = []
    for _ in range(steps):
        with mixer.on(model(), images, labels) as step:
            seen.append(step.images)
    return seen


def test_without_a_generator_steps_differ_and_the_seed_repeats_them():
    one, same, other = (first_images(Mixup(seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one[0], other[0])


def test_rows_of_labels_and_one_hot_indices_agree():
    net, (images, labels) = model(), batch()
    losses = []
    for given in (labels, torch.eye(5)[labels]):
        with CutMix().on(net, images, given) as step:
            losses.append(step.loss(net(step.images), 0.1))
    assert torch.isclose(*losses)


def test_several_labels_with_one_sigmoid_each():
    net, (images, _) = model(), batch()
    labels = (torch.rand(5, 5, generator=torch.Generator().manual_seed(0)) < 0.4).int()
    with Mixup().on(net, images, labels) as step:
        logits = net(step.images)
    targets = step.mixed.mix_labels(labels * 0.9 + 0.05)
    assert torch.isclose(step.loss(logits, 0.1, kind="bce"), F.binary_cross_entropy_with_logits(logits, targets))


def test_one_sigmoid_per_class_with_indices_smooths_over_classes():
    net, (images, labels) = model(), batch()
    with Mixup().on(net, images, labels) as step:
        logits = net(step.images)
    targets = step.mixed.mix_labels(torch.eye(5)[labels] * 0.9 + 0.1 / 5)
    assert torch.isclose(step.loss(logits, 0.1, kind="bce"), F.binary_cross_entropy_with_logits(logits, targets))


def test_model_images_and_labels_are_left_alone():
    net, (images, labels) = model(), batch()
    before = copy.deepcopy((net.state_dict(), images, labels))
    for name in PLAIN:
        with MIXERS[name]().on(net, images, labels) as step:
            step.loss(net(step.images))
    assert torch.equal(images, before[1])
    assert torch.equal(labels, before[2])
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), net.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("images", "labels", "error", "says"),
    [
        (torch.zeros(4, 3, 8, 8), torch.zeros(3, dtype=torch.long), ValueError, "4 images but 3 labels"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.long), TypeError, "uint8"),
        (torch.zeros(3, 8, 8), torch.zeros(3, dtype=torch.long), ValueError, r"\(3, 8, 8\)"),
    ],
)
def test_bad_batches_are_named(images, labels, error, says):
    with pytest.raises(error, match=says), CutMix().on(model(), images, labels):
        pass


def test_asking_for_targets_of_indices_needs_the_number_of_classes():
    images, labels = batch()
    with CutMix().on(model(), images, labels) as step, pytest.raises(ValueError, match="num_classes"):
        step.targets()


def test_an_unknown_loss_is_named():
    images, labels = batch()
    with CutMix().on(model(), images, labels) as step, pytest.raises(ValueError, match="use one of ce, bce"):
        step.loss(torch.zeros(5, 5), kind="focal")
