"""GTA: the worked example, the exact properties, and that the source is left alone."""

import copy

import pytest
import timm
import torch

import foveal
from foveal.transfer import GTA, gta_loss

PREFIXED = {  # name: model arguments beside the common ones
    "plain": {},
    "registers": {"reg_tokens": 3, "init_values": 0.5},
    "no class embedding": {"no_embed_class": True},
    "qk norm": {"qk_norm": True},
}


def vit(seed=0, dtype=torch.float64, **kwargs):
    torch.manual_seed(seed)
    settings = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 3,
        "num_heads": 2,
        "num_classes": 4,
        **kwargs,
    }
    return timm.models.VisionTransformer(**settings).to(dtype).eval()


def batch(B=3, dtype=torch.float64):
    return torch.randn(B, 3, 32, 32, dtype=dtype, generator=torch.Generator().manual_seed(5))


def loss_of(guide, model, images):
    with guide.on(model, images) as g:
        model(images)
    return g.losses()["gta"]


def by_hand(requires_grad=False):
    """One head, d = 4, class token and three patches: rows of target and source from shared keys."""
    keys = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 1, 0, 0], [-1, 0, 0, 0]], dtype=torch.float64)
    keys.requires_grad_(requires_grad)
    q_target = torch.tensor([2, 0, 0, 0], dtype=torch.float64, requires_grad=requires_grad)
    q_source = torch.tensor([1, 1, 0, 0], dtype=torch.float64)
    return keys, q_target, keys @ q_target / 2, (keys @ q_source / 2).detach()


def test_worked_example():
    _, _, target, source = by_hand()
    assert target.tolist() == [1, 1, 0, -1]
    assert source.tolist() == [1, 0.5, 0.5, -0.5]
    assert gta_loss([target[1:].view(1, 1, 3)], [source[1:].view(1, 1, 3)]).item() == 0.25


def test_worked_gradients():
    keys, q, target, source = by_hand(requires_grad=True)
    gta_loss([target[1:].view(1, 1, 3)], [source[1:].view(1, 1, 3)]).backward()
    third = 1 / 3
    assert torch.allclose(q.grad, torch.tensor([third, -third / 2, 0, 0], dtype=torch.float64))
    expected = [[0, 0, 0, 0], [third, 0, 0, 0], [-third, 0, 0, 0], [-third, 0, 0, 0]]
    assert torch.allclose(keys.grad, torch.tensor(expected, dtype=torch.float64))


def test_the_loss_is_the_mean_over_everything():
    g = torch.Generator().manual_seed(0)
    target = [torch.randn(2, 3, 5, generator=g) for _ in range(4)]
    source = [torch.randn(2, 3, 5, generator=g) for _ in range(4)]
    total = sum((t - s).square().sum() for t, s in zip(target, source, strict=True))
    assert torch.allclose(gta_loss(target, source), total / (2 * 4 * 3 * 5))
    order = torch.tensor([2, 0, 1])
    permuted = gta_loss([t[:, order] for t in target], [s[:, order] for s in source])
    assert torch.allclose(permuted, total / 120)
    twice = gta_loss([torch.cat([t, t]) for t in target], [torch.cat([s, s]) for s in source])
    assert torch.allclose(twice, total / 120)


def test_half_precision_is_compared_in_float32():
    target, source = torch.full((1, 1, 4), 300.0).bfloat16(), torch.full((1, 1, 4), 298.0).bfloat16()
    loss = gta_loss([target], [source])
    assert loss.dtype == torch.float32
    assert loss.item() == 4.0


def test_padding_does_not_count():
    inf = float("-inf")
    target = torch.tensor([[[1.0, 2.0, inf]]], requires_grad=True)
    loss = gta_loss([target], [torch.tensor([[[0.0, 0.0, inf]]])])
    loss.backward()
    assert loss.item() == 2.5
    assert torch.equal(target.grad, torch.tensor([[[1.0, 2.0, 0.0]]]))


@pytest.mark.parametrize("kind", PREFIXED)
def test_equal_models_have_zero_loss_and_zero_gradient(kind):
    model, images = vit(**PREFIXED[kind]), batch()
    loss = loss_of(GTA(model), model, images)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or p.grad.abs().max() <= 1e-12 for p in model.parameters())


@pytest.mark.parametrize("kind", PREFIXED)
def test_loss_equals_the_unfused_definition(kind):
    model, source, images = vit(0, **PREFIXED[kind]), vit(1, **PREFIXED[kind]), batch()
    P = model.num_prefix_tokens

    def rows(net):
        maps, x = [], net.norm_pre(net._pos_embed(net.patch_embed(images)))
        for block in net.blocks:
            a = block.attn
            q, k, _ = a.qkv(block.norm1(x)).unflatten(-1, (3, a.num_heads, -1)).permute(2, 0, 3, 1, 4)
            q, k = a.q_norm(q), a.k_norm(k)
            maps.append((q @ k.transpose(-1, -2) * a.scale)[:, :, 0, P:])
            x = block(x)
        return torch.stack(maps)

    expected = (rows(model) - rows(source)).square().mean()
    assert torch.allclose(loss_of(GTA(source), model, images), expected, rtol=1e-12)
    assert torch.allclose(loss_of(GTA(source, weight=10.0), model, images), 10 * expected, rtol=1e-12)


def test_only_the_path_to_queries_and_keys_is_guided():
    model, source = vit(0), vit(1)
    loss_of(GTA(source), model, batch()).backward()
    guided = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    last = ("blocks.2.attn.proj", "blocks.2.norm2", "blocks.2.mlp", "norm.", "head.")
    assert not any(name.startswith(last) for name in guided)
    values = model.blocks[2].attn.qkv.weight.grad[64:]
    assert values.abs().max() == 0
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.2.attn.qkv.weight"} <= guided
    with_gradient = [n for n, p in model.named_parameters() if p.grad is not None]
    assert (len(with_gradient), len(list(model.parameters()))) == (32, 44)


def test_a_key_bias_changes_the_raw_loss_but_not_the_network():
    model, images = vit(), batch()
    guide = GTA(model)
    before = model(images)
    with torch.no_grad():
        model.blocks[2].attn.qkv.bias[32:64] += 1.0  # keys of the last block
    assert torch.allclose(model(images), before)
    assert loss_of(guide, model, images) > 1e-4


def test_the_source_is_left_alone_and_copied():
    model, images = vit(), batch()
    guide = GTA(model)
    weights = copy.deepcopy(guide.source.state_dict())
    out = guide.source(images)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        with guide.on(model, images) as g:
            loss = model(images).square().sum()
        (loss + sum(g.losses().values())).backward()
        optimiser.step()
    assert g.losses()["gta"] > 0
    assert all(not p.requires_grad and p.grad is None for p in guide.source.parameters())
    assert not guide.source.training
    assert all(torch.equal(v, guide.source.state_dict()[k]) for k, v in weights.items())
    assert torch.equal(guide.source(images), out)
    assert all(p.requires_grad for p in model.parameters())
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0


def test_zero_weight_never_runs_the_source():
    model, images = vit(), batch()
    guide = GTA(model, weight=0.0)
    guide.source.register_forward_hook(lambda *args: pytest.fail("the source ran"))
    with guide.on(model, images) as g:
        model(images)
    assert g.losses() == {}


def test_layers_can_be_chosen():
    model, source, images = vit(0), vit(1), batch()
    each = [loss_of(GTA(source, layers=i), model, images) for i in range(3)]
    assert torch.allclose(loss_of(GTA(source), model, images), sum(each) / 3)
    assert torch.allclose(loss_of(GTA(source, layers=[0, 2]), model, images), (each[0] + each[2]) / 2)


def test_checkpointing_gives_the_same_gradients():
    source, images, gradients = vit(1), batch(), []
    for checkpointed in (False, True):
        model = vit(0).train()
        model.set_grad_checkpointing(checkpointed)
        loss_of(GTA(source), model, images).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None and p.grad.abs().max() > 0])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-13)


def test_batch_of_one_and_autocast():
    model, source, images = vit(0, torch.float32), vit(1, torch.float32), batch(1, torch.float32)
    exact = loss_of(GTA(source), model, images)
    with torch.autocast("cpu", torch.bfloat16):
        half = loss_of(GTA(source), model, images)
    assert half.dtype == torch.float32
    assert abs(half - exact) < 0.05 * exact + 1e-3


@pytest.mark.parametrize("other", [{"num_heads": 4}, {"patch_size": 16}, {"depth": 2}])
def test_models_that_do_not_match_are_refused(other):
    model, images = vit(), batch()
    with pytest.raises(ValueError, match="source"):
        loss_of(GTA(vit(**other)), model, images)


@pytest.mark.parametrize(("tuned", "kept"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float32)])
def test_the_source_may_have_another_type(tuned, kept):
    guide = GTA(vit(0, kept))
    assert loss_of(guide, vit(0, tuned), batch(dtype=tuned)) < 1e-3
    assert next(guide.source.parameters()).dtype == kept


def test_a_source_that_was_attached_and_compiled():
    model, images = vit(), batch()
    with foveal.attach(model):
        guide = GTA(torch.compile(model, backend="eager"))
    assert loss_of(guide, model, images) == 0.0


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="weight=-1"):
        GTA(vit(), weight=-1)
    with pytest.raises(ValueError, match="weight=nan"):
        GTA(vit(), weight=float("nan"))
    with pytest.raises(ValueError, match="no class token"):
        GTA(vit(class_token=False, global_pool="avg"))
    with pytest.raises(foveal.UnsupportedModelError):
        GTA(timm.create_model("resnet18"))
    with pytest.raises(ValueError, match="0 target layers"):
        gta_loss([], [])
