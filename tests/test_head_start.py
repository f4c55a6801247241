"""A classifier that starts as a linear probe of the frozen features."""

import math

import numpy as np
import pytest
import timm
import torch
from torch import nn

import foveal
from foveal.chance import generator
from foveal.data.config import image_config
from foveal.data.images import Images
from foveal.evaluate.features import Features
from foveal.train.head_start import STRENGTHS, Decision, choose, entering, folded, probe_head, regressions

VIT = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
FEW = (1e-3, 0.1, 10.0)


def vit(name="vit_tiny_patch16_224", **more):
    torch.manual_seed(0)
    return timm.create_model(name, **(VIT | more)).eval()


def coloured(per_class=8, classes=3, seed=0, names=None):
    """Images with a class each, told by the brightness of one colour under noise."""
    labels = torch.arange(classes).repeat(per_class)
    pixels = torch.randint(0, 120, (len(labels), 3, 32, 32), generator=generator(seed, "scenes"))
    pixels[torch.arange(len(labels)), labels % 3] += 60
    return Images(labels, names or tuple("abcdef"[:classes]), pixels.to(torch.uint8))


def logits_of(model, images):
    with torch.no_grad():
        return model(image_config(model).normalise(images.pixels).to(next(model.parameters()).dtype))


def plain_probe(model, images, strength):
    """By hand: features by timm's own call, one mean and deviation of all numbers, scikit-learn, its decision."""
    from sklearn.linear_model import LogisticRegression

    with torch.no_grad():
        x = image_config(model).normalise(images.pixels)
        found = model.forward_head(model.forward_features(x), pre_logits=True).double().numpy()
    x = (found - found.mean()) / found.std()
    regression = LogisticRegression(C=strength, max_iter=200).fit(x, images.labels.numpy())
    return torch.from_numpy(regression.decision_function(x))


@pytest.mark.parametrize("more", [{}, {"global_pool": "avg"}, {"global_pool": "map", "class_token": False}])
def test_logits_are_the_decision_function(more):
    model, images = vit(**more), coloured()
    start = probe_head(model, images, image_config(model), val=coloured(seed=1), batch_size=5, strengths=[0.1])
    wanted = plain_probe(model, images, 0.1)
    got = logits_of(model, images)
    assert wanted.abs().max() > 0.1
    assert torch.allclose(got.double(), wanted, rtol=0, atol=1e-4)
    assert start.train == float((wanted.argmax(1) == images.labels).double().mean())


def test_two_classes_differ_by_the_one_row_that_scikit_learn_fits():
    model, images = vit(num_classes=2), coloured(classes=2)
    probe_head(model, images, image_config(model), val=coloured(classes=2, seed=1), strengths=[0.1])
    got = logits_of(model, images).double()
    assert torch.allclose(got[:, 1] - got[:, 0], plain_probe(model, images, 0.2), rtol=0, atol=1e-4)
    assert torch.allclose(model.head.weight[0], -model.head.weight[1])


def test_two_classes_are_the_softmax_regression_of_that_strength():
    """The objective written out, minimised by torch from zero: the same weights and biases."""
    rng = generator(3, "init")
    x, y = torch.randn(40, 4, generator=rng).double(), torch.arange(40) % 2
    x[:, 0] += y
    found = regressions(Features(x, y), [0.5])[0]
    W = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    b = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([W, b], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss():
        solver.zero_grad()
        value = 0.5 * nn.functional.cross_entropy(x @ W.T + b, y, reduction="sum") + W.square().sum() / 2
        value.backward()
        return value

    solver.step(loss)
    assert torch.allclose(found.weight, W.detach(), atol=1e-3)  # scikit-learn stops at a gradient of 1e-4
    assert torch.allclose(found.bias, b.detach(), atol=1e-3)


def test_nothing_else_of_the_model_changes():
    model = vit().train()
    model.blocks[0].eval()
    model.blocks.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    probe_head(model, coloured(), image_config(model), val=coloured(seed=1), strengths=FEW)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"head.weight", "head.bias"}
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.blocks.parameters()] == [False] * len(list(model.blocks.parameters()))
    assert model.head.weight.requires_grad


def test_features_are_of_whole_images_in_evaluation_whatever_the_batch():
    model, images = vit(drop_rate=0.5, drop_path_rate=0.5).train(), coloured()
    config = image_config(model)
    once = entering(model, images, config, batch_size=64)
    assert torch.allclose(entering(model, images, config, batch_size=1).values, once.values, atol=1e-5)
    assert once.labels.tolist() == images.labels.tolist()
    again = vit()
    with torch.no_grad():
        tokens = again.forward_features(config.normalise(images.pixels))
    assert torch.allclose(once.values, tokens[:, 0], atol=1e-5)


def test_a_class_without_images_is_never_the_answer():
    model, images = vit(num_classes=4), coloured()
    images = Images(images.labels + (images.labels > 0), tuple("abcd"), images.pixels)  # none of b
    start = probe_head(model, images, image_config(model), val=images, strengths=FEW)
    assert start.absent == ("b",)
    assert torch.equal(model.head.weight[1], torch.zeros(16))
    got = logits_of(model, coloured(seed=2))
    assert got.isfinite().all()
    assert bool((got[:, 1] < got.amax(1)).all())
    noise = torch.randn(500, 16, generator=generator(0, "init")) * 100
    assert bool((model.head(noise).argmax(1) != 1).all())


def test_rows_of_classes_without_images_by_hand():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.1, 1.0]])
    found = regressions(Features(x.double(), torch.tensor([0, 2, 0, 2]), classes=("a", "b", "c")), [1.0])[0]
    assert found.weight[1].tolist() == [0, 0]
    assert float(found.bias[1]) == pytest.approx(float(found.bias[[0, 2]].min()) - math.log(5))
    assert torch.allclose(found.weight.sum(0), torch.zeros(2, dtype=torch.float64), atol=1e-12)


def test_distilled_models_get_one_probe_of_both_tokens():
    model, images = vit("deit_tiny_distilled_patch16_224"), coloured()
    config = image_config(model)
    val = coloured(seed=1)
    wanted = choose(entering(model, images, config), entering(model, val, config), FEW)[1]
    both = entering(model, images, config)
    assert both.values.shape == (24, 32)
    probe_head(model, images, config, val=val, strengths=FEW)
    assert torch.allclose(logits_of(model, images).double(), wanted(both.values), atol=1e-4)
    assert torch.equal(model.head.bias, model.head_dist.bias)
    assert not torch.equal(model.head.weight, model.head_dist.weight)


def test_standardisation_folds_back():
    decision = Decision(torch.tensor([[1.0, 2.0]], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64))
    raw = folded(decision, mean=3.0, std=2.0)
    # (f - 3) / 2 for f = (5, 9) is (1, 3): 1 + 6 + 1/2
    assert raw.weight.tolist() == [[0.5, 1.0]]
    assert raw.bias.tolist() == [0.5 - 3 * 1.5]
    assert raw(torch.tensor([[5.0, 9.0]])).tolist() == [[7.5]]


def test_the_probe_does_not_depend_on_scale_and_shift_of_the_features():
    rng = generator(5, "init")
    x, y = torch.randn(60, 5, generator=rng), torch.arange(60) % 3
    x[torch.arange(60), y] += 1
    one, other = (Features(v, y) for v in (x, 7 * x + 100))
    (start, a), (again, b) = (choose(f, f, [0.1]) for f in (one, other))
    assert start.val == again.val
    # standardised to float32's rounding of features around 100, and fitted to scikit-learn's tolerance
    assert torch.allclose(a(one.values), b(other.values), atol=1e-3)


def test_strength_is_chosen_on_validation_and_the_smaller_loss_breaks_ties():
    rng = generator(6, "init")
    y = torch.arange(30) % 2
    x = torch.randn(30, 40, generator=rng)
    x[:, 0] += 2 * y
    vx, vy = torch.randn(200, 40, generator=rng), torch.arange(200) % 2
    vx[:, 0] += 2 * vy
    start, decision = choose(Features(x, y), Features(vx, vy), STRENGTHS)
    assert [trial.setting for trial in start.trials] == [f"C {c:g}" for c in STRENGTHS]
    best = max(trial.val for trial in start.trials)
    assert start.val == best == float((decision(vx).argmax(1) == vy).double().mean())
    assert start.chosen_on == "the validation images"
    ties = {
        c: choose(Features(x, y), Features(vx, vy), [c])[1]
        for c, t in zip(STRENGTHS, start.trials, strict=True)
        if t.val == best
    }
    losses = {c: float(nn.functional.cross_entropy(one(vx), vy)) for c, one in ties.items()}
    assert losses[start.strength] <= min(losses.values()) + 1e-3  # warm starts end within the tolerance of cold ones


def test_without_validation_some_training_images_choose_and_all_are_fitted():
    images = coloured(per_class=20)
    model, again, other = vit(), vit(), vit()
    config = image_config(model)
    start = probe_head(model, images, config, strengths=FEW, seed=3)
    assert "15 % of the training images, held out by seed 3" in start.chosen_on
    assert probe_head(again, images, config, strengths=FEW, seed=3) == start
    assert torch.equal(model.head.weight, again.head.weight)
    probe_head(other, images, config, val=images, strengths=[start.strength])
    assert torch.allclose(logits_of(model, images), logits_of(other, images), atol=1e-5)  # fitted on all of them
    assert "linear probe" in str(start)


def test_classes_of_the_validation_images_are_matched_by_name():
    images, config = coloured(), image_config(vit())
    val = coloured(seed=1)
    turned = Images(2 - val.labels, ("c", "b", "a"), val.pixels)
    one, other = vit(), vit()
    assert probe_head(one, images, config, val=val, strengths=FEW) == probe_head(
        other, images, config, val=turned, strengths=FEW
    )


def test_the_grid_is_every_eleventh_of_the_papers():
    assert np.allclose(STRENGTHS, np.logspace(-7, 2, 100)[::11])


def test_other_float_types_and_devices_by_name():
    model, images = vit().to(torch.bfloat16), coloured()
    probe_head(model, images, image_config(model), val=images, strengths=[1.0], device="cpu")
    assert model.head.weight.dtype == torch.bfloat16
    right = (logits_of(model, images).argmax(1) == images.labels).double().mean()
    assert right > 0.9


def test_readers_and_doors_see_nothing():
    model, images = vit(), coloured()
    with foveal.attach(model), foveal.read(model) as seen:
        model(torch.zeros(1, 3, 32, 32))
        probe_head(model, images, image_config(model), val=images, strengths=[1.0])
    assert seen.class_attention().shape == (1, 2, 4)


class Scaled(nn.Module):
    """Multiplies what its classifier gives."""

    def __init__(self):
        super().__init__()
        self.vit = vit()

    def get_classifier(self):
        return self.vit.head

    def forward(self, x):
        return 10 * self.vit(x)


def test_models_that_change_their_logits_are_refused_and_left_alone():
    model, images = Scaled(), coloured()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="changes what its classifier gives"):
        probe_head(model, images, image_config(model.vit), val=images, strengths=[1.0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_classifiers_that_no_probe_fits():
    images = coloured()
    config = image_config(vit())
    with pytest.raises(ValueError, match="has no classifier: build it with num_classes=3"):
        probe_head(vit(num_classes=0), images, config)
    with pytest.raises(ValueError, match="has 7 classes, the images 3"):
        probe_head(vit(num_classes=7), images, config)
    model = vit()
    model.head = nn.Linear(16, 3, bias=False)
    with pytest.raises(ValueError, match="not a linear layer with a bias"):
        probe_head(model, images, config)


def test_images_that_no_probe_fits():
    images = coloured()
    model = vit()
    config = image_config(model)
    one = Images(torch.zeros(24, dtype=torch.int64), images.classes, images.pixels)
    with pytest.raises(ValueError, match="all of one class"):
        probe_head(model, one, config)
    with pytest.raises(ValueError, match="too few to hold some out"):
        probe_head(model, coloured(per_class=1), config)
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        probe_head(model, images, config)
    with torch.no_grad():
        model.norm.weight.fill_(0)
        model.norm.bias.fill_(1)
    with pytest.raises(ValueError, match="the same number"):
        probe_head(model, images, config, val=images)


@pytest.mark.parametrize("strengths", [(), (0.0, 1.0), (float("inf"),), (1.0, float("nan"), 2.0)])
def test_strengths_that_cannot_be(strengths):
    with pytest.raises(ValueError, match="strengths="):
        probe_head(vit(), coloured(), image_config(vit()), strengths=strengths)
