"""GridMix: by hand, hole by hole, statistics."""

import math

import pytest
import torch

from foveal import chance
from foveal.mix import GridDraw, GridMix
from foveal.mix.gridmix import grids


def rng(seed=0):
    return chance.generator(seed, "mix", 0)


def of(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def one_grid(size, n, lam0, share=1.0, aspect=1.0, place=(0.0, 0.0)):
    return grids(of(lam0), of(n, dtype=torch.int64), of(share), of(aspect), of(place), size)


def shown(grid, size):
    """Mask of the partner, (H, W), as GridMix applies it."""
    draw = GridDraw(torch.tensor([1, 0]), *(x.expand(2, 2) for x in grid))
    mixed = GridMix().apply(torch.stack([torch.zeros(1, *size), torch.ones(1, *size)]), draw)
    assert torch.equal(mixed.images[0, 0], 1 - mixed.keep[0, 0])
    return mixed.images[0, 0], mixed


def by_holes(size, n, lam0, share, aspect, place):
    """The mask hole by hole, all rules written out."""
    H, W = size
    width = max(int(math.sqrt(int(H * W * share) / aspect)), 1)
    height = max(int(width * aspect), 1)
    top, left = int((H - height) * place[0]), int((W - width) * place[1])
    n = max(min(n, width // 2), 1)
    cell = math.ceil(width / n)
    hole = min(max(int(cell * math.sqrt(1 - lam0)), 1), cell - 1)
    mask = torch.zeros(H, W)
    for i in range(math.ceil(height / cell)):
        for j in range(n):
            rows = range(top + i * cell, min(top + i * cell + hole, top + height))
            columns = range(left + j * cell, min(left + j * cell + hole, left + width))
            for y in rows:
                for x in columns:
                    if 0 <= y < H and 0 <= x < W:
                        mask[y, x] = 1
    return mask


def test_worked_example():
    grid = one_grid((12, 12), 3, 0.5)
    assert [x.tolist() for x in grid] == [[[0, 0]], [[12, 12]], [[4, 4]], [[2, 2]]]
    mask, mixed = shown(grid, (12, 12))
    assert mask[0].tolist() == [1, 1, 0, 0] * 3
    assert mask[:, 0].tolist() == [1, 1, 0, 0] * 3
    assert mixed.factors[0].own.tolist() == [0.75, 0.75]  # not lam0
    assert mixed.targets(torch.tensor([0, 1]), 2).tolist() == [[0.75, 0.25], [0.25, 0.75]]


@pytest.mark.parametrize("size", [(32, 32), (28, 20), (7, 50), (9, 9), (64, 40)])
def test_masks_hole_by_hole(size):
    g = torch.Generator().manual_seed(0)
    beyond = 0
    for _ in range(60):
        u = torch.rand(5, generator=g, dtype=torch.float64)
        n = int(torch.randint(2, 7, (), generator=g))
        values = (float(0.1 + 0.8 * u[0]), float(0.5 + 0.5 * u[1]), float(0.5 + 1.5 * u[2]), (float(u[3]), float(u[4])))
        lam0, share, aspect, place = values
        grid = one_grid(size, n, lam0, share, aspect, place)
        mask, mixed = shown(grid, size)
        assert torch.equal(mask, by_holes(size, n, lam0, share, aspect, place))
        assert torch.allclose(mixed.factors[0].partner, mask.mean(), atol=1e-6)
        beyond += bool((grid[1] > torch.tensor(size)).any())
    assert beyond > 0  # long crops reach beyond the image


def test_a_small_crop_holds_fewer_holes():
    _, crop, cell, hole = one_grid((8, 8), 6, 0.5, share=0.5)
    assert crop.tolist() == [[5, 5]]
    assert cell.tolist() == [[3, 3]]  # two holes, not six
    assert hole.tolist() == [[2, 2]]


def test_a_hole_is_at_least_a_pixel_and_never_the_cell():
    for lam0, expected in ((0.999, 1), (0.001, 3)):
        assert one_grid((12, 12), 3, lam0)[3].tolist() == [[expected, expected]]


def test_random_grids_have_the_settings_that_were_asked_for():
    B, side = 4000, 4096
    draw = GridMix(mode="elem").draw(B, (side, side), rng=rng())
    mixed = torch.arange(B) != torch.arange(B - 1, -1, -1)
    crop, cell, hole = (x[mixed, 1].double() for x in (draw.crop, draw.cell, draw.hole))
    across = (crop / cell).round()
    for n in range(2, 7):  # each with probability 1/5
        assert abs(float((across == n).double().mean()) - 0.2) < 5 * math.sqrt(0.16 / B)
    lam0 = 1 - (hole / cell) ** 2
    assert 0.09 < float(lam0.min()) < 0.11
    assert 0.89 < float(lam0.max()) < 0.91
    assert abs(float(lam0.mean()) - 0.5) < 5 * 0.8 / math.sqrt(12 * B) + 0.002  # holes are whole pixels
    height, width = draw.crop.double().unbind(1)
    assert 0.499 < float((height * width).min()) / side**2 < 0.51
    assert 0.5 <= float((height / width).min() + 1e-3) < 0.52
    assert 1.97 < float((height / width).max()) <= 2.0


def test_beta_weights_make_small_or_large_holes():
    draw = GridMix(mode="elem", alpha=0.2).draw(4000, (1024, 1024), rng=rng())
    lam0 = 1 - (draw.hole[:, 0] / draw.cell[:, 0]) ** 2
    outside = ((lam0 < 0.1) | (lam0 > 0.9)).double().mean()
    assert outside > 0.5  # .61 of Beta(.2, .2) lies there


def test_settings_may_come_as_a_list():
    assert GridMix(holes=[3, 5]) == GridMix(holes=(3, 5))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: GridMix(holes=(0, 3)), "fewest and the most"),
        (lambda: GridMix(holes=(4, 3)), "fewest and the most"),
        (lambda: GridMix(alpha=-1), "positive"),
        (lambda: GridMix(prob=2), "probability"),
    ],
)
def test_bad_settings_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()
