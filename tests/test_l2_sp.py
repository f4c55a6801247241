"""L2-SP: worked examples, the plain definition, what is held and what is not, the decoupled form."""

import copy

import pytest
import timm
import torch
from torch import nn

from foveal.transfer.l2_sp import L2SP, l2_sp


def vit(seed=0, dtype=torch.float64, **kwargs):
    torch.manual_seed(seed)
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 4}
    return timm.models.VisionTransformer(**(settings | kwargs)).to(dtype).eval()


IMAGES = torch.zeros(1, 3, 32, 32, dtype=torch.float64)


def loss_of(guide, model, relax=1.0):
    with guide.on(model, IMAGES, relax=relax) as g:
        pass
    return g.losses().get("l2_sp")


def distance(model, source, names):
    ours, theirs = dict(model.named_parameters()), dict(source.named_parameters())
    return sum((ours[n] - theirs[n]).square().sum() for n in names) / 2


def body(model):
    return [n for n, _ in model.named_parameters() if not n.startswith("head.")]


def test_worked_example():
    w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    loss = l2_sp([w], [torch.zeros(2, dtype=torch.float64)])
    loss.backward()
    assert loss.item() == pytest.approx(2.5, rel=1e-15)
    assert w.grad.tolist() == [1.0, 2.0]
    assert l2_sp([w]).item() == pytest.approx(2.5, rel=1e-15)


def test_gradient_is_the_way_back():
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in [(3, 4), (5,), ()]]
    starts = [torch.randn(w.shape, generator=g, dtype=torch.float64) for w in weights]
    weights = [w.requires_grad_() for w in weights]
    assert torch.autograd.gradcheck(lambda *w: 3 * l2_sp(w, starts), weights)
    for gradient, w, s in zip(torch.autograd.grad(2 * l2_sp(weights, starts), weights), weights, starts, strict=True):
        assert torch.equal(gradient, 2 * (w - s))


def test_zero_at_the_start_with_zero_gradient():
    w = torch.randn(7, 3, requires_grad=True)
    loss = l2_sp([w], [w.detach().clone()])
    (gradient,) = torch.autograd.grad(loss, w)
    assert loss.item() == 0.0
    assert not gradient.any()


def test_the_gradient_can_be_asked_twice():
    w = torch.randn(3, requires_grad=True)
    for loss in (3 * l2_sp([w], [torch.ones(3)]), 3 * l2_sp([w])):
        first, second, third = (torch.autograd.grad(loss, w, retain_graph=True)[0] for _ in range(3))
        assert torch.equal(first, second)
        assert torch.equal(first, third)


def test_the_weights_are_not_touched_by_their_gradient():
    w, start = torch.arange(3.0).requires_grad_(), torch.ones(3)
    (5 * l2_sp([w], [start]) + 7 * l2_sp([w])).backward()
    assert w.tolist() == [0.0, 1.0, 2.0]
    assert start.tolist() == [1.0, 1.0, 1.0]
    assert w.grad.tolist() == [-5.0, 7.0, 19.0]


def test_half_precision_is_summed_in_float32():
    w = torch.full((40000,), 1.0, dtype=torch.bfloat16, requires_grad=True)
    loss = l2_sp([w], [torch.full((40000,), 0.5, dtype=torch.bfloat16)])
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(5000, rel=1e-5)
    assert w.grad.dtype == torch.bfloat16
    assert torch.equal(w.grad, torch.full_like(w, 0.5))


def test_pairs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="0 weights"):
        l2_sp([])
    with pytest.raises(ValueError, match="2 weights against 1"):
        l2_sp([torch.ones(2), torch.ones(2)], [torch.ones(2)])
    with pytest.raises(ValueError, match="shape"):
        l2_sp([torch.ones(2)], [torch.ones(3)])


def test_the_term_is_the_definition():
    model, source = vit(0), vit(1)
    shared, head = distance(model, source, body(model)), sum(p.square().sum() for p in model.head.parameters()) / 2
    assert torch.allclose(loss_of(L2SP(source), model), 0.01 * shared + 0.01 * head, rtol=1e-12)
    assert torch.allclose(loss_of(L2SP(source, weight=0.1, head=0.5), model), 0.1 * shared + 0.5 * head, rtol=1e-12)
    half = loss_of(L2SP(source, weight=0.1, head=0.5), model, relax=0.5)
    assert torch.allclose(half, 0.05 * shared + 0.25 * head, rtol=1e-12)


def test_gradients_of_a_model_are_the_definitions():
    model, source = vit(0), vit(1)
    loss_of(L2SP(source, weight=0.3, head=0.2), model).backward()
    start = dict(source.named_parameters())
    for name, p in model.named_parameters():
        expected = 0.2 * p if name.startswith("head.") else 0.3 * (p - start[name])
        assert torch.allclose(p.grad, expected, rtol=1e-12), name


def test_only_the_new_classifier_counts_at_the_start():
    model = vit()
    assert loss_of(L2SP(model, head=0.0), model).item() == 0.0
    guide = L2SP(model, head=1.0)
    loss_of(guide, model).backward()
    assert all(not p.grad.any() for n, p in model.named_parameters() if not n.startswith("head."))
    assert torch.allclose(model.head.weight.grad, model.head.weight)


def test_a_classifier_of_the_same_shape_is_still_new():
    source, model = vit(), vit()
    with torch.no_grad():
        source.head.weight.add_(100.0)
    head = sum(p.square().sum() for p in model.head.parameters()) / 2
    assert torch.allclose(loss_of(L2SP(source, head=1.0), model), head)


def test_kernels_only():
    model, source = vit(0, init_values=0.1, reg_tokens=1), vit(1, init_values=0.1, reg_tokens=1)
    kernels = [n for n in body(model) if n.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight"))]
    assert len(kernels) == 1 + 4 * 2
    expected = distance(model, source, kernels) + model.head.weight.square().sum() / 2
    assert torch.allclose(loss_of(L2SP(source, weight=1.0, head=1.0, biases=False), model), expected, rtol=1e-12)


def test_embedding_tables_are_no_kernels():
    class Tables(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.table, self.head = nn.Linear(3, 3), nn.Embedding(5, 3), nn.Linear(3, 2)

    torch.manual_seed(0)
    model, source = Tables(), Tables()
    expected = distance(model, source, ["body.weight"])
    assert torch.allclose(loss_of(L2SP(source, weight=1.0, head=0.0, biases=False), model), expected)
    expected = distance(model, source, ["body.weight", "body.bias", "table.weight"])
    assert torch.allclose(loss_of(L2SP(source, weight=1.0, head=0.0), model), expected)


def test_another_input_size_leaves_the_position_table_free():
    model, source = vit(0, img_size=48), vit(1)
    guide = L2SP(source, weight=1.0, head=0.0)
    assert guide.excluded == ()
    names = [n for n in body(model) if n != "pos_embed"]
    assert torch.allclose(loss_of(guide, model), distance(model, source, names), rtol=1e-12)
    assert guide.excluded == ("pos_embed",)


def test_frozen_parameters_and_buffers_do_not_count():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    source = copy.deepcopy(model)
    guide = L2SP(source, weight=1.0)
    with torch.no_grad():
        model[1].running_mean.add_(1.0)
        model[2].weight.add_(1.0)
        model[0].weight.add_(1.0)
    model[0].requires_grad_(False)
    assert torch.allclose(loss_of(guide, model), torch.tensor(4.0))  # 8 weights moved by 1
    model[0].requires_grad_(True)  # thawed later
    assert torch.allclose(loss_of(guide, model), torch.tensor(10.0))
    assert guide.excluded == ()


def test_a_replaced_classifier_is_noticed():
    model = vit()
    guide = L2SP(model, head=1.0)
    loss_of(guide, model)
    model.reset_classifier(7)
    model.to(torch.float64)
    assert torch.allclose(loss_of(guide, model), sum(p.square().sum() for p in model.head.parameters()) / 2)


def test_both_heads_of_a_distilled_model_are_new():
    torch.manual_seed(0)
    model = timm.models.deit.VisionTransformerDistilled(
        img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=4
    )
    heads = [*model.head.parameters(), *model.head_dist.parameters()]
    loss = loss_of(L2SP(model, head=1.0), model)
    assert torch.allclose(loss, sum(p.square().sum() for p in heads) / 2, rtol=1e-5)


def test_the_start_is_a_copy():
    model = vit()
    guide = L2SP(model, weight=1.0, head=0.0)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.add_(1.0)
    assert loss_of(guide, model).item() == pytest.approx(model.blocks[0].attn.qkv.weight.numel() / 2, rel=1e-12)
    assert guide.learned() is None
    assert not any(isinstance(value, nn.Module) for name, value in vars(guide).items() if name != "_met")


def test_nothing_in_common_is_refused():
    frozen = vit()
    frozen.requires_grad_(False).head.requires_grad_(True)
    for model in (frozen, nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="hold nothing"), L2SP(vit()).on(model, IMAGES):
            pytest.fail("the forward began")


@pytest.mark.parametrize("relax", [1.0, 0.25])
def test_decoupled_moves_by_the_groups_rate(relax):
    model, source = vit(0), vit(1)
    before, start = copy.deepcopy(model.state_dict()), dict(source.named_parameters())
    groups = [
        {"params": list(model.blocks.parameters()), "lr": 0.5},
        {"params": [p for n, p in model.named_parameters() if not n.startswith("blocks.")], "lr": 0.1},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    guide = L2SP(source, weight=0.2, head=0.3, decoupled=True)
    assert loss_of(guide, model, relax) is None
    guide.after_step(model, optimizer, relax)
    for name, p in model.named_parameters():
        w = before[name]
        rate = relax * (0.5 if name.startswith("blocks.") else 0.1)
        expected = w - rate * 0.3 * w if name.startswith("head.") else w - rate * 0.2 * (w - start[name])
        assert torch.allclose(p, expected, rtol=0, atol=1e-14), name
        assert p.grad is None


def test_decoupled_leaves_frozen_weights_and_the_start_alone():
    model, source = vit(0), vit(1)
    model.blocks[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    guide = L2SP(source, weight=0.5, decoupled=True)
    guide.after_step(model, torch.optim.SGD(model.parameters(), lr=1.0))
    assert all(torch.equal(p, before[f"blocks.0.{n}"]) for n, p in model.blocks[0].named_parameters())
    assert not torch.equal(model.blocks[1].attn.qkv.weight, before["blocks.1.attn.qkv.weight"])
    assert torch.equal(source.cls_token, vit(1).cls_token)


def test_with_plain_sgd_both_forms_are_one_step():
    source, moved = vit(1), []
    for decoupled in (False, True):
        model = vit(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        guide = L2SP(source, weight=0.2, head=0.1, decoupled=decoupled)
        with guide.on(model, IMAGES) as g:
            pass
        for loss in g.losses().values():
            loss.backward()
        optimizer.step()
        guide.after_step(model, optimizer)
        moved.append(model.state_dict())
    assert all(torch.allclose(moved[0][n], moved[1][n], rtol=0, atol=1e-13) for n in moved[0])


def test_the_loss_form_does_nothing_after_a_step():
    model, source = vit(0), vit(1)
    before = copy.deepcopy(model.state_dict())
    L2SP(source).after_step(model, torch.optim.SGD(model.parameters(), lr=1.0))
    L2SP(source, weight=0.0, decoupled=True).after_step(model, torch.optim.SGD(model.parameters(), lr=1.0))
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert loss_of(L2SP(source, weight=0.0), model) is None


def test_a_compiled_model_is_the_model_inside():
    model = vit()
    guide = L2SP(torch.compile(model, backend="eager"), head=0.0)
    assert loss_of(guide, torch.compile(model, backend="eager")).item() == 0.0
    assert guide.excluded == ()


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="weight=-1"):
        L2SP(vit(), weight=-1)
    with pytest.raises(ValueError, match="head=nan"):
        L2SP(vit(), head=float("nan"))
    with pytest.raises(ValueError, match="LoRA"):
        L2SP(None)
    assert L2SP.replaces_decay
    assert not L2SP.unmixed
