"""The linear probe as MAE trains it, on augmented images and on cached features; logistic regression."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from foveal.chance import generator
from foveal.data import Data, ImageConfig, Images
from foveal.evaluate import Features, Recipe, cached_linear_probe, linear_probe, logistic_probe
from foveal.evaluate.heads import fit_heads, lars, logits_of, portions, probe_head, share_of_peak
from foveal.evaluate.logistic import fit_logistic, scores_of
from map_models import everything, same, vit

QUICK = Recipe(base_lr=(1.0, 10.0), epochs=6)
CONFIG = ImageConfig(size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def some(n, classes=3, width=8, seed=0, pull=2.0, **given):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.randn(8, width, generator=torch.Generator().manual_seed(99))
    values = pull * centres[labels] + torch.randn(n, width, generator=g)
    return Features(values, labels, classes=tuple("abcdefgh"[:classes]), **given)


def pictures(n, classes=2, seed=0):
    """Bright against dark."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    pixels = torch.randint(0, 100, (n, 3, 32, 32), generator=g) + 100 * labels[:, None, None, None]
    return Images(labels, tuple("ab"[:classes]), pixels=pixels.to(torch.uint8))


def data(n=40, **changes):
    return replace(Data("bright", pictures(n), pictures(10, seed=1), {"test": pictures(12, seed=2)}), **changes)


# -- MAE's arithmetic


def test_lars_by_hand():
    p = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    p.grad = torch.tensor([[0.6, 0.8]])
    lars([p], lr=1.0).step()
    assert torch.allclose(p.data, torch.tensor([[2.997, 3.996]]), atol=1e-6)


def test_lars_is_maes():
    g = torch.Generator().manual_seed(0)
    weight, bias, zero = (
        nn.Parameter(x) for x in (torch.randn(3, 4, generator=g), torch.randn(3, generator=g), torch.zeros(2, 2))
    )
    parameters = [weight, bias, zero]
    plain, mu = [p.detach().clone().double() for p in parameters], [torch.zeros_like(p).double() for p in parameters]
    optimizer = lars(parameters)
    for step in range(5):
        lr = 0.5 * (step + 1)  # multiplies the momentum's buffer: changes act on old steps
        grads = [torch.randn(p.shape, generator=g) for p in parameters]
        if step == 2:
            grads[0] = torch.zeros(3, 4)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for p, grad in zip(parameters, grads, strict=True):
            p.grad = grad.clone()
        optimizer.step()
        for i, grad in enumerate(grads):
            update = grad.double()
            if update.ndim > 1 and plain[i].norm() > 0 and update.norm() > 0:
                update = update * 0.001 * plain[i].norm() / update.norm()
            mu[i] = 0.9 * mu[i] + update
            plain[i] = plain[i] - lr * mu[i]
    for p, expected in zip(parameters, plain, strict=True):
        assert torch.allclose(p.detach().double(), expected, atol=1e-5)


def test_the_schedule():
    assert share_of_peak(0, 90, 10) == 0
    assert share_of_peak(2.5, 90, 10) == 0.25
    assert share_of_peak(10, 90, 10) == 1
    assert share_of_peak(50, 90, 10) == pytest.approx(0.5)
    assert share_of_peak(90, 90, 10) == pytest.approx(0)
    assert share_of_peak(0, 90, 0) == 1
    assert Recipe().warmup == 10
    assert Recipe(epochs=45).warmup == 5


def test_the_head_is_maes():
    before = torch.get_rng_state()
    norm, linear = probe_head(200, 50, generator(0, "init"))
    assert torch.equal(torch.get_rng_state(), before)
    assert norm.eps == 1e-6
    assert list(norm.parameters()) == []
    assert float(linear.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
    assert not linear.bias.any()
    head = nn.Sequential(norm, linear)
    x = torch.randn(7, 200)
    head.eval()
    assert torch.allclose(head(x), linear(x), atol=1e-5)  # before any step: mean 0, variance 1
    head.train()
    normed = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-6).sqrt()
    assert torch.allclose(head(x), linear(normed), atol=1e-5)


def test_training_is_the_plain_loop():
    """The same steps written out: permutation, equal parts, cross-entropy, MAE's LARS and schedule, in float64."""
    train, val = some(23), some(9, seed=1)
    recipe = Recipe(base_lr=3.0, epochs=4, warmup_epochs=1, batch=8, seed=5)
    orders = [torch.randperm(23, generator=generator(5, "order", e)) for e in range(4)]
    [head] = fit_heads(
        lambda e: [(train.values[orders[e]], train.labels[orders[e]])],
        23,
        train.classes,
        val,
        recipe,
        torch.device("cpu"),
    )
    _, linear = probe_head(8, 3, generator(5, "init"))
    W, b = linear.weight.detach().double(), linear.bias.detach().double()
    muW, mub = torch.zeros_like(W), torch.zeros_like(b)
    for epoch in range(4):
        for step, rows in enumerate([slice(0, 7), slice(7, 15), slice(15, 23)]):  # 23 in three
            x, y = train.values[orders[epoch]][rows].double(), train.labels[orders[epoch]][rows]
            x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-6).sqrt()
            error = ((x @ W.T + b).softmax(1) - F.one_hot(y, 3)) / len(y)
            e = epoch + step / 3
            lr = 3.0 * 8 / 256 * (e if e < 1 else 0.5 * (1 + math.cos(math.pi * (e - 1) / 3)))
            gW, gb = error.T @ x, error.sum(0)
            muW = 0.9 * muW + gW * 0.001 * W.norm() / gW.norm()
            mub = 0.9 * mub + gb
            W, b = W - lr * muW, b - lr * mub
    assert torch.allclose(head.head[1].weight.detach().double(), W, atol=1e-6)
    assert torch.allclose(head.head[1].bias.detach().double(), b, atol=1e-6)


def test_portions_are_cut_anew():
    rows = torch.arange(10.0)[:, None]
    for sizes_in in ([10], [1] * 10, [3, 3, 4], [7, 3]):
        pieces = [(x, x[:, 0].long()) for x in rows.split(sizes_in)]
        for sizes in ([10], [5, 5], [2, 3, 5], [1] * 10):
            out = list(portions(pieces, sizes))
            assert [len(y) for _, y in out] == sizes
            assert torch.equal(torch.cat([x for x, _ in out]), rows)


@pytest.mark.parametrize(("n", "batch"), [(2, 2), (500, 64), (20000, 312), (1281167, 16384)])
def test_images_per_step(n, batch):
    assert Recipe().images(n) == batch


# -- probes


def test_a_separable_set_is_told_apart():
    train, test = some(90, pull=10.0), some(30, seed=1, pull=10.0)
    probe = cached_linear_probe(train, test, some(30, seed=2, pull=10.0))
    assert probe.tests["test"].accuracy == probe.last["test"].accuracy == probe.val == 1.0
    assert logistic_probe(train, test, val=some(30, seed=2, pull=10.0)).tests["test"].accuracy == 1.0


def test_the_choice_is_made_on_validation_and_the_last_epoch_is_told():
    train, val, test = some(60, pull=0.4), some(40, seed=1, pull=0.4), some(50, seed=2, pull=0.4)
    seen = []
    probe = cached_linear_probe(train, {"a": test}, val, Recipe(epochs=9), progress=lambda *x: seen.append(x))
    assert probe.val == max(trial.val for trial in probe.trials) == seen[-1][2]
    assert [x[:2] for x in seen] == [(e, 9) for e in range(1, 10)]
    assert [trial.setting for trial in probe.trials] == [f"base lr {x:g}" for x in Recipe().base_lr]
    chosen = next(trial for trial in probe.trials if probe.setting.startswith(f"{trial.setting} of"))
    assert probe.epoch == chosen.epoch
    heads = []
    for epochs in (probe.epoch, 9):  # the same training, stopped at the epoch that was chosen
        heads.append(_replay(train, val, float(chosen.setting.split()[-1]), epochs))
    for head, scores in zip(heads, (probe.tests["a"], probe.last["a"]), strict=True):
        right = logits_of(head, test.values).argmax(1) == test.labels
        assert torch.equal(scores.correct, right)
        assert scores.accuracy == pytest.approx(float(right.double().mean()))


def _replay(train, val, base_lr, stop):
    orders = [torch.randperm(60, generator=generator(0, "order", e)) for e in range(9)]
    head = probe_head(8, 3, generator(0, "init"))
    optimizer = lars(head.parameters())
    for epoch in range(stop):
        for group in optimizer.param_groups:
            group["lr"] = base_lr * 60 / 256 * share_of_peak(epoch, 9, 1)
        optimizer.zero_grad()
        head.train()
        nn.functional.cross_entropy(head(train.values[orders[epoch]]), train.labels[orders[epoch]]).backward()
        optimizer.step()
    return head


def test_the_same_seed_gives_the_same_probe():
    train, test = some(60, pull=0.4), some(50, seed=2, pull=0.4)
    state = torch.get_rng_state()
    one, two, other = (cached_linear_probe(train, test, None, replace(QUICK, seed=s)) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert one.trials == two.trials
    assert torch.equal(one.tests["test"].correct, two.tests["test"].correct)
    assert "held out by seed 0" in one.chosen_on
    assert other.trials != one.trials


def test_the_backbone_is_left_as_it_was():
    model = vit(num_classes=0, drop_path_rate=0.3, proj_drop_rate=0.3)
    before = everything(model)
    probe = linear_probe(model, data(), CONFIG, QUICK, batch_size=16)
    assert same(everything(model), before)
    assert probe.kind == "linear probe"
    assert probe.definition == "block 2 of 0-2, class token, after the final norm"
    assert "40 images per step, seed 0, crops of 0.08-1, mirrored" in probe.recipe


def test_the_probe_on_images_hangs_on_the_seed_alone():
    model = vit(num_classes=0)
    runs = [linear_probe(model, data(), CONFIG, replace(QUICK, seed=s), batch_size=16) for s in (0, 0, 1)]
    assert runs[0].trials == runs[1].trials
    assert torch.equal(runs[0].tests["test"].correct, runs[1].tests["test"].correct)


def test_images_are_augmented_anew_in_each_epoch(monkeypatch):
    import sys

    from foveal.evaluate import linear as module  # noqa: F401  the function hides the module

    seen = []

    def spy(pieces, n, *rest):
        seen.extend(torch.cat([x for x, _ in pieces(epoch)]) for epoch in (0, 1, 0))
        return fit_heads(pieces, n, *rest)

    monkeypatch.setattr(sys.modules["foveal.evaluate.linear"], "fit_heads", spy)
    linear_probe(vit(num_classes=0), data(12), CONFIG, Recipe(base_lr=1.0, epochs=1, warmup_epochs=0), batch_size=5)
    assert seen[0].shape == (12, 32)
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0].sort(0).values, seen[1].sort(0).values)


def test_bright_and_dark_are_told_apart_through_a_random_backbone():
    probe = linear_probe(vit(num_classes=0), data(60), CONFIG, Recipe(epochs=12), tokens="mean")
    assert probe.tests["test"].accuracy == 1.0


def test_a_remainder_of_one_image_is_no_step_of_its_own():
    train = some(9)
    probe = cached_linear_probe(train, some(6), some(6, seed=1), Recipe(base_lr=1.0, epochs=2, batch=8))
    assert "8 images per step" in probe.recipe


def test_classes_by_name_and_classes_without_images():
    train = some(60, classes=3)
    named = Features(train.values, train.labels + 1, classes=("x", "a", "b", "c"))  # x has no image
    test = some(40, classes=4, seed=1)
    for probe in (
        cached_linear_probe(named, test, some(30, seed=2), Recipe(base_lr=30.0)),
        logistic_probe(named, test, val=some(30, seed=2)),
    ):
        assert probe.tests["test"].unknown == 10
        assert not probe.tests["test"].correct[test.labels == 3].any()
        assert probe.tests["test"].accuracy > 0.5
        assert probe.tests["test"].balanced == pytest.approx(probe.tests["test"].accuracy)  # classes of equal size


@pytest.mark.parametrize("fit", [cached_linear_probe, logistic_probe])
def test_what_cannot_be_fitted(fit):
    good = some(20)
    one = Features(good.values, torch.zeros(20, dtype=torch.int64), classes=("cat", "dog"))
    with pytest.raises(ValueError, match=r"all of one class \(cat\): there is nothing to tell apart"):
        fit(one, good)
    bad = some(20)
    bad.values[2] = math.nan
    with pytest.raises(ValueError, match="1 of 20 training features are not finite"):
        fit(bad, good)
    with pytest.raises(ValueError, match="1 of 20 test features are not finite"):
        fit(good, bad)
    with pytest.raises(ValueError, match="are 8 wide, of test 4"):
        fit(good, some(20, width=4))
    with pytest.raises(ValueError, match="different definitions"):
        fit(some(20, definition="block 1"), some(20, definition="block 2"))
    with pytest.raises(ValueError, match="no test set"):
        fit(good, {})


def test_one_class_of_images():
    images = Images(torch.zeros(4, dtype=torch.int64), ("a", "b"), pixels=torch.zeros(4, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"all of one class \(a\)"):
        linear_probe(vit(), data(train=images), CONFIG, QUICK)


def test_rates_that_diverge_lose_and_if_all_do_it_is_told():
    train, test = some(60), some(30, seed=1)
    probe = cached_linear_probe(train, test, test, Recipe(base_lr=(1.0, 1e40), epochs=4, batch=2, warmup_epochs=0))
    assert probe.setting == "base lr 1 of 1, 1e+40"
    assert probe.trials[1].val == 0
    with pytest.raises(ValueError, match="diverged at base_lr=1e"):
        cached_linear_probe(train, test, test, Recipe(base_lr=1e40, epochs=4, batch=2, warmup_epochs=0))


@pytest.mark.parametrize(
    "settings", [{"base_lr": ()}, {"base_lr": 0.0}, {"epochs": 0}, {"batch": 1}, {"warmup_epochs": 90}]
)
def test_recipes_that_cannot_be(settings):
    with pytest.raises(ValueError, match="|".join(settings)):
        Recipe(**settings)


# -- logistic regression


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("penalty", [0.01, 0.1])
def test_the_regression_is_at_the_minimum_of_its_formula(classes, penalty):
    train = some(50, classes=classes)
    W = fit_logistic(train.values, train.labels, classes, penalty)
    x = F.normalize(train.values.double(), dim=1)
    W.requires_grad_(True)
    loss = F.cross_entropy(x @ W.T, train.labels) + penalty / 2 * W.square().sum()
    (gradient,) = torch.autograd.grad(loss, W)
    assert float(gradient.abs().max()) < 1e-5
    assert float(W.detach().norm()) > 0.1


def test_the_penalty_is_chosen_on_validation_then_all_of_train_is_fitted():
    train, val, test = some(60, pull=0.5), some(40, seed=1, pull=0.5), some(50, seed=2, pull=0.5)
    probe = logistic_probe(train, test, (1e-4, 0.1), val)
    accuracies = []
    for penalty, trial in zip((1e-4, 0.1), probe.trials, strict=True):
        W = fit_logistic(train.values, train.labels, 3, penalty)
        accuracies.append(float((scores_of(W, val.values).argmax(1) == val.labels).double().mean()))
        assert trial.val == pytest.approx(accuracies[-1])
        if probe.setting == f"penalty {penalty:g} of 0.0001, 0.1":
            assert torch.equal(probe.tests["test"].correct, scores_of(W, test.values).argmax(1) == test.labels)
    assert probe.val == pytest.approx(max(accuracies))
    assert "cached features" in probe.kind
    assert probe.epoch is None
    assert probe.last == {}
    held = logistic_probe(train, test, (0.1,))
    W = fit_logistic(train.values, train.labels, 3, 0.1)
    assert torch.equal(held.tests["test"].correct, scores_of(W, test.values).argmax(1) == test.labels)
    assert held.chosen_on == "15 % of the training images, held out by seed 0"


def test_lengths_do_not_matter_to_the_regression():
    train = some(40)
    scale = torch.from_numpy(np.linspace(0.1, 10, 40))[:, None]
    a, b = (fit_logistic(x, train.labels, 3, 0.1) for x in (train.values, train.values * scale))
    assert torch.allclose(a, b, atol=1e-4)


def test_a_probe_says_what_it_is():
    train = some(60, definition="block 2 of 0-2, class token, before the final norm")
    probe = logistic_probe(train, some(30, seed=1), val=some(30, seed=2))
    said = str(probe)
    for part in ("test ", "logistic regression on cached features", "chosen on val", train.definition):
        assert part in said
