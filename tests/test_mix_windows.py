"""Windows of cells: sums, ties, copies, against slow twins."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from foveal.mix import windows
from foveal.mix.windows import (
    at,
    at_pixels,
    check_grid,
    extreme_window,
    move_windows,
    pick,
    scaled,
    tied,
    window_boxes,
    window_size,
    window_sums,
)

GRIDS = [(14, 14), (8, 8), (7, 5), (1, 6)]
grids = pytest.mark.parametrize("grid", GRIDS)


def maps(B, grid, seed=0):
    return torch.rand(B, *grid, generator=torch.Generator().manual_seed(seed))


def smooth_maps(B, grid=(14, 14), seed=0):
    """4 x 4 noise, upsampled, of which what exceeds 0.7 max + 0.3 min is kept: zero nearly everywhere."""
    fine = F.interpolate(maps(B, (4, 4), seed)[:, None], grid, mode="bicubic")[:, 0]
    low, high = fine.flatten(1).aminmax(dim=1)
    return (fine - (0.7 * high + 0.3 * low)[:, None, None]).clamp_min(0)


def direct_sums(map, size):
    """Every window on its own, in float64."""
    (h, w), (k_h, k_w) = map.shape[1:], size
    rows = [
        [map[:, r : r + k_h, c : c + k_w].double().sum((1, 2)) for c in range(w - k_w + 1)] for r in range(h - k_h + 1)
    ]
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)


def sizes(grid):
    return itertools.product(range(1, grid[0] + 1), range(1, grid[1] + 1))


# -- sums


@grids
def test_table_sums_are_direct_sums(grid):
    map = maps(3, grid)
    for size in sizes(grid):
        got = window_sums(map, size)
        assert got.shape == (3, grid[0] - size[0] + 1, grid[1] - size[1] + 1)
        assert torch.allclose(got, direct_sums(map, size), rtol=0, atol=1e-13)  # some ulps of a total of 98


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sums_are_wide_whatever_the_map(dtype):
    map = maps(2, (8, 8)).to(dtype)
    assert torch.allclose(window_sums(map, (3, 2)), direct_sums(map, (3, 2)), rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [(0, 1), (9, 1), (1, 6)])
def test_a_window_that_does_not_fit_is_named(size):
    with pytest.raises(ValueError, match="does not fit a grid of 8 x 5"):
        window_sums(maps(1, (8, 5)), size)


@grids
def test_the_sum_at_a_place(grid):
    sums = window_sums(maps(4, grid), (1, 2))
    for r, c in itertools.product(range(sums.shape[1]), range(sums.shape[2])):
        assert torch.equal(at(sums, torch.tensor([[r, c]] * 4)), sums[:, r, c])


# -- the extreme windows


@grids
def test_without_ties_it_is_the_extreme_whatever_the_pick(grid):
    map = maps(20, grid)
    total = map.double().sum((1, 2))
    for size, u in itertools.product([(1, 1), (1, 3), grid], [0.0, 0.5, 1 - 2**-24]):
        sums = window_sums(map, size)
        direct = direct_sums(map, size)
        for largest, best in ((True, direct.amax((1, 2))), (False, direct.amin((1, 2)))):
            place = extreme_window(sums, total, torch.full((20,), u), largest)
            assert torch.allclose(at(direct, place), best, rtol=0, atol=1e-12)


def test_windows_of_zeros_stay_tied_after_the_table():
    """Subtracting corners of a table leaves rounding where the map has zeros; as ties they must not be told apart."""
    map = smooth_maps(300) ** 12  # from 1 to 1e-30: more than the digits of float64
    total = map.double().sum((1, 2))
    rounding = 0
    for k in (3, 5):
        sums = window_sums(map, (k, k))
        empty = direct_sums(map, (k, k)) == 0
        rounding += int((sums[empty] != 0).sum())
        some = empty.flatten(1).any(1)
        assert some.float().mean() > 0.5
        assert (tied(sums, total, largest=False) | ~empty)[some].all()
    assert rounding > 0  # without a tolerance this would be an order


def test_float32_tables_keep_their_ties_too():
    """Where a device has no float64, the table is in float32 and the tolerance follows."""
    map = smooth_maps(300)
    sums, empty = window_sums(map, (3, 3)).float(), direct_sums(map, (3, 3)) == 0
    shaken = sums + (torch.rand(sums.shape, generator=torch.Generator().manual_seed(1)) - 0.5) * 1e-5
    total = map.sum((1, 2))
    big = total > 2  # so that 1e-5 is some ulps of it
    assert big.float().mean() > 0.5
    assert (tied(shaken, total, largest=False) | ~empty)[big].all()


def test_a_constant_map_ties_everywhere():
    for value in (0.0, 1 / 196, 7.3):
        map = torch.full((2, 14, 14), value)
        sums = window_sums(map, (4, 4))
        for largest in (True, False):
            assert tied(sums, map.double().sum((1, 2)), largest).all()


def test_a_difference_that_the_map_can_show_is_no_tie():
    map = torch.ones(1, 14, 14)
    map[0, 5, 6] += 1e-3
    found = tied(window_sums(map, (1, 1)), map.double().sum((1, 2)), largest=True)
    assert found.nonzero().tolist() == [[0, 5, 6]]


# -- picking among ties


def test_every_tied_place_is_picked_equally_often_and_no_other():
    among = torch.tensor([False, True, True, False, True, False, True])
    u = torch.arange(1000) / 1000
    picked = pick(among.expand(1000, 7), u)
    assert torch.bincount(picked, minlength=7).tolist() == [0, 250, 250, 0, 250, 0, 250]
    assert int(pick(among[None], torch.zeros(1))) == 1
    assert int(pick(among[None], torch.full((1,), 1 - 2**-24))) == 6


@pytest.mark.parametrize("n", [1, 2, 3, 144, 224 * 224, 2**24 + 1])
def test_the_largest_pick_is_the_last(n):
    assert int(pick(torch.ones(1, n, dtype=torch.bool), torch.tensor([1 - 2**-24]))) >= n - 1 - n // 2**24
    assert int(pick(torch.zeros(1, n, dtype=torch.bool), torch.tensor([0.5]))) < n


def pastes(map, k, ties, seed=0):
    tie = torch.rand(len(map), generator=torch.Generator().manual_seed(seed))
    tie = tie if ties == "random" else torch.zeros_like(tie)
    return extreme_window(window_sums(map, (k, k)), map.double().sum((1, 2)), tie, largest=False)


@pytest.mark.parametrize("k", [3, 5, 7])
def test_pastes_on_thresholded_maps_do_not_pile_up_in_the_top_rows(k):
    """Picked at random, a paste lands in each row as often as that row has tied windows; picked first, at the top."""
    map = smooth_maps(2000)
    direct = direct_sums(map, (k, k))
    lowest = direct <= direct.amin((1, 2), keepdim=True)
    chance_of_row = lowest.sum(2).double() / lowest.sum((1, 2))[:, None]  # (B, rows)
    rows = pastes(map, k, "random")[:, 0]
    got = torch.bincount(rows, minlength=chance_of_row.shape[1])
    spread = (chance_of_row * (1 - chance_of_row)).sum(0).sqrt()
    assert ((got - chance_of_row.sum(0)).abs() <= 5 * spread + 1e-9).all()
    columns = pastes(map, k, "random")[:, 1]
    chance_of_column = lowest.sum(1).double() / lowest.sum((1, 2))[:, None]
    spread = (chance_of_column * (1 - chance_of_column)).sum(0).sqrt()
    got = torch.bincount(columns, minlength=chance_of_column.shape[1])
    assert ((got - chance_of_column.sum(0)).abs() <= 5 * spread + 1e-9).all()


@pytest.mark.parametrize(("k", "in_top_row"), [(3, 0.99), (5, 0.71), (7, 0.45)])
def test_the_first_of_the_tied_windows_lies_at_the_top(k, in_top_row):
    """The shares of pastes in the top row of windows that the released rule gives on such maps."""
    top = (pastes(smooth_maps(2000), k, "first")[:, 0] == 0).float().mean()
    assert abs(float(top) - in_top_row) < 0.1
    at_random = (pastes(smooth_maps(2000), k, "random")[:, 0] == 0).float().mean()
    assert at_random < top - 0.1


# -- moving pixels


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("grid", "size"), [((14, 14), (28, 28)), ((8, 8), (32, 32)), ((7, 5), (21, 20))])
def test_windows_move_pixel_for_pixel(grid, size, dtype):
    g = torch.Generator().manual_seed(0)
    B, patch = 5, (size[0] // grid[0], size[1] // grid[1])
    images = torch.randn(B, 3, *size, generator=g).to(dtype)
    before, perm = images.clone(), torch.tensor([4, 2, 1, 3, 0])
    for k in ((1, 1), (3, 2), (2, 3), grid):
        places = [
            torch.stack([torch.randint(n - m + 1, (B,), generator=g) for n, m in zip(grid, k, strict=True)], -1)
            for _ in range(2)
        ]
        paste, cut = (scaled(place, patch) for place in places)
        pixels = (k[0] * patch[0], k[1] * patch[1])
        out = move_windows(images, perm, paste, cut, pixels)
        for i in range(B):
            (y, x), (Y, X) = paste[i].tolist(), cut[i].tolist()
            expected = before[i].clone()
            expected[:, y : y + pixels[0], x : x + pixels[1]] = before[perm[i], :, Y : Y + pixels[0], X : X + pixels[1]]
            assert torch.equal(out[i], expected)
        assert window_boxes(paste, pixels)[:, 2:].sub(paste).tolist() == [list(pixels)] * B
    assert torch.equal(images, before)
    assert out.dtype == dtype


def test_channels_last_images_stay_so():
    images = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    zero = torch.zeros(2, 2, dtype=torch.int64)
    out = move_windows(images, torch.tensor([1, 0]), zero, zero + 4, (4, 4))
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_cells_at_pixels():
    cells = torch.tensor([[[1, 2, 3], [4, 5, 6]]])
    assert at_pixels(cells, (4, 3)).tolist() == [[[1, 2, 3], [1, 2, 3], [4, 5, 6], [4, 5, 6]]]


# -- sizes


@pytest.mark.parametrize(
    ("grid", "rows", "columns"),
    [((14, 14), (3, 10), (3, 10)), ((8, 8), (2, 6), (2, 6)), ((7, 7), (1, 5), (1, 5)), ((7, 5), (1, 5), (1, 3))],
)
def test_sides_are_the_whole_cells_between_a_quarter_and_three_quarters(grid, rows, columns):
    u = [i / 840 for i in range(840)]  # divisible by the number of sides
    drawn = [window_size((0.25, 0.75), grid, one) for one in u]
    for axis, (low, high) in enumerate((rows, columns)):
        seen = torch.bincount(torch.tensor([k[axis] for k in drawn]))
        assert seen[:low].sum() == 0
        assert len(seen) == high + 1
        assert (seen[low:] - 840 / (high - low + 1)).abs().max() <= 1  # uniform
    if grid[0] == grid[1]:
        assert all(k_h == k_w for k_h, k_w in drawn)


def test_mean_area_of_the_published_windows():
    """14 x 14 cells, sides 3 to 10: .954, .918, .872, .816, .750, .674, .587, .490 stay, .7577 on average."""
    sides = [window_size((0.25, 0.75), (14, 14), (i + 0.5) / 8)[0] for i in range(8)]
    areas = [1 - k * k / 196 for k in sides]
    assert [round(a, 3) for a in areas] == [0.954, 0.918, 0.872, 0.816, 0.750, 0.673, 0.587, 0.490]
    assert math.isclose(sum(areas) / 8, 0.7577, abs_tol=5e-5)


def test_a_share_that_is_a_whole_number_of_cells_is_not_rounded_down():
    assert 0.29 * 100 < 29  # in floating point
    assert window_size((0.29, 0.29), (100, 100), 0.5) == (29, 29)
    assert window_size((0.01, 0.1), (4, 4), 0.9) == (1, 1)
    assert window_size((1.0, 1.0), (4, 3), 0.0) == (4, 3)


@pytest.mark.parametrize(
    ("grid", "size", "fits"),
    [
        ((14, 14), (224, 224), None),
        ((7, 5), (28, 20), None),
        ((3, 3), (80, 80), (4, 4)),
        ((14, 14), (32, 50), (16, 10)),
    ],
)
def test_a_grid_that_does_not_fit_names_one_that_does(grid, size, fits):
    if fits is None:
        assert check_grid(grid, size) == grid
        return
    with pytest.raises(ValueError, match=r"cells of whole pixels.*cells=\(") as raised:
        check_grid(grid, size)
    assert f"cells={fits}" in str(raised.value)
    assert check_grid(fits, size) == fits


def test_nothing_waits_for_the_device():
    """On the meta device there are no values: whatever asks for one raises."""
    map, images = torch.rand(4, 8, 8, device="meta"), torch.rand(4, 3, 32, 32, device="meta")
    sums = windows.window_sums(map, (3, 2))
    place = windows.extreme_window(sums, map.sum((1, 2)), torch.rand(4, device="meta"), largest=True)
    perm = torch.empty(4, dtype=torch.int64, device="meta")
    assert windows.move_windows(images, perm, place, place, (12, 8)).shape == images.shape
    assert windows.at(sums, place).shape == (4,)
