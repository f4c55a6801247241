"""BSS: worked examples, the singular values, invariances, and listening without a trace."""

from collections import OrderedDict

import pytest
import timm
import torch
from torch import nn

from foveal.attention import ReadError
from foveal.transfer.bss import BSS, bss


def vit(seed=0, dtype=torch.float64, **kwargs):
    torch.manual_seed(seed)
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 4}
    return timm.models.VisionTransformer(**(settings | kwargs)).to(dtype).eval()


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def orthogonal(n):
    return torch.linalg.qr(randn(n, n, seed=9))[0]


def test_worked_examples():
    F = torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(bss(F), F)
    assert bss(F).item() == pytest.approx(9.0, rel=1e-14)
    assert torch.allclose(gradient, torch.tensor([[6.0, 0.0], [0.0, 0.0]], dtype=torch.float64), atol=1e-14)
    assert bss(F, k=2).item() == pytest.approx(25.0, rel=1e-14)
    assert bss(torch.tensor([[3.0, 4.0]])).item() == pytest.approx(25.0, rel=1e-6)
    rows = torch.tensor([[1.0, 2.0, 2.0], [0.0, 3.0, 4.0]], dtype=torch.float64)
    assert bss(rows).item() == pytest.approx(0.875484, abs=1e-6)
    assert (bss(rows, k=2) - bss(rows)).item() == pytest.approx(33.124516, abs=1e-6)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (5, 5), (1, 7), (7, 1)])
@pytest.mark.parametrize("k", [1, 3, 100])
def test_value_and_gradient_are_those_of_the_singular_values(shape, k):
    F = randn(*shape).requires_grad_()
    U, S, V = torch.linalg.svd(F.detach(), full_matrices=False)
    k = min(k, len(S))
    assert torch.allclose(bss(F, k), S[-k:].square().sum(), rtol=1e-10)
    expected = 2 * (U[:, -k:] * S[-k:]) @ V[-k:]
    assert torch.allclose(torch.autograd.grad(bss(F, k), F)[0], expected, atol=1e-10)


def test_gradcheck():
    assert torch.autograd.gradcheck(lambda F: bss(F, 2), randn(4, 6).requires_grad_())
    assert torch.autograd.gradcheck(lambda F: bss(F, 2), randn(6, 4).requires_grad_())


def test_rotations_change_nothing_and_the_scale_is_squared():
    F = randn(6, 10)
    for k in (1, 4):
        assert torch.allclose(bss(orthogonal(6) @ F, k), bss(F, k), rtol=1e-10)
        assert torch.allclose(bss(F @ orthogonal(10), k), bss(F, k), rtol=1e-10)
        assert torch.allclose(bss(-3 * F, k), 9 * bss(F, k), rtol=1e-12)
    assert torch.allclose(bss(F, 6), F.square().sum(), rtol=1e-12)


def test_equal_rows_have_nothing_left_to_shrink():
    row = randn(1, 5)
    F = torch.cat([row, row, randn(1, 5, seed=1)]).requires_grad_()
    loss = bss(F)
    assert loss.item() == pytest.approx(0, abs=1e-14)
    assert torch.autograd.grad(loss, F)[0].abs().max() < 1e-12


def test_equal_singular_values_have_a_finite_gradient():
    F = torch.eye(4, dtype=torch.float64).requires_grad_()
    gradient = torch.autograd.grad(bss(F, 2), F)[0]
    assert gradient.isfinite().all()
    assert gradient.norm().item() == pytest.approx(2 * 2**0.5)


def test_half_precision_and_autocast_are_computed_in_float32():
    F = randn(4, 8, dtype=torch.float32).bfloat16()
    exact = bss(F.float())
    assert bss(F).dtype == torch.float32
    assert torch.equal(bss(F), exact)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bss(F.float()), exact)
    assert bss(F.double()).dtype == torch.float64


def test_bad_inputs_are_refused():
    with pytest.raises(ValueError, match=r"\(B, D\)"):
        bss(torch.ones(3))
    with pytest.raises(ValueError, match=r"\(0, 3\)"):
        bss(torch.ones(0, 3))
    with pytest.raises(ValueError, match="k=0"):
        bss(torch.ones(2, 3), k=0)
    for k in (0, 1.5):
        with pytest.raises(ValueError, match=f"k={k}"):
            BSS(k=k)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight=-1"):
        BSS(weight=-1)


def test_the_features_are_what_the_classifier_reads():
    for kwargs in ({}, {"global_pool": "avg"}, {"reg_tokens": 2}):
        model, images = vit(**kwargs), randn(3, 3, 32, 32)
        with BSS(weight=0.1, k=2).on(model, images) as g:
            logits = model(images)
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        assert torch.equal(model.head(features), logits)
        assert torch.allclose(g.losses()["bss"], 0.1 * bss(features, 2), rtol=1e-10)


def test_gradients_reach_the_body_and_not_the_classifier():
    model, images = vit(), randn(3, 3, 32, 32)
    with BSS().on(model, images) as g:
        model(images)
    g.losses()["bss"].backward()
    assert model.blocks[0].attn.qkv.weight.grad.any()
    assert model.head.weight.grad is None


def test_relaxed_and_off():
    model, images = vit(), randn(3, 3, 32, 32)
    losses = []
    for relax in (1.0, 0.5, 0.0):
        with BSS().on(model, images, relax=relax) as g:
            assert len(model.head._forward_pre_hooks) == (relax > 0)
            model(images)
        losses.append(g.losses())
    assert losses[2] == {}
    assert torch.allclose(losses[0]["bss"], 2 * losses[1]["bss"])


def test_a_batch_of_one_is_not_shrunk():
    model, images = vit(dtype=torch.float32), randn(1, 3, 32, 32, dtype=torch.float32)
    with BSS().on(model, images) as g:
        logits = model(images)
    assert g.losses()["bss"].item() == 0.0
    (logits.sum() + g.losses()["bss"]).backward()


def test_other_models():
    images = randn(2, 3, 32, 32, dtype=torch.float32)
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.AdaptiveAvgPool2d(1))
    conv = nn.Sequential(OrderedDict(body=body, classifier=nn.Conv2d(8, 4, 1)))
    with BSS(weight=1.0).on(conv, images) as g:
        conv(images)
    assert torch.allclose(g.losses()["bss"], bss(body(images).flatten(1)))
    distilled = timm.models.deit.VisionTransformerDistilled(
        img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=4
    ).eval()
    with BSS(weight=1.0).on(distilled, images) as g:
        distilled(images)
    assert torch.allclose(g.losses()["bss"], bss(distilled.forward_features(images)[:, 0]))


def test_no_classifier_or_no_forward_is_said():
    model, images = vit(num_classes=0), randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match="num_classes"), BSS().on(model, images):
        pytest.fail("the forward began")
    model = vit()
    with BSS().on(model, images) as g:
        pass
    with pytest.raises(ReadError, match="0 times"):
        g.losses()
    with BSS().on(model, images) as g:
        model(images), model(images)
    with pytest.raises(ReadError, match="2 times"):
        g.losses()


def test_the_model_is_left_alone():
    model, images = vit().train(), randn(2, 3, 32, 32)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    out = model(images)
    with pytest.raises(KeyboardInterrupt), BSS().on(model, images):
        raise KeyboardInterrupt
    with BSS().on(model, images) as g:
        guided = model(images)
    g.losses()
    assert torch.equal(out, guided)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
