"""Label arithmetic of mixing: rows, factors, accuracy, losses."""

import math

import pytest
import torch
import torch.nn.functional as F

from foveal.mix import LabelWeights, Mixed, binary_cross_entropy, label_rows, paired, soft_cross_entropy


def weights(own, perm, partner=None):
    own = torch.tensor(own)
    return LabelWeights(own, torch.tensor(perm), 1 - own if partner is None else torch.tensor(partner))


def mixed_with(*factors):
    B = len(factors[0].perm)
    return Mixed(torch.zeros(B, 3, 4, 4), factors[0].perm, torch.ones(B, 1, 4, 4), factors)


def dense(w):
    """The factor written out, entry by entry: (B, B)."""
    B = len(w.perm)
    W = [[0.0] * B for _ in range(B)]
    for i in range(B):
        W[i][i] += float(w.own[i])
        W[i][int(w.perm[i])] += float(w.partner[i])
    return torch.tensor(W)


TWO = (weights([0.9, 0.3, 0.5, 0.25, 1.0], [4, 3, 2, 1, 0]), weights([0.6, 0.8, 0.1, 1.0, 0.5], [1, 2, 0, 3, 1]))
LABELS = torch.tensor([2, 0, 1, 0, 2])


def test_smoothing_by_hand():
    rows = label_rows(torch.tensor([1]), 4, smoothing=0.1)
    assert torch.allclose(rows, torch.tensor([[0.025, 0.925, 0.025, 0.025]]))


def test_several_labels_are_smoothed_towards_one_half():
    rows = label_rows(torch.tensor([[1.0, 0.0, 1.0]]), smoothing=0.1, multi_label=True)
    assert torch.allclose(rows, torch.tensor([[0.95, 0.05, 0.95]]))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_indices_and_one_hot_rows_are_the_same_labels(dtype):
    one_hot = torch.eye(3)[LABELS]
    assert torch.equal(label_rows(LABELS.to(dtype), 3), one_hot)
    assert torch.allclose(label_rows(LABELS, 3, 0.2), label_rows(one_hot, 3, 0.2))


def test_targets_are_the_product_of_dense_factors():
    expected = dense(TWO[1]) @ dense(TWO[0]) @ torch.eye(3)[LABELS]
    assert torch.allclose(mixed_with(*TWO).targets(LABELS, 3), expected, atol=1e-7)


def test_factors_do_not_commute_and_the_first_comes_first():
    there, back = mixed_with(*TWO).targets(LABELS, 3), mixed_with(*TWO[::-1]).targets(LABELS, 3)
    assert not torch.allclose(there, back)


def test_label_mass_is_preserved_by_factors_that_sum_to_one():
    targets = mixed_with(*TWO).targets(LABELS, 3, smoothing=0.1)
    assert torch.allclose(targets.sum(-1), torch.ones(5))
    assert (targets >= 0).all()


def test_weights_need_not_sum_to_one():
    targets = mixed_with(weights([0.75, 0.5], [1, 0], [0.5, 0.25])).targets(torch.tensor([0, 1]), 2)
    assert torch.equal(targets, torch.tensor([[0.75, 0.5], [0.25, 0.5]]))


def test_partners_of_one_class_give_that_class_whole():
    targets = mixed_with(weights([0.3, 0.6], [1, 0])).targets(torch.tensor([1, 1]), 3)
    assert torch.allclose(targets, torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]))


@pytest.mark.parametrize("factors", [TWO[:1], TWO])
def test_accuracy_is_the_label_weight_of_the_predicted_class(factors):
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    W = dense(factors[0]) if len(factors) == 1 else dense(factors[1]) @ dense(factors[0])
    hits = [sum(float(W[i, j]) for j in range(5) if int(logits[i].argmax()) == int(LABELS[j])) for i in range(5)]
    got = mixed_with(*factors).accuracy(logits, LABELS)
    assert math.isclose(float(got), sum(hits) / 5, rel_tol=1e-6)


def test_accuracy_by_hand():
    mixed = mixed_with(weights([0.7, 0.7], [1, 0]))
    logits = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])  # says 0 and 2
    assert torch.isclose(mixed.accuracy(logits, torch.tensor([0, 1])), torch.tensor(0.35))


def test_accuracy_without_mixing_is_accuracy():
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    none = mixed_with(weights([1.0] * 5, [0, 1, 2, 3, 4]))
    assert torch.equal(none.accuracy(logits, LABELS), (logits.argmax(-1) == LABELS).float().mean())


def test_soft_cross_entropy_is_cross_entropy():
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert torch.isclose(soft_cross_entropy(logits, label_rows(LABELS, 3)), F.cross_entropy(logits, LABELS))
    smoothed = soft_cross_entropy(logits, label_rows(torch.eye(3, dtype=torch.float64)[LABELS], 3, 0.1))
    assert torch.isclose(smoothed, F.cross_entropy(logits, LABELS, label_smoothing=0.1))


def test_gradient_is_softmax_minus_target():
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64, requires_grad=True)
    targets = mixed_with(*TWO).targets(torch.eye(3, dtype=torch.float64)[LABELS])
    (grad,) = torch.autograd.grad(soft_cross_entropy(logits, targets), logits)
    assert torch.allclose(grad, (logits.softmax(-1) * targets.sum(-1, keepdim=True) - targets) / 5, atol=1e-12)


def test_mixing_losses_is_mixing_targets():
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for one in TWO:
        targets = mixed_with(one).targets(torch.eye(3, dtype=torch.float64)[LABELS])
        got = paired(lambda z, y: F.cross_entropy(z, y, reduction="none"), logits, LABELS, one)
        assert torch.isclose(got, soft_cross_entropy(logits, targets), rtol=1e-12)


def test_each_weight_meets_its_own_sample():
    """Two samples, one easy and one hard, with different weights: weighing the batch mean gives another number."""
    logits = torch.tensor([[4.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    labels, one = torch.tensor([0, 1]), weights([0.9, 0.2], [1, 0])
    easy, hard = math.log1p(math.exp(-4)), 3 + math.log1p(math.exp(-3))
    first = 0.9 * easy + 0.1 * (4 + easy)
    second = 0.2 * hard + 0.8 * (hard - 3)
    expected = (first + second) / 2
    rows = torch.eye(2, dtype=torch.float64)[labels]
    assert math.isclose(float(soft_cross_entropy(logits, one.mix(rows))), expected, rel_tol=1e-6)
    per_sample = lambda z, y: F.cross_entropy(z, y, reduction="none")  # noqa: E731
    assert math.isclose(float(paired(per_sample, logits, labels, one)), expected, rel_tol=1e-6)
    of_means = 0.55 * (easy + hard) / 2 + 0.45 * (4 + easy + hard - 3) / 2
    assert abs(of_means - expected) > 0.2


def test_an_averaged_loss_is_refused():
    with pytest.raises(ValueError, match="one value per sample"):
        paired(F.cross_entropy, torch.randn(5, 3), LABELS, TWO[0])


def test_half_precision_logits_give_a_float32_loss():
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(5)).bfloat16()
    targets = mixed_with(TWO[0]).targets(LABELS, 3)
    for loss in (soft_cross_entropy, binary_cross_entropy):
        assert loss(logits, targets).dtype == torch.float32
        assert torch.equal(loss(logits, targets), loss(logits.float(), targets))


def test_binary_cross_entropy_entry_by_entry():
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    targets = torch.tensor([[0.2, 0.8, 1.0], [0.0, 0.5, 0.9]], dtype=torch.float64)
    total = 0.0
    for z, t in zip(logits.flatten().tolist(), targets.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-z))
        total -= t * math.log(p) + (1 - t) * math.log(1 - p)
    assert math.isclose(float(binary_cross_entropy(logits, targets)), total / 6, rel_tol=1e-12)


@pytest.mark.parametrize(
    ("labels", "classes", "smoothing", "error", "says"),
    [
        (torch.tensor([0, 5]), 5, 0.0, ValueError, "from 0 to 5 but there are 5 classes"),
        (torch.tensor([-1, 2]), 5, 0.0, ValueError, "from -1 to 2"),
        (torch.tensor([0.0, 1.0]), 5, 0.0, TypeError, "must be integers"),
        (torch.tensor([True, False]), 2, 0.0, TypeError, "must be integers"),
        (torch.tensor([0, 1]), None, 0.0, ValueError, "need num_classes"),
        (torch.ones(2, 4), 5, 0.0, ValueError, "4 columns but there are 5 classes"),
        (torch.ones(2, 4, 1), 4, 0.0, ValueError, r"\(2, 4, 1\)"),
        (torch.tensor([0, 1]), 2, 1.0, ValueError, r"\[0, 1\)"),
        (torch.tensor([0, 1]), 2, float("nan"), ValueError, r"\[0, 1\)"),
    ],
)
def test_bad_labels_are_named(labels, classes, smoothing, error, says):
    with pytest.raises(error, match=says):
        label_rows(labels, classes, smoothing)


def test_logits_and_targets_of_different_width_are_named():
    with pytest.raises(ValueError, match=r"logits \(2, 4\) and targets \(2, 3\)"):
        soft_cross_entropy(torch.zeros(2, 4), torch.ones(2, 3))
