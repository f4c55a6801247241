"""Manifold Mixup and AlignMix: by hand, what is always true, and on models."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import foveal
from foveal.mix import AlignDraw, AlignMix, CutMix, DepthDraw, ManifoldMixup, Mixup, MixupDraw, label_rows
from foveal.mix.alignmix import align, correspondence, squared_distances
from foveal.mix.losses import softmax_binary_cross_entropy
from foveal.mix.manifold import blend_tokens
from test_tokenmixup import MODELS, C, batch, cct, every_model, rng, vit

f64 = torch.float64
LAM = torch.tensor([0.7], dtype=f64)


def drawn(B, depth, lam=0.7, perm=None):
    perm = torch.arange(B).roll(1) if perm is None else perm
    return DepthDraw(perm, torch.full((B,), lam), torch.tensor(depth))


def step_with(mixer, model, images, labels, draw):
    """A step of a given draw."""
    mixer.draw = lambda *args, **kwargs: draw
    with mixer.on(model, images, labels, rng=rng(), num_classes=C) as step:
        logits = model(step.images)
    return step, logits


def after(model, block, tokens):
    """Logits of a model whose block gets these tokens."""
    handle = model.blocks[block].register_forward_pre_hook(lambda m, args: (tokens, *args[1:]))
    out = model(batch(model, len(tokens))[0])
    handle.remove()
    return out


def entering(model, block, images):
    with foveal.read(model, layers=block, what="tokens") as seen, torch.no_grad():
        model(images)
    return seen.tokens(prefix=True)


# -- the correspondence


def test_worked_example():
    a = torch.tensor([[[0.0, 0], [1, 0], [0, 1]]], dtype=f64)
    b = torch.tensor([[[1.0, 0.1], [0.1, 1], [0, 0.1]]], dtype=f64)
    R = correspondence(squared_distances(a, b), stop=0.1)
    expected = torch.tensor([[0, 0, 0.9996], [1, 0, 0], [0, 1, 0.0003]], dtype=f64)
    assert torch.allclose(R[0], expected, atol=1e-4)
    own = torch.tensor([[0, 0.03], [1, 0.03], [0.03, 1.0]], dtype=f64)
    assert torch.allclose(align(a, b, R, LAM, False)[0], own, atol=1e-3)
    partner = torch.tensor([[1.0, 0.03], [0.03, 1.0], [0, 0.03]], dtype=f64)
    assert torch.allclose(align(a, b, R, LAM, True)[0], partner, atol=1e-3)


def slow_sinkhorn(M, eps=0.1, limit=100, stop=0.1):
    """The authors' loop with u and v as they write it."""
    B, r, _ = M.shape
    u, v = M.new_zeros(B, r), M.new_zeros(B, r)
    share = torch.log(torch.tensor(1 / r + 1e-8, dtype=M.dtype))
    for _ in range(limit):
        before = u
        u = eps * (share - torch.logsumexp((-M + u[:, :, None] + v[:, None, :]) / eps, -1)) + u
        v = eps * (share - torch.logsumexp((-M + u[:, :, None] + v[:, None, :]) / eps, -2)) + v
        if (u - before).abs().sum(-1).mean() < stop:
            break
    return r * ((-M + u[:, :, None] + v[:, None, :]) / eps).exp()


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("r", [1, 4, 25])
@pytest.mark.parametrize("stop", [0.1, None])
def test_the_plan_is_the_authors(scale, r, stop):
    g = torch.Generator().manual_seed(r)
    a, b = (scale * torch.randn(3, r, 6, generator=g, dtype=f64) for _ in range(2))
    M = squared_distances(a, b)
    assert torch.allclose(M, torch.cdist(a, b).square(), atol=1e-9)
    expected = slow_sinkhorn(M, stop=0.1 if stop else -1.0)
    assert torch.allclose(correspondence(M, stop=stop), expected, atol=1e-6)  # their 1e-8 in log(1/r + 1e-8)


def test_columns_sum_to_one_and_rows_once_it_has_converged():
    a, b = torch.randn(2, 5, 9, 4, dtype=f64, generator=torch.Generator().manual_seed(0))
    R = correspondence(squared_distances(a, b), iterations=3)
    assert torch.allclose(R.sum(-2), torch.ones(5, 9, dtype=f64))
    R = correspondence(squared_distances(a, b) / 20, iterations=2000)
    assert torch.allclose(R.sum(-1), torch.ones(5, 9, dtype=f64), atol=1e-6)


def test_equal_maps_with_distant_places_stay():
    a = 10 * torch.randn(2, 8, 4, dtype=f64, generator=torch.Generator().manual_seed(0))
    R = correspondence(squared_distances(a, a))
    assert torch.allclose(R, torch.eye(8, dtype=f64).expand(2, 8, 8), atol=1e-6)
    for onto_partner in (False, True):
        assert torch.allclose(align(a, a, R, LAM.expand(2), onto_partner), a, atol=1e-5)


def test_permuted_places_permute_columns_and_nothing_else():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 8, 4, generator=g, dtype=f64)
    order = torch.randperm(8, generator=g)
    R, permuted = correspondence(squared_distances(a, b)), correspondence(squared_distances(a, b[:, order]))
    assert torch.allclose(permuted, R[:, :, order])
    assert torch.allclose(permuted @ b[:, order], R @ b)


def test_lam_of_one_gives_the_image():
    a, b = torch.randn(2, 3, 8, 4, dtype=f64)
    R = correspondence(squared_distances(a, b))
    assert torch.equal(align(a, b, R, torch.ones(3), False), a)


def test_pooling_undoes_the_alignment():
    """Why the mixed tokens need a block after them: columns of R sum to 1."""
    a, b = torch.randn(2, 3, 8, 4, dtype=f64, generator=torch.Generator().manual_seed(0))
    R = correspondence(squared_distances(a, b) / 20, iterations=2000)
    pooled = align(a, b, R, LAM.expand(3), False).mean(1)
    assert torch.allclose(pooled, 0.7 * a.mean(1) + 0.3 * b.mean(1), atol=1e-6)


def test_no_gradient_through_the_correspondence():
    a, b = (torch.randn(1, 4, 3, dtype=f64, requires_grad=True) for _ in range(2))
    R = correspondence(squared_distances(a, b))
    assert not R.requires_grad
    align(a, b, R, LAM, False).sum().backward()
    assert torch.allclose(a.grad, torch.full_like(a, 0.7))
    assert torch.allclose(b.grad, 0.3 * R.sum(1)[..., None].expand_as(b))


def test_half_precision_costs_give_a_finite_plan():
    a, b = (30 * torch.randn(2, 16, 8).half() for _ in range(2))
    R = AlignMix().correspondence(torch.cat([a, b]), torch.tensor([2, 3, 0, 1]))
    assert R.dtype == torch.float32
    assert R.isfinite().all()
    assert torch.allclose(R.sum(-2), torch.ones(4, 16))


# -- on models


@every_model
@pytest.mark.parametrize("depth", [1, 2])
def test_manifold_blends_the_input_of_the_block(kind, depth):
    model = MODELS[kind]()
    images, labels = batch(model)
    draw = drawn(4, depth)
    step, logits = step_with(ManifoldMixup(), model, images, labels, draw)
    x = entering(model, depth, images)
    expected = after(model, depth, draw.lam[0].double() * x + (1 - draw.lam[0].double()) * x[draw.perm])
    assert torch.allclose(logits, expected, atol=1e-7)
    assert step.images is images
    rows = label_rows(labels, C)
    assert torch.allclose(step.targets(C), 0.7 * rows + 0.3 * rows[draw.perm])


@every_model
def test_depth_zero_is_mixup(kind):
    model = MODELS[kind]()
    images, labels = batch(model)
    draw = drawn(4, 0)
    mixup = Mixup().apply(images, MixupDraw(draw.perm, draw.lam))
    for mixer, one in (
        (ManifoldMixup(), draw),
        (AlignMix(), AlignDraw(draw.perm, draw.lam, draw.depth, draw.depth > 0)),
    ):
        step, logits = step_with(mixer, model, images, labels, one)
        assert torch.equal(step.images, mixup.images)
        assert torch.equal(logits, model(mixup.images))
        assert torch.equal(step.targets(C), mixup.targets(labels, C))


@every_model
@pytest.mark.parametrize("onto_partner", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
def test_alignmix_aligns_patches_and_blends_prefixes(kind, onto_partner, normalise):
    model = MODELS[kind]()
    images, labels = batch(model)
    P, perm = model.num_prefix_tokens, torch.arange(4).roll(1)
    mixer = AlignMix(block=2, normalise=normalise, iterations=20)
    draw = AlignDraw(perm, torch.full((4,), 0.7), torch.tensor(1), torch.tensor(onto_partner))
    _, logits = step_with(mixer, model, images, labels, draw)
    x = entering(model, 2, images)
    compared = F.normalize(x[:, P:], dim=-1) if normalise else x[:, P:]
    R = slow_sinkhorn(torch.cdist(compared, compared[perm]).square(), limit=20, stop=-1.0)
    own, partner = x[:, P:], x[perm][:, P:]
    patches = 0.7 * (R.mT @ own) + 0.3 * partner if onto_partner else 0.7 * own + 0.3 * (R @ partner)
    expected = after(model, 2, torch.cat([0.7 * x[:, :P] + 0.3 * x[perm][:, :P], patches], 1))
    assert torch.allclose(logits, expected, atol=1e-5)


@every_model
@pytest.mark.parametrize("mixer", [ManifoldMixup(), AlignMix(block=1)], ids=["manifold", "alignmix"])
def test_lam_of_one_or_no_partner_changes_nothing(kind, mixer):
    model = MODELS[kind]()
    images, labels = batch(model)
    for draw in (drawn(4, 1, lam=1.0), drawn(4, 1, perm=torch.arange(4))):
        if isinstance(mixer, AlignMix):
            if draw.lam[0] < 1:
                continue  # an image may be aligned with itself
            draw = AlignDraw(draw.perm, draw.lam, draw.depth, torch.tensor(False))
        step, logits = step_with(mixer, model, images, labels, draw)
        assert torch.allclose(logits, model(images), atol=1e-12)
        assert torch.allclose(step.targets(C), label_rows(labels, C))


@pytest.mark.parametrize("make", [vit, cct])
@pytest.mark.parametrize("mixer", [ManifoldMixup(), AlignMix(block=2, iterations=5)], ids=["manifold", "alignmix"])
def test_checkpointed_gradients_are_exact(make, mixer):
    model = make()
    images, labels = batch(model)
    for depth in (0, 1):
        draw = drawn(4, depth) if isinstance(mixer, ManifoldMixup) else AlignDraw(
            torch.arange(4).roll(1), torch.full((4,), 0.7), torch.tensor(depth), torch.tensor(True))  # fmt: skip
        mixer.draw = lambda *args, draw=draw, **kwargs: draw
        grads = []
        for checkpointed in (False, True):
            model.zero_grad()
            model.set_grad_checkpointing(checkpointed)
            with mixer.on(model, images, labels, num_classes=C) as step:
                step.loss(model(step.images)).backward()
            grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_in_a_linear_network_all_depths_agree():
    """Blocks without norms, attention or activation: blending anywhere is blending the images."""
    model = vit()
    for block in model.blocks:
        block.norm1 = block.norm2 = block.mlp = nn.Identity()
        with torch.no_grad():
            block.attn.proj.weight.zero_()
            block.attn.proj.bias.zero_()
    model.norm = nn.Identity()
    images, labels = batch(model)
    logits = [step_with(ManifoldMixup(), model, images, labels, drawn(4, depth))[1] for depth in (0, 1, 2)]
    assert torch.allclose(logits[0], logits[1], atol=1e-12)
    assert torch.allclose(logits[0], logits[2], atol=1e-12)


def test_draws_are_uniform_over_depths_and_coins():
    draws = [ManifoldMixup(deepest=3).draw(6, (16, 16), rng=rng(seed)) for seed in range(400)]
    counts = torch.bincount(torch.stack([draw.depth for draw in draws]), minlength=4)
    assert (counts > 60).all()
    assert all((draw.lam == draw.lam[0]).all() for draw in draws)
    assert len({tuple(draw.perm.tolist()) for draw in draws}) > 250
    aligned = [AlignMix().draw(6, (16, 16), rng=rng(seed)) for seed in range(400)]
    pairs = torch.bincount(torch.stack([2 * draw.depth + draw.onto_partner for draw in aligned]), minlength=4)
    assert (pairs > 60).all()


def test_on_top_of_an_image_mixer():
    model = vit()
    images, labels = batch(model)
    mixer = ManifoldMixup(over=CutMix())
    seen = set()
    for seed in range(8):
        with mixer.on(model, images, labels, rng=rng(seed), num_classes=C) as step:
            step.loss(model(step.images))
        image, token = step.mixed.factors
        with CutMix().on(model, images, labels, rng=rng(seed)) as alone:
            pass
        assert torch.equal(image.own, alone.mixed.factors[0].own)
        assert torch.equal(step.mixed.keep, alone.mixed.keep)  # whose pixels these are is for the image mixer to say
        assert torch.equal(step.mixed.perm, alone.mixed.perm)
        assert torch.equal(step.targets(C), token.mix(alone.targets(C)))
        seen.add(torch.equal(step.images, alone.images))
    assert seen == {True, False}


def test_the_published_loss():
    logits = torch.randn(4, 7, dtype=f64, generator=torch.Generator().manual_seed(0))
    targets = torch.rand(4, 7, dtype=f64, generator=torch.Generator().manual_seed(1)).softmax(-1)
    p = logits.softmax(-1)
    assert torch.allclose(softmax_binary_cross_entropy(logits, targets), F.binary_cross_entropy(p, targets))
    sure = torch.tensor([[40.0, 0.0, 0.0]], requires_grad=True)
    loss = softmax_binary_cross_entropy(sure, torch.tensor([[1.0, 0.0, 0.0]]))
    loss.backward()
    assert loss.isfinite()
    assert sure.grad.isfinite().all()
    model = vit()
    images, labels = batch(model)
    with ManifoldMixup().on(model, images, labels, num_classes=C) as step:
        out = model(step.images)
    expected = F.binary_cross_entropy(out.softmax(-1), step.targets(C).double())
    assert torch.allclose(step.loss(out, kind="softmax_bce"), expected, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ManifoldMixup(alpha=0.0), "alpha=0"),
        (lambda: ManifoldMixup(deepest=-1), "depths count from 0"),
        (lambda: AlignMix(eps=0.0), "eps=0"),
        (lambda: AlignMix(iterations=0), "iterations=0"),
    ],
)
def test_settings_that_cannot_be_meant(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_blocks_that_are_not_there():
    model = vit()
    images, labels = batch(model)
    with pytest.raises(ValueError, match="deepest=4"), ManifoldMixup(deepest=4).on(model, images, labels):
        pass
    with pytest.raises(ValueError, match="block 7"), AlignMix(block=7).on(model, images, labels):
        pass
    assert ManifoldMixup().first_mixed_block(model) == 1
    assert ManifoldMixup(deepest=0).first_mixed_block(model) is None
    assert AlignMix().first_mixed_block(model) == 3


def test_a_blend_of_tokens_by_hand():
    x = torch.arange(12.0).view(2, 3, 2)
    assert torch.allclose(
        blend_tokens(x, torch.tensor([1, 0]), torch.tensor([0.25, 1.0]))[0], 0.25 * x[0] + 0.75 * x[1]
    )
    assert torch.equal(blend_tokens(x, torch.tensor([1, 0]), torch.tensor([0.25, 1.0]))[1], x[1])


def test_steps_without_a_generator_follow_the_seed():
    model = vit()
    images, labels = batch(model)
    told = []
    for seed in (0, 0, 1):
        mixer = ManifoldMixup(seed=seed)
        with mixer.on(model, images, labels, num_classes=C) as step:
            told.append(float(step.loss(model(step.images)).detach()))
    assert told[0] == told[1] != told[2]
