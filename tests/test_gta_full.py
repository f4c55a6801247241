"""GTA in its full form: eight families against their unfused logits, matching, reductions, queries, the source."""

import copy
import math

import pytest
import timm
import torch
from torch import nn

import foveal
from foveal.attention import glance
from foveal.transfer import GTA, Source, converted, gta_loss, inject, output_loss

FAMILIES = {  # timm name: arguments, and images
    "plain": ("vit_tiny_patch16_224", {"embed_dim": 48, "num_heads": 3}, 3),
    "registers and layer scale": (
        "vit_small_patch14_reg4_dinov2",
        {"embed_dim": 48, "num_heads": 3, "patch_size": 16},
        2,
    ),
    "distilled": ("deit_tiny_distilled_patch16_224", {"embed_dim": 48, "num_heads": 3}, 2),
    "qk norm": ("vit_tiny_patch16_224", {"embed_dim": 48, "num_heads": 3, "qk_norm": True, "pre_norm": True}, 2),
    "rotary and registers": (
        "vit_small_patch16_dinov3",
        {"embed_dim": 48, "num_heads": 3, "global_pool": "token", "dynamic_img_size": False},
        2,
    ),
    "rotary and split projections": (
        "eva02_base_patch14_224",
        {"embed_dim": 48, "num_heads": 3, "patch_size": 16, "global_pool": "token"},
        2,
    ),
    "position bias": ("beit_base_patch16_224", {"embed_dim": 48, "num_heads": 3, "global_pool": "token"}, 2),
    "batch of one": ("vit_tiny_patch16_224", {"embed_dim": 48, "num_heads": 3}, 1),
}


def build(kind, seed):
    name, arguments, _ = FAMILIES[kind]
    torch.manual_seed(seed)
    model = timm.create_model(name, depth=2, img_size=64, num_classes=3, **arguments)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.double().eval()


def pixels(B, seed=7, side=64):
    return torch.randn(B, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def vit(seed=0, **kwargs):
    torch.manual_seed(seed)
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 4}
    return timm.models.VisionTransformer(**(settings | kwargs)).double().eval()


def small(B=3):
    return pixels(B, 5, 32)


def loss_of(guide, model, images, relax=1.0):
    with guide.on(model, images, relax=relax) as g:
        model(images)
    return g.losses()["gta"]


def unfused_logits(model, images, monkeypatch):
    """Logits at the input of the softmax of every block, fused kernels off: (B, H, T, T) each."""
    seen = []
    fused = [m for m in model.modules() if getattr(m, "fused_attn", None)]
    softmax = torch.Tensor.softmax

    def note(x, *args, **kwargs):
        if x.dim() == 4:
            seen.append(x)
        return softmax(x, *args, **kwargs)

    for module in fused:
        module.fused_attn = False
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "softmax", note)
        model(images)
    for module in fused:
        module.fused_attn = True
    return seen


@pytest.mark.parametrize("kind", FAMILIES)
def test_losses_and_gradients_equal_the_unfused_definition(kind, monkeypatch):
    model, source, images = build(kind, 0), build(kind, 1), pixels(FAMILIES[kind][2])
    P = model.num_prefix_tokens
    with torch.no_grad():
        s = torch.stack([a[:, :, 0, P:] for a in unfused_logits(source, images, monkeypatch)])
    t = torch.stack([a[:, :, 0, P:] for a in unfused_logits(model, images, monkeypatch)])
    L, B, H, M = t.shape
    assert (L, H, M) == (2, 3, 16)
    gap = t - s
    p, q = s.softmax(-1), t.softmax(-1)
    expected = {
        ("raw", "mean_all"): gap.square().mean(),
        ("centred", "mean_all"): (gap - gap.mean(-1, keepdim=True)).square().mean(),
        ("kl", "mean_all"): (p * (p.log() - q.log())).sum() / (L * B * H),
        ("raw", "sum_heads_tokens__mean_batch_layers"): gap.square().sum() / (B * L),
        ("raw", "sum_heads_tokens_layers__mean_batch"): gap.square().sum() / B,
        ("raw", "sum_all"): gap.square().sum(),
    }
    weights = list(model.parameters())
    for (match, reduction), value in expected.items():
        found = loss_of(GTA(source, match=match, reduction=reduction), model, images)
        assert torch.allclose(found, value, rtol=1e-10), (match, reduction)
        if reduction == "mean_all":
            mine = torch.autograd.grad(found, weights, allow_unused=True)
            theirs = torch.autograd.grad(value, weights, allow_unused=True, retain_graph=True)
            for a, b in zip(mine, theirs, strict=True):
                zero = torch.zeros((), dtype=torch.float64)
                a, b = (zero if x is None else x for x in (a, b))
                assert torch.allclose(a, b, rtol=1e-8, atol=1e-11)


def test_the_worked_example_centred_and_summed():
    target = torch.tensor([1.0, 0, -1]).double().view(1, 1, 3)
    source = torch.tensor([0.5, 0.5, -0.5]).double().view(1, 1, 3)
    assert gta_loss([target], [source]).item() == 0.25
    assert gta_loss([target], [source], reduction="sum_all").item() == 0.75
    assert gta_loss([target], [source], "centred").item() == pytest.approx(0.25 - (1 / 6) ** 2, abs=1e-15)


def test_raw_is_the_centred_part_and_the_squared_mean():
    g = torch.Generator().manual_seed(0)
    t, s = (torch.randn(2, 3, 7, dtype=torch.float64, generator=g) for _ in range(2))
    whole, centred = gta_loss([t], [s]), gta_loss([t], [s], "centred")
    assert torch.allclose(whole, centred + (t - s).mean(-1).square().mean(), rtol=1e-12)


def test_a_key_bias_leaves_centred_and_kl_losses_as_they_are():
    model, source, images = vit(0), vit(1), small()
    guides = {match: GTA(source, match=match) for match in ("raw", "centred", "kl")}
    before = {match: loss_of(guide, model, images) for match, guide in guides.items()}
    with torch.no_grad():
        model.blocks[2].attn.qkv.bias[32:64] += 1.0  # keys of the last block
    after = {match: loss_of(guide, model, images) for match, guide in guides.items()}
    assert not torch.allclose(after["raw"], before["raw"], rtol=1e-4)
    for match in ("centred", "kl"):
        assert torch.allclose(after[match], before[match], rtol=1e-10)


def test_padding_has_no_share_in_any_match():
    inf = float("-inf")
    target = torch.tensor([[[1.0, 2.0, inf]]], dtype=torch.float64, requires_grad=True)
    source = torch.tensor([[[0.0, 0.0, inf]]], dtype=torch.float64)
    short = [target[..., :2]], [source[..., :2]]
    for match in ("raw", "centred", "kl"):
        loss = gta_loss([target], [source], match)
        assert torch.allclose(loss, gta_loss(*short, match))
        (grad,) = torch.autograd.grad(loss, target)
        assert grad.isfinite().all()
        assert grad[0, 0, 2] == 0


@pytest.mark.parametrize(
    "new", ["sum_heads_tokens__mean_batch_layers", "sum_heads_tokens_layers__mean_batch", "sum_all"]
)
@pytest.mark.parametrize("match", ["raw", "kl"])
def test_converted_weights_give_the_same_loss(new, match):
    model, source, images = vit(0), vit(1), small()
    sizes = {"layers": 3, "heads": 2, "columns": 16 if match == "raw" else 1, "batch": 3}
    weight = converted(10.0, "mean_all", new, **sizes)
    mean = loss_of(GTA(source, 10.0, match=match), model, images)
    assert torch.allclose(loss_of(GTA(source, weight, match=match, reduction=new), model, images), mean, rtol=1e-12)
    assert converted(weight, new, "mean_all", **sizes) == pytest.approx(10.0, rel=1e-14)


def test_lambda_in_words_of_the_other_reductions():
    sizes = {"layers": 12, "heads": 6, "columns": 196}
    assert converted(14112.0, "sum_heads_tokens_layers__mean_batch", "mean_all", **sizes) == 14112.0 * 14112
    assert converted(1.0, "mean_all", "sum_heads_tokens__mean_batch_layers", **sizes) == pytest.approx(1 / 1176)
    with pytest.raises(ValueError, match="depends on the batch size"):
        converted(1.0, "mean_all", "sum_all", **sizes)


def test_the_mean_query_is_the_mean_of_the_patches_rows(monkeypatch):
    plain = {"class_token": False, "global_pool": "avg"}
    model, source, images = vit(0, **plain), vit(1, **plain), small()
    t, s = (torch.stack([a.mean(2) for a in unfused_logits(m, images, monkeypatch)]) for m in (model, source))
    assert torch.allclose(loss_of(GTA(source, query="mean"), model, images), (t - s).square().mean(), rtol=1e-10)


def test_the_pooling_query_guides_an_attention_pool():
    pool = {"class_token": False, "global_pool": "map"}
    model, source, images = vit(0, **pool), vit(1, **pool), small()
    guide = GTA(source, query="pool")
    assert guide.layers == ["attn_pool"]
    rows = []
    for m in (model, source):
        with foveal.read(m, "attn_pool", "class_logits") as seen:
            m(images)
        rows.append(seen.class_logits())
    assert torch.allclose(loss_of(guide, model, images), (rows[0] - rows[1]).square().mean(), rtol=1e-12)
    with pytest.raises(ValueError, match="no attention pooling head"):
        GTA(vit(), query="pool")


def test_without_a_class_token_a_query_must_be_chosen():
    with pytest.raises(ValueError, match="mean_query"):
        GTA(vit(class_token=False, global_pool="avg"))


def test_registers_count_where_only_the_class_column_is_dropped(monkeypatch):
    model, source, images = vit(0, reg_tokens=3), vit(1, reg_tokens=3), small()
    t, s = (torch.stack([a[:, :, 0, 1:] for a in unfused_logits(m, images, monkeypatch)]) for m in (model, source))
    assert t.shape[-1] == 19
    assert torch.allclose(
        loss_of(GTA(source, columns="drop_first"), model, images), (t - s).square().mean(), rtol=1e-10
    )


@pytest.mark.parametrize("what", ["attn_out", "block_out"])
def test_outputs_can_be_guided_instead(what):
    model, source, images = vit(0), vit(1), small()
    seen = []
    for m in (source, model):
        parts = []
        handles = [
            (b.attn if what == "attn_out" else b).register_forward_hook(
                lambda _, a, out, parts=parts: parts.append(out)
            )
            for b in m.blocks
        ]
        m(images)
        for handle in handles:
            handle.remove()
        seen.append(torch.stack(parts))
    loss = loss_of(GTA(source, what=what), model, images)
    assert torch.allclose(loss, (seen[1] - seen[0]).square().mean(), rtol=1e-12)
    assert loss_of(GTA(model, what=what), model, images) == 0
    loss.backward()
    values = model.blocks[2].attn.qkv.weight.grad[64:]
    assert values.abs().max() > 0  # unlike the rows, outputs depend on the values
    with pytest.raises(ValueError, match="do not apply"):
        GTA(source, what=what, match="centred")


def test_output_loss_is_a_mean_in_float32():
    t, s = torch.full((1, 2, 2), 300.0).bfloat16(), torch.full((1, 2, 2), 298.0).bfloat16()
    assert output_loss([t, t], [s, t]).item() == 2.0


def test_a_classifier_that_averages_is_refused_unless_said():
    model, images = vit(global_pool="avg"), small()
    with pytest.raises(ValueError, match="never reads the last block's class row"):
        loss_of(GTA(vit(1, global_pool="avg")), model, images)
    assert loss_of(GTA(vit(1, global_pool="avg"), average_pooled=True), model, images) > 0
    assert loss_of(GTA(vit(1, global_pool="avg"), layers=range(2)), model, images) > 0
    assert loss_of(GTA(vit(1, global_pool="avg"), query="mean"), model, images) > 0


def test_patch_dropout_is_refused():
    model = vit(patch_drop_rate=0.5).train()
    with pytest.raises(ValueError, match="patch_drop_rate=0"):
        loss_of(GTA(vit(1)), model, small())


def test_reentrant_checkpointing_is_refused():
    model, images = vit().train(), small()
    block = model.blocks[1]
    forward = block.forward
    block.forward = lambda x, **kw: torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=True)
    with pytest.raises(foveal.ReadError, match="use_reentrant=False"), GTA(vit(1)).on(model, images):
        model(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"match": "cosine"}, "match='cosine' is not known; use raw, centred, kl"),
        ({"reduction": "mean"}, "reduction='mean' is not known"),
        ({"what": "values"}, "what='values' is not known"),
        ({"query": "token"}, "query='token' is not known"),
        ({"columns": "all"}, "columns='all' is not known"),
        ({"columns": "drop_first", "query": "mean"}, "drop_first"),
        ({"precision": "int8"}, "precision='int8'"),
        ({"layers": []}, "no layer asked"),
        ({"layers": [3]}, "3 readable self-attention blocks"),
    ],
)
def test_options_that_cannot_be_meant(options, message):
    with pytest.raises(ValueError, match=message):
        GTA(vit(), **options)


# -- strength


def test_relaxing_scales_the_term_and_at_zero_the_source_rests():
    model, source, images = vit(0), vit(1), small()
    guide = GTA(source, weight=4.0)
    whole = loss_of(guide, model, images)
    assert torch.allclose(loss_of(guide, model, images, relax=0.25), whole / 4)
    guide.source.register_forward_pre_hook(lambda *args: pytest.fail("the source ran"))
    with guide.on(model, images, relax=0.0) as g:
        model(images)
    assert g.losses() == {}


# -- the source


def ran(model):
    """Names of the modules that run, and a list to undo it."""
    names, handles = [], []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda _, args, name=name: names.append(name)))
    return names, handles


@pytest.mark.parametrize(("layers", "last"), [("all", 2), ([0], 0), ([1, 0], 1)])
def test_the_source_stops_where_it_has_been_seen(layers, last):
    model, source, images = vit(0), vit(1), small()
    guide = GTA(source, layers=layers)
    names, _ = ran(guide.source)
    loss_of(guide, model, images)
    assert f"blocks.{last}.attn" in names
    assert f"blocks.{last}.mlp" not in names
    assert not any(name in ("norm", "head") or name.startswith(f"blocks.{last + 1}") for name in names)


def test_a_source_without_a_copy_is_the_model_with_its_adapters_off():
    model, images = vit(), small()
    before = GTA(model)
    inject(model, rank=2)
    model.train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(0.1 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(1)))
    guide = GTA(None)
    assert guide.source is None
    state = copy.deepcopy(model.state_dict())
    out = model(images)
    loss = loss_of(guide, model, images)
    assert torch.allclose(loss, loss_of(before, model, images), rtol=1e-12)
    assert loss > 0
    loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert trained
    assert all("lora" in name for name in trained)
    assert torch.equal(model(images), out)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0


def test_without_adapters_and_without_a_copy_there_is_no_source():
    with pytest.raises(ValueError, match="adapter"):
        loss_of(GTA(None), vit(), small())


def test_the_source_may_run_in_bfloat16():
    model, source, images = vit(0).float(), vit(1).float(), small().float()
    exact = loss_of(GTA(source), model, images)
    half = loss_of(GTA(source, precision="bfloat16"), model, images)
    assert half.dtype == torch.float32
    assert half != exact
    assert abs(half - exact) < 0.03 * exact
    with torch.autocast("cpu", torch.bfloat16):
        look = Source(source, precision="float32").look(images, -1, "class_logits")
    assert torch.equal(look.class_logits(), Source(source).look(images, -1, "class_logits").class_logits())


def test_the_source_may_be_compiled(monkeypatch):
    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_(self, backend="eager"))
    model, source, images = vit(0), vit(1), small()
    guide = GTA(source, compiled=True)
    for _ in range(2):
        assert torch.allclose(loss_of(guide, model, images), loss_of(GTA(source), model, images), rtol=1e-12)
    with pytest.raises(ValueError, match="not compiled apart"):
        GTA(None, compiled=True)


def test_a_forward_that_raises_leaves_nothing_behind():
    model, images = vit(), small()
    guide = GTA(vit(1))
    model.blocks[1].mlp.register_forward_pre_hook(lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt), guide.on(model, images):
        model(images)
    model.blocks[1].mlp._forward_pre_hooks.clear()
    for m in (model, guide.source):
        assert sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in m.modules()) == 0
    assert loss_of(guide, model, images) > 0


# -- glance


def test_a_glance_shows_what_a_whole_forward_shows():
    model, images = vit(), small()
    what = ("class_logits", "received", "keys", "attn_out", "tokens")
    with torch.no_grad(), foveal.read(model, "all", what) as seen:
        model(images)
    look = glance(model, images, "all", what)
    for name in what:
        for a, b in zip(getattr(look, name)(), getattr(seen, name)(), strict=True):
            assert torch.equal(a, b), name
    assert look.grid == seen.grid
    assert not look.class_logits()[0].requires_grad
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0


def test_a_glance_at_a_block_ends_after_it():
    model, images = vit(), small()
    names, handles = ran(model)
    out = glance(model, images, 1, "block_out").block_out()
    for handle in handles:
        handle.remove()
    assert "blocks.1.mlp" in names
    assert "blocks.2" not in names
    with foveal.read(model, 1, "block_out") as seen:
        model(images)
    assert torch.equal(out, seen.block_out())


def test_a_glance_inside_a_read_is_a_forward_like_any_other():
    model, images = vit(), small()
    with foveal.attach(model), foveal.read(model) as outside:
        glance(model, images[:1])
        model(images)
    assert len(outside.calls) == 2
    with foveal.read(model) as outside:
        with foveal.attention.unseen(model):
            glance(model, images[:1])
        model(images)
    assert outside.class_logits().shape[0] == 3


def test_errors_inside_a_glance_come_through():
    model = vit()
    model.blocks[1].mlp.register_forward_pre_hook(lambda *args: math.sqrt(-1))
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
        glance(model, small(), "all")
