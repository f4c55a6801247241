"""Attention transfer: the tiled cross entropy and the copied maps, against whole maps in plain operations."""

import copy
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointError

import foveal
from foveal.attention import rows
from foveal.attention.factors import Factors, cross_entropy
from foveal.attention.replace import replace
from foveal.transfer import GUIDES, AttentionCopy, AttentionTransfer, attention_transfer_loss
from plain import plain_attention
from test_attention_edit import case, out_of
from test_gta import batch, vit

INF = float("inf")
FAMILIES = (
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_small_patch16_dinov3",
    "eva02_base_patch14_224",
    "beit_base_patch16_224",
    "vit_base_patch16_xp_224",
    "vit_base_patch16_siglip_224",
    "torchvision",
    "cct",
    "vit classifier",
    "dinov3",
    "clip",
)
every_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(autouse=True)
def no_trace():
    yield
    assert not _get_current_function_mode_stack()


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def tiny_swin():
    settings = {"embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
    return timm.models.SwinTransformer(img_size=32, patch_size=4, **settings)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def by_definition(logits, source):
    """Mean over rows of -sum_j softmax(source)_j log_softmax(logits)_j, with whole maps."""
    return -(source.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


def other(model, seed=7):
    """The same architecture with other weights."""
    twin, g = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.3 * torch.randn(p.shape, dtype=p.dtype, generator=g))
    return twin


def self_attention(logits):
    """Logits of self-attention among those seen, without pooling heads."""
    return [x for x in logits if x.shape[-1] == x.shape[-2]]


# -- the cross entropy


def test_one_row_by_hand():
    q, zero = torch.tensor([[[[math.log(3.0)]]]]), torch.zeros(1, 1, 1, 1)
    k = torch.tensor([[[[1.0], [0.0]]]])
    got = rows.map_cross_entropy(q, k, 1.0, None, zero, k, 1.0, None)  # target (3/4, 1/4), source (1/2, 1/2)
    assert got.item() == pytest.approx(-0.5 * math.log(3 / 4) - 0.5 * math.log(1 / 4))
    back = rows.map_cross_entropy(zero, k, 1.0, None, q, k, 1.0, None)
    assert back.item() == pytest.approx(math.log(2.0))


@pytest.mark.parametrize("tile", [8 * 11 * 5, 1 << 20])
@pytest.mark.parametrize("mask_shape", [None, (1, 3, 11, 11), (2, 1, 1, 11), (2, 3, 11, 11), (11, 11)])
def test_value_and_gradient_are_those_of_whole_maps(monkeypatch, tile, mask_shape):
    monkeypatch.setitem(rows.TILE_BYTES, "cpu", tile)  # small: batch, heads and queries are all cut
    q, k = (random(2, 3, 11, 8, seed=i).requires_grad_() for i in range(2))
    qs, ks = (random(2, 3, 11, 5, seed=i) for i in (2, 3))  # heads may be of another width
    mask = None if mask_shape is None else random(*mask_shape, seed=4).requires_grad_()
    mask_source = None if mask is None else random(*mask_shape, seed=5)
    logits, source = q @ k.mT * 0.3, qs @ ks.mT * 0.9
    if mask is not None:
        logits, source = logits + mask, source + mask_source
    inputs = [q, k] if mask is None else [q, k, mask]
    expected = by_definition(logits, source)
    got = rows.map_cross_entropy(q, k, 0.3, mask, qs, ks, 0.9, mask_source)
    assert torch.allclose(got, expected, rtol=0, atol=1e-10)
    gradients = zip(torch.autograd.grad(2 * got, inputs), torch.autograd.grad(2 * expected, inputs), strict=True)
    for a, b in gradients:
        assert torch.allclose(a, b, rtol=0, atol=1e-10)


def test_equal_maps_give_their_entropy_and_no_gradient():
    q, k = (random(2, 3, 7, 4, seed=i).requires_grad_() for i in range(2))
    loss = rows.map_cross_entropy(q, k, 0.5, None, q, k, 0.5, None)
    attn = (q @ k.mT * 0.5).softmax(-1)
    assert torch.allclose(loss, -(attn * attn.log()).sum(-1).mean())
    assert loss > 0.5
    assert all(g.abs().max() < 1e-15 for g in torch.autograd.grad(loss, (q, k)))


@pytest.mark.parametrize("fused", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("filler", [-INF, torch.finfo(torch.float64).min])
def test_padding_does_not_count(fused, filler):
    q, k, qs, ks = (random(2, 2, 6, 4, seed=i).requires_grad_() for i in range(4))
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    mask = torch.zeros(2, 1, 6, 6, dtype=torch.float64)
    mask = mask.masked_fill(~(valid[:, None, :, None] & valid[:, None, None]), filler)
    target, source = Factors(q, k, mask, 0.5, valid=valid), Factors(qs, ks, mask, 0.5, valid=valid)
    target = target if fused[0] else Factors(logits=target.multiplied(), valid=valid)
    source = source if fused[1] else Factors(logits=source.multiplied(), valid=valid)
    loss = cross_entropy(target, source)
    first, second = (
        by_definition(q[b, :, :n] @ k[b, :, :n].mT / 2, qs[b, :, :n] @ ks[b, :, :n].mT / 2) for b, n in ((0, 6), (1, 4))
    )
    expected = (6 * first + 4 * second) / 10  # 12 and 8 rows
    assert torch.allclose(loss, expected, rtol=0, atol=1e-10)
    for a, b in zip(torch.autograd.grad(loss, (q, k)), torch.autograd.grad(expected, (q, k)), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-10)


def test_queries_that_may_attend_to_nothing_are_left_out_unasked():
    q, k, qs, ks = (random(1, 1, 5, 4, seed=i).requires_grad_() for i in range(4))
    mask = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    mask[:, :, 3:], mask[..., 3:] = -INF, -INF
    loss = rows.map_cross_entropy(q, k, 0.5, mask, qs, ks, 0.5, mask)
    loss.backward()
    assert torch.allclose(loss, by_definition(q[:, :, :3] @ k[:, :, :3].mT / 2, qs[:, :, :3] @ ks[:, :, :3].mT / 2))
    assert q.grad.isfinite().all()
    assert (q.grad[:, :, 3:] == 0).all()
    assert (k.grad[:, :, 3:] == 0).all()


def test_the_map_is_never_whole():
    T = 2048
    q, k = (random(1, 1, T, 4, seed=i, dtype=torch.float32).requires_grad_() for i in range(2))
    biggest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal biggest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                biggest = max(biggest, out.numel())
            return out

    with Watch():
        rows.map_cross_entropy(q, k, 0.5, None, k, q, 0.5, None).backward()
    assert 0 < biggest <= T * T // 8
    assert q.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    q, k, qs, ks = (random(2, 2, 9, 8, seed=i).to(dtype).requires_grad_() for i in range(4))
    with torch.autocast("cpu", torch.bfloat16):
        got = rows.map_cross_entropy(q, k, 0.3, None, qs, ks, 0.3, None)
    assert got.dtype == torch.float32
    expected = by_definition(q.float() @ k.float().mT * 0.3, qs.float() @ ks.float().mT * 0.3)
    assert torch.allclose(got, expected, atol=1e-6)
    assert torch.autograd.grad(got, q)[0].dtype == dtype


# -- distil


@every_family
def test_the_loss_is_that_of_whole_maps(name):
    model, images = case(name)
    source = other(model).eval()
    with plain_attention() as logits:
        out_of(model, images)
    model.zero_grad()
    with torch.no_grad(), plain_attention() as logits_source:
        out_of(source, images)
    if name == "torchvision":  # its attention does not pass by the fused kernel's name
        with foveal.read(model, "all", "factors") as a, foveal.read(source, "all", "factors") as b:
            out_of(model, images), out_of(source, images)
        logits, logits_source = ([f.q @ f.k.mT * f.scale for f in x.factors()] for x in (a, b))
    pairs = list(zip(self_attention(logits), self_attention(logits_source), strict=True))
    assert len(pairs) == 2
    expected = sum(by_definition(t, s) for t, s in pairs)
    wanted = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    with AttentionTransfer(source, weight=1.0).on(model, images) as g:
        out_of(model, images)
    loss = g.losses()["attention_transfer"]
    got = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert torch.allclose(loss, expected, rtol=0, atol=1e-10)
    for a, b in zip(got, wanted, strict=True):
        a, b = (torch.zeros(()) if x is None else x for x in (a, b))
        assert (a - b).abs().max() <= 1e-10 * max(1.0, float(b.abs().max()))
    assert hooks(model) == 0


@pytest.mark.parametrize("kind", [{"qk_norm": True}, {"reg_tokens": 3, "init_values": 0.5}])
def test_fused_and_unfused_give_the_same(kind):
    model, source, images, found = vit(0, **kind), vit(1, **kind), batch(), []
    for fused in ((True, True), (True, False), (False, True), (False, False)):
        guide = AttentionTransfer(source)
        for net, flag in zip((model, guide.frozen.model), fused, strict=True):
            for block in net.blocks:
                block.attn.fused_attn = flag
        model.zero_grad()
        with guide.on(model, images) as g:
            model(images)
        loss = g.losses()["attention_transfer"]
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    for one in found[1:]:
        assert all(torch.allclose(a, b, rtol=0, atol=1e-10) for a, b in zip(one, found[0], strict=True))


def test_factors_are_queries_and_keys_as_they_meet():
    for name in ("vit_small_patch16_dinov3", "beit_base_patch16_224", "torchvision", "dinov3"):
        model, images = case(name)
        for grad in (True, False):
            with torch.set_grad_enabled(grad), foveal.read(model, "all", ["factors", "full"]) as seen:
                out_of(model, images)
            for factors, attn in zip(seen.factors(), seen.full(), strict=True):
                assert torch.allclose(factors.map(), attn, atol=1e-12)
                assert factors.sizes == attn.shape[:3]
                assert factors.q.requires_grad == grad
                assert grad or factors.q.is_contiguous()  # else it would keep the values alive


def test_layers_and_weight():
    model, source, images = vit(0), vit(1), batch()

    def loss(relax=1.0, **settings):
        with AttentionTransfer(source, **settings).on(model, images, relax=relax) as g:
            model(images)
        return g.losses()["attention_transfer"]

    each = [loss(weight=1.0, layers=i) for i in range(3)]
    assert torch.allclose(loss(weight=1.0), sum(each))
    assert torch.allclose(loss(), 3 * sum(each))
    assert torch.allclose(loss(weight=1.0, skip_last=1), each[0] + each[1])
    assert torch.allclose(loss(weight=1.0, layers=[0, 2]), each[0] + each[2])
    assert torch.allclose(loss(weight=1.0, layers="blocks.1"), each[1])
    assert torch.allclose(loss(relax=0.5), 1.5 * sum(each))
    assert isinstance(AttentionTransfer(source), GUIDES["attention_transfer"])


def test_only_the_path_to_queries_and_keys_is_guided():
    model = vit(0)
    with AttentionTransfer(vit(1)).on(model, batch()) as g:
        model(batch())
    g.losses()["attention_transfer"].backward()
    assert model.blocks[2].attn.qkv.weight.grad[64:].abs().max() == 0
    assert model.blocks[2].attn.qkv.weight.grad[:64].abs().max() > 0
    assert model.blocks[2].attn.proj.weight.grad is None
    assert model.pos_embed.grad.abs().max() > 0


def test_at_equality_the_loss_is_an_entropy_without_gradient():
    model, images = vit(), batch()
    with AttentionTransfer(model).on(model, images) as g:
        model(images)
    loss = g.losses()["attention_transfer"]
    loss.backward()
    assert loss > 1.0
    assert all(p.grad is None or p.grad.abs().max() < 1e-13 for p in model.parameters())


def test_the_source_is_left_alone_and_zero_weight_never_runs_it():
    model, images = vit(), batch()
    guide = AttentionTransfer(model)
    weights, before = copy.deepcopy(guide.frozen.model.state_dict()), model(images)
    with guide.on(model, images) as g:
        out = model(images)
    (out.sum() + g.losses()["attention_transfer"]).backward()
    assert torch.equal(out, before)
    assert all(torch.equal(v, guide.frozen.model.state_dict()[n]) for n, v in weights.items())
    assert all(p.grad is None for p in guide.frozen.model.parameters())
    assert hooks(model) == hooks(guide.frozen.model) == 0
    off = AttentionTransfer(model, weight=0.0)
    off.frozen.model.register_forward_hook(lambda *args: pytest.fail("the source ran"))
    with off.on(model, images) as g:
        model(images)
    assert g.losses() == {}


def test_checkpointing_gives_the_same_gradients():
    source, images, found = vit(1), batch(1), []
    for checkpointed in (False, True):
        model = vit(0).train()
        model.set_grad_checkpointing(checkpointed)
        with AttentionTransfer(source).on(model, images) as g:
            out = model(images)
        (out.square().sum() + g.losses()["attention_transfer"]).backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*found, strict=True))


def test_what_does_not_fit_is_refused():
    model, images = vit(), batch()

    def guided(source, **settings):
        with AttentionTransfer(source, **settings).on(model, images) as g:
            model(images)
        return g.losses()

    for kind in ({"num_heads": 4}, {"patch_size": 16}, {"reg_tokens": 2}):
        with pytest.raises(ValueError, match="same heads, patch size"):
            guided(vit(**kind))
    with pytest.raises(ValueError, match="3 target layers against 2"):
        guided(vit(depth=2))
    with pytest.raises(ValueError, match="0 target layers"):
        attention_transfer_loss([], [])
    with pytest.raises(ValueError, match="skip_last=3 of 3 blocks"):
        AttentionTransfer(model, skip_last=3)
    with pytest.raises(ValueError, match="skip_last=1 leaves out"):
        AttentionTransfer(model, layers=[0], skip_last=1)
    with pytest.raises(ValueError, match="weight=-1"):
        AttentionTransfer(model, weight=-1)
    with pytest.raises(ValueError, match="window attention"):
        AttentionTransfer(tiny_swin())
    with pytest.raises(ValueError, match="pool attention"):
        AttentionTransfer(case("vit_base_patch16_siglip_224")[0], layers="attn_pool")


# -- copy


def with_maps(model, images, maps):
    """The twin: the fused kernel gives the product of given maps and the values."""
    from torch.nn import functional as F

    fused, left = F.scaled_dot_product_attention, list(maps)

    def given(q, k, v, *args, **kwargs):
        if q.shape[-2] != k.shape[-2]:
            return fused(q, k, v, *args, **kwargs)
        return left.pop(0) @ v

    F.scaled_dot_product_attention = given
    try:
        return out_of(model, images)
    finally:
        F.scaled_dot_product_attention = fused


def maps_of(model, images, layers="all"):
    with torch.no_grad(), foveal.read(model, layers, "full") as seen:
        out_of(model, images)
    return seen.full()


@every_family
def test_copied_maps_carry_the_models_own_values(name):
    model, images = case(name)
    source = other(model).eval()
    copied, parameters = AttentionCopy(source), list(model.parameters())
    with copied.on(model, images):
        got = out_of(model, images)
    assert hooks(model) == 0
    before = out_of(model, images)
    assert not torch.allclose(got, before)
    with torch.no_grad(), AttentionCopy(model).on(model, images):
        assert torch.allclose(out_of(model, images), before, atol=1e-9)  # its own maps change nothing
    if name == "torchvision":
        return  # next test
    twin = with_maps(model, images, maps_of(source, images))
    assert torch.allclose(got, twin, atol=1e-9)
    gradients = (torch.autograd.grad(x.square().sum(), parameters, allow_unused=True) for x in (got, twin))
    for a, b in zip(*gradients, strict=True):
        a, b = (torch.zeros(()) if x is None else x for x in (a, b))
        assert (a - b).abs().max() <= 1e-9 * max(1.0, float(b.abs().max()))


def test_copied_maps_in_multihead_attention():
    model, images = case("torchvision")
    source = other(model)
    with AttentionCopy(source, 1).on(model, images):
        got = model(images)
    x = model.encoder.layers[0](
        torch.cat([model.class_token.expand(3, -1, -1), model._process_input(images)], 1) + model.encoder.pos_embedding
    )
    layer, attn = model.encoder.layers[1], maps_of(source, images, 1)
    D = layer.self_attention.embed_dim
    weight, bias = layer.self_attention.in_proj_weight[2 * D :], layer.self_attention.in_proj_bias[2 * D :]
    v = (layer.ln_1(x) @ weight.T + bias).unflatten(-1, (attn.shape[1], -1)).transpose(1, 2)
    x = x + layer.self_attention.out_proj((attn @ v).transpose(1, 2).flatten(2))
    twin = model.heads(model.encoder.ln(x + layer.mlp(layer.ln_2(x)))[:, 0])
    assert torch.allclose(got, twin, atol=1e-10)


def test_gradient_flows_through_the_values_only():
    model, source, images = vit(0), vit(1), batch()
    with AttentionCopy(source).on(model, images):
        out = model(images)
    out.sum().backward()
    for block in model.blocks:
        assert block.attn.qkv.weight.grad[:64].abs().max() == 0
        assert block.attn.qkv.weight.grad[64:].abs().max() > 0


def test_blocks_that_are_not_chosen_attend_themselves():
    model, source, images = vit(0).train(), vit(1), batch()
    with foveal.read(model, "all", "full") as seen, AttentionCopy(source, skip_last=1).on(model, images):
        model(images)
    maps = maps_of(source, images)
    assert torch.allclose(seen.full()[0], maps[0], atol=1e-12)
    assert torch.allclose(seen.full()[1], maps[1], atol=1e-12)
    assert not torch.allclose(seen.full()[2], maps[2], atol=1e-3)


def test_unfused_blocks_copy_the_same():
    model, source, images, found = vit(0), vit(1), batch(), []
    for fused in ((True, True), (True, False), (False, True), (False, False)):
        copied = AttentionCopy(source)
        for net, flag in zip((model, copied.frozen.model), fused, strict=True):
            for block in net.blocks:
                block.attn.fused_attn = flag
        model.zero_grad()
        with copied.on(model, images):
            out = model(images)
        out.square().sum().backward()
        found.append([out, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for one in found[1:]:
        assert torch.allclose(one[0], found[0][0], atol=1e-10)
        assert torch.allclose(one[-1], found[0][-1], atol=1e-9)


@pytest.mark.parametrize("fused", [True, False])
def test_checkpointed_copies(fused):
    source, images, found = vit(1), batch(), []
    for checkpointed in (False, True):
        model = vit(0).train()
        for block in model.blocks:
            block.attn.fused_attn = fused
        model.set_grad_checkpointing(checkpointed)
        with AttentionCopy(source).on(model, images):
            model(images).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
        assert hooks(model) == 0
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*found, strict=True))
    with AttentionCopy(source).on(model, images):
        out = model(images)
    with pytest.raises(CheckpointError):  # never the gradient of the block's own map
        out.square().sum().backward()


def test_dropout_of_the_map_is_the_models_own():
    model, source, images = vit(0, attn_drop_rate=0.5).train(), vit(1), batch()
    outs = []
    for _ in range(2):
        with AttentionCopy(source).on(model, images):
            outs.append(model(images))
    assert not torch.allclose(*outs)


def test_a_copy_leaves_no_trace_and_may_fail():
    model, source, images = vit(0).train(), vit(1), batch()
    weights, before = copy.deepcopy(model.state_dict()), model(images)
    copied = AttentionCopy(source)
    handle = model.blocks[1].attn.proj.register_forward_hook(lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), copied.on(model, images):
        model(images)
    handle.remove()
    assert hooks(model) == 0
    assert torch.equal(model(images), before)
    with copied.on(model, images):
        with foveal.attention.unseen(model):
            assert torch.equal(model(images), before)
        assert not torch.equal(model(images), before)
    with pytest.raises(foveal.ReadError, match="no forward took"), copied.on(model, images):
        pass
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in weights.items())
    assert model.training
    assert all(p.grad is None for p in copied.frozen.model.parameters())


def test_other_threads_and_second_forwards():
    model, source, images = vit(0), vit(1), batch()
    before = model(images)
    with ThreadPoolExecutor(1) as pool, AttentionCopy(source).on(model, images):
        assert torch.equal(pool.submit(model, images).result(), before)
        assert not torch.equal(model(images), before)
        with pytest.raises(foveal.ReadError, match="ran twice"):
            model(images)


def test_a_batch_of_one_under_autocast():
    model, source, images = vit(0, torch.float32), vit(1, torch.float32), batch(1, torch.float32)
    with AttentionCopy(source).on(model, images):
        exact = model(images)
    with torch.autocast("cpu", torch.bfloat16), AttentionCopy(source).on(model, images):
        half = model(images)
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), exact, atol=0.05)
    double = vit(0)
    with AttentionCopy(source).on(double, images.double()):  # the source may be of another type
        assert torch.allclose(double(images.double()).float(), exact, atol=1e-5)


def test_copies_that_cannot_be_are_refused():
    model, images = vit(), batch()
    for kind in ({"num_heads": 4}, {"patch_size": 16}, {"reg_tokens": 2}):
        with pytest.raises(ValueError, match="same images, heads"), AttentionCopy(vit(**kind)).on(model, images):
            model(images)
    with pytest.raises(ValueError, match="same images"), AttentionCopy(vit()).on(model, images):
        model(images[:2])
    with pytest.raises(ValueError, match="2 maps for 3 layers"), AttentionCopy(vit(depth=2)).on(model, images):
        pass
    compiled = torch.compile(vit(), backend="eager")
    with pytest.raises(foveal.UnsupportedModelError, match="compiled"), AttentionCopy(vit()).on(compiled, images):
        pass
    swin = tiny_swin()
    with pytest.raises(foveal.UnsupportedModelError, match="keeps its own map"):
        replace(swin, 0, [Factors()])
    with pytest.raises(foveal.UnsupportedModelError, match="attn_pool"):
        replace(case("vit_base_patch16_siglip_224")[0], "attn_pool", [Factors()])


def test_reentrant_checkpointing_is_refused():
    from torch.utils.checkpoint import checkpoint

    model, images = vit().train(), batch()
    block = model.blocks[0]
    forward = block.forward
    block.forward = lambda x, *args, **kwargs: checkpoint(forward, x, use_reentrant=True)
    with pytest.raises(foveal.ReadError, match="use_reentrant=False"), AttentionCopy(vit()).on(model, images):
        model(images)
    assert hooks(model) == 0
