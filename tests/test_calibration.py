"""Expected calibration error: a slow twin, by hand, and at the edges."""

import math

import pytest
import torch

from foveal.evaluate import expected_calibration_error


def logits_of(confidence, classes=4):
    """Rows whose first class has this probability, the others alike."""
    p = torch.as_tensor(confidence, dtype=torch.float64)[:, None]
    rest = (1 - p).expand(-1, classes - 1) / (classes - 1)
    return torch.cat([p, rest], 1).log()


def slow(logits, labels, bins):
    members = [[] for _ in range(bins)]
    for row, label in zip(logits.float().softmax(1).tolist(), labels.tolist(), strict=True):
        confidence = max(row)
        members[min(int(confidence * bins), bins - 1)].append((confidence, row.index(confidence) == label))
    error = 0.0
    for each in members:
        if each:
            confidence, right = (sum(values) / len(each) for values in zip(*each, strict=True))
            error += len(each) / len(labels) * abs(right - confidence)
    return error


@pytest.mark.parametrize("bins", [1, 10, 15])
@pytest.mark.parametrize("scale", [0.1, 2.0, 50.0])
def test_error_is_its_slow_twin(bins, scale):
    g = torch.Generator().manual_seed(bins)
    logits = scale * torch.randn(200, 5, generator=g)
    labels = torch.where(torch.rand(200, generator=g) < 0.6, logits.argmax(1), torch.randint(5, (200,), generator=g))
    assert expected_calibration_error(logits, labels, bins) == pytest.approx(slow(logits, labels, bins), abs=1e-5)


def test_by_hand():
    """Two bins: .9 and right 3 of 4 times, .5 and right always."""
    logits = logits_of([0.9] * 4 + [0.5] * 4)
    labels = torch.tensor([0, 0, 0, 1] + [0] * 4)
    expected = (4 / 8) * abs(0.75 - 0.9) + (4 / 8) * abs(1 - 0.5)
    assert expected_calibration_error(logits, labels) == pytest.approx(expected, abs=1e-6)


def test_right_as_often_as_it_says():
    labels = torch.tensor([0] * 8 + [1] * 2)
    assert expected_calibration_error(logits_of([0.8] * 10), labels) == pytest.approx(0, abs=1e-6)


def test_logits_within_zero_and_one_are_still_logits():
    """Half a unit of logit is not a probability of one half."""
    logits = torch.tensor([[0.5, 0.0]]).expand(10, 2)
    p = 1 / (1 + math.exp(-0.5))
    assert expected_calibration_error(logits, torch.zeros(10, dtype=torch.int64)) == pytest.approx(1 - p, abs=1e-6)


def test_certainty_shares_the_last_bin():
    """One image of confidence 1 that is wrong, one of .95 that is right: together right half of the time."""
    logits = torch.cat([torch.tensor([[1e4, 0.0, 0, 0]], dtype=torch.float64), logits_of([0.95])])
    found = expected_calibration_error(logits, torch.tensor([1, 0]))
    assert found == pytest.approx(abs(0.5 - 0.975), abs=1e-6)


def test_half_precision_and_unnormalised_logits():
    logits = torch.tensor([[3.0, 1.0], [0.0, 2.0]])
    labels = torch.tensor([0, 0])
    expected = expected_calibration_error(logits, labels)
    assert expected_calibration_error(logits.half(), labels) == pytest.approx(expected)
    assert expected_calibration_error(logits + 100, labels) == pytest.approx(expected)


def test_diverged_models_have_no_confidence():
    assert math.isnan(expected_calibration_error(torch.tensor([[math.nan, 0.0], [1, 0]]), torch.tensor([0, 0])))


@pytest.mark.parametrize(
    ("logits", "labels", "bins", "message"),
    [
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), 15, "no images"),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), 15, "3 labels"),
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), 0, "bins=0"),
    ],
)
def test_what_cannot_be_measured(logits, labels, bins, message):
    with pytest.raises(ValueError, match=message):
        expected_calibration_error(logits, labels, bins)
