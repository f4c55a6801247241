"""Order: no sample lost or padded, and the same micro-batches for processes and for accumulation."""

import pytest
import torch

from foveal.data.errors import DataError
from foveal.data.order import Micro, evaluation_plan, permutation, step_sizes, training_plan

SIZES = [
    (1, 1, 1, 1),
    (7, 3, 1, 1),
    (64, 8, 2, 2),
    (65, 8, 2, 2),
    (66, 8, 2, 2),
    (70, 8, 1, 4),
    (31, 4, 4, 2),
    (9, 4, 2, 4),
]


def all_micros(n: int, batch: int, world: int, accumulate: int) -> list[Micro]:
    order = permutation(n, 0, 0)
    ranks = [training_plan(order, batch, rank=r, world=world, accumulate=accumulate) for r in range(world)]
    assert len({len(plan) for plan in ranks}) == 1  # a rank with fewer would leave the others waiting
    assert len(ranks[0]) == len(step_sizes(n, batch, world, accumulate)) * accumulate
    return sorted((m for plan in ranks for m in plan), key=lambda m: m.micro)


@pytest.mark.parametrize("sizes", SIZES)
def test_micro_batches_are_the_permutation_cut_in_order(sizes):
    micros = all_micros(*sizes)
    assert [m.micro for m in micros] == list(range(len(micros)))
    assert torch.equal(torch.cat([m.index for m in micros]), permutation(sizes[0], 0, 0))
    assert all(len(m.index) > 0 for m in micros)


@pytest.mark.parametrize("sizes", SIZES)
def test_weighted_mean_of_means_is_the_mean_over_the_step(sizes):
    n, _, world, accumulate = sizes
    values = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    micros, parts = all_micros(*sizes), world * accumulate
    for start in range(0, len(micros), parts):
        step = micros[start : start + parts]
        mean = sum(m.weight * values[m.index].mean() for m in step) / parts
        assert torch.isclose(mean, values[torch.cat([m.index for m in step])].mean(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("n", [64, 71, 66, 9])
def test_accumulation_and_processes_see_the_same(n):
    for world, accumulate in [(4, 1), (2, 2), (1, 4)]:
        for a, b in zip(all_micros(n, 4, world, accumulate), all_micros(n, 4, 1, 4), strict=True):
            assert torch.equal(a.index, b.index)
            assert (a.micro, a.weight) == (b.micro, b.weight)


def test_rank_takes_every_world_th_micro_batch():
    plan = training_plan(torch.arange(24), 3, rank=1, world=2, accumulate=2)
    assert [m.micro for m in plan] == [1, 3, 5, 7]
    assert [m.index.tolist() for m in plan] == [[3, 4, 5], [9, 10, 11], [15, 16, 17], [21, 22, 23]]
    assert [m.weight for m in plan] == [1.0] * 4


def test_last_step_is_split_evenly_and_weighed():
    last = all_micros(8 + 7, 2, 2, 2)[4:]
    assert [len(m.index) for m in last] == [2, 2, 2, 1]
    assert [m.weight for m in last] == [8 / 7, 8 / 7, 8 / 7, 4 / 7]


def test_remainder_too_small_to_share_joins_the_step_before():
    assert step_sizes(16 + 3, 4, 2, 2) == [19]
    assert step_sizes(32 + 3, 4, 2, 2) == [16, 19]
    assert step_sizes(32 + 4, 4, 2, 2) == [16, 16, 4]
    assert max(len(m.index) for m in all_micros(35, 4, 2, 2)) == 5


def test_too_few_samples_for_the_processes():
    with pytest.raises(DataError, match="3 training images for 2 processes x 2"):
        step_sizes(3, 8, 2, 2)


def test_order_changes_with_epoch_and_seed_only():
    assert torch.equal(permutation(50, 1, 2), permutation(50, 1, 2))
    assert not torch.equal(permutation(50, 1, 2), permutation(50, 1, 3))
    assert not torch.equal(permutation(50, 1, 2), permutation(50, 2, 2))
    assert torch.equal(permutation(50, 1, 2).sort().values, torch.arange(50))


@pytest.mark.parametrize(("n", "world"), [(10, 1), (10, 3), (2, 4), (12, 4)])
def test_evaluation_sees_each_sample_once_in_order(n, world):
    ranks = [evaluation_plan(n, 4, rank=r, world=world) for r in range(world)]
    index = [m.index for plan in ranks for m in plan]
    assert torch.equal(torch.cat(index), torch.arange(n))
    shares = [sum(len(m.index) for m in plan) for plan in ranks]
    assert max(shares) - min(shares) <= 1
