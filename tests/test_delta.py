"""DELTA: worked examples, the plain definition on tokens, layers, channel attention and its slow twin."""

import copy

import pytest
import timm
import torch
from torch.nn import functional as F

from foveal.attention import UnsupportedModelError
from foveal.transfer.channels import channel_attention, channel_weights
from foveal.transfer.delta import DELTA, delta_loss, quarters


def vit(seed=0, dtype=torch.float64, **kwargs):
    torch.manual_seed(seed)
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 4}
    return timm.models.VisionTransformer(**(settings | kwargs)).to(dtype).eval()


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def loss_of(guide, model, images, relax=1.0):
    with guide.on(model, images, relax=relax) as g:
        model(images)
    return g.losses()["delta"]


def tokens(model, images):
    """Tokens that leave each block, (B, T, D)."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    found = []
    for block in model.blocks:
        x = block(x)
        found.append(x)
    return found


TARGET = torch.tensor([[[1.0, 1.0], [2.0, 0.0]]], dtype=torch.float64)  # B = 1, C = 2, S = 2
WEIGHTS = torch.tensor([0.25, 0.75], dtype=torch.float64)


@pytest.mark.parametrize("B", [1, 5])
def test_worked_examples(B):
    target = TARGET.expand(B, 2, 2)
    zero = torch.zeros_like(target)
    assert delta_loss(target, zero).item() == 3.0
    assert delta_loss(target, zero, WEIGHTS).item() == 1.75
    assert delta_loss(target[:, :, None], zero[:, :, None], WEIGHTS).item() == 1.75  # (B, C, h, w)
    assert delta_loss(target.mT, zero.mT, dim=-1).item() == 3.0  # tokens
    assert delta_loss(target.mT, zero.mT, WEIGHTS, dim=-1).item() == 1.75


def test_the_authors_sum_is_the_mean_times_the_batch():
    target, source, w = randn(6, 5, 7), randn(6, 5, 7, seed=1), randn(5, seed=2).softmax(0)
    plain = sum(0.5 * (target[b] - source[b]).norm() ** 2 for b in range(6))
    weighted = sum(0.5 * 5 * w[c] * (target[b, c] - source[b, c]).norm() ** 2 / 7 for b in range(6) for c in range(5))
    assert torch.allclose(delta_loss(target, source) * 6, plain, rtol=1e-12)
    assert torch.allclose(delta_loss(target, source, w) * 6, weighted, rtol=1e-12)


def test_uniform_weights_are_the_mean_over_positions():
    target, source = randn(3, 9, 4), randn(3, 9, 4, seed=1)
    uniform = torch.full((4,), 1 / 4, dtype=torch.float64)
    plain = delta_loss(target, source, dim=-1)
    assert torch.allclose(delta_loss(target, source, uniform, dim=-1), plain / 9, rtol=1e-12)


def test_gradients():
    target, source, w = randn(2, 3, 4).requires_grad_(), randn(2, 3, 4, seed=1), randn(3, seed=2).softmax(0)
    assert torch.autograd.gradcheck(lambda t: delta_loss(t, source), target)
    assert torch.autograd.gradcheck(lambda t: delta_loss(t, source, w), target)
    (gradient,) = torch.autograd.grad(delta_loss(target, source), target)
    assert torch.allclose(gradient, (target - source) / 2, rtol=1e-12)
    assert not torch.autograd.grad(delta_loss(target, target.detach()), target)[0].any()
    source.requires_grad_()
    assert torch.autograd.grad(delta_loss(target, source), source, allow_unused=True) == (None,)


def test_half_precision_is_compared_in_float32():
    target, source = torch.full((1, 4, 100), 300.0).bfloat16(), torch.full((1, 4, 100), 298.0).bfloat16()
    loss = delta_loss(target, source)
    assert loss.dtype == torch.float32
    assert loss.item() == 800.0


def test_features_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="source features"):
        delta_loss(torch.ones(2, 3, 4), torch.ones(2, 3, 5))
    with pytest.raises(ValueError, match=r"give \(3,\)"):
        delta_loss(torch.ones(2, 3, 4), torch.ones(2, 3, 4), torch.ones(4))
    with pytest.raises(ValueError, match="images first"):
        delta_loss(torch.ones(2, 3, 4), torch.ones(2, 3, 4), dim=0)


@pytest.mark.parametrize("kwargs", [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_term_is_the_definition_on_patch_tokens(kwargs, weighted):
    model, source, images = vit(0, **kwargs), vit(1, **kwargs), randn(3, 3, 32, 32)
    P, layers = model.num_prefix_tokens, [0, 2]
    channels = [randn(32, seed=i).softmax(0) for i in layers] if weighted else None
    expected = 0
    for n, i in enumerate(layers):
        square = (tokens(model, images)[i] - tokens(source, images)[i])[:, P:].square()  # (B, N, D)
        expected += (square * 32 * channels[n] / 16 if weighted else square).sum() / 2 / 3
    loss = loss_of(DELTA(source, weight=0.5, layers=layers, channels=channels), model, images)
    assert torch.allclose(loss, 0.5 * expected, rtol=1e-10)
    half = loss_of(DELTA(source, weight=0.5, layers=layers, channels=channels), model, images, relax=0.5)
    assert torch.allclose(half, loss / 2)


def test_default_layers_are_the_quarters():
    assert quarters(vit()) == [0, 1, 2, 3]
    assert quarters(vit(depth=1)) == [0]
    assert quarters(vit(depth=3)) == [0, 1, 2]
    assert quarters(vit(depth=12, embed_dim=4, num_heads=1)) == [2, 5, 8, 11]
    model, source, images = vit(0), vit(1), randn(2, 3, 32, 32)
    each = [loss_of(DELTA(source, layers=i), model, images) for i in range(4)]
    assert torch.allclose(loss_of(DELTA(source), model, images), sum(each))
    assert torch.allclose(loss_of(DELTA(source, layers="all"), model, images), sum(each))
    assert DELTA(source).weight == 0.64  # the authors' 0.01, summed over 64 images


def test_the_batch_size_does_not_change_the_strength():
    model, source, images = vit(0), vit(1), randn(2, 3, 32, 32)
    guide = DELTA(source)
    assert torch.allclose(loss_of(guide, model, torch.cat([images] * 3)), loss_of(guide, model, images))
    one = [loss_of(guide, model, image[None]) for image in images]
    assert torch.allclose(sum(one) / 2, loss_of(guide, model, images))


def test_equal_models_have_zero_loss_and_zero_gradient():
    model, images = vit(), randn(2, 3, 32, 32)
    loss = loss_of(DELTA(model), model, images)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_source_and_model_are_left_alone():
    model, images = vit().train(), randn(2, 3, 32, 32)
    guide = DELTA(model)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.mul_(1.5)
    before = copy.deepcopy(model.state_dict()), copy.deepcopy(guide.frozen.model.state_dict())
    out = model(images)
    with guide.on(model, images) as g:
        guided = model(images)
    g.losses()["delta"].backward()
    with pytest.raises(KeyboardInterrupt), guide.on(model, images):
        raise KeyboardInterrupt
    assert torch.equal(out, guided)
    for net, state in zip((model, guide.frozen.model), before, strict=True):
        assert all(torch.equal(v, state[n]) for n, v in net.state_dict().items())
        assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()) == 0
    assert all(p.grad is None and not p.requires_grad for p in guide.frozen.model.parameters())
    assert all(m.training for m in model.modules())


def test_zero_weight_never_runs_the_source():
    model, images = vit(), randn(1, 3, 32, 32)
    guide = DELTA(model, weight=0.0)
    guide.frozen.model.register_forward_hook(lambda *args: pytest.fail("the source ran"))
    with guide.on(model, images) as g:
        model(images)
    assert g.losses() == {}


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="weight=-1"):
        DELTA(vit(), weight=-1)
    with pytest.raises(ValueError, match="channel_attention"):
        DELTA(vit(), channels="attention")
    with pytest.raises(ValueError, match="1 tensors of channel weights for 4 layers"):
        DELTA(vit(), channels=[torch.ones(32) / 32])
    with pytest.raises(ValueError, match="4 readable"):
        DELTA(vit(), layers=4)
    with pytest.raises(UnsupportedModelError):
        DELTA(timm.create_model("resnet18"))
    with pytest.raises(ValueError, match="same width"):
        loss_of(DELTA(vit(embed_dim=16)), vit(), randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"there are 32 channels"):
        loss_of(DELTA(vit(1), layers=0, channels=[torch.ones(16) / 16]), vit(), randn(1, 3, 32, 32))


def test_channel_weights_by_hand():
    w = channel_weights(torch.tensor([0.0, 0.0, 4.0, 4.0], dtype=torch.float64))  # z = -1, -1, 1, 1
    assert torch.allclose(w, (torch.tensor([-1, -1, 1, 1]) / 5).double().softmax(0))
    assert w.sum().item() == pytest.approx(1)
    assert torch.allclose(channel_weights(torch.tensor([3.0, 3.0])), torch.tensor([0.5, 0.5]))
    x = randn(10)
    assert torch.allclose(channel_weights(7 * x - 3), channel_weights(x))  # units of the loss do not matter


def without(model, images, labels, layer, channel, share=0.0):
    """Loss with one channel of one block's output multiplied by share."""

    def scale(_, args, output):
        factor = torch.ones(output.shape[-1], dtype=output.dtype)
        factor[channel] = share
        return output * factor

    hook = model.blocks[layer].register_forward_hook(scale)
    try:
        with torch.no_grad():
            return F.cross_entropy(model(images), labels)
    finally:
        hook.remove()


def batches(n=2, B=3):
    return [(randn(B, 3, 32, 32, seed=i), torch.tensor([i % 4, 1, 3])) for i in range(n)]


def test_channel_attention_is_the_slope_of_taking_a_channel_out():
    model, eps = vit(embed_dim=8), 1e-5
    slopes = torch.zeros(2, 8, dtype=torch.float64)
    for images, labels in batches():
        for n, layer in enumerate((1, 3)):
            for c in range(8):
                out = [without(model, images, labels, layer, c, 1 + e) for e in (-eps, eps)]
                slopes[n, c] += (out[0] - out[1]) / (2 * eps) / 2
    found = channel_attention(model, batches(), layers=[1, 3])
    for n in range(2):
        assert torch.allclose(found[n], channel_weights(slopes[n]), rtol=1e-6)


def test_channel_attention_agrees_with_taking_channels_out():
    model, (images, labels) = vit(embed_dim=64, depth=2), batches(1)[0]
    intact = F.cross_entropy(model(images), labels).detach()
    exact = torch.stack([without(model, images, labels, 0, c) - intact for c in range(64)])
    (found,) = channel_attention(model, [(images, labels)], layers=0)
    assert torch.corrcoef(torch.stack([channel_weights(exact), found]))[0, 1] > 0.9


def test_channel_attention_leaves_the_model_alone():
    model = vit(drop_path_rate=0.5).train()
    model.blocks[1].eval()
    model.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    before = copy.deepcopy(model.state_dict())
    found = channel_attention(model, batches(6))
    assert [w.shape for w in found] == [(32,)] * 4
    assert all(not w.requires_grad and abs(w.sum().item() - 1) < 1e-12 for w in found)
    first = channel_attention(model, batches(4))  # of six batches the first four count
    assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0
    assert all(p.grad is None for p in model.parameters())
    assert loss_of(DELTA(vit(1), channels=found), vit(), randn(1, 3, 32, 32)) > 0


def test_channel_attention_needs_images():
    with pytest.raises(ValueError, match="one batch or more"):
        channel_attention(vit(), [])
