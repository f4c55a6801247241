"""Energy-based pointing game, accuracy and BG-Gap: by hand, by slow twins, and at the edges."""

import math

import pytest
import torch

from foveal.evaluate import balanced_accuracy, bg_gap, correct, coverage, energy_share
from foveal.evaluate.accuracy import accuracy


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_two_by_two_by_hand():
    masks = torch.zeros(1, 4, 4, dtype=torch.bool)
    masks[0, :2, :3] = True  # covers the first patch, half of the second
    attn = torch.tensor([[[0.4, 0.2], [0.3, 0.1]]])
    assert torch.equal(coverage(masks, (2, 2)), torch.tensor([[[1.0, 0.5], [0.0, 0.0]]]))
    assert torch.allclose(energy_share(attn, masks), torch.tensor([0.5]))  # 0.4 + 0.5 * 0.2


@pytest.mark.parametrize(("grid", "size"), [((3, 5), (7, 11)), ((7, 4), (7, 3)), ((4, 4), (32, 32)), ((1, 1), (5, 6))])
def test_coverage_is_exact_on_any_grid(grid, size):
    """Slow twin: every pixel cut into the cells it overlaps, area by area."""
    masks = uniform(2, *size) > 0.5
    (h, w), (H, W) = grid, size
    twin = torch.zeros(2, h, w, dtype=torch.float64)
    for i in range(h):
        for j in range(w):
            for y in range(H):
                for x in range(W):
                    down = max(0.0, min((i + 1) * H / h, y + 1) - max(i * H / h, y))
                    along = max(0.0, min((j + 1) * W / w, x + 1) - max(j * W / w, x))
                    twin[:, i, j] += down * along * masks[:, y, x] * (h * w) / (H * W)
    assert torch.allclose(coverage(masks, grid).double(), twin, atol=1e-6)


@pytest.mark.parametrize("grid", [(2, 2), (3, 5), (9, 7)])
def test_uniform_attention_scores_the_area(grid):
    masks = uniform(3, 8, 12) > 0.3
    found = energy_share(torch.full((3, *grid), 0.25), masks)
    assert torch.allclose(found, masks.float().mean((1, 2)), atol=1e-6)


def test_object_and_background_share_all():
    attn, masks = uniform(4, 3, 5), uniform(4, 16, 16) > 0.5
    assert torch.allclose(energy_share(attn, masks) + energy_share(attn, ~masks), torch.ones(4), atol=1e-6)


def test_everything_or_nothing():
    attn = uniform(2, 3, 3)
    assert torch.allclose(energy_share(attn, torch.ones(2, 9, 9, dtype=torch.bool)), torch.ones(2))
    assert torch.equal(energy_share(attn, torch.zeros(2, 9, 9, dtype=torch.bool)), torch.zeros(2))


def test_scale_does_not_matter_and_no_attention_falls_back_to_area():
    attn, masks = uniform(2, 4, 4), uniform(2, 8, 8) > 0.6
    assert torch.allclose(energy_share(1e-6 * attn, masks), energy_share(attn, masks), atol=1e-6)
    assert torch.allclose(energy_share(0 * attn, masks), masks.float().mean((1, 2)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    attn, masks = uniform(2, 14, 14).to(dtype), uniform(2, 28, 28) > 0.6
    found = energy_share(attn, masks)
    assert found.dtype == torch.float32
    assert torch.equal(found, energy_share(attn.float(), masks))


@pytest.mark.parametrize(
    ("attn", "masks", "message"),
    [
        (torch.ones(2, 4), torch.ones(2, 8, 8), "must be"),
        (torch.ones(2, 4, 4), torch.ones(3, 8, 8), "must be"),
        (-torch.ones(2, 4, 4), torch.ones(2, 8, 8), "not logits"),
        (torch.full((1, 2, 2), math.nan), torch.ones(1, 8, 8), "finite"),
    ],
)
def test_attention_that_is_none(attn, masks, message):
    with pytest.raises(ValueError, match=message):
        energy_share(attn, masks)


def test_accuracy_by_hand():
    logits = torch.tensor([[2.0, 1, 0], [0, 1, 2], [0, 1, 2], [0, 1, 2]])
    labels = torch.tensor([0, 2, 2, 1])
    assert correct(logits, labels).tolist() == [True, True, True, False]
    assert accuracy(logits, labels) == 0.75
    assert balanced_accuracy(logits, labels) == pytest.approx((1 + 0 + 1) / 3)


def test_balanced_equals_plain_accuracy_when_classes_are_even():
    labels = torch.arange(30) % 3
    logits = uniform(30, 3)
    assert balanced_accuracy(logits, labels) == pytest.approx(accuracy(logits, labels), abs=1e-12)


def test_always_the_majority_is_chance_when_balanced():
    labels = torch.tensor([0] * 90 + [1] * 10)
    logits = torch.tensor([[1.0, 0.0]]).expand(100, 2)
    assert accuracy(logits, labels) == pytest.approx(0.9)
    assert balanced_accuracy(logits, labels) == pytest.approx(0.5)


def test_classes_that_do_not_occur_do_not_count():
    assert balanced_accuracy(torch.eye(5)[[1, 4]], torch.tensor([1, 4])) == 1.0


def test_nan_logits_are_wrong():
    logits = torch.tensor([[math.nan, 0.0], [1.0, 0.0]])
    assert correct(logits, torch.tensor([0, 0])).tolist() == [False, True]


def test_nothing_to_average():
    for measure in (accuracy, balanced_accuracy):
        with pytest.raises(ValueError, match="no images"):
            measure(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="2 rows of logits but 3 labels"):
        correct(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))


def test_bg_gap_is_in_points():
    assert bg_gap(0.862, 0.789) == pytest.approx(7.3)  # the challenge's ResNet-50
    assert bg_gap(0.5, 0.5) == 0
    assert bg_gap(0.2, 0.3) == pytest.approx(-10)
    with pytest.raises(ValueError, match=r"same=86\.2 is not an accuracy"):
        bg_gap(86.2, 78.9)
