"""The guided reconstruction loss: worked examples, exact identities, and what must change nothing."""

import math

import pytest
import torch
from torch.nn import functional as F

from foveal.maps import on_grid
from foveal.pretrain import guided_reconstruction, object_weights, temperature_at, to_patches, unit


def case(B=3, h=3, w=4, P=12, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    prediction, target = (torch.randn(B, h * w, P, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    removed = (torch.rand(B, h * w, generator=g) < 0.7).float()
    map = torch.randn(B, h, w, generator=g, dtype=torch.float64)  # negative values too
    return prediction, target, removed, map


def slow(prediction, target, removed, map, temperature, gamma, normalise):
    """Patch by patch."""
    sums = []
    for b in range(len(prediction)):
        values = map[b].flatten().tolist()
        low, high = min(values), max(values)
        part = whole = count = 0.0
        for i, value in enumerate(values):
            share = (value - low) / (high - low) if high > low else 0.0
            weight = math.exp(share / temperature)
            error = sum((p - t) ** 2 for p, t in zip(prediction[b, i].tolist(), target[b, i].tolist(), strict=True))
            m = float(removed[b, i])
            part, whole, count = part + m * weight * error / prediction.shape[2], whole + m * weight, count + m
        sums.append((part, whole, count))
    if normalise == "image":
        return gamma * sum(part / whole for part, whole, _ in sums) / len(sums)
    down = sum(whole if normalise == "batch" else count for _, whole, count in sums)
    return gamma * sum(part for part, _, _ in sums) / down


def worked():
    """Errors [0.4, 0.1, 0.2, 0.3] of one number per patch, the third patch visible."""
    error = torch.tensor([[0.4, 0.1, 0.2, 0.3]], dtype=torch.float64)
    removed = torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    return error.sqrt()[..., None], torch.zeros(1, 4, 1, dtype=torch.float64), removed


def test_worked_example():
    map = torch.tensor([[[0.2, 0.5], [0.2, 0.8]]], dtype=torch.float64)
    torch.testing.assert_close(unit(map).flatten().tolist(), [0.0, 0.5, 0.0, 1.0])
    weights = object_weights(unit(map), 0.75)[0]
    torch.testing.assert_close(weights.tolist(), [1.0, 1.947734, 1.0, 3.793668], atol=1e-6, rtol=0)
    plain = guided_reconstruction(*worked())
    guided = guided_reconstruction(*worked(), map)
    batch = guided_reconstruction(*worked(), map, normalise="batch")
    assert [float(x) for x in (plain.loss, guided.loss, guided.plain, batch.loss)] == pytest.approx(
        [0.266667, 0.577625, 0.266667, 0.257049], abs=1e-6
    )
    assert float(guided_reconstruction(*worked(), map, normalise="image").loss) == pytest.approx(0.257049, abs=1e-6)


@pytest.mark.parametrize(
    ("temperature", "half", "full"),
    [
        (0.5, 2.718282, 7.389056),
        (0.7, 2.042727, 4.172734),
        (0.75, 1.947734, 3.793668),
        (0.8, 1.868246, 3.490343),
        (1.0, 1.648721, 2.718282),
        (2.0, 1.284025, 1.648721),
    ],
)
def test_table_of_weights(temperature, half, full):
    weights = object_weights(torch.tensor([[0.0, 0.5, 1.0]]), temperature)
    assert weights[0, 0] == 1
    torch.testing.assert_close(weights[0, 1:].tolist(), [half, full], atol=1e-6, rtol=1e-6)
    assert weights.dtype == torch.float32


@pytest.mark.parametrize("normalise", ["none", "batch", "image"])
@pytest.mark.parametrize(("temperature", "gamma"), [(0.75, 1.0), (0.3, 2.5)])
def test_slow_twin(normalise, temperature, gamma):
    prediction, target, removed, map = case()
    map[1] = 0.4  # a constant one among them
    found = guided_reconstruction(prediction, target, removed, map, temperature, gamma, normalise)
    expected = slow(prediction, target, removed, map, temperature, gamma, normalise)
    assert float(found.loss) == pytest.approx(expected, rel=1e-12)
    assert found.blank.tolist() == [False, True, False]
    assert float(found.plain) == pytest.approx(slow(*case()[:3], map * 0, 1.0, 1.0, "none"), rel=1e-12)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e9, float("nan"), float("inf")])
def test_maps_that_prefer_nothing_give_maes_loss(value):
    prediction, target, removed, map = case(dtype=torch.float32)
    found = guided_reconstruction(prediction, target, removed, torch.full_like(map, value), 0.1)
    expected = (((prediction - target) ** 2).mean(-1) * removed).sum() / removed.sum()
    torch.testing.assert_close(found.loss, expected)
    assert torch.equal(found.loss.detach(), found.plain)
    assert found.blank.all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("scaled", [True, False])
def test_one_bad_value_makes_its_image_plain_and_no_other(bad, scaled):
    prediction, target, removed, map = case()
    map = unit(map)
    spoilt = map.clone()
    spoilt[1, 0, 0] = bad
    map[1] = 0
    found = guided_reconstruction(prediction, target, removed, spoilt, scaled=scaled)
    assert torch.equal(found.loss, guided_reconstruction(prediction, target, removed, map, scaled=scaled).loss)
    assert found.loss.isfinite()
    assert found.blank.tolist() == [False, True, False]


def test_weights_are_one_at_the_least_and_exp_at_the_greatest_value():
    map = torch.randn(5, 6, 7) * 10 - 3
    for temperature in (0.3, 0.75, 2.0):
        weights = object_weights(unit(map), temperature)
        assert torch.equal(weights.amin(1), torch.ones(5))
        torch.testing.assert_close(weights.amax(1), torch.full((5,), math.exp(1 / temperature)))
        assert torch.equal(weights.argsort(1), map.flatten(1).argsort(1))


def test_weights_forget_scale_and_offset():
    map = torch.randn(4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(unit(3.5 * map + 20), unit(map), atol=1e-14, rtol=0)


def test_endless_temperature_is_plain():
    prediction, target, removed, map = case()
    found = guided_reconstruction(prediction, target, removed, map, float("inf"))
    assert torch.equal(found.loss, found.plain)


def test_gradient_is_the_published_one():
    prediction, target, removed, map = case()
    prediction.requires_grad_()
    map.requires_grad_()
    guided_reconstruction(prediction, target, removed, map, 0.6, gamma=1.7).loss.backward()
    w = object_weights(unit(map), 0.6)
    expected = 1.7 * (removed * w)[..., None] * 2 * (prediction - target).detach() / (12 * removed.sum())
    torch.testing.assert_close(prediction.grad, expected, atol=1e-15, rtol=1e-12)
    assert not prediction.grad[removed == 0].any()
    assert map.grad is None


def test_visible_patches_do_not_count():
    prediction, target, removed, map = case()
    other = prediction + (1 - removed)[..., None] * 100
    one, two = (guided_reconstruction(p, target, removed, map) for p in (prediction, other))
    assert torch.equal(one.loss, two.loss)
    assert torch.equal(one.plain, two.plain)


def test_order_of_patches_and_flips_change_nothing():
    prediction, target, removed, map = case()
    loss = guided_reconstruction(prediction, target, removed, map).loss
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    flat = map.flatten(1)[:, order]
    moved = guided_reconstruction(prediction[:, order], target[:, order], removed[:, order], flat).loss
    torch.testing.assert_close(moved, loss, rtol=1e-13, atol=0)

    def flip(x):
        return x.unflatten(1, (3, 4)).flip(2).flatten(1, 2)

    flipped = guided_reconstruction(flip(prediction), flip(target), flip(removed), map.flip(2)).loss
    torch.testing.assert_close(flipped, loss, rtol=1e-13, atol=0)


def test_a_scaled_map_of_a_crop_is_taken_as_it_is():
    prediction, target, removed, _ = case()
    background, inside = (torch.full((3, 3, 4), v, dtype=torch.float64) for v in (0.0, 1.0))
    inside[:, 0, 0] = 0.98  # noise within the object is not stretched
    plain = guided_reconstruction(prediction, target, removed, background, scaled=True)
    assert torch.equal(plain.loss, plain.plain)
    found = guided_reconstruction(prediction, target, removed, inside, scaled=True)
    weights = (inside.flatten(1) / 0.75).exp()
    expected = (removed * weights * ((prediction - target) ** 2).mean(-1)).sum() / removed.sum()
    torch.testing.assert_close(found.loss, expected, rtol=1e-13, atol=0)
    assert not found.blank.any()


def test_maps_of_other_sizes_come_to_the_patches():
    prediction, target, removed, _ = case()
    fine = torch.rand(3, 12, 16, dtype=torch.float64)
    found = guided_reconstruction(prediction, target, removed, fine, grid=(3, 4))
    pooled = F.avg_pool2d(unit(fine)[:, None], 4)[:, 0]
    by_hand = guided_reconstruction(prediction, target, removed, pooled, scaled=True)
    torch.testing.assert_close(found.loss, by_hand.loss, rtol=1e-12, atol=0)
    coarse = torch.rand(3, 2, 2)
    expected = F.interpolate(coarse[:, None], size=(6, 4), mode="bilinear")[:, 0]
    torch.testing.assert_close(to_patches(coarse, (6, 4)), expected)
    assert torch.equal(to_patches(fine, (5, 7)), on_grid(fine, (5, 7)))
    mixed = to_patches(torch.rand(1, 2, 9), (4, 3))  # coarser in one direction, finer in the other
    assert mixed.shape == (1, 4, 3)
    assert torch.equal(to_patches(torch.ones(1, 2, 9), (4, 3)), torch.ones(1, 4, 3))


def test_nothing_removed_is_zero():
    prediction, target, _, map = case()
    for normalise in ("none", "batch", "image"):
        found = guided_reconstruction(prediction, target, torch.zeros(3, 12), map, normalise=normalise)
        assert found.loss == 0
        assert found.plain == 0


def test_image_normalised_leaves_out_images_without_removed_patches():
    prediction, target, removed, map = case()
    removed[1] = 0
    rest = [0, 2]
    found = guided_reconstruction(prediction, target, removed, map, normalise="image").loss
    alone = guided_reconstruction(prediction[rest], target[rest], removed[rest], map[rest], normalise="image").loss
    torch.testing.assert_close(found, alone, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_float32_out(dtype):
    prediction, target, removed, map = case(B=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = guided_reconstruction(prediction.to(dtype), target.float(), removed, map.to(dtype))
    assert found.loss.dtype == torch.float32
    exact = guided_reconstruction(
        prediction.to(dtype).double(), target.float().double(), removed, map.to(dtype).double()
    )
    torch.testing.assert_close(found.loss.double(), exact.loss, rtol=1e-6, atol=0)  # float32 sums


def test_temperature_goes_down_half_a_cosine():
    assert temperature_at(0, 100, 2.0, 0.5) == 2.0
    assert temperature_at(50, 100, 2.0, 0.5) == pytest.approx(1.25)
    assert temperature_at(100, 100, 2.0, 0.5) == pytest.approx(0.5)
    assert temperature_at(25, 100, 2.0, 0.5) == pytest.approx(0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert {temperature_at(e, 7, 0.75, 0.75) for e in range(8)} == {0.75}


def test_wrong_settings_say_what_fits():
    prediction, target, removed, map = case()
    with pytest.raises(ValueError, match="use one of none, batch, image"):
        guided_reconstruction(prediction, target, removed, map, normalise="sum")
    for temperature in (0.0, -1.0, 0.001, float("nan")):
        with pytest.raises(ValueError, match=r"use at least 0\.0114"):
            guided_reconstruction(prediction, target, removed, map, temperature)
    assert object_weights(torch.ones(1, 1), 1 / 88).isfinite().all()
    with pytest.raises(ValueError, match=r"autoencoder\.grid"):
        guided_reconstruction(prediction, target, removed, torch.rand(3, 5, 5))
    with pytest.raises(ValueError, match="do not fit"):
        guided_reconstruction(prediction, target[:, :5], removed, map)
    with pytest.raises(ValueError, match="do not fit"):
        guided_reconstruction(prediction, target, removed[:1], map)
