"""PuzzleMix: the exact cut, block costs and transport against slow twins, by hand, and a training step."""

import copy
import itertools
import math

import numpy as np
import pytest
import timm
import torch

from foveal import chance
from foveal.maps import Found
from foveal.mix import PuzzleDraw, PuzzleMix, graph_cut, transport
from foveal.mix.graph_cut import cheapest, energy
from foveal.mix.puzzlemix import Costs, best_labels, block_costs, prior

SIZES = [(32, 32), (28, 20), (16, 48)]


def rng(seed=0):
    return chance.generator(seed, "mix", 0)


def batch(B, size=(32, 32), dtype=torch.float32, channels=3):
    return torch.randn(B, channels, *size, generator=torch.Generator().manual_seed(B)).to(dtype)


def saliency(B, size=(32, 32), seed=0):
    return torch.rand(B, *size, generator=torch.Generator().manual_seed(seed)) ** 4


def mixes(mixer, B, size=(32, 32), count=6):
    images, map = batch(B, size), saliency(B, size)
    for seed in range(count):
        draw = mixer.draw(B, size, rng=rng(seed))
        yield images, draw, mixer.apply(images, draw, map)


# -- the cut

EXAMPLE = np.array([[[[677, 1138, 1877], [1077, 938, 1077]], [[1077, 1138, 1477], [2277, 1338, 677]]]])
DOWN, RIGHT = np.array([[[190, 229]]]), np.array([[[270], [150]]])


def test_worked_example_of_a_labelling():
    labels = cheapest(EXAMPLE, DOWN, RIGHT)
    assert labels.tolist() == [[[0, 1], [1, 2]]]
    assert energy(EXAMPLE, DOWN, RIGHT, labels) / 4 == 3639.75


def test_worked_example_of_costs():
    priors = prior(torch.tensor([0.5]), 3, 0.2, 2)
    assert torch.allclose(priors, torch.tensor([[0.0693, 0.0347, 0.0693]], dtype=torch.float64), atol=5e-5)
    costs = Costs(
        own=torch.tensor([[[0.1, 0.2], [0.2, 0.5]]], dtype=torch.float64),
        partner=torch.tensor([[[0.4, 0.2], [0.3, 0.1]]], dtype=torch.float64),
        down=torch.tensor([[[0.01, 0.02]]], dtype=torch.float64),
        right=torch.tensor([[[0.03], [0.0]]], dtype=torch.float64),
    )
    assert best_labels(costs, priors, 0.0375).tolist() == [[[0, 1], [1, 2]]]  # a mask of 1 .5 .5 0


def test_worked_example_in_integers(monkeypatch):
    seen = []
    monkeypatch.setattr(graph_cut, "cheapest", lambda *costs: seen.extend(costs) or cheapest(*costs))
    test_worked_example_of_costs()
    for got, expected in zip(seen, (EXAMPLE, DOWN, RIGHT), strict=True):
        assert got.tolist() == expected.tolist()


def random_costs(B, h, w, L, seed, high=1000):
    g = np.random.default_rng(seed)
    ints = [g.integers(-high, high, (B, h, w, L)), g.integers(0, high // 2, (B, h - 1, w))]
    return (*ints, g.integers(0, high // 2, (B, h, w - 1)))


def least(unary, down, right):
    """By trying every labelling."""
    h, w, L = unary.shape
    every = np.array(list(itertools.product(range(L), repeat=h * w))).reshape(-1, h, w)
    same = [np.broadcast_to(x, (len(every), *x.shape)) for x in (unary, down, right)]
    return energy(*same, every).min()


@pytest.mark.parametrize(
    ("h", "w", "L"), [(2, 2, 2), (3, 3, 2), (2, 5, 2), (2, 2, 3), (2, 3, 3), (1, 6, 3), (2, 2, 4), (2, 2, 6)]
)
@pytest.mark.parametrize("high", [3, 1000])
def test_no_labelling_is_cheaper(h, w, L, high):
    costs = random_costs(6, h, w, L, seed=h * w + L, high=high)
    got = energy(*costs, cheapest(*costs))
    for i in range(6):
        assert got[i] == least(*(x[i] for x in costs))


def test_energy_is_the_cost_as_written():
    unary, down, right = random_costs(3, 4, 3, 4, seed=0)
    labels = np.random.default_rng(1).integers(0, 4, (3, 4, 3))
    for i in range(3):
        total = 0.0
        for y, x in itertools.product(range(4), range(3)):
            total += unary[i, y, x, labels[i, y, x]]
            if y < 3:
                total += down[i, y, x] * ((labels[i, y, x] - labels[i, y + 1, x]) / 3) ** 2
            if x < 2:
                total += right[i, y, x] * ((labels[i, y, x] - labels[i, y, x + 1]) / 3) ** 2
        assert math.isclose(energy(unary, down, right, labels)[i] / 9, total, rel_tol=1e-9, abs_tol=1e-6)


def test_images_do_not_meet_in_the_cut(monkeypatch):
    costs = random_costs(7, 8, 8, 3, seed=2)
    together = energy(*costs, cheapest(*costs))
    monkeypatch.setattr(graph_cut, "NODES", 1)  # one by one
    alone = energy(*costs, cheapest(*costs))
    monkeypatch.setattr(graph_cut, "NODES", 3 * 128)  # three at a time, one left over
    some = energy(*costs, cheapest(*costs))
    assert together.tolist() == alone.tolist() == some.tolist()


def test_free_edges_choose_block_by_block_and_dear_ones_a_single_label():
    unary, down, right = random_costs(2, 16, 16, 3, seed=3)
    labels = cheapest(unary, down * 0, right * 0)
    assert (np.take_along_axis(unary, labels[..., None], -1)[..., 0] == unary.min(-1)).all()
    labels = cheapest(unary, down * 0 + 10**5, right * 0 + 10**5)
    assert (labels == unary.sum((1, 2)).argmin(-1)[:, None, None]).all()


def test_what_no_cut_can_do_is_refused():
    unary, down, right = random_costs(1, 3, 3, 2, seed=4)
    with pytest.raises(ValueError, match="negative cost"):
        cheapest(unary, down - 10**4, right)
    with pytest.raises(ValueError, match="scale them down"):
        cheapest(unary * 10**7, down, right)


@pytest.mark.parametrize("beta", [0.0, 1e3, 1e9])
@pytest.mark.parametrize("eta", [0.0, 1e9])
def test_any_weights_fit_into_32_bits(beta, eta):
    costs = Costs(
        *(x / x.sum() for x in (saliency(1, (4, 4), s) for s in (0, 1))),
        *(torch.zeros(1, *s) for s in ((3, 4), (4, 3))),
    )
    labels = best_labels(costs, prior(torch.tensor([0.2]), 3, eta, 4), beta)
    if eta:  # the label that a weight of .2 makes likeliest: chances .04, .32, .64
        assert (labels == 2).all()
    elif beta:
        assert labels.unique().numel() == 1
    else:
        assert torch.equal(labels == 0, costs.own < costs.partner)


# -- block costs


def pooled(image, std, side, n):
    """Means over squares of the image on the scale of pixels: (channels, H/side, W/side)."""
    C, H, W = image.shape
    out = torch.zeros(C, H // side[0], W // side[1], dtype=torch.float64)
    for c, y, x in itertools.product(range(C), range(H // side[0]), range(W // side[1])):
        square = image[c, y * side[0] : (y + 1) * side[0], x * side[1] : (x + 1) * side[1]]
        out[c, y, x] = square.double().mean() * std[c] + 0.3  # any mean cancels
    return out


@pytest.mark.parametrize(
    ("size", "n", "neigh", "side"),
    [((16, 16), 2, 4, (4, 4)), ((16, 16), 4, 4, (4, 4)), ((16, 16), 8, 4, (2, 2)), ((28, 20), 2, 4, (2, 2)),
     ((28, 20), 4, 4, (1, 1)), ((28, 28), 2, 4, (2, 2)), ((8, 16), 2, 3, (2, 2)), ((16, 16), 4, 1, (1, 1))],
)  # fmt: skip
def test_block_costs_one_block_at_a_time(size, n, neigh, side):
    """side: what `neigh` becomes, the largest divisor of a block's side."""
    B, std, smoothness = 3, (0.2, 0.5, 1.0), 0.7
    images, perm = batch(B, size), torch.tensor([2, 1, 0])
    u = saliency(B, (n, n))
    u = u / u.sum((1, 2), keepdim=True)
    got = block_costs(images, torch.tensor(std), u, perm, smoothness, neigh)
    kh, kw = size[0] // n // side[0], size[1] // n // side[1]
    for i in range(B):
        a, b = (pooled(images[j], std, side, n) for j in (i, int(perm[i])))

        def down(P, Q, r, c):
            last, first = P[:, (r + 1) * kh - 1], Q[:, (r + 1) * kh]
            return smoothness * float((last - first)[:, c * kw : (c + 1) * kw].abs().mean())

        def right(P, Q, r, c):
            last, first = P[:, :, (c + 1) * kw - 1], Q[:, :, (c + 1) * kw]
            return smoothness * float((last - first)[:, r * kh : (r + 1) * kh].abs().mean())

        for r, c in itertools.product(range(n), range(n)):
            own, partner = float(u[perm[i], r, c]), float(u[i, r, c])
            for N, y, x in ((down, r, c), (right, r, c)):
                if (N is down and r < n - 1) or (N is right and c < n - 1):  # a lower or right neighbour
                    own += (N(a, b, y, x) + N(a, a, y, x)) / 2
                    partner += (N(b, a, y, x) + N(b, b, y, x)) / 2
                    w = (N(a, b, y, x) + N(b, a, y, x) - N(a, a, y, x) - N(b, b, y, x)) / 2
                    edge = got.down if N is down else got.right
                    assert math.isclose(float(edge[i, r, c]), w, abs_tol=1e-6)
            for N, y, x in ((down, r - 1, c), (right, r, c - 1)):
                if min(y, x) >= 0:  # an upper or left neighbour
                    own += (N(b, a, y, x) + N(a, a, y, x)) / 2
                    partner += (N(a, b, y, x) + N(b, b, y, x)) / 2
            assert math.isclose(float(got.own[i, r, c]), own, abs_tol=1e-6)
            assert math.isclose(float(got.partner[i, r, c]), partner, abs_tol=1e-6)


def test_an_image_with_itself_has_no_edges():
    u = torch.full((2, 4, 4), 1 / 16)
    costs = block_costs(batch(2), torch.ones(3), u, torch.tensor([0, 1]), 1.0)
    assert torch.equal(costs.own, costs.partner)
    assert costs.down.abs().max() < 1e-6
    assert costs.right.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("L", "expected"), [(2, [0.3, 0.7]), (3, [0.09, 0.42, 0.49]), (4, [0.027, 0.189, 0.441, 0.343])]
)
def test_priors_are_binomial(L, expected):
    got = prior(torch.tensor([0.3, 1.0]), L, 0.5, 4)
    assert torch.allclose(got[0], -(0.5 / 16) * (torch.tensor(expected).double() + 1e-8).log(), atol=1e-6)
    assert torch.allclose(got[1, 1:], torch.tensor(-(0.5 / 16) * math.log(1e-8), dtype=torch.float64))


# -- transport


def slow_plan(g, z, t_eps, h, w):
    N, n = h * w, max(h, w)
    cost = np.zeros((N, N), dtype=np.float32)
    for i, j in itertools.product(range(N), range(N)):
        C = ((i // w - j // w) ** 2 + (i % w - j % w) ** 2) / (n - 1) ** 2
        cost[i, j] = np.float32(t_eps) * np.float32(C) - g[i] * z[j]
    for _ in range(n):
        claims = cost.argmin(1)
        winner = {}
        for i in range(N):
            j = int(claims[i])
            if j not in winner or cost[i, j] < cost[winner[j], j]:
                winner[j] = i
        for i in range(N):
            if winner[int(claims[i])] != i:
                cost[i, claims[i]] += 1
    return winner


@pytest.mark.parametrize(("h", "w"), [(2, 2), (4, 4), (8, 8), (3, 5), (1, 4)])
@pytest.mark.parametrize("t_eps", [0.8, 0.05])
def test_plans_one_claim_at_a_time(h, w, t_eps):
    g = saliency(4, (h, w))
    g[3] = 0.1  # many equal costs
    g = g / g.sum((1, 2), keepdim=True)
    z = torch.rand(4, h, w, generator=torch.Generator().manual_seed(1)) < 0.4
    plan = transport.plan(g, z, t_eps)
    for i in range(4):
        winner = slow_plan(g[i].flatten().numpy(), z[i].flatten().float().numpy(), t_eps, h, w)
        assert plan.won[i].nonzero().flatten().tolist() == sorted(winner)
        assert plan.shown[i].tolist() == [winner.get(j, j) for j in range(h * w)]
        assert len(set(winner.values())) == len(winner)  # no block is shown twice


def test_a_salient_block_moves_to_the_place_that_is_seen():
    """2 x 2 blocks, only the first is seen; the last holds nearly all saliency and is two steps (C = 2) away."""
    g, z = torch.tensor([[[0.05, 0.02], [0.03, 0.9]]]), torch.tensor([[[True, False], [False, False]]])
    near = transport.plan(g, z, 0.4)  # .4 * 2 - .9 < -.05
    assert near.shown[0, 0] == 3
    far = transport.plan(g, z, 0.5)  # .5 * 2 - .9 > 0
    assert far.shown[0].tolist() == [0, 1, 2, 3]
    weight = z.float() * 0.5
    assert transport.seen_at_home(weight, near).tolist() == [[[0.0, 0.0], [0.0, 0.5]]]
    assert transport.seen_at_home(weight, far).tolist() == [[[0.5, 0.0], [0.0, 0.0]]]


@pytest.mark.parametrize("grid", [(4, 4), (7, 5), (2, 8)])
def test_what_is_seen_everywhere_or_nowhere_stays(grid):
    g = saliency(3, grid)
    for z in (torch.ones(3, *grid, dtype=torch.bool), torch.zeros(3, *grid, dtype=torch.bool)):
        plan = transport.plan(g / g.sum((1, 2), keepdim=True), z, 0.8)
        assert torch.equal(plan.shown, torch.arange(grid[0] * grid[1]).expand(3, -1))
        assert plan.won.all()


def test_every_place_that_is_seen_shows_a_block_at_least_as_salient():
    g = saliency(16, (8, 8))
    g = g / g.sum((1, 2), keepdim=True)
    z = torch.rand(16, 8, 8, generator=torch.Generator().manual_seed(2)) < 0.5
    plan = transport.plan(g, z, 0.8)
    assert plan.won[z.flatten(1)].all()
    shown = g.flatten(1).gather(1, plan.shown)
    assert (shown >= g.flatten(1))[z.flatten(1)].all()
    assert (plan.shown != torch.arange(64)).any()


def test_many_images_are_planned_in_parts(monkeypatch):
    g, z = saliency(5, (4, 4)), saliency(5, (4, 4), 1) > 0.2
    whole = transport.plan(g, z, 0.8)
    monkeypatch.setattr(transport, "COSTS_AT_ONCE", 2 * 256)
    parts = transport.plan(g, z, 0.8)
    assert torch.equal(whole.shown, parts.shown)
    assert torch.equal(whole.won, parts.won)


def test_cutting_and_joining_is_the_identity():
    images = batch(2, (28, 20))
    blocks = transport.cut(images, (7, 5))
    assert blocks.shape == (2, 35, 3, 4, 4)
    assert torch.equal(blocks[1, 2 * 5 + 3], images[1, :, 8:12, 12:16])
    assert torch.equal(transport.joined(blocks, (7, 5)), images)


# -- the mixer


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("B", [1, 2, 5])
@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_without_transport_pixels_and_labels_follow_the_mask(size, B, mode):
    for images, draw, mixed in mixes(PuzzleMix(transport=False, mode=mode), B, size, count=3):
        keep, (weights,), n = mixed.keep, mixed.factors, int(draw.blocks)
        assert keep.shape == (B, 1, *size)
        assert set(keep.unique().tolist()) <= {0.0, 0.5, 1.0}
        block = keep.unflatten(3, (n, -1)).unflatten(2, (n, -1))
        assert torch.equal(block, block[:, :, :, :1, :, :1].expand_as(block))
        assert torch.allclose(mixed.images, keep * images + (1 - keep) * images[mixed.perm], atol=1e-6)
        assert torch.allclose(weights.own, keep.mean((1, 2, 3)), atol=1e-6)
        assert torch.allclose(mixed.targets(torch.arange(B), B).sum(-1), torch.ones(B))
        assert torch.equal(mixed.visible_own + mixed.visible_partner, torch.ones_like(keep))
        if B % 2:  # the middle is its own partner
            assert torch.equal(mixed.images[B // 2], images[B // 2])
            assert weights.own[B // 2] == 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("t_size", [-1, 2])
def test_transport_shows_whole_blocks_of_both_images_and_says_which(size, t_size):
    B, moved = 4, 0
    place = torch.arange(float(size[0] * size[1])).view(1, *size)  # a pixel's value is its number
    images = torch.stack([place + 10_000 * i for i in range(B)])
    map = saliency(B, size)
    for seed in range(6):
        options = {"n_labels": 2, "beta": 0.0, "std": (1e-5,), "mode": "elem"}  # 2 labels: pixels are copied
        mixer = PuzzleMix(t_size=t_size, t_eps=0.1, **options)
        draw = mixer.draw(B, size, rng=rng(seed))
        mixed = mixer.apply(images, draw, map)
        still = PuzzleMix(transport=False, **options).apply(images, draw, map)
        assert torch.equal(mixed.keep, still.keep)  # transport comes after the mask
        assert torch.equal(mixed.factors[0].own, still.factors[0].own)
        for i in range(B):
            own, partner = images[i].flatten(), images[B - 1 - i].flatten()
            keep, out = mixed.keep[i].flatten() == 1, mixed.images[i].flatten()
            assert torch.isin(out[keep], own).all()
            assert torch.isin(out[~keep], partner).all()
            assert torch.equal(torch.isin(own, out), mixed.visible_own[i].flatten() == 1)
            assert torch.equal(torch.isin(partner, out), mixed.visible_partner[i].flatten() == 1)
            assert len(out.unique()) == len(out)  # nothing twice
            moved += int((out != torch.where(keep, own, partner)).any())
    assert moved > 0


@pytest.mark.parametrize("t_size", [-1, 14])
def test_large_images(t_size):
    """224 pixels: blocks of 14 pixels, which the released neigh_size of 4 does not divide."""
    images, map, ns = batch(2, (224, 224)), saliency(2, (14, 14)), set()
    for seed in range(8):
        draw = PuzzleMix().draw(2, (224, 224), rng=rng(seed))
        mixed = PuzzleMix(t_size=t_size).apply(images, draw, map)
        ns.add(int(draw.blocks))
        assert torch.allclose(mixed.factors[0].own, mixed.keep.mean((1, 2, 3)), atol=1e-6)
        assert torch.allclose(mixed.factors[0].own, mixed.visible_own.mean((1, 2, 3)), atol=1e-6)
    assert 16 in ns


def test_transport_at_half_weights_adds_up():
    for images, _, mixed in mixes(PuzzleMix(mode="elem"), 6):
        own, partner = (x.mean((1, 2, 3)) for x in (mixed.visible_own, mixed.visible_partner))
        assert torch.allclose(own, mixed.factors[0].own, atol=1e-6)
        assert torch.allclose(partner, mixed.factors[0].partner, atol=1e-6)
        assert mixed.images.shape == images.shape


def test_each_image_is_shown_where_it_is_salient():
    images, map = batch(2) * 0.01, torch.zeros(2, 32, 32)
    map[0, :, :16], map[1, :, 16:] = 1.0, 1.0
    draw = PuzzleDraw(torch.tensor([1, 0]), torch.tensor([0.5, 0.5]), torch.tensor([True, True]), torch.tensor(8))
    mixed = PuzzleMix(transport=False, beta=0.1).apply(images, draw, map)
    assert torch.equal(mixed.images[0, :, :, :16], images[0, :, :, :16])
    assert torch.equal(mixed.images[0, :, :, 16:], images[1, :, :, 16:])
    assert mixed.factors[0].own.tolist() == [0.5, 0.5]
    assert torch.equal(mixed.images[1], mixed.images[0])  # seen from the partner


@pytest.mark.parametrize(("lam", "own"), [(0.0, 0.0), (1.0, 1.0)])
def test_a_strong_prior_follows_the_requested_weight(lam, own):
    images = batch(4)
    draw = PuzzleDraw(torch.arange(3, -1, -1), torch.full((4,), lam), torch.ones(4, dtype=torch.bool), torch.tensor(8))
    mixed = PuzzleMix(eta=100.0).apply(images, draw, saliency(4))
    assert torch.equal(mixed.factors[0].own, torch.full((4,), own))
    assert torch.equal(mixed.images, images if own else images.flip(0))


@pytest.mark.parametrize("map", [None, torch.zeros(4, 8, 8), torch.full((4, 8, 8), torch.nan)])
def test_without_a_preference_every_block_counts_alike(map):
    images = batch(4)
    mixer = PuzzleMix()
    draw = mixer.draw(4, (32, 32), rng=rng())
    assert torch.equal(mixer.apply(images, draw, map).images, mixer.apply(images, draw, torch.ones(4, 5, 3)).images)


def test_maps_on_any_grid_are_block_means():
    images, map = batch(4), saliency(4, (16, 16))
    mixer = PuzzleMix(mode="elem")
    for seed in range(4):
        draw = mixer.draw(4, (32, 32), rng=rng(seed))
        fine = map.repeat_interleave(2, 1).repeat_interleave(2, 2)
        assert torch.equal(mixer.apply(images, draw, map).images, mixer.apply(images, draw, fine).images)
        assert torch.equal(mixer.apply(images, draw, map).keep, mixer.apply(images, draw, 1e-3 * map).keep)


def test_images_that_are_not_numbers_do_not_stop_the_step():
    images = batch(4)
    images[0, 0, 3, 3] = torch.nan
    mixer = PuzzleMix()
    mixed = mixer.apply(images, mixer.draw(4, (32, 32), rng=rng()), saliency(4))
    assert mixed.keep.isfinite().all()


def test_probability_zero_never_mixes_and_asks_for_no_map():
    mixer = PuzzleMix(prob=0.0)
    for images, draw, mixed in mixes(mixer, 4, count=2):
        assert not mixer.follows(draw)
        assert torch.equal(mixed.images, images)
        assert torch.equal(mixed.factors[0].own, torch.ones(4))


def test_given_images_stay_and_applying_takes_no_chance():
    mixer, images, map, g = PuzzleMix(mode="elem"), batch(4), saliency(4), rng()
    draw = mixer.draw(4, (32, 32), rng=g)
    before, state, everybody = images.clone(), g.get_state(), torch.get_rng_state()
    one, two = (mixer.apply(images, draw, map) for _ in range(2))
    assert torch.equal(one.images, two.images)
    assert torch.equal(images, before)
    assert images._version == map._version == 0
    assert torch.equal(g.get_state(), state)
    assert torch.equal(torch.get_rng_state(), everybody)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    mixer, images, map = PuzzleMix(), batch(4, dtype=dtype), saliency(4)
    draw = mixer.draw(4, (32, 32), rng=rng(1))
    got = mixer.apply(images, draw, map.to(dtype))
    assert got.images.dtype == dtype
    assert got.keep.dtype == got.factors[0].own.dtype == torch.float32
    same = mixer.apply(images.float(), draw, map.to(dtype))
    assert torch.equal(got.images, same.images.to(dtype))


def test_autocast_changes_nothing():
    mixer, images, map = PuzzleMix(mode="elem"), batch(6), saliency(6)
    for seed in range(4):
        draw = mixer.draw(6, (32, 32), rng=rng(seed))
        plain = mixer.apply(images, draw, map)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            auto = mixer.apply(images, draw, map)
        assert torch.equal(auto.images, plain.images)
        assert torch.equal(auto.factors[0].own, plain.factors[0].own)


@pytest.mark.parametrize(
    ("size", "allowed"), [((32, 32), {2, 4, 8, 16}), ((28, 20), {2, 4}), ((6, 64), {2}), ((224, 224), {2, 4, 8, 16})]
)
def test_blocks_are_drawn_among_those_that_divide_the_image(size, allowed):
    drawn = [int(PuzzleMix().draw(2, size, rng=rng(seed)).blocks) for seed in range(200)]
    assert set(drawn) == allowed
    for n in allowed:
        share = 1 / len(allowed)
        assert abs(drawn.count(n) / 200 - share) <= 5 * math.sqrt(share * (1 - share) / 200)


def test_labels_are_balanced_on_average():
    """Over many pairs with their roles exchanged neither image is preferred."""
    own = [mixed.factors[0].own for _, _, mixed in mixes(PuzzleMix(mode="elem"), 32, count=8)]
    own = torch.cat(own).double()
    assert abs(float(own.mean()) - 0.5) < 5 * float(own.std()) / math.sqrt(len(own))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_draw_gives_the_same_on_a_gpu():
    for images, draw, here in mixes(PuzzleMix(n_labels=2, mode="elem"), 6):
        there = PuzzleMix(n_labels=2).apply(images.cuda(), draw, saliency(6).cuda())
        same = (here.keep == there.keep.cpu()).float().mean()  # costs in another order of sums may tip a block
        assert same > 0.99


# -- a training step


class Fake:
    """A source that remembers what it was asked."""

    model = None

    def __init__(self):
        self.asked = []

    def __call__(self, images, labels=None, given=None):
        self.asked.append((images, labels))
        return Found(saliency(len(images), tuple(images.shape[2:])), torch.zeros(len(images), dtype=torch.bool))


def vit(**settings):
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5, **settings
    )


def test_a_step_is_draw_maps_apply():
    source, model, images, labels = Fake(), vit(), batch(5), torch.arange(5)
    mixer = PuzzleMix(map=source)
    with mixer.on(model, images, labels, rng=rng(3)) as step:
        loss = step.loss(model(step.images))
    loss.backward()
    assert len(source.asked) == 1
    assert source.asked[0][0] is images
    assert source.asked[0][1] is labels
    draw = mixer.draw(5, (32, 32), rng=rng(3))
    expected = PuzzleMix(std=(0.5, 0.5, 0.5)).apply(images, draw, saliency(5))  # this model's deviation
    assert torch.equal(step.images, expected.images)
    assert torch.equal(step.targets(5), expected.targets(labels, 5))
    assert step.measures()["map_blank"] == 0


def test_input_gradients_of_the_model_that_trains():
    model, images, labels = vit(), batch(4), torch.arange(4)
    before = copy.deepcopy(model.state_dict())
    with PuzzleMix().on(model, images, labels, rng=rng(1)) as step:
        assert model.training
        assert all(p.grad is None for p in model.parameters())
        step.loss(model(step.images)).backward()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    with PuzzleMix().on(model, images, labels, rng=rng(1), trusted=False) as untrusted:
        model(untrusted.images)
    assert not torch.equal(untrusted.images, step.images)


def test_a_mixer_says_its_settings_and_can_be_copied():
    mixer = PuzzleMix(n_labels=2, std=[0.2, 0.2, 0.2])
    assert mixer.std == (0.2, 0.2, 0.2)
    assert copy.deepcopy(mixer) == mixer
    assert "n_labels=2" in repr(mixer)
    assert "_" not in repr(mixer).replace("n_labels", "").replace("neigh_size", "").replace("t_eps", "").replace(
        "t_size", ""
    ).replace("input_gradient", "")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PuzzleMix(alpha=0), "never mixes"),
        (lambda: PuzzleMix(beta=-1), "beta=-1 is a weight"),
        (lambda: PuzzleMix(eta=float("inf")), "eta=inf"),
        (lambda: PuzzleMix(n_labels=1), "2"),
        (lambda: PuzzleMix(neigh_size=0), "neigh_size=0"),
        (lambda: PuzzleMix(t_size=0), "-1 for whole blocks"),
        (lambda: PuzzleMix(std=(0.1, 0.0)), "above 0"),
        (lambda: PuzzleMix().draw(2, (33, 32), rng=rng()), "33 x 32 pixels cannot be cut"),
        (lambda: next(mixes(PuzzleMix(std=(0.1, 0.2)), 2)), "images of 3 channels"),
        (lambda: PuzzleMix().apply(batch(3), PuzzleMix().draw(2, (32, 32), rng=rng())), "2 images given 3"),
    ],
)
def test_bad_settings_and_inputs_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_one_channel_needs_its_deviation():
    images = batch(2, channels=1)
    draw = PuzzleMix().draw(2, (32, 32), rng=rng())
    with pytest.raises(ValueError, match="one deviation per channel"):
        PuzzleMix().apply(images, draw)
    assert PuzzleMix(std=(0.3,)).apply(images, draw).images.shape == images.shape
