"""Grad-CAM by hand, against autograd written down plainly, where it is zero, and that it leaves no trace."""

import pytest
import torch

import foveal
from foveal import maps
from foveal.attention import attach
from foveal.maps.grad_cam import grad_cam
from map_models import MODELS, batch, everything, resnet, same, vit


def test_by_hand():
    """Two channels on a 2 x 2 grid: weights 0.1 and -0.2."""
    F = torch.tensor([[[1.0, 2], [3, 4]], [[0, 1], [1, 0]]]).flatten(1).T[None]
    gradient = torch.tensor([[[0.1, 0.1], [0.1, 0.1]], [[-0.4, 0], [0, -0.4]]]).flatten(1).T[None]
    cam = grad_cam(F, gradient)
    assert torch.allclose(cam, torch.tensor([[0.1, 0, 0.1, 0.4]]), atol=1e-7)
    assert torch.allclose(cam / cam.max(), torch.tensor([[0.25, 0, 0.25, 1]]), atol=1e-6)


def plain(model, images, labels, prefix, block=-1):
    """Plain: run to the norm, cut there, run on from it; image by image."""
    model = model.eval()
    out = []
    kept = {}

    def keep(_, args, output):
        kept["F"] = output.detach().requires_grad_()
        return kept["F"]

    for x, label in zip(images, labels, strict=True):
        hook = model.blocks[block].norm1.register_forward_hook(keep)
        logits = model(x[None])
        hook.remove()
        logits[0, label].backward()
        F, g = (t[0, prefix:] for t in (kept["F"].detach(), kept["F"].grad))
        out.append(sum(g[:, d].mean() * F[:, d] for d in range(F.shape[1])).clamp_min(0))
    return torch.stack(out)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("B", [1, 3])
def test_it_is_its_plain_twin(name, B):
    build, size, grid = MODELS[name]
    model = build().double()
    images, labels = batch(B, size, dtype=torch.float64)
    source = maps.GradCAM(model)
    found = source(images, labels)
    prefix = model.num_prefix_tokens
    assert found.map.shape == (B, *grid)
    assert found.map.dtype == torch.float32
    assert (found.map >= 0).all()
    expected = plain(build().double(), images, labels, prefix).float().view(B, *grid)
    expected = expected.masked_fill(found.blank[:, None, None], 0)
    assert torch.allclose(found.map, expected, rtol=1e-4, atol=1e-6 * float(expected.max()))
    earlier = maps.GradCAM(model, layer=0)(images, labels).map
    assert torch.allclose(
        earlier,
        plain(build().double(), images, labels, prefix, 0).float().view(B, *grid),
        rtol=1e-4,
        atol=1e-6 * float(earlier.max()),
    )


def test_some_maps_of_the_twin_have_preferences():
    model = vit()
    images, labels = batch(3, (32, 32))
    assert not maps.GradCAM(model)(images, labels).blank.all()


def test_after_the_last_block_nothing_is_left_but_for_mean_pooling():
    images, labels = batch(3, (28, 20))
    told = maps.GradCAM(vit(img_size=(28, 20)), at="block_out")(images, labels)
    assert told.blank.all()
    assert not told.map.any()
    pooled = vit(img_size=(28, 20), class_token=False, reg_tokens=2, global_pool="avg")
    assert maps.GradCAM(pooled, at="block_out")(images, labels).map.any()


def test_without_labels_its_own_guess():
    model = vit()
    images, _ = batch(4, (32, 32))
    source = maps.GradCAM(model)
    guess = source(images)
    assert torch.equal(guess.map, source(images, guess.logits.argmax(1)).map)
    rows = torch.nn.functional.one_hot(guess.logits.argmax(1), 5)
    assert torch.allclose(source(images, rows).map, guess.map, atol=1e-7)
    other = source(images, (guess.logits.argmax(1) + 1) % 5)
    assert not torch.equal(other.map, guess.map)


def test_a_class_that_looks_at_nothing_has_no_map():
    model = vit()
    with torch.no_grad():
        model.head.weight[2] = 0
    images, _ = batch(3, (32, 32))
    found = maps.GradCAM(model)(images, torch.tensor([2, 2, 0]))
    assert found.blank[:2].all()
    assert not found.map[:2].any()


def test_images_of_a_batch_do_not_meet():
    model = vit().double()
    images, labels = batch(4, (32, 32), dtype=torch.float64)
    source = maps.GradCAM(model)
    together = source(images, labels).map
    for i in range(4):
        alone = source(images[i : i + 1], labels[i : i + 1]).map[0]
        assert torch.allclose(alone, together[i], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(dtype):
    images, labels = batch(2, (32, 32))
    exact = maps.GradCAM(vit())(images, labels).map
    near = maps.GradCAM(vit(dtype=dtype))(images, labels).map
    assert near.dtype == torch.float32
    assert (near - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("name", ["8x8", "pooled", "distilled"])
@pytest.mark.parametrize("at", ["norm1", "block_out"])
def test_the_model_is_left_alone(name, at):
    build, size, _ = MODELS[name]
    model = build()
    images, labels = batch(2, size)
    model(images).sum().backward()  # gradients that must stay
    before = everything(model)
    source = maps.GradCAM(model, at=at)
    source(images, labels)
    with pytest.raises(ValueError, match="labels from"):
        source(images, labels + 5)
    model.requires_grad_(True)
    assert same(before, everything(model))
    assert images.grad is None


def test_also_when_the_forward_fails():
    model = vit()
    source, before = maps.GradCAM(model), everything(model)
    with pytest.raises(AssertionError):
        source(torch.zeros(1, 3, 8, 8))
    assert same(before, everything(model))


def test_frozen_weights_no_gradient_outside_and_readers_outside():
    model = vit().requires_grad_(False)
    images, labels = batch(2, (32, 32))
    expected = maps.GradCAM(vit())(images, labels).map
    with torch.no_grad(), attach(model), foveal.read(model) as seen:
        model(images)
        got = maps.GradCAM(model)(images, labels)
    assert torch.equal(got.map, expected)
    assert seen.class_attention().shape[0] == 2
    with torch.inference_mode():
        assert torch.equal(maps.GradCAM(model)(images, labels).map, expected)
    assert not got.map.requires_grad


def test_checkpointed_blocks():
    model, images, labels = vit(), *batch(2, (32, 32))
    expected = maps.GradCAM(model)(images, labels).map
    model.set_grad_checkpointing()
    assert torch.allclose(maps.GradCAM(model)(images, labels).map, expected, atol=1e-6)


def test_by_name():
    model, images, labels = vit(), *batch(2, (32, 32))
    found = maps.make("grad_cam", model, layer=-2, classes=5)(images, labels)
    assert torch.equal(found.map, maps.GradCAM(model, layer=-2)(images, labels).map)


@pytest.mark.parametrize(
    ("build", "options", "error", "message"),
    [
        (resnet, {}, maps.MapModelError, "input_gradient fits any classifier"),
        (lambda: vit(num_classes=0), {}, maps.MapModelError, "no classifier"),
        (vit, {"layer": 3}, ValueError, r"use values in \[-3, 2\]"),
        (vit, {"at": "norm2"}, ValueError, "at='norm2' is not known"),
    ],
)
def test_models_and_options_that_do_not_fit(build, options, error, message):
    with pytest.raises(error, match=message):
        maps.GradCAM(build(), **options)


def test_another_number_of_classes():
    images, labels = batch(2, (32, 32))
    with pytest.raises(maps.MapModelError, match=r"logits \(B, 7\)"):
        maps.GradCAM(vit(), classes=7)(images, labels)
    with pytest.raises(ValueError, match="label rows of 7"):
        maps.GradCAM(vit())(images, torch.ones(2, 7))
