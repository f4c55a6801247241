"""Co-Tuning: the soft cross-entropy, both tables against plain definitions, and the guide."""

import copy

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from foveal.transfer.co_tuning import CoTuning, co_tuning_loss, co_tuning_of
from foveal.transfer.relations import STRENGTHS, calibration, direct_table, learned_table, relate


def vit(seed=0, dtype=torch.float64, **kwargs):
    torch.manual_seed(seed)
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 4}
    return timm.models.VisionTransformer(**(settings | kwargs)).to(dtype).eval()


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def answers(n=60, C=3, S=6, noise=1.0, seed=0):
    """Logits (n, S) of a source whose classes 2t and 2t + 1 go with target class t, and labels (n,)."""
    labels = torch.arange(n) % C
    logits = noise * randn(n, S, seed=seed)
    rows = torch.arange(n)
    logits[rows, 2 * labels] += 2
    logits[rows, 2 * labels + 1] += 1
    return logits, labels


def test_loss_by_hand():
    logits = torch.tensor([[0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    table = torch.tensor([[0.25, 0.75], [1.0, 0.0]], dtype=torch.float64)
    assert co_tuning_loss(logits, torch.tensor([0, 1]), table).item() == pytest.approx(np.log(2))
    logits = torch.tensor([[0.0, np.log(3.0)]], dtype=torch.float64)  # softmax 1/4, 3/4
    expected = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    assert co_tuning_loss(logits, torch.tensor([0]), table).item() == pytest.approx(expected)


def test_a_one_hot_table_is_the_ordinary_cross_entropy():
    logits, labels = randn(5, 4), torch.tensor([0, 2, 1, 2, 0])
    classes = torch.tensor([3, 1, 0])  # the source class of each target class
    table = F.one_hot(classes, 4).double()
    assert torch.allclose(co_tuning_loss(logits, labels, table), F.cross_entropy(logits, classes[labels]))


def test_loss_equals_the_double_sum():
    logits, labels, table = randn(5, 4), torch.tensor([0, 2, 1, 2, 0]), randn(3, 4, seed=1).softmax(1)
    shares = logits.softmax(1)
    total = -sum(table[labels[b], s] * shares[b, s].log() for b in range(5) for s in range(4)) / 5
    assert torch.allclose(co_tuning_loss(logits, labels, table), total, rtol=1e-12)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: co_tuning_loss(z, labels, table), logits)
    (gradient,) = torch.autograd.grad(co_tuning_loss(logits, labels, table), logits)
    assert torch.allclose(gradient, (shares - table[labels]) / 5, rtol=1e-10)


def test_half_precision_is_summed_in_float32():
    logits, labels, table = randn(4, 8).bfloat16(), torch.tensor([0, 1, 0, 1]), randn(2, 8, seed=1).softmax(1)
    loss = co_tuning_loss(logits, labels, table)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, co_tuning_loss(logits.double(), labels, table).float())


def test_direct_table_by_hand():
    shares = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.25, 0.75]], dtype=torch.float64)
    table = direct_table(shares, torch.tensor([1, 0, 1]), 2)
    assert table.tolist() == [[1.0, 0.0], [0.375, 0.625]]


def test_direct_table_is_the_mean_of_each_class():
    logits, labels = answers()
    table = relate(logits.float(), labels, 3, scale=0.884)
    for t in range(3):
        assert torch.allclose(table[t], (0.884 * logits.float().double())[labels == t].softmax(1).mean(0))
    assert torch.allclose(table.sum(1), torch.ones(3, dtype=torch.float64))
    assert torch.equal(table, relate(logits.float(), labels, 3, "direct", scale=0.884))


def slow_table(shares, labels, val_shares, val_labels, C):
    """The paper's table in plain steps: a regression solved by Newton's method in numpy's arithmetic."""
    x, y = shares.numpy(), np.eye(C)[labels.numpy()]

    def softmax(z):
        e = np.exp(z - z.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    def fit(strength):
        W = np.zeros((C, x.shape[1]))
        for _ in range(100):
            p = softmax(x @ W.T)
            gradient = ((p - y).T @ x + W / strength).ravel()
            H = np.zeros((W.size, W.size))
            for i in range(len(x)):
                H += np.kron(np.diag(p[i]) - np.outer(p[i], p[i]), np.outer(x[i], x[i]))
            step = np.linalg.solve(H + np.eye(W.size) / strength, gradient).reshape(W.shape)
            W = W - step
            if np.abs(step).max() < 1e-10:
                break
        return W

    fitted = [fit(strength) for strength in STRENGTHS]
    right = [(np.argmax(val_shares.numpy() @ W.T, 1) == val_labels.numpy()).sum() for W in fitted]
    W = fitted[int(np.argmax(right))]
    z = val_shares.numpy() @ W.T
    scales = np.exp(np.linspace(np.log(1e-2), np.log(1e2), 20001))
    losses = [-np.log(softmax(a * z)[np.arange(len(z)), val_labels.numpy()]).mean() for a in scales]
    given = softmax((scales[int(np.argmin(losses))] * W).T)  # (S, C): p(t | s)
    marginal = np.concatenate([x, val_shares.numpy()]).mean(0)
    joint = (given * marginal[:, None]).T
    return torch.from_numpy(joint / joint.sum(1, keepdims=True))


@pytest.mark.parametrize("C", [2, 3])
def test_learned_table_equals_its_plain_steps(C):
    logits, labels = answers(40, C, 2 * C, noise=2.0)
    val, val_labels = answers(30, C, 2 * C, noise=2.0, seed=1)
    found = learned_table(logits.softmax(1), labels, val.softmax(1), val_labels, C)
    slow = slow_table(logits.softmax(1), labels, val.softmax(1), val_labels, C)
    # L-BFGS stops at a gradient of 1e-4
    assert torch.allclose(found, slow, atol=2e-3)
    assert torch.allclose(found.sum(1), torch.ones(C, dtype=torch.float64))
    assert torch.equal(found, relate(logits, labels, C, "learned", val=(val, val_labels)))


def test_seventeen_strengths_from_large_to_small():
    assert len(STRENGTHS) == 17
    assert (STRENGTHS[0], STRENGTHS[-1]) == (1e4, 1e-4)
    assert list(STRENGTHS) == sorted(STRENGTHS, reverse=True)


def test_both_tables_find_the_related_classes():
    logits, labels = answers(120, noise=0.5)
    for kind in ("direct", "learned"):
        table = relate(logits, labels, 3, kind)
        assert table.shape == (3, 6)
        assert table.argmax(1).tolist() == [0, 2, 4]
        assert table.topk(2).indices.sort(1).values.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_held_out_images_depend_on_the_seed_alone():
    logits, labels = answers(noise=3.0)
    state = torch.random.get_rng_state()
    first = relate(logits, labels, 3, "learned", seed=1)
    assert torch.equal(relate(logits, labels, 3, "learned", seed=1), first)
    assert not torch.equal(relate(logits, labels, 3, "learned", seed=2), first)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_calibration_finds_the_scale():
    z = 3 * randn(20000, 3)
    labels = torch.multinomial((0.5 * z).softmax(1), 1, generator=torch.Generator().manual_seed(1))[:, 0]
    assert calibration(z, labels) == pytest.approx(0.5, rel=0.03)
    assert calibration(2 * z, labels) == pytest.approx(calibration(z, labels) / 2, rel=1e-3)
    assert calibration(z, z.argmax(1)) == pytest.approx(100, rel=1e-3)  # always right: as sure as may be


def test_images_that_tell_nothing_are_refused():
    logits, labels = answers()
    for kind in ("direct", "learned"):
        with pytest.raises(ValueError, match="no training image of class 3"):
            relate(logits, labels, 4, kind)
    with pytest.raises(ValueError, match="table='paper'"):
        relate(logits, labels, 3, "paper")
    with pytest.raises(ValueError, match="labels from 0 to 2 but classes=2"):
        relate(logits, labels, 2)
    with pytest.raises(ValueError, match="give"):
        relate(logits, labels[:5], 3)
    with pytest.raises(ValueError, match="finite"):
        relate(logits / 0, labels, 3)
    with pytest.raises(ValueError, match="scale=0"):
        relate(logits, labels, 3, scale=0)
    with pytest.raises(ValueError, match="no validation images"):
        relate(logits[:3], labels[:3], 3, "learned")


def guide_of(source, S=6, C=4, weight=2.3):
    return CoTuning(randn(C, S, seed=3).softmax(1), source.get_classifier(), weight)


IMAGES, LABELS = randn(3, 3, 32, 32, seed=4), torch.tensor([3, 0, 3])


def test_the_term_is_the_definition():
    model, source = vit(0), vit(1, num_classes=6)
    guide = guide_of(source)
    with guide.on(model, IMAGES, LABELS) as g:
        logits = model(IMAGES)
    features = model.forward_head(model.forward_features(IMAGES), pre_logits=True)
    assert torch.equal(model.head(features), logits)
    expected = co_tuning_loss(source.head(features), LABELS, guide.table)
    assert torch.allclose(g.losses()["co_tuning"], 2.3 * expected, rtol=1e-12)
    with guide.on(model, IMAGES, LABELS, relax=0.5) as g:
        model(IMAGES)
    assert torch.allclose(g.losses()["co_tuning"], 1.15 * expected, rtol=1e-12)


def test_the_body_and_the_sources_classifier_learn():
    model, source = vit(0), vit(1, num_classes=6)
    source.requires_grad_(False)
    guide = guide_of(source)
    with guide.on(model, IMAGES, LABELS) as g:
        model(IMAGES)
    g.losses()["co_tuning"].backward()
    assert guide.learned() is guide.head
    assert all(p.grad.any() for p in guide.learned().parameters())
    assert model.blocks[0].attn.qkv.weight.grad.any()
    assert model.head.weight.grad is None
    assert source.head.weight.grad is None
    assert not source.head.weight.requires_grad


def test_registered_once_by_a_task():
    task = nn.Module()
    guide = guide_of(vit(num_classes=6))
    task.guiding = guide.learned()
    task.float()
    model = vit(dtype=torch.float32)
    with guide.on(model, IMAGES.float(), LABELS) as g:
        model(IMAGES.float())
    assert g.losses()["co_tuning"].dtype == torch.float32
    assert set(task.state_dict()) == {"guiding.weight", "guiding.bias"}


def test_model_and_source_are_left_alone():
    model, source = vit(0).train(), vit(1, num_classes=6)
    guide = guide_of(source)
    before = copy.deepcopy(model.state_dict())
    out = model(IMAGES)
    with guide.on(model, IMAGES, LABELS) as g:
        guided = model(IMAGES)
    g.losses()["co_tuning"].backward()
    torch.optim.SGD(guide.learned().parameters(), lr=1.0).step()
    with pytest.raises(KeyboardInterrupt), guide.on(model, IMAGES, LABELS):
        raise KeyboardInterrupt
    assert torch.equal(out, guided)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert torch.equal(source.head.weight, vit(1, num_classes=6).head.weight)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0


def test_from_a_source_and_its_answers():
    source, (logits, labels) = vit(1, num_classes=6), answers()
    guide = co_tuning_of(source, logits, labels, 3)
    assert torch.equal(guide.table, relate(logits, labels, 3, "direct"))
    assert torch.equal(guide.head.weight, source.head.weight)
    assert guide.weight == 2.3
    guide = co_tuning_of(source, logits, labels, 3, table="learned", weight=1.0, seed=5)
    assert torch.equal(guide.table, relate(logits, labels, 3, "learned", seed=5))
    assert guide.weight == 1.0


def test_a_source_without_classes_is_refused():
    logits, labels = answers()
    with pytest.raises(ValueError, match="trained without labels"):
        co_tuning_of(vit(num_classes=0), logits, labels, 3)
    with pytest.raises(ValueError, match="trained without labels"):
        CoTuning(torch.ones(2, 2) / 2, nn.Identity())
    with pytest.raises(ValueError, match="source has 7 classes"):
        co_tuning_of(vit(num_classes=7), logits, labels, 3)


def test_what_does_not_fit_is_refused():
    head, table = nn.Linear(32, 6), torch.ones(4, 6) / 6
    with pytest.raises(ValueError, match="6 classes"):
        CoTuning(torch.ones(4, 5) / 5, head)
    with pytest.raises(ValueError, match="sum 1"):
        CoTuning(torch.ones(4, 6), head)
    with pytest.raises(ValueError, match="weight=-1"):
        CoTuning(table, head, weight=-1)
    assert CoTuning.unmixed
    for labels in (None, torch.ones(3, 4), torch.ones(3)):
        with pytest.raises(ValueError, match="class of every image"):
            CoTuning(table, head).on(vit(), IMAGES, labels)
    with pytest.raises(ValueError, match="no classifier"), CoTuning(table, head).on(vit(num_classes=0), IMAGES, LABELS):
        pytest.fail("the forward began")
    with CoTuning(table, nn.Linear(16, 6)).on(vit(), IMAGES, LABELS) as g:
        vit_ = g._model
        vit_(IMAGES)
    with pytest.raises(ValueError, match="reads 16 features, but 32"):
        g.losses()


def test_weight_zero_listens_to_nothing():
    model = vit()
    with CoTuning(torch.ones(4, 6) / 6, nn.Linear(32, 6), weight=0.0).on(model, IMAGES) as g:
        assert not model.head._forward_pre_hooks
        model(IMAGES)
    assert g.losses() == {}
