"""Intervals: agreement with scipy, identities, and no interval where the data cannot tell."""

import math

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats

from foveal.chance import generator
from foveal.stats import (
    Interval,
    bootstrap_means,
    over_images,
    over_seeds,
    paired_over_images,
    paired_over_seeds,
)

RNG = np.random.default_rng(0)
A, B = RNG.normal(0.7, 0.1, 5), RNG.normal(0.6, 0.1, 5)


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_over_seeds_is_scipys_t_interval(level):
    found = over_seeds(A, level=level)
    low, high = scipy_stats.t.interval(level, len(A) - 1, A.mean(), scipy_stats.sem(A))
    assert (found.mean, found.low, found.high) == pytest.approx((A.mean(), low, high), rel=1e-12)
    assert found.over == "5 seeds (Student's t)"


def test_paired_over_seeds_is_scipys_paired_t_test():
    found = paired_over_seeds(A, B)
    twin = scipy_stats.ttest_rel(A, B).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((twin.low, twin.high), rel=1e-12)
    assert found.over == "differences over 5 seeds (Student's t)"


def test_two_seeds_by_hand():
    found = over_seeds([0.0, 2.0])  # t_1 quantile 12.7062, s / sqrt(2) = 1
    assert (found.low, found.high) == pytest.approx((1 - 12.7062047, 1 + 12.7062047), abs=1e-6)


def test_pairing_removes_what_seeds_share():
    shared = np.array([0.0, 5.0, 10.0, 15.0])
    found = paired_over_seeds(shared + np.array([1.0, 1.1, 0.9, 1.0]), shared)
    assert found.mean == pytest.approx(1.0)
    assert found.high - found.low < 0.5 < 10 < over_seeds(shared).high - over_seeds(shared).low


def test_bootstrap_is_its_slow_twin():
    x = RNG.normal(size=13)
    rng = generator(4, "bootstrap", 13)
    draws = torch.randint(13, (50, 13), generator=rng).tolist()
    twin = [sum(x[i] for i in row) / 13 for row in draws]
    assert np.allclose(bootstrap_means(x, 50, 4), twin, rtol=1e-13)


def test_bootstrap_in_pieces_is_the_same(monkeypatch):
    x = RNG.normal(size=13)
    whole = bootstrap_means(x, 50, 4)
    monkeypatch.setattr("foveal.stats.CHUNK", 100)
    assert np.array_equal(bootstrap_means(x, 50, 4), whole)


def test_bootstrap_agrees_with_the_exact_distribution():
    """Accuracy 3 of 10: resampled means are Binomial(10, 0.3) / 10, whose 2.5 and 97.5 % points are 0.1, 0.6."""
    right = np.array([1.0] * 3 + [0.0] * 7)
    exact = scipy_stats.binom.ppf([0.025, 0.975], 10, 0.3) / 10
    found = over_images(right, resamples=20000)
    assert (found.low, found.high) == pytest.approx(tuple(exact), abs=1e-12)
    assert found.mean == pytest.approx(0.3)


def test_bootstrap_agrees_with_scipys_within_its_noise():
    x = RNG.exponential(size=200)
    found = over_images(x, resamples=20000)
    twin = scipy_stats.bootstrap((x,), np.mean, n_resamples=20000, method="percentile", rng=0).confidence_interval
    noise = 5 * 1.6 * x.std() / math.sqrt(200) / math.sqrt(20000) * 2.7  # 5 s.e. of a 2.5 % quantile's estimate
    assert abs(found.low - twin.low) < noise
    assert abs(found.high - twin.high) < noise


def test_an_image_is_drawn_with_all_its_seeds():
    values = RNG.random((3, 40))
    found, mean = over_images(values), over_images(values.mean(0))
    assert (found.mean, found.low, found.high) == pytest.approx((mean.mean, mean.low, mean.high), rel=1e-12)
    assert found.over == "40 images, the 3 seeds as they are (bootstrap, 2,000 resamples)"
    assert mean.over == "40 images, one seed (bootstrap, 2,000 resamples)"


def test_paired_over_images_is_over_the_differences():
    a, b = RNG.random((2, 30)), RNG.random((2, 30))
    found, twin = paired_over_images(a, b), over_images(a - b)
    assert (found.mean, found.low, found.high) == (twin.mean, twin.low, twin.high)
    assert found.over.startswith("differences on 30 images")
    turned = paired_over_images(b, a)
    assert turned.mean == pytest.approx(-found.mean)


def test_scaling_and_shifting_the_values():
    x = RNG.random(50)
    base, moved = over_images(x), over_images(100 * x + 3)
    assert (moved.low, moved.high) == pytest.approx((100 * base.low + 3, 100 * base.high + 3), rel=1e-12)
    assert base.scaled(100).low == pytest.approx(100 * base.low)
    assert base.scaled(100).over == base.over


def test_wider_level_wider_interval_around_the_mean():
    x = RNG.random(50)
    narrow, wide = over_images(x, level=0.5), over_images(x, level=0.99)
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high


def test_seed_decides_the_draws():
    x = RNG.random(50)
    assert over_images(x, seed=1) == over_images(x, seed=1)
    assert over_images(x, seed=1) != over_images(x, seed=2)


@pytest.mark.parametrize(
    ("interval", "why"),
    [
        (over_seeds([0.8]), "not available: one seed"),
        (paired_over_seeds([0.8], [0.7]), "not available: one seed"),
        (over_seeds([0.8, 0.8, 0.8]), "not available: all seeds have the same value"),
        (over_images([0.8]), "not available: one image"),
        (over_images([[0.8], [0.7]]), "not available: one image"),
        (over_images([1.0] * 50), "not available: all images have the same value"),
        (paired_over_images([0.0, 1.0], [0.0, 1.0]), "not available: all images have the same value"),
    ],
)
def test_no_interval_of_zero_width(interval, why):
    assert math.isfinite(interval.mean)
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)
    assert not interval.available
    assert interval.over.startswith(why)
    assert "no interval" in str(interval)


def test_images_without_a_value_are_left_out():
    values = np.array([[0.1, np.nan, 0.5, 0.3], [0.3, 0.9, np.nan, 0.7]])
    found = over_images(values)
    assert found.mean == pytest.approx((0.1 + 0.3 + 0.3 + 0.7) / 4)
    assert found.over.startswith("2 images")
    with pytest.raises(ValueError, match="no image has a finite value"):
        over_images([math.nan])


def test_tensors_bools_and_lists():
    right = torch.tensor([True, False, True, True])
    assert over_images(right) == over_images(right.float().tolist())
    assert isinstance(over_images(right), Interval)
    assert str(Interval(0.5, 0.25, 0.75, 0.95, "")) == "0.5 [0.25, 0.75]"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: over_images([]), "not empty"),
        (lambda: over_images(np.zeros((2, 2, 2))), r"\(S, N\) or \(N,\)"),
        (lambda: over_seeds(np.zeros((2, 2))), r"give \(S,\)"),
        (lambda: over_seeds([0.1, math.nan]), "must be finite"),
        (lambda: paired_over_images([0.1, 0.2], [0.1]), "equal shapes"),
        (lambda: over_seeds([0.1, 0.2], level=95), r"level=95 is not in \(0, 1\)"),
    ],
)
def test_values_that_cannot_be_used(call, message):
    with pytest.raises(ValueError, match=message):
        call()
