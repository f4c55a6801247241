"""The two-pass guide against a twin in plain operations; its identities; the loss that trains it."""

import itertools

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import foveal
from foveal import maps
from foveal.maps.feedback import Decoders, fed_back, value_paths
from foveal.maps.topdown import TopDown, topdown_loss
from map_models import MODELS, batch, everything, resnet, same, vit

SHAPES = {
    **MODELS,
    "layer scale": (lambda: vit(img_size=(28, 20), init_values=0.5), (28, 20), (7, 5)),
    "normed queries": (lambda: vit(img_size=(28, 20), qk_norm=True), (28, 20), (7, 5)),
    "no value bias": (lambda: vit(img_size=(28, 20), qkv_bias=False), (28, 20), (7, 5)),
    "class and mean": (lambda: vit(img_size=(28, 20), global_pool="avg"), (28, 20), (7, 5)),
}


def guide(model, loud=True, **options):
    made = TopDown.fresh(model, seed=1, **options)
    if loud:
        with torch.no_grad():
            for p in made.decoders.parameters():  # as strong as a trained guide's: deviation 0.02 hardly shows
                p.mul_(20)
    return made


# -- the twin: every step written out for one image, with matrices


def plain_norm(x, norm):
    if isinstance(norm, nn.Identity):
        return x
    mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias


def plain_attention_out(attn, x, feedback, with_bias):
    D = x.shape[1]
    H, d = attn.num_heads, D // attn.num_heads
    w = attn.qkv.weight
    bias = attn.qkv.bias if attn.qkv.bias is not None else torch.zeros(3 * D).to(x)
    q, k, v = ((x @ w[i * D : (i + 1) * D].T + bias[i * D : (i + 1) * D]) for i in range(3))
    if feedback is not None:
        v = v + feedback @ w[2 * D :].T + (bias[2 * D :] if with_bias else 0)
    out = torch.zeros_like(x)
    for h in range(H):
        part = slice(h * d, (h + 1) * d)
        qh, kh = plain_norm(q[:, part], attn.q_norm), plain_norm(k[:, part], attn.k_norm)
        logits = qh @ kh.T / d**0.5
        weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
        out[:, part] = weights @ v[:, part]
    return out @ attn.proj.weight.T + attn.proj.bias


def plain_pass(model, start, feedback, with_bias):
    x, inputs, outputs = start, [], []
    for l, block in enumerate(model.blocks):
        inputs.append(x)
        scale1 = getattr(block.ls1, "gamma", 1.0)
        scale2 = getattr(block.ls2, "gamma", 1.0)
        fed = None if feedback is None else feedback[l]
        x = x + scale1 * plain_attention_out(block.attn, plain_norm(x, block.norm1), fed, with_bias)
        hidden = plain_norm(x, block.norm2) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
        x = x + scale2 * (F.gelu(hidden) @ block.mlp.fc2.weight.T + block.mlp.fc2.bias)
        outputs.append(x)
    fc_norm = getattr(model, "fc_norm", nn.Identity())
    return plain_norm(plain_norm(x, model.norm), fc_norm), inputs, outputs


def plain_gate(tokens, u):
    return torch.stack(
        [((t * u).sum() / (t.norm().clamp_min(1e-12) * u.norm().clamp_min(1e-12))).clamp(0, 1) for t in tokens]
    )


def plain_guide(model, made, image, u):
    """Steps 1 to 6 for one image: the map (N,), and the tokens of both passes."""
    model.eval()
    start = model._pos_embed(model.patch_embed(image[None]))[0]
    Z, _, _ = plain_pass(model, start, None, False)
    R = plain_gate(Z, u)[:, None] * Z
    F_ = [None] * len(model.blocks)
    for l in range(len(model.blocks) - 1, -1, -1):
        R = R @ made.decoders[l].linear.weight.T
        F_[l] = made.sigma * (R @ made.decoders[l].linear2.weight.T)
    Z2, inputs, outputs = plain_pass(model, start, F_, made.feedback_bias)
    m = plain_gate(Z2, u)[model.num_prefix_tokens :]
    if made.threshold:
        m = (m - (0.7 * m.max() + 0.3 * m.min())).clamp_min(0)
    return m, Z, Z2, inputs, outputs


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("sigma", "bias", "threshold"), [(1.0, True, True), (2.0, False, False), (0.0, True, True)])
def test_the_slow_twin(name, sigma, bias, threshold):
    build, size, grid = SHAPES[name]
    model = build().double()
    images, labels = batch(3, size, dtype=torch.float64)
    made = guide(model, sigma=sigma, feedback_bias=bias, threshold=threshold)
    found = made(images, labels)
    with torch.no_grad():
        for i in range(3):
            expected, *_ = plain_guide(model, made, images[i], model.head.weight[labels[i]])
            assert torch.allclose(found.map[i].double(), expected.unflatten(0, grid), atol=1e-7)  # float32 out
        assert torch.equal(found.logits, model.eval()(images).float())


@pytest.mark.parametrize("B", [1, 3])
def test_the_prompt_stands_in_for_the_label(B):
    model = vit(img_size=(28, 20)).double()
    images, _ = batch(B, (28, 20), dtype=torch.float64)
    made = guide(model)
    found = made(images)
    with torch.no_grad():
        for i in range(B):
            expected, *_ = plain_guide(model, made, images[i], made.prompt.double())
            assert torch.allclose(found.map[i].double(), expected.unflatten(0, (7, 5)), atol=1e-6)  # float32 prompt
    same_rows = TopDown(model, made.decoders, prompt=model.head.weight[2].detach())
    assert torch.allclose(same_rows(images).map, made(images, torch.full((B,), 2)).map, atol=1e-6)
    with pytest.raises(ValueError, match="give labels, or a prompt"):
        TopDown(model, made.decoders)(images)


# -- identities


def second_pass(made, images, labels):
    with torch.no_grad():
        made.model.eval()
        first = made.model.forward_features(images)
        return first, made.again(images, first, made.rows(images, labels))


@pytest.mark.parametrize("name", SHAPES)
def test_sigma_0_without_bias_is_the_plain_pass(name):
    build, size, _ = SHAPES[name]
    model = build()
    images, labels = batch(3, size)
    first, second = second_pass(guide(model, sigma=0.0, feedback_bias=False), images, labels)
    assert (first - second).abs().max() < 1e-6
    with_bias, again = second_pass(guide(model, sigma=0.0), images, labels)
    if name == "no value bias":
        assert torch.equal(with_bias, again)
    else:
        assert (with_bias - again).abs().max() > 1e-3


def test_sigma_0_without_bias_is_head_cosine():
    model = vit()
    images, labels = batch(3, (32, 32))
    for threshold in (True, False):
        got = guide(model, sigma=0.0, feedback_bias=False, threshold=threshold)(images, labels).map
        assert torch.allclose(got, maps.HeadCosine(model, threshold=threshold)(images, labels).map, atol=1e-6)


def test_still_conditioned_on_the_label_at_sigma_0():
    model = vit()
    images, labels = batch(3, (32, 32))
    made = guide(model, sigma=0.0)
    assert not torch.equal(made(images, labels).map, made(images, (labels + 1) % 5).map)


def test_feedback_changes_the_map():
    model = vit()
    images, labels = batch(3, (32, 32))
    by_sigma = [guide(model, sigma=s, threshold=False)(images, labels).map for s in (0.0, 0.5, 1.0, 2.0)]
    for one, other in itertools.pairwise(by_sigma):
        assert (one - other).abs().max() > 1e-3


def test_sigma_scales_what_is_emitted_only():
    torch.manual_seed(0)
    decoders, gated = Decoders(3, 8).double(), torch.randn(2, 4, 8, dtype=torch.float64)
    for l, (one, three) in enumerate(zip(decoders(gated, 1.0), decoders(gated, 3.0), strict=True)):
        assert torch.allclose(three, 3 * one)
        carried = gated
        for k in range(2, l - 1, -1):
            carried = carried @ decoders[k].linear.weight.T
        assert torch.allclose(one, carried @ decoders[l].linear2.weight.T)


def test_one_common_vector_in_all_values_shifts_the_attention_by_it():
    """The row added to V literally, as the paper's text says: nothing spatial comes of it, rows of A sum to one."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 9, 16, dtype=torch.float64)
    row = torch.randn(16, dtype=torch.float64)
    plain, shifted = F.scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v + row)
    assert (shifted - plain - row).abs().max() < 4e-15


def test_only_values_change():
    model = vit()
    images, _ = batch(2, (32, 32))
    feedback = [torch.randn(2, 65, 32) for _ in model.blocks]
    with torch.no_grad():
        model.eval()
        with foveal.read(model, layers=0, what=["queries", "keys", "values", "class_logits"]) as plain:
            model(images)
        with (
            fed_back(value_paths(model), feedback, bias=True),
            foveal.read(model, layers=0, what=["queries", "keys", "values", "class_logits"]) as fed,
        ):
            model(images)
    assert torch.equal(plain.queries(), fed.queries())
    assert torch.equal(plain.keys(), fed.keys())
    assert torch.equal(plain.class_logits(), fed.class_logits())
    D = 32
    extra = F.linear(feedback[0], model.blocks[0].attn.qkv.weight[2 * D :], model.blocks[0].attn.qkv.bias[2 * D :])
    expected = plain.values(prefix=True) + extra.unflatten(-1, (2, 16)).transpose(1, 2)
    assert torch.allclose(fed.values(prefix=True), expected, atol=1e-6)


def test_other_images_labels_do_not_matter():
    model = vit()
    images, labels = batch(4, (32, 32))
    made, changed = guide(model), labels.clone()
    changed[2] = (changed[2] + 1) % 5
    rows = [0, 1, 3]
    assert torch.equal(made(images, labels).map[rows], made(images, changed).map[rows])


def test_channels_permuted_with_their_filters_change_nothing():
    model = vit()
    images, labels = batch(2, (32, 32))
    before = guide(model)(images, labels).map
    with torch.no_grad():
        model.patch_embed.proj.weight.copy_(model.patch_embed.proj.weight[:, [2, 0, 1]])
    assert torch.allclose(guide(model)(images[:, [2, 0, 1]], labels).map, before, atol=1e-5)


# -- other models


def test_separate_projections():
    torch.manual_seed(0)
    settings = {"img_size": (56, 42), "depth": 2, "embed_dim": 64, "num_heads": 4, "num_classes": 5}
    model = timm.create_model("eva02_base_patch14_224", **settings)  # rotary positions, q, k and v apart
    images, labels = batch(2, (56, 42))
    made = guide(model, sigma=0.0, feedback_bias=False)
    assert made.paths[0].name == "blocks.0.attn.v_proj"
    first, second = second_pass(made, images, labels)
    assert (first - second).abs().max() < 1e-6
    assert (second_pass(guide(model), images, labels)[1] - first).abs().max() > 1e-3
    assert guide(model)(images, labels).map.shape == (2, 4, 3)


def test_models_that_take_no_feedback_are_refused_by_name():
    torch.manual_seed(0)
    small = {"img_size": 28, "depth": 1, "num_classes": 5}
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1,), embed_dim=24, num_heads=(2,), num_classes=5)
    fused = timm.create_model("eva02_tiny_patch14_224", **small)
    beit = timm.create_model("beit_base_patch16_224", **{**small, "img_size": 32}, embed_dim=32, num_heads=2)
    both = timm.create_model("vit_base_patch16_xp_224", **{**small, "img_size": 32}, embed_dim=32, num_heads=2)
    for model, text in (
        (resnet(), "ResNet has no blocks to feed back to: topdown fits timm's vision transformers"),
        (swin, "SwinTransformer has no blocks"),
        (fused, "blocks.0.attn keeps the bias of its fused projection apart"),
        (beit, "blocks.0.attn is Attention: feedback is added to the values of timm's"),
        (both, "blocks.0.attn is NoneType"),
    ):
        with pytest.raises(maps.MapModelError, match=text):
            TopDown.fresh(model)


def test_guides_that_do_not_fit():
    model = vit()
    with pytest.raises(maps.MapModelError, match="2 decoders of width 32 for a model of 3 blocks and width 32"):
        TopDown(model, Decoders(2, 32))
    with pytest.raises(maps.MapModelError, match="3 decoders of width 16"):
        TopDown(model, Decoders(3, 16))
    with pytest.raises(maps.MapModelError, match=r"a prompt of shape \(16,\); \(32,\) fits"):
        TopDown(model, Decoders(3, 32), prompt=torch.zeros(16))
    with pytest.raises(ValueError, match=r"sigma=-0\.5"):
        TopDown(model, Decoders(3, 32), sigma=-0.5)
    with pytest.raises(maps.MapModelError, match="has 5 classes but the data have 100: label 7 would mean another"):
        TopDown(model, Decoders(3, 32), classes=100)
    with pytest.raises(maps.MapModelError, match="missing"):
        TopDown(vit(num_classes=0), Decoders(3, 32))


def test_a_projection_that_does_not_run_once_is_an_error():
    model, images = vit().eval(), batch(1, (32, 32))[0]
    feedback = [torch.zeros(1, 65, 32)] * 3
    with (
        pytest.raises(maps.MapModelError, match=r"blocks\.1\.attn\.qkv ran 0 times"),
        torch.no_grad(),
        fed_back(value_paths(model), feedback, bias=False),
    ):
        model.blocks[0](model._pos_embed(model.patch_embed(images)))
    assert not any(m._forward_hooks for m in model.modules())


def test_fresh_guides_come_from_their_seed():
    model = vit()
    state = torch.get_rng_state()
    a, b, c = (TopDown.fresh(model, seed=s) for s in (0, 0, 1))
    assert same(a.decoders.state_dict(), b.decoders.state_dict())
    assert torch.equal(a.prompt, b.prompt)
    assert not same(a.decoders.state_dict(), c.decoders.state_dict())
    assert abs(float(torch.cat([p.detach().flatten() for p in a.decoders.parameters()]).std()) - 0.02) < 1e-3
    assert torch.equal(state, torch.get_rng_state())


# -- training a guide


def plain_loss(model, made, images, labels, weight):
    logits, errors = [[], []], []
    per_block = [[] for _ in model.blocks]
    for image in images:
        _, Z, Z2, inputs, outputs = plain_guide(model, made, image, made.prompt)
        for which, tokens in enumerate((Z, Z2)):
            logits[which].append(tokens[0] @ model.head.weight.T + model.head.bias)
        for l, (into, out) in enumerate(zip(inputs, outputs, strict=True)):
            per_block[l].append((out.detach() @ made.decoders[l].linear.weight.T - into.detach()).square())
    errors = [torch.stack(one).mean() for one in per_block]
    ce = [F.cross_entropy(torch.stack(one), labels) for one in logits]
    return (ce[0] + ce[1]) / 2 + weight * sum(errors), ce, sum(errors)


def test_the_loss_and_all_its_gradients():
    model = vit(img_size=(28, 20)).double().eval()
    images, labels = batch(3, (28, 20), dtype=torch.float64)
    made = guide(model)
    made.decoders.double()
    made.prompt = nn.Parameter(made.prompt.detach().double())
    parameters = made.parameters()
    assert len(parameters) == len(list(model.parameters())) + 2 * 3 + 1
    loss = topdown_loss(made, images, labels)
    expected, ce, error = plain_loss(model, made, images, labels, 0.1)
    assert torch.allclose(loss.total, expected)
    assert torch.allclose(loss.first, ce[0])
    assert torch.allclose(loss.second, ce[1])
    assert torch.allclose(loss.reconstruction, error)
    for got, want in zip(
        torch.autograd.grad(loss.total, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        assert torch.allclose(got, want, atol=1e-8)
        assert got.abs().max() > 0


def test_the_reconstruction_trains_the_first_matrices_alone():
    model = vit().eval()
    images, labels = batch(2, (32, 32))
    made = guide(model)
    with_it, without = (topdown_loss(made, images, labels, reconstruction=w).total for w in (1.0, 0.0))
    only = torch.autograd.grad(with_it - without, made.parameters(), allow_unused=True, materialize_grads=True)
    names = [*(n for n, _ in model.named_parameters()), *(n for n, _ in made.decoders.named_parameters()), "prompt"]
    for name, g in zip(names, only, strict=True):
        if name.endswith(".linear.weight"):
            assert g.abs().max() > 1e-3
        else:
            assert g.abs().max() < 1e-5, name  # the difference of two equal gradients


def test_in_training_mode_with_drop_path_and_labels_as_rows():
    model = vit(drop_path_rate=0.3)
    images, labels = batch(3, (32, 32))
    made = guide(model)
    torch.manual_seed(0)
    one = topdown_loss(made, images, labels).total
    torch.manual_seed(0)
    rows = topdown_loss(made, images, F.one_hot(labels, 5).float()).total
    assert torch.isclose(one, rows)
    assert model.training
    smooth = topdown_loss(made, images, labels, smoothing=0.5)
    assert smooth.logits.shape == (3, 5)
    smooth.total.backward()
    assert all(p.grad is not None for p in made.parameters())


def test_a_few_steps_lower_the_loss():
    model = vit(img_size=(28, 20), depth=2)
    images, labels = batch(8, (28, 20))
    made = TopDown.fresh(model)
    optimizer = torch.optim.AdamW(made.parameters(), lr=2e-3)
    losses = []
    for _ in range(15):
        terms = topdown_loss(made, images, labels)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        losses.append(terms.total.item())
    assert losses[-1] < 0.6 * losses[0]


def test_checkpointing_would_lose_the_feedback():
    model = vit()
    model.set_grad_checkpointing(True)
    with pytest.raises(ValueError, match=r"set_grad_checkpointing\(False\)"):
        topdown_loss(guide(model), *batch(2, (32, 32)))


def test_the_loss_leaves_no_hook_when_the_forward_raises():
    model = vit()
    made = guide(model)
    before = everything(model)
    with pytest.raises(AssertionError):
        topdown_loss(made, *batch(2, (36, 32)))
    assert same(before, everything(model))
