"""What a source gives: maps in one form, those that say nothing marked; maps on other grids."""

import pytest
import torch

from foveal.maps import found, on_grid


def test_maps_that_prefer_no_place_are_zero_and_marked():
    rows = [torch.rand(3, 4), torch.full((3, 4), 0.7), torch.zeros(3, 4), torch.full((3, 4), torch.nan)]
    rows.append(torch.rand(3, 4).index_fill(0, torch.tensor([1]), torch.inf))
    one = found(torch.stack(rows).half())
    assert one.blank.tolist() == [False, True, True, True, True]
    assert one.map.dtype == torch.float32
    assert torch.equal(one.map[1:], torch.zeros(4, 3, 4))
    assert torch.equal(one.map[0], rows[0].half().float())


def test_maps_carry_no_gradient():
    map = torch.rand(2, 3, 3, requires_grad=True)
    one = found(map, map.sum((1, 2))[:, None])
    assert not one.map.requires_grad
    assert one.logits is not None
    assert not one.logits.requires_grad


@pytest.mark.parametrize("shape", [(3, 3), (2, 1, 3, 3)])
def test_a_map_is_one_grid_per_image(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="map per image"):
        found(torch.zeros(shape))


@pytest.mark.parametrize("grid", [(2, 2), (4, 3), (7, 5), (16, 24), (1, 1)])
def test_cells_of_another_grid_are_means_over_their_area(grid: tuple[int, int]):
    map = torch.rand(2, 8, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fine = map.repeat_interleave(grid[0], 1).repeat_interleave(grid[1], 2)  # both grids divide this one
    cells = fine.unflatten(2, (grid[1], 12)).unflatten(1, (grid[0], 8)).mean((2, 4))
    torch.testing.assert_close(on_grid(map, grid), cells, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(on_grid(map, grid).mean((1, 2)), map.mean((1, 2)), rtol=1e-12, atol=1e-12)


def test_half_precision_around_it_changes_nothing():
    map = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = on_grid(map, (5, 7))
    with torch.autocast("cpu", torch.bfloat16):
        inside = on_grid(map, (5, 7))
    assert inside.dtype == torch.float32
    assert torch.equal(inside, plain)
