"""AttnDistill: rows of other grids and heads, each step by hand and against a plain twin."""

import math

import pytest
import timm
import torch
import torchvision
from torch.nn import functional as F

import foveal
from foveal.transfer import GUIDES, AttnDistill, attn_distill_loss
from foveal.transfer.attn_distill import clamped, class_row, input_size, merge_heads, to_grid
from test_gta import batch, vit


def rows_of(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def twin(student, teacher, student_grid, teacher_grid, T=10.0):
    """The definition, one image and one column after the other."""
    total = torch.zeros((), dtype=torch.float64)
    for s, t in zip(student, teacher, strict=True):
        if student_grid != teacher_grid:
            heads = []
            for row in t:
                picture = F.interpolate(row[1:].view(1, 1, *teacher_grid), size=student_grid, mode="bicubic").flatten()
                heads.append(torch.cat([row[:1], picture / picture.sum() * (1 - row[0])]))
            t = torch.stack(heads)
        if len(s) != len(t):
            s, t = ((sum(row.log() for row in x) / T).softmax(-1)[None] for x in (s, t))
        for a, b in zip(s, t, strict=True):
            a, b = (x.clamp(1e-5, 0.996) / x.clamp(1e-5, 0.996).sum() for x in (a, b))
            total = total + (b * (b / a).log()).sum()
    return total / len(student)


def loss_of(guide, model, images):
    with guide.on(model, images) as g:
        model(images)
    return g.losses()["attn_distill"]


# -- pure functions


def test_same_heads_and_grid_by_hand():
    student = torch.tensor([[[0.5, 0.25, 0.25]]], dtype=torch.float64)
    teacher = torch.tensor([[[0.5, 0.5, 0.0]]], dtype=torch.float64)
    loss = attn_distill_loss(student, teacher, (1, 2), (1, 2))
    # the teacher's 0 counts as 1e-5: (0.5, 0.5, 1e-5) / 1.00001
    one = 1.00001
    expected = 0.5 / one * (math.log(1 / one) + math.log(2 / one)) + 1e-5 / one * math.log(1e-5 / one / 0.25)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    # heads are summed, images averaged
    heads = [x.expand(2, 3, 3) for x in (student, teacher)]
    assert attn_distill_loss(*heads, (1, 2), (1, 2)).item() == pytest.approx(3 * expected, rel=1e-12)


def test_merging_heads_by_hand():
    row = torch.tensor([[[0.5, 0.5], [0.9, 0.1]]], dtype=torch.float64)  # products 0.45 and 0.05
    assert torch.allclose(merge_heads(row, 1.0), torch.tensor([[0.9, 0.1]], dtype=torch.float64))
    tenth = 9**0.1
    expected = torch.tensor([[tenth / (tenth + 1), 1 / (tenth + 1)]], dtype=torch.float64)
    assert torch.allclose(merge_heads(row), expected)
    assert merge_heads(torch.tensor([[[1.1, -0.1, 0.0]]])).isfinite().all()  # overshoot and underflow


def test_resizing_keeps_the_class_column_and_the_mass():
    row = rows_of(2, 3, 1 + 3 * 4)
    out = to_grid(row, (3, 4), (6, 5))
    assert out.shape == (2, 3, 31)
    assert torch.equal(out[..., 0], row[..., 0])
    assert torch.allclose(out.sum(-1), torch.ones(2, 3, dtype=torch.float64))
    even = torch.cat([torch.full((1, 1, 1), 0.4), torch.full((1, 1, 4), 0.15)], -1)
    assert torch.allclose(to_grid(even, (2, 2), (3, 3))[..., 1:], torch.full((1, 1, 9), 0.6 / 9))
    # not a transposed grid: mass in the left column stays left
    left = torch.tensor([[[0.2, 0.4, 0.0, 0.0, 0.4, 0.0, 0.0]]])
    picture = to_grid(left, (2, 3), (4, 6))[0, 0, 1:].view(4, 6)
    assert picture[:, :2].sum() > 0.7


def test_rows_are_clamped_and_sum_to_one():
    row = clamped(torch.tensor([1.0, 0.0, -0.1], dtype=torch.float64))
    assert torch.allclose(row, torch.tensor([0.996, 1e-5, 1e-5], dtype=torch.float64) / 0.99602)


def test_registers_are_left_out_of_the_row():
    logits = torch.tensor([[[0.0, 5.0, 7.0, math.log(2.0), math.log(5.0)]]])
    assert torch.allclose(class_row(logits, 2), torch.tensor([[[1 / 8, 2 / 8, 5 / 8]]]))
    assert class_row(logits.bfloat16(), 2).dtype == torch.float32


@pytest.mark.parametrize("heads", [(3, 3), (3, 6)])
@pytest.mark.parametrize("grids", [((4, 4), (4, 4)), ((4, 4), (6, 5)), ((2, 3), (4, 6)), ((4, 1), (2, 2))])
def test_the_loss_is_that_of_the_plain_twin(heads, grids):
    (h, w), (hh, ww) = grids
    student = rows_of(3, heads[0], 1 + h * w).requires_grad_()
    teacher = rows_of(3, heads[1], 1 + hh * ww, seed=1)
    teacher = 0.5 * teacher + 0.5 / teacher.shape[-1]  # flat enough that bicubic interpolation stays above 0
    got, expected = (f(student, teacher, *grids) for f in (attn_distill_loss, twin))
    assert torch.allclose(got, expected, rtol=0, atol=1e-10)
    a, b = (torch.autograd.grad(x, student)[0] for x in (got, expected))
    assert torch.allclose(a, b, rtol=0, atol=1e-10)
    assert got > 0


def test_equal_rows_cost_nothing_and_order_of_heads_does_not_matter_when_merged():
    student, teacher = rows_of(2, 3, 10), rows_of(2, 5, 10, seed=1)
    assert attn_distill_loss(student, student, (3, 3), (3, 3)).abs() < 1e-15
    merged = attn_distill_loss(student, teacher, (3, 3), (3, 3))
    assert torch.allclose(attn_distill_loss(student[:, [2, 0, 1]], teacher.flip(1), (3, 3), (3, 3)), merged)
    assert not torch.allclose(attn_distill_loss(student, teacher, (3, 3), (3, 3), temperature=1.0), merged)


def test_peaked_rows_stay_finite():
    student = (200 * torch.randn(2, 3, 17, generator=torch.Generator().manual_seed(0))).requires_grad_()
    teacher = torch.zeros(2, 2, 65)
    teacher[..., 9] = 1.0
    loss = attn_distill_loss(student.softmax(-1), teacher, (4, 4), (8, 8))
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"student's rows are \(2, 3, 10\), expected \(images, heads, 1 \+ 2 x 3\)"):
        attn_distill_loss(rows_of(2, 3, 10), rows_of(2, 3, 10), (2, 3), (3, 3))
    with pytest.raises(ValueError, match="2 images of the student against 1"):
        attn_distill_loss(rows_of(2, 3, 10), rows_of(1, 3, 10), (3, 3), (3, 3))


# -- the guide

SOURCES = {  # name: a model that differs from the student (2 heads, 4 x 4 patches of 8 pixels)
    "same": {},
    "finer": {"patch_size": 4},
    "coarser": {"patch_size": 16},
    "wider": {"num_heads": 4},
    "bigger": {"patch_size": 4, "num_heads": 8, "depth": 5, "embed_dim": 64},
    "registers": {"reg_tokens": 3, "num_heads": 4},
}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("student", [{}, {"reg_tokens": 2}])
def test_any_source_against_the_plain_twin(kind, student):
    model, source, images = vit(0, **student), vit(1, **SOURCES[kind]), batch()

    def row(net):
        with foveal.read(net, -1, "full") as seen:
            net(images)
        attn = seen.full()[:, :, 0]
        P = net.num_prefix_tokens
        kept = torch.cat([attn[..., :1], attn[..., P:]], -1)
        return kept / kept.sum(-1, keepdim=True), net.patch_embed.grid_size

    (s, s_grid), (t, t_grid) = row(model), row(source)
    expected = twin(s, t.detach(), s_grid, t_grid)
    got = loss_of(AttnDistill(source, weight=1.0), model, images)
    assert torch.allclose(got, expected, rtol=0, atol=1e-10)
    parameters = list(model.parameters())
    gradients = (torch.autograd.grad(x, parameters, allow_unused=True) for x in (got, expected))
    for a, b in zip(*gradients, strict=True):
        a, b = (torch.zeros(()) if x is None else x for x in (a, b))
        assert (a - b).abs().max() < 1e-10
    assert torch.allclose(loss_of(AttnDistill(source), model, images), 0.1 * expected)


def test_the_model_and_the_source_are_left_alone():
    model, source, images = vit(0).train(), vit(1, patch_size=4), batch()
    guide = AttnDistill(source)
    before = model(images)
    with guide.on(model, images) as g:
        out = model(images)
    (out.sum() + g.losses()["attn_distill"]).backward()
    assert torch.equal(out, before)
    assert all(p.grad is None and not p.requires_grad for p in guide.frozen.model.parameters())
    assert all(p.requires_grad for p in source.parameters())
    for net in (model, guide.frozen.model):
        assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()) == 0
    with AttnDistill(source, weight=0.0).on(model, images) as g:
        model(images)
    assert g.losses() == {}
    with guide.on(model, images, relax=0.0) as g:
        model(images)
    assert g.losses() == {}
    assert isinstance(guide, GUIDES["attn_distill"])


def test_checkpointing_batch_of_one_and_autocast():
    source, images, found = vit(1, num_heads=4, patch_size=4), batch(1), []
    for checkpointed in (False, True):
        model = vit(0).train()
        model.set_grad_checkpointing(checkpointed)
        loss_of(AttnDistill(source), model, images).backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None and p.grad.abs().max() > 0])
    assert all(torch.allclose(a, b, atol=1e-13) for a, b in zip(*found, strict=True))
    exact = loss_of(AttnDistill(source), model, images)
    with torch.autocast("cpu", torch.bfloat16):
        half = loss_of(AttnDistill(source.float()), vit(0, torch.float32), images.float())
    assert half.dtype == torch.float32
    assert abs(half - exact) < 0.05 * exact + 1e-3


def test_a_source_that_insists_on_its_size_gets_resized_images():
    model, images = vit(0), batch()
    source = vit(1, img_size=64)
    resized = F.interpolate(images, size=(64, 64), mode="bilinear", antialias=True)
    seen_by_source = []
    guide = AttnDistill(source)
    guide.frozen.model.patch_embed.register_forward_pre_hook(lambda m, args: seen_by_source.append(args[0]))
    loss_of(guide, model, images)
    assert torch.equal(seen_by_source[0], resized)
    free = AttnDistill(vit(1, img_size=64, dynamic_img_size=True))
    free.frozen.model.patch_embed.register_forward_pre_hook(lambda m, args: seen_by_source.append(args[0]))
    loss_of(free, model, images)
    assert torch.equal(seen_by_source[1], images)


def test_sizes_that_models_insist_on():
    assert input_size(vit(img_size=(32, 48))) == (32, 48)
    assert input_size(vit(dynamic_img_size=True)) is None
    assert input_size(timm.create_model("vit_small_patch16_dinov3", depth=1)) is None
    assert input_size(torchvision.models.VisionTransformer(32, 8, 1, 2, 32, 48)) == (32, 32)


@pytest.mark.parametrize("name", ["vit", "deit", "clip", "beit", "dinov2", "dinov3", "dinov2 registers"])
def test_transformers_sources(name):
    pytest.importorskip("transformers")
    from test_attention_transformers import build

    source, images = build(name), batch()
    fixed = name in ("vit", "deit", "clip", "beit")
    assert input_size(source) == ((64, 64) if fixed else None)
    if not fixed:
        images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = vit()
    loss = loss_of(AttnDistill(source), model, images)
    assert loss.isfinite()
    assert loss > 0


def test_other_libraries_teach():
    source = torchvision.models.VisionTransformer(48, 8, 2, 4, 32, 48).double()
    model, images = vit(), batch()
    loss = loss_of(AttnDistill(source), model, images)
    loss.backward()
    assert loss > 0
    assert model.blocks[2].attn.qkv.weight.grad[:64].abs().max() > 0
    assert model.blocks[2].attn.qkv.weight.grad[64:].abs().max() == 0


def test_models_without_a_class_row_are_refused():
    bare = vit(class_token=False, global_pool="avg")
    with pytest.raises(ValueError, match="no class token"):
        AttnDistill(bare)
    with pytest.raises(ValueError, match="no class token"):
        loss_of(AttnDistill(vit()), bare, batch())
    with pytest.raises(foveal.UnsupportedModelError):
        AttnDistill(timm.create_model("resnet10t"))
    with pytest.raises(ValueError, match="temperature=0"):
        AttnDistill(vit(), temperature=0)
    with pytest.raises(ValueError, match="weight=-1"):
        AttnDistill(vit(), weight=-1)
