"""SaliencyMix, AttentiveMix and TokenMix: by hand, slow twins, ties, statistics."""

import itertools
import math

import pytest
import torch
from torch import nn

from foveal import chance
from foveal.data.config import ImageConfig
from foveal.maps import make
from foveal.mix import AttentiveMix, SaliencyMix, TokenMix, label_rows
from foveal.mix.attentivemix import CellsDraw, largest_cells
from foveal.mix.saliencymix import SalientDraw, boxes_around, salient_pixels
from foveal.mix.tokenmix import TokenDraw, random_blocks, random_cells
from sources import Fixed

GRIDS = {(14, 14): (28, 28), (8, 8): (32, 32), (7, 5): (21, 20)}
grids = pytest.mark.parametrize("grid", GRIDS)


def rng(seed=0):
    return chance.generator(seed, "mix", 0)


def batch(B, size=(32, 32)):
    return torch.randn(B, 3, *size, generator=torch.Generator().manual_seed(B))


def maps(B, grid, seed=0):
    return torch.rand(B, *grid, generator=torch.Generator().manual_seed(seed))


def own(mixed):
    return mixed.factors[0].own


# -- SaliencyMix


def test_an_odd_box_loses_a_pixel_as_published():
    """10 x 10, lam 1/2, centre (5, 5): a cut of 7 covers rows 2 to 7, so .64 of the image stays."""
    box = boxes_around(torch.tensor([[5, 5]]), torch.tensor([[7, 7]]), (10, 10))
    assert box.tolist() == [[2, 2, 8, 8]]
    map = torch.zeros(2, 10, 10)
    map[:, 5, 5] = 1.0
    draw = SalientDraw(torch.tensor([1, 0]), torch.tensor([[7, 7], [7, 7]]), torch.zeros(2))
    assert torch.allclose(own(SaliencyMix().apply(batch(2, (10, 10)), draw, map)), torch.tensor(0.64))


def test_boxes_one_at_a_time():
    g = torch.Generator().manual_seed(0)
    H, W, B = 23, 40, 1000
    centre = torch.stack([torch.randint(H, (B,), generator=g), torch.randint(W, (B,), generator=g)], -1)
    cut = torch.stack([torch.randint(H + 1, (B,), generator=g), torch.randint(W + 1, (B,), generator=g)], -1)
    for (cy, cx), (h, w), box in zip(
        centre.tolist(), cut.tolist(), boxes_around(centre, cut, (H, W)).tolist(), strict=True
    ):
        expected = [max(cy - h // 2, 0), max(cx - w // 2, 0), min(cy + h // 2, H), min(cx + w // 2, W)]
        assert box == (expected if h > 1 and w > 1 else [0, 0, 0, 0])


def test_boxes_lie_around_the_partners_maximum_each_its_own():
    B, size = 4, (32, 24)
    images, map = batch(B, size), maps(4, size)
    peaks = [(3, 4), (20, 20), (31, 0), (16, 11)]
    for i, (y, x) in enumerate(peaks):
        map[i, y, x] = 2.0
    draw = SalientDraw(torch.tensor([3, 2, 1, 0]), torch.tensor([[8, 6]] * 4), torch.rand(4))
    mixed = SaliencyMix().apply(images, draw, map)
    for i in range(B):
        cy, cx = peaks[3 - i]
        expected = images[i].clone()
        keep = torch.ones(size)
        rows, columns = slice(max(cy - 4, 0), min(cy + 4, 32)), slice(max(cx - 3, 0), min(cx + 3, 24))
        expected[:, rows, columns] = images[3 - i][:, rows, columns]  # cut and pasted at the same place
        keep[rows, columns] = 0
        assert torch.equal(mixed.images[i], expected)
        assert torch.equal(mixed.keep[i, 0], keep)
        assert torch.isclose(own(mixed)[i], keep.mean())


def test_a_coarse_maximum_is_the_middle_of_its_cell():
    map = torch.zeros(3, 4, 7)
    map[0, 0, 0] = map[1, 3, 6] = map[2, 1, 2] = 1.0
    assert salient_pixels(map, torch.zeros(3), (32, 28)).tolist() == [[4, 2], [28, 26], [12, 10]]
    pixels = maps(5, (9, 11))
    got = salient_pixels(pixels, torch.rand(5), (9, 11))
    assert [tuple(p) for p in got.tolist()] == [divmod(int(m.argmax()), 11) for m in pixels]


def test_equal_maxima_are_picked_equally_often():
    map = torch.zeros(1, 6, 6)
    peaks = [(0, 1), (2, 2), (5, 0), (5, 5)]
    for y, x in peaks:
        map[0, y, x] = 255.0
    got = salient_pixels(map.expand(1000, 6, 6), torch.arange(1000) / 1000, (6, 6)).tolist()
    assert [got.count(list(peak)) for peak in peaks] == [250] * 4
    assert salient_pixels(map, torch.zeros(1), (6, 6)).tolist() == [[0, 1]]


def test_without_a_map_or_with_a_blank_one_the_centre_is_anywhere():
    draw = SalientDraw(torch.arange(3999, -1, -1), torch.full((4000, 2), 2), torch.rand(4000, generator=rng()))
    images = torch.zeros(4000, 1, 6, 5)
    one, other = (SaliencyMix().apply(images, draw, map) for map in (None, torch.zeros(4000, 6, 5)))
    assert torch.equal(one.keep, other.keep)
    # centre r covers rows r - 1 and r: row y is covered by centres y and y + 1, the last row by one
    share = (one.keep[:, 0] == 0).any(2).float().mean(0)
    expected = torch.tensor([2, 2, 2, 2, 2, 1]) / 6
    assert ((share - expected).abs() < 5 * (expected * (1 - expected) / 4000).sqrt()).all()


def test_sizes_are_shared_as_the_mode_says_and_areas_are_cutmixs():
    draws = {mode: SaliencyMix(mode=mode).draw(6, (64, 64), rng=rng(1)) for mode in ("batch", "pair", "elem")}
    assert len(draws["batch"].cut.unique(dim=0)) == 1
    assert torch.equal(draws["pair"].cut, draws["pair"].cut.flip(0))
    assert not torch.equal(draws["elem"].cut, draws["elem"].cut.flip(0))
    cut = SaliencyMix(mode="elem").draw(10_000, (1000, 1000), rng=rng()).cut[:, 0].double() / 1000
    assert abs((cut**2).mean() - 0.5) < 5 * math.sqrt(1 / 12 / 10_000) + 2e-3  # 1 - lam is uniform


def test_the_default_map_finds_what_stands_out():
    """Centre-surround on pixels, no network: a bright spot on grey, at another place in each image."""
    config = ImageConfig((48, 48), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bilinear", 1.0)
    pixels = torch.full((4, 3, 48, 48), 100.0)
    spots = [(10, 10), (36, 12), (12, 36), (36, 36)]
    for i, (y, x) in enumerate(spots):
        pixels[i, :, y - 2 : y + 3, x - 2 : x + 3] = 255.0
    images = config.normalise(pixels)
    mixer = SaliencyMix(map=make("centre_surround", nn.Identity(), config))
    for seed in range(5):
        with mixer.on(nn.Identity(), images, torch.arange(4), rng=rng(seed)) as step:
            for i in range(4):
                area = step.mixed.keep[i, 0] == 0
                if area.any():
                    y, x = spots[3 - i]
                    assert area[y - 2 : y + 3, x - 2 : x + 3].any()


# -- AttentiveMix


@grids
def test_the_largest_cells_stay(grid):
    size, B = GRIDS[grid], 5
    images, map = batch(B, size), maps(B, grid)
    N, (rows, columns) = grid[0] * grid[1], (size[0] // grid[0], size[1] // grid[1])
    order = torch.stack([torch.randperm(N) for _ in range(B)])
    for counts in ([1, 2, N, N // 2, N - 1], [3] * 5):
        draw = CellsDraw(torch.arange(B - 1, -1, -1), torch.tensor(grid), torch.tensor(counts), order)
        mixed = AttentiveMix().apply(images, draw, map)
        for i, k in enumerate(counts):
            top = set(sorted(range(N), key=lambda n: -float(map[i].flatten()[n]))[:k])
            for n in range(N):
                r, c = n // grid[1] * rows, n % grid[1] * columns
                shown = images[i] if n in top else images[B - 1 - i]
                assert torch.equal(
                    mixed.images[i, :, r : r + rows, c : c + columns], shown[:, r : r + rows, c : c + columns]
                )
            assert math.isclose(float(own(mixed)[i]), k / N, rel_tol=1e-6)


def test_equal_cells_are_taken_in_the_drawn_order():
    values = torch.tensor([[0.0, 2.0, 0.0, 0.0, 2.0, 0.0]]).expand(3, 6)
    order = torch.tensor([[5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5], [2, 4, 0, 1, 3, 5]])
    for k, expected in ((1, [[4], [1], [4]]), (2, [[1, 4]] * 3), (3, [[1, 4, 5], [0, 1, 4], [1, 2, 4]])):
        kept = largest_cells(values, torch.full((3,), k), order)
        assert [row.nonzero().flatten().tolist() for row in kept] == expected


def test_zeros_of_a_thresholded_map_are_kept_anywhere():
    """Two cells stand out, six are kept: the other four are as often of any row and column."""
    map = torch.zeros(3000, 4, 4)
    map[:, 1, 1] = map[:, 1, 2] = 1.0
    draw = AttentiveMix(share=6 / 16, mode="elem").draw(3000, (8, 8), (4, 4), rng=rng())
    kept = (AttentiveMix().apply(torch.zeros(3000, 1, 8, 8), draw, map).keep[:, 0, ::2, ::2]).mean(0)
    assert kept[1, 1] == kept[1, 2] == 1.0
    others = torch.cat([kept.flatten()[:5], kept.flatten()[7:]])
    assert ((others - 4 / 14).abs() < 5 * math.sqrt(4 / 14 * 10 / 14 / 3000)).all()


def test_the_published_share_is_six_cells_of_49():
    assert set(AttentiveMix(share=6 / 49).draw(4, (14, 14), (7, 7), rng=rng()).count.tolist()) == {6}
    assert set(AttentiveMix(share=6 / 49).draw(4, (28, 28), (14, 14), rng=rng()).count.tolist()) == {24}
    assert set(AttentiveMix(share=1e-3).draw(4, (14, 14), (7, 7), rng=rng()).count.tolist()) == {1}


def test_counts_are_beta_distributed_and_at_least_one():
    draw = AttentiveMix(mode="elem").draw(10_000, (28, 28), (14, 14), rng=rng())
    count = draw.count.double()
    assert 1 <= count.min() <= count.max() <= 196
    assert abs(count.mean() - (98 - 0.5)) < 5 * 196 * math.sqrt(1 / 20 / 10_000) + 0.5  # Beta(2, 2): variance 1/20
    tiny = AttentiveMix(alpha=0.05, mode="elem").draw(1000, (6, 6), (3, 3), rng=rng()).count
    assert tiny.min() == 1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"alpha": 0.0}, "never mixes"),
        ({"share": 0.0}, "share=0.0"),
        ({"share": 1.5}, "share=1.5"),
        ({"mode": "x"}, "mode"),
    ],
)
def test_bad_settings_of_attentivemix_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        AttentiveMix(**settings)


# -- TokenMix


@pytest.mark.parametrize(("grid", "count"), [((14, 14), 112), ((8, 8), 36), ((7, 5), 19), ((2, 2), 2)])
def test_the_partner_gets_half_the_cells_and_a_fourteenth(grid, count):
    """14 x 14: 98 + 14 cells, as released; the same share of other grids."""
    for seed in range(20):
        draw = TokenMix(pattern="random").draw(2, (grid[0] * 2, grid[1] * 2), grid, rng=rng(seed))
        assert draw.mask.sum((1, 2)).tolist() == [count, count]


@grids
def test_blocks_fill_up_to_the_count_and_no_further(grid):
    N = grid[0] * grid[1]
    for count in (1, N // 2, N // 2 + N // 14):
        got = [int(random_blocks(grid, count, rng(seed)).sum()) for seed in range(200)]
        assert max(got) == count
        assert sum(g == count for g in got) > 0.6 * len(got)  # ten tries may fail at the end
        assert min(got) >= 0.5 * count


def test_blocks_are_blocks():
    """Cells of blocks have more neighbours of their kind than random cells, and lie at all places."""
    touching = []
    for draw in (random_blocks, random_cells):
        masks = torch.stack([draw((14, 14), 112, rng(seed)) for seed in range(300)])
        share = masks.float().mean(0)
        assert share.min() > 0.05  # a corner is in fewer blocks than the middle
        assert share.max() < 0.95
        touching.append((masks[:, 1:] == masks[:, :-1]).float().mean())
    assert touching[0] > touching[1] + 0.2


@grids
@pytest.mark.parametrize("pattern", ["blocks", "random"])
def test_labels_count_what_is_seen_sample_by_sample(grid, pattern):
    B, size = 5, GRIDS[grid]
    images, map = batch(B, size), maps(B, grid)
    map[1] = 0.0  # blank: all places alike
    for seed in range(5):
        draw = TokenMix(pattern=pattern).draw(B, size, grid, rng=rng(seed))
        plain = TokenMix(normalise=False).apply(images, draw, map)
        mixed = TokenMix().apply(images, draw, map)
        mask = draw.mask[0]
        for i in range(B):
            T = [m / m.sum() if m.sum() > 0 else torch.full(grid, 1 / (grid[0] * grid[1])) for m in map]
            w_i, w_p = float(T[i][~mask].sum()), float(T[B - 1 - i][mask].sum())
            if i == B - 1 - i:
                w_i, w_p = 1.0, 0.0
            assert math.isclose(float(plain.factors[0].own[i]), w_i, abs_tol=1e-6)
            assert math.isclose(float(plain.factors[0].partner[i]), w_p, abs_tol=1e-6)
            assert math.isclose(float(own(mixed)[i]), w_i / (w_i + w_p), abs_tol=1e-6)
        assert torch.allclose(own(mixed) + mixed.factors[0].partner, torch.ones(B))
        assert torch.equal(plain.images, mixed.images)


def test_the_same_mask_for_the_batch_and_whole_cells():
    draw = TokenMix().draw(4, (32, 32), (8, 8), rng=rng())
    assert all(torch.equal(draw.mask[i], draw.mask[0]) for i in range(4))
    keep = TokenMix().apply(batch(4), draw, None).keep
    assert torch.equal(keep[:, 0, ::4, ::4] == 0, draw.mask)
    assert torch.equal(keep[:, :, ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3), keep)


def half_and_half(B=2):
    mask = torch.zeros(B, 4, 4, dtype=torch.bool)
    mask[:, :2] = True
    return TokenDraw(torch.arange(B - 1, -1, -1), mask)


def test_what_is_hidden_does_not_count():
    """Image 0 is looked at in its upper half, which is hidden, image 1 too, which is shown: the label is image 1's."""
    map = torch.zeros(2, 4, 4)
    map[:, :2] = 1.0
    got = TokenMix(normalise=False).apply(batch(2, (8, 8)), half_and_half(), map).factors[0]
    assert got.own.tolist() == [0.0, 0.0]
    assert got.partner.tolist() == [1.0, 1.0]
    map[1] = 0.0
    map[1, 2:] = 1.0  # nothing of either is visible in image 0, everything in image 1
    got = TokenMix(normalise=False).apply(batch(2, (8, 8)), half_and_half(), map).factors[0]
    assert got.own.tolist() == [0.0, 1.0]
    assert got.partner.tolist() == [0.0, 1.0]
    got = TokenMix().apply(batch(2, (8, 8)), half_and_half(), map).factors[0]
    assert got.own.tolist() == [0.5, 0.5]  # by area where nothing is visible


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_smoothing_as_released(smoothing):
    labels, C, s = torch.tensor([2, 0]), 4, smoothing
    map = maps(2, (4, 4))
    mixed = TokenMix(normalise=False).apply(batch(2, (8, 8)), half_and_half(), map)
    targets = mixed.targets(labels, C, smoothing=s)
    for i, p in ((0, 1), (1, 0)):
        w_i, w_p = float(own(mixed)[i]), float(mixed.factors[0].partner[i])
        expected = [0.0] * C
        for label, weight in ((labels[i], w_i), (labels[p], w_p)):
            for c in range(C):
                expected[c] += s / 2 / C + (weight - s / 2 if c == label else 0.0)
        assert torch.allclose(targets[i], torch.tensor(expected), atol=1e-6)
        assert math.isclose(float(targets[i].sum()), w_i + w_p, abs_tol=1e-6)


def test_smoothing_agrees_with_the_usual_one_at_equal_weights_and_without_mixing():
    labels = torch.tensor([2, 0, 1])
    even = torch.ones(3, 4, 4)
    mixed = TokenMix(normalise=False).apply(batch(3, (8, 8)), half_and_half(3), even)
    mixed = TokenMix(normalise=False).apply(
        batch(3, (8, 8)),
        TokenDraw(mixed.perm, half_and_half(3).mask & torch.tensor([1, 0, 1]).bool()[:, None, None]),
        even,
    )
    usual = mixed.mix_labels(label_rows(labels, 4, 0.1))
    assert torch.allclose(mixed.targets(labels, 4, 0.1), usual, atol=1e-6)
    none = TokenMix(normalise=False, prob=0.0)
    mixed = none.apply(batch(3, (8, 8)), none.draw(3, (8, 8), (4, 4), rng=rng()), even)
    assert torch.allclose(mixed.targets(labels, 4, 0.1), label_rows(labels, 4, 0.1))


def test_a_label_that_cannot_be_seen_is_not_negative():
    map = torch.zeros(2, 4, 4)
    map[:, :2] = 1.0
    mixed = TokenMix(normalise=False).apply(batch(2, (8, 8)), half_and_half(), map)
    targets = mixed.targets(torch.tensor([2, 0]), 4, smoothing=0.2)
    assert targets.min() == 0.0
    assert torch.allclose(targets[0], torch.tensor([0.95, 0.05, 0.0, 0.05]))


def test_several_labels_are_smoothed_before_mixing():
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    mixed = TokenMix(normalise=False).apply(batch(2, (8, 8)), half_and_half(), maps(2, (4, 4)))
    expected = mixed.mix_labels(labels * 0.9 + 0.05)
    assert torch.allclose(mixed.targets(labels, smoothing=0.1, multi_label=True), expected)


def test_a_step_with_one_sigmoid_per_class():
    """The published loss: targets that need not sum to 1."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4))
    labels = torch.tensor([0, 1, 2, 3])
    mixer = TokenMix(map=Fixed(maps(4, (4, 4)) ** 6), cells=4, normalise=False)
    with mixer.on(model, batch(4, (8, 8)), labels, rng=rng()) as step:
        logits = model(step.images)
        loss = step.loss(logits, smoothing=0.1, kind="bce")
    targets = step.mixed.targets(labels, 4, 0.1)
    assert not torch.allclose(targets.sum(-1), torch.ones(4), atol=0.01)
    assert torch.isclose(loss, nn.functional.binary_cross_entropy_with_logits(logits, targets))


def test_an_unknown_pattern_is_named():
    with pytest.raises(ValueError, match="'blocks' or 'random'"):
        TokenMix(pattern="block")


def test_a_share_of_steps_is_left_alone():
    drawn = [TokenMix(prob=0.3).draw(4, (32, 32), (8, 8), rng=rng(i)).mask.any() for i in range(1000)]
    assert abs(sum(map(int, drawn)) / 1000 - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 1000)


def test_every_cell_may_go_to_either():
    seen = torch.stack([TokenMix().draw(2, (14, 10), (7, 5), rng=rng(i)).mask[0] for i in range(200)])
    for r, c in itertools.product(range(7), range(5)):
        assert 0 < seen[:, r, c].float().mean() < 1
