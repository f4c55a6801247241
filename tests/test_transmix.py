"""TransMix: labels half by area, half by where the class token of the training forward looks."""

import copy

import pytest
import timm
import torch
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch.overrides import _get_current_function_mode_stack

import foveal
from foveal import chance
from foveal.mix import BlendBoxDraw, LabelWeights, Mixed, MixupCutMix, TransMix, soft_cross_entropy
from foveal.mix.cutmix import box_share, inside
from foveal.mix.transmix import relabelled, sample_keep, visible_attention

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 6}


def vit(cls=VisionTransformer, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    model = cls(**{"img_size": 32, "patch_size": 4, **SMALL, **settings}).to(dtype).train()
    with torch.no_grad():  # a fresh model looks everywhere alike: give it preferences
        for name, p in model.named_parameters():
            if "qkv" in name and p.dim() == 2:
                p.mul_(8.0)
    return model


MODELS = {
    "8x8": lambda: vit(),
    "14x14": lambda: vit(img_size=56),
    "7x5": lambda: vit(img_size=(28, 20)),
    "distilled": lambda: vit(VisionTransformerDistilled),
    "registers": lambda: vit(reg_tokens=4),
    "attention dropout": lambda: vit(attn_drop_rate=0.3, drop_path_rate=0.2, proj_drop_rate=0.1),
}
SIZES = {"14x14": (56, 56), "7x5": (28, 20)}
GRIDS = {"14x14": (14, 14), "7x5": (7, 5)}


def batch(B=5, size=(32, 32), dtype=torch.float32, classes=6):
    g = torch.Generator().manual_seed(B)
    return torch.randn(B, 3, *size, generator=g).to(dtype), torch.randint(classes, (B,), generator=g)


def rng(seed=0):
    return chance.generator(seed, "mix", 0)


def by_boxes(box, size, attn=None, grid=None, lam=None):
    """A batch mixed by given boxes, and its relabelled form if attention is given."""
    B = len(box)
    draw = BlendBoxDraw(torch.arange(B - 1, -1, -1), torch.as_tensor(box), torch.ones(B) if lam is None else lam)
    mixed = TransMix().apply(torch.zeros(B, 3, *size), draw)
    return mixed if attn is None else relabelled(mixed, attn, grid)


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_always_called")
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)


# -- by hand


def test_worked_example():
    """8 x 8 pixels, 4 x 4 patches, box rows 1-4 and columns 3-7: pixels 0, 2, 4, 6 are sampled, so cells 1-2 x 2-3."""
    attn = [[0.05, 0.05, 0.10, 0.10], [0.05, 0.15, 0.20, 0.02], [0.03, 0.10, 0.05, 0.02], [0.02, 0.02, 0.02, 0.02]]
    mixed = by_boxes([[1, 3, 5, 8]] * 2, (8, 8), torch.tensor([attn] * 2).flatten(1), (4, 4))
    keep = sample_keep(mixed.keep, (4, 4))[0].reshape(4, 4)
    assert keep.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert torch.allclose(mixed.factors[0].partner, torch.tensor(0.30125))  # (.3125 + .29) / 2


@pytest.mark.parametrize(("size", "grid"), [((56, 56), (14, 14)), ((32, 32), (8, 8)), ((28, 20), (7, 5))])
def test_uniform_attention_on_whole_patches_is_the_area(size, grid):
    box = [[0, 4, 8, 16], [4, 0, 24, 20], [0, 0, 4, 4], [8, 8, 12, 20]]
    attn = torch.full((4, grid[0] * grid[1]), 0.02)
    area = by_boxes(box, size).factors[0]
    got = by_boxes(box, size, attn, grid).factors[0]
    assert torch.allclose(got.partner, area.partner, atol=1e-6)
    assert torch.allclose(got.own, area.own, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "grid"), [((56, 56), (14, 14)), ((32, 32), (8, 8)), ((28, 20), (7, 5)), ((30, 23), (7, 5))]
)
def test_uniform_attention_is_half_area_half_sampled_cells(size, grid):
    mixer = TransMix(mode="elem")
    draw = mixer.draw(64, size, rng=rng())
    mixed = mixer.apply(torch.zeros(64, 3, *size), draw)
    got = relabelled(mixed, torch.ones(64, grid[0] * grid[1]), grid).factors[0].partner
    for i in range(64):
        top, left, bottom, right = draw.box[i].tolist()
        cells = sum(
            top <= (r * size[0]) // grid[0] < bottom and left <= (c * size[1]) // grid[1] < right
            for r in range(grid[0])
            for c in range(grid[1])
        )
        area = (bottom - top) * (right - left) / (size[0] * size[1])
        assert abs(float(got[i]) - (area + cells / (grid[0] * grid[1])) / 2) < 1e-6


def test_a_box_between_the_samples_counts_half_its_area():
    mixed = by_boxes([[1, 1, 4, 4]] * 2, (32, 32), torch.rand(2, 64), (8, 8))
    assert torch.allclose(mixed.factors[0].partner, torch.tensor(9 / 1024 / 2))


def test_only_the_shape_of_the_attention_counts():
    attn = torch.rand(2, 64, generator=torch.Generator().manual_seed(0))
    box = [[3, 3, 20, 31]] * 2
    one, scaled = (by_boxes(box, (32, 32), x, (8, 8)).factors[0].own for x in (attn, attn * 1e-6))
    assert torch.allclose(one, scaled)


def test_attention_of_zeros_falls_back_to_the_sampled_cells():
    box = [[0, 0, 16, 32]] * 2
    assert torch.allclose(by_boxes(box, (32, 32), torch.zeros(2, 64), (8, 8)).factors[0].own, torch.tensor(0.5))


def test_all_attention_on_one_image():
    inside_box = sample_keep(by_boxes([[0, 0, 16, 32]] * 2, (32, 32)).keep, (8, 8)) == 0
    for where, partner in ((inside_box, 0.75), (~inside_box, 0.25)):
        got = by_boxes([[0, 0, 16, 32]] * 2, (32, 32), where.float(), (8, 8))
        assert torch.allclose(got.factors[0].partner, torch.tensor(partner))


def test_share_of_attention_by_hand():
    attn, keep = torch.tensor([[1.0, 2.0, 5.0], [0.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.5, 0.0], [1.0, 0.0, 0.5]])
    assert torch.allclose(visible_attention(attn, keep), torch.tensor([0.25, 0.5]))


def test_a_blended_image_keeps_its_weight_under_any_attention():
    lam = torch.tensor([0.3, 0.7, 0.01])
    attn = torch.rand(3, 64, generator=torch.Generator().manual_seed(1))
    mixed = by_boxes(torch.zeros(3, 4, dtype=torch.long), (32, 32), attn, (8, 8), lam=lam)
    assert torch.allclose(mixed.factors[0].own, lam, atol=1e-6)


def test_earlier_factors_stay():
    first = LabelWeights(torch.tensor([0.5, 0.5]), torch.tensor([1, 0]), torch.tensor([0.5, 0.5]))
    mixed = by_boxes([[0, 0, 16, 32]] * 2, (32, 32))
    both = Mixed(mixed.images, mixed.perm, mixed.keep, (first, *mixed.factors))
    got = relabelled(both, torch.ones(2, 64), (8, 8))
    assert len(got.factors) == 2
    assert got.factors[0] is first


# -- against the same model unfused, one image at a time


def plain_map(model, images, seed):
    """Last block's whole attention map from timm's own unfused code, caught before its dropout: (B, H, T, T)."""
    model, caught = copy.deepcopy(model), []
    attn = model.blocks[-1].attn
    attn.fused_attn = False
    attn.attn_drop.register_forward_pre_hook(lambda module, args: caught.append(args[0].detach()))
    torch.manual_seed(seed)
    model(images)
    return caught[0]


def slow_weights(rows, prefix, box, size, grid):
    """Weight of the partner, sample by sample. rows: (B, T) attention of one query, all columns."""
    weights = []
    for row, (top, left, bottom, right) in zip(rows.tolist(), box.tolist(), strict=True):
        pixels = torch.zeros(size)
        pixels[top:bottom, left:right] = 1
        cells = [
            float(pixels[r * size[0] // grid[0], c * size[1] // grid[1]])
            for r in range(grid[0])
            for c in range(grid[1])
        ]
        patches = row[prefix:]
        share = sum(a * m for a, m in zip(patches, cells, strict=True)) / sum(patches)
        weights.append((float(pixels.mean()) + share) / 2)
    return torch.tensor(weights)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("B", [1, 2, 5])
def test_weights_are_those_of_the_unfused_model(name, B):
    model, size, grid = MODELS[name](), SIZES.get(name, (32, 32)), GRIDS.get(name, (8, 8))
    images, labels = batch(B, size)
    mixer = TransMix(mode="elem")
    draw = mixer.draw(B, size, rng=rng())
    torch.manual_seed(5)
    with mixer.on(model, images, labels, rng=rng()) as step:
        logits = model(step.images)
    rows = plain_map(model, step.images, seed=5)[:, :, 0].mean(1)
    expected = slow_weights(rows, model.num_prefix_tokens, draw.box, size, grid)
    area = step.mixed.factors[0].partner
    assert torch.allclose(area, box_share(draw.box, size), atol=1e-7)  # provisional until asked
    loss = step.loss(logits, smoothing=0.1)
    weights = step.mixed.factors[0]
    assert torch.allclose(weights.partner, expected, atol=1e-5)
    assert torch.allclose(weights.own + weights.partner, torch.ones(B))
    if B > 1:
        assert (weights.partner - area).abs().max() > 1e-3  # the model has preferences
    assert torch.isclose(loss, soft_cross_entropy(logits, step.mixed.targets(labels, 6, 0.1)))
    assert torch.isclose(step.targets(6).sum(), torch.tensor(float(B)))


def test_received_attention_of_a_model_without_class_token():
    model = vit(class_token=False, global_pool="avg", img_size=(28, 20))
    images, labels = batch(4, (28, 20))
    mixer = TransMix(mode="elem", attention="received")
    with mixer.on(model, images, labels, rng=rng()) as step:
        step.loss(model(step.images))
    rows = plain_map(model, step.images, 0).mean((1, 2))
    box = mixer.draw(4, (28, 20), rng=rng()).box
    assert torch.allclose(step.mixed.factors[0].partner, slow_weights(rows, 0, box, (28, 20), (7, 5)), atol=1e-5)


def test_a_class_attention_block_by_name():
    torch.manual_seed(0)
    model = Cait(img_size=32, patch_size=8, **SMALL)
    images, labels = batch(4)
    with foveal.read(model, layers="blocks_token_only.1") as seen, torch.no_grad():
        model(TransMix().apply(images, TransMix().draw(4, (32, 32), rng=rng())).images)
    with TransMix(layer="blocks_token_only.1").on(model, images, labels, rng=rng()) as step:
        step.loss(model(step.images))
    rows, box = seen.class_attention(prefix=True).mean(1), TransMix().draw(4, (32, 32), rng=rng()).box
    expected = slow_weights(rows, 1, box, (32, 32), (4, 4))
    assert torch.allclose(step.mixed.factors[0].partner, expected, atol=1e-5)


# -- inside a training step


def gradients(model):
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def run(model, images, labels, **settings):
    model.zero_grad()
    with TransMix(mode="elem", **settings).on(model, images, labels, rng=rng()) as step:
        step.loss(model(step.images)).backward()
    return step, gradients(model)


def test_no_gradient_flows_through_the_weights():
    model, (images, labels) = vit(), batch()
    step, got = run(model, images, labels)
    assert not step.mixed.factors[0].own.requires_grad
    assert not step.mixed.keep.requires_grad
    fixed = step.targets(6).clone()
    model.zero_grad()
    soft_cross_entropy(model(step.images), fixed).backward()
    assert all(torch.equal(a, b) for a, b in zip(got, gradients(model), strict=True))


def test_gradient_through_the_weights_would_be_another_one():
    """The test above can fail: with the attention left attached, the gradient differs."""
    model, (images, labels) = vit(), batch()
    step, got = run(model, images, labels)
    model.zero_grad()
    with foveal.read(model) as seen:
        logits = model(step.images)
    keep = sample_keep(step.mixed.keep, (8, 8))
    own = (step.mixed.keep.mean((1, 2, 3)) + visible_attention(seen.class_attention().mean(1), keep)) / 2
    weights = LabelWeights(own, step.mixed.perm, 1 - own)
    soft_cross_entropy(logits, weights.mix(torch.eye(6)[labels])).backward()
    assert not all(torch.allclose(a, b, atol=1e-7) for a, b in zip(got, gradients(model), strict=True))


def test_checkpointing_changes_nothing():
    model, (images, labels) = vit(depth=3), batch()
    plain, expected = run(model, images, labels)
    model.set_grad_checkpointing(True)
    step, got = run(model, images, labels)
    assert torch.equal(step.mixed.factors[0].own, plain.mixed.factors[0].own)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_checkpointing_with_backward_after_the_block():
    model, (images, labels) = vit(depth=3), batch()
    _, expected = run(model, images, labels)
    model.set_grad_checkpointing(True)
    model.zero_grad()
    with TransMix(mode="elem").on(model, images, labels, rng=rng()) as step:
        logits = model(step.images)
    step.loss(logits).backward()
    assert all(torch.equal(a, b) for a, b in zip(expected, gradients(model), strict=True))


def test_autocast_leaves_weights_and_loss_in_float32():
    model, (images, labels) = vit(), batch()
    full, _ = run(model, images, labels)
    with torch.autocast("cpu", torch.bfloat16), TransMix(mode="elem").on(model, images, labels, rng=rng()) as step:
        logits = model(step.images)
        loss = step.loss(logits)
    own = step.mixed.factors[0].own
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == own.dtype == torch.float32
    # q and k carry 8 bits: logits of size 10 are off by some hundredths, and so are their shares
    assert torch.allclose(own, full.mixed.factors[0].own, atol=0.02)
    rows = plain_row_in_float32(model, step.images)
    draw = TransMix(mode="elem").draw(5, (32, 32), rng=rng())
    assert torch.allclose(1 - own, slow_weights(rows, 1, draw.box, (32, 32), (8, 8)), atol=1e-5)


def plain_row_in_float32(model, images):
    """The class row from the very q and k of the autocast forward, multiplied in float32: (B, T)."""
    caught = []
    handle = model.blocks[-1].attn.qkv.register_forward_hook(lambda module, args, out: caught.append(out.detach()))
    with torch.autocast("cpu", torch.bfloat16):
        model(images)
    handle.remove()
    B, T, _ = caught[0].shape
    q, k, _ = caught[0].float().reshape(B, T, 3, 3, 16).permute(2, 0, 3, 1, 4)
    return ((q[:, :, :1] / 4) @ k.transpose(-1, -2)).softmax(-1)[:, :, 0].mean(1)


def test_half_precision_images_and_model():
    model, (images, labels) = vit(dtype=torch.bfloat16), batch(dtype=torch.bfloat16)
    step, _ = run(model, images, labels)
    assert step.images.dtype == torch.bfloat16
    assert step.mixed.factors[0].own.dtype == torch.float32


def test_the_model_is_left_alone():
    model, (images, labels) = vit(), batch()
    before, keys = copy.deepcopy(model.state_dict()), set(model.__dict__)
    model.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    with TransMix().on(model, images, labels, rng=rng()) as step:
        assert hooks(model) > 0
        step.loss(model(step.images))
    assert hooks(model) == 0
    assert set(model.__dict__) == keys
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_left_alone_when_the_step_raises(error):
    model, (images, labels) = vit(), batch()
    modes = len(_get_current_function_mode_stack())

    def interrupted():
        with TransMix().on(model, images, labels) as step:
            model(step.images)
            raise error("stop")

    with pytest.raises(error, match="stop"):
        interrupted()
    assert hooks(model) == 0
    assert len(_get_current_function_mode_stack()) == modes


def test_the_forward_is_the_one_without_reading():
    model, (images, labels) = vit(attn_drop_rate=0.2, drop_path_rate=0.2), batch()
    torch.manual_seed(3)
    with TransMix().on(model, images, labels, rng=rng()) as step:
        logits = model(step.images)
        step.loss(logits)
    torch.manual_seed(3)
    assert torch.equal(model(step.images), logits)


def test_the_step_lets_go_of_what_it_read():
    model, (images, labels) = vit(), batch()
    with TransMix().on(model, images, labels) as step:
        step.loss(model(step.images))
    assert step._relabel is None


def test_several_questions_agree():
    model, (images, labels) = vit(), batch()
    with TransMix().on(model, images, labels, num_classes=6) as step:
        logits = model(step.images)
        targets = step.targets()
        assert torch.isclose(step.loss(logits), soft_cross_entropy(logits, targets))
        hit = targets.gather(1, logits.argmax(-1, keepdim=True)).mean()
        assert torch.isclose(step.accuracy(logits), hit)
        assert torch.equal(step.targets(), targets)


def test_mixup_steps_keep_ordinary_labels_and_read_nothing():
    model, (images, labels) = vit(), batch()
    mixer, joint = (kind(mixup_alpha=0.8, switch_prob=0.0) for kind in (TransMix, MixupCutMix))
    with mixer.on(model, images, labels, rng=rng()) as step:
        assert hooks(model) == 0
        step.loss(model(step.images))
    ordinary = joint.apply(images, joint.draw(5, (32, 32), rng=rng()))
    assert torch.equal(step.images, ordinary.images)
    assert torch.equal(step.mixed.factors[0].own, ordinary.factors[0].own)


def test_a_batch_of_blends_and_boxes():
    model, (images, labels) = vit(), batch(16)
    mixer = TransMix(mixup_alpha=0.8, mode="elem", prob=0.8)
    draw = mixer.draw(16, (32, 32), rng=rng())
    step, _ = run(model, images, labels, mixup_alpha=0.8, prob=0.8)
    own, boxed = step.mixed.factors[0].own, draw.box.any(-1)
    assert boxed.any()
    assert (draw.lam < 1).any()
    assert torch.allclose(own[~boxed], draw.lam[~boxed], atol=1e-6)
    cells = sample_keep(1.0 - inside(draw.box, (32, 32)).float(), (8, 8))
    rows = plain_map(model, step.images, 0)[:, :, 0, 1:].mean(1)
    expected = (1 - box_share(draw.box, (32, 32)) + visible_attention(rows, cells)) / 2
    assert torch.allclose(own[boxed], expected[boxed], atol=1e-5)


def test_inside_an_attached_door():
    model, (images, labels) = vit(), batch()
    expected, _ = run(model, images, labels)
    with foveal.attach(model):
        attached = hooks(model)
        for _ in range(2):
            step, _ = run(model, images, labels)
            assert torch.equal(step.mixed.factors[0].own, expected.mixed.factors[0].own)
            assert hooks(model) == attached
    assert hooks(model) == 0


def test_a_compiled_model_compiles_once_for_each_kind_of_step():
    """Hooks attached before: steps that read and steps that do not take one graph each, however they alternate."""
    model, twin, (images, labels) = vit(), vit(), batch(4)
    mixer, graphs, kinds = TransMix(mixup_alpha=0.8), [], set()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with foveal.attach(model):
        compiled = torch.compile(model, backend=backend)
        for seed in range(6):
            owns = []
            for one in (compiled, twin):
                with mixer.on(one, images, labels, rng=rng(seed)) as step:
                    step.loss(one(step.images))
                owns.append(step.mixed.factors[0].own)
            assert torch.allclose(*owns, atol=1e-5)
            kinds.add(bool((step.mixed.keep == 0).any()))
    assert kinds == {True, False}
    assert len(graphs) == 2


def test_a_guide_may_read_the_same_forward():
    model, (images, labels) = vit(), batch()
    expected, _ = run(model, images, labels)
    with TransMix(mode="elem").on(model, images, labels, rng=rng()) as step, foveal.read(model, layers="all") as seen:
        step.loss(model(step.images))
    assert len(seen.class_attention()) == 2
    assert torch.equal(step.mixed.factors[0].own, expected.mixed.factors[0].own)


# -- refusals


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_no_class_token_is_refused_with_the_way_out(registers, prob):
    model = vit(class_token=False, reg_tokens=registers, global_pool="avg")
    images, labels = batch()
    with (
        pytest.raises(ValueError, match=r"no class token.*attention='received'"),
        TransMix(prob=prob).on(model, images, labels),
    ):
        pass
    assert hooks(model) == 0


def test_a_model_that_cannot_be_read_is_named():
    images, labels = batch()
    with (
        pytest.raises(foveal.UnsupportedModelError),
        TransMix().on(timm.create_model("resnet10t", num_classes=6), images, labels),
    ):
        pass


def test_a_step_without_a_forward_says_so():
    model, (images, labels) = vit(), batch()
    with pytest.raises(foveal.ReadError, match="no forward"), TransMix().on(model, images, labels):
        pass
    with pytest.raises(foveal.ReadError, match="no forward"), TransMix().on(model, images, labels) as step:
        step.loss(torch.zeros(5, 6))


def test_two_forwards_in_a_step_say_so():
    model, (images, labels) = vit(), batch()
    with TransMix().on(model, images, labels) as step:
        model(step.images)
        logits = model(step.images)
        with pytest.raises(foveal.ReadError, match="2 forwards"):
            step.loss(logits)
