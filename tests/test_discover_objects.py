"""TokenCut, MaskCut, LOST and DINO's mass on features: worked examples, slow twins, symmetries, inversion, pieces."""

import math

import numpy as np
import pytest
import torch

import discover_twins as twins
from foveal.maps.discover import (
    boxes_of,
    component_of,
    dino_mass,
    in_pixels,
    largest_component,
    lost,
    maskcut,
    mass_mask,
    object_side,
    tokencut,
)


def scene(grid, *rectangles, seed=0, noise=0.05, dtype=torch.float32):
    """Features of a background and objects (top, left, bottom, right), and the label of each cell."""
    labels = torch.zeros(grid, dtype=torch.long)
    for i, (top, left, bottom, right) in enumerate(rectangles, 1):
        labels[top:bottom, left:right] = i
    return twins.clusters(labels, noise=noise, seed=seed, dtype=dtype), labels


# -- TokenCut


def test_example_of_six_patches():
    y = torch.tensor([-0.141625, -0.141625, 0.484171, -0.141625, -0.038114, 0.307239])
    for sign in (1, -1):  # of the solver
        side = object_side(sign * y[None], (2, 3))
        assert side.seed.tolist() == [2]
        assert side.side.nonzero()[:, 1].tolist() == [2, 5]
        assert torch.equal(side.eigenvector[0], y)
        assert side.inverted.tolist() == [False]


@pytest.mark.parametrize("grid", [(2, 3), (7, 5), (5, 7), (9, 9), (1, 12), (12, 1)])
@pytest.mark.parametrize("foreground", ["smaller", "corners"])
def test_tokencut_is_its_slow_twin(grid, foreground):
    h, w = grid
    for seed in range(4):
        x = twins.random_features(3, h * w, seed=10 * seed + h)
        found = tokencut(x, grid, foreground=foreground)
        for i in range(3):
            y, _, mask, at = twins.tokencut(x[i], grid, by_corners=foreground == "corners")
            if found.degenerate[i] or float(found.gap[i]) < 1e-3 or twins.ties(y):
                continue  # several vectors, or seeds, are right
            assert np.allclose(found.eigenvector[i].numpy(), y, atol=5e-4 * np.abs(y).max())
            assert np.array_equal(found.mask[i].numpy(), mask)
            assert int(found.seed[i]) == at
            assert found.boxes[i].tolist() == twins.box(mask)


def test_most_random_features_of_the_twin_have_no_ties():
    """Else the test above would say nothing."""
    told = []
    for seed in range(4):
        x = twins.random_features(3, 35, seed=10 * seed + 7)
        told += [not twins.ties(twins.tokencut(one, (7, 5))[0]) for one in x]
    assert sum(told) >= 8


@pytest.mark.parametrize("grid", [(10, 8), (7, 5), (14, 14)])
def test_the_planted_object_is_found(grid):
    h, w = grid
    x, labels = scene(grid, (1, 1, h // 2, w // 2 + 1))
    found = tokencut(x, grid)
    assert torch.equal(found.mask[0], labels == 1)
    assert found.boxes.tolist() == [[1, 1, h // 2, w // 2 + 1]]
    assert torch.equal(found.map[0] > 0, labels == 1)
    assert found.mask[0].flatten()[found.seed[0]]
    assert not found.inverted.any()
    assert not found.blank.any()
    assert not found.degenerate.any()


def test_an_object_that_fills_the_picture_is_inverted():
    """The side of the smaller sum of degrees: for more than half of the area that is the border."""
    x, labels = scene((10, 10), (1, 1, 9, 9))  # 64 of 100 cells
    attention = torch.where(labels == 1, 2.0, 1.0).view(1, -1)
    published = tokencut(x, (10, 10))
    assert torch.equal(published.mask[0], labels == 0)
    assert published.inverted.tolist() == [True]
    for mended in (
        tokencut(x, (10, 10), foreground="corners"),
        tokencut(x, (10, 10), foreground="attention", attention=attention),
    ):
        assert torch.equal(mended.mask[0], labels == 1)
        assert mended.inverted.tolist() == [True]
        assert mended.mask[0].flatten()[mended.seed[0]]
        assert torch.equal(mended.map[0] > 0, labels == 1)
        assert torch.equal(mended.eigenvector, -published.eigenvector)
    x, labels = scene((10, 10), (0, 2, 9, 9))  # 63 cells, on one edge
    assert torch.equal(tokencut(x, (10, 10)).mask[0], labels == 0)
    assert torch.equal(tokencut(x, (10, 10), foreground="corners").mask[0], labels == 1)


def test_second_opinions_let_a_small_object_be():
    x, labels = scene((10, 10), (2, 2, 6, 7))
    attention = torch.where(labels == 1, 2.0, 1.0).view(1, -1)
    published = tokencut(x, (10, 10))
    for same in (
        tokencut(x, (10, 10), foreground="corners"),
        tokencut(x, (10, 10), foreground="attention", attention=attention),
    ):
        assert torch.equal(same.mask, published.mask)
        assert not same.inverted.any()
    swapped = tokencut(x, (10, 10), foreground="attention", attention=1 / attention)
    assert torch.equal(swapped.mask[0], labels == 0)
    assert swapped.inverted.tolist() == [True]


def test_variants_of_the_map():
    x = twins.random_features(3, 48, seed=4)
    clipped, whole, mask = (tokencut(x, (6, 8), variant=v) for v in ("clipped", "eigenvector", "mask"))
    y = whole.eigenvector
    assert torch.allclose(clipped.map, (y - y.mean((1, 2), keepdim=True)).clamp_min(0), atol=1e-7)
    assert torch.allclose(whole.map, y - y.amin((1, 2), keepdim=True), atol=1e-7)
    assert torch.equal(mask.map, mask.mask.float())
    assert (clipped.map[clipped.mask] > 0).all()
    for found in (clipped, whole, mask):
        assert found.map.dtype == torch.float32
        assert (found.map >= 0).all()
        assert torch.equal(found.mask, clipped.mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_only_directions_of_features_matter(dtype):
    x, labels = scene((7, 5), (1, 1, 5, 3), dtype=dtype)
    scale = 0.1 + torch.rand(1, 35, 1, generator=torch.Generator().manual_seed(0))
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))[0]
    for changed in (x, x * scale.to(dtype), x @ turn.to(dtype)):
        found = tokencut(changed, (7, 5))
        assert torch.equal(found.mask[0], labels == 1)
        assert found.eigenvector.dtype == found.eigenvalue.dtype == torch.float32


def test_a_binary_graph_knows_only_the_side_of_tau():
    x, _ = scene((7, 5), (1, 1, 5, 3))
    for tau in (0.2, 0.5):
        assert torch.equal(tokencut(x, (7, 5), tau=tau).eigenvector, tokencut(x, (7, 5)).eigenvector)


def test_a_mirrored_image_has_a_mirrored_map():
    x, _ = scene((7, 5), (1, 1, 5, 3), noise=0.3)
    found = tokencut(x, (7, 5))
    for dim in (1, 2):
        mirrored = tokencut(x.unflatten(1, (7, 5)).flip(dim).flatten(1, 2), (7, 5))
        assert torch.equal(mirrored.mask, found.mask.flip(dim))
        assert torch.allclose(mirrored.map, found.map.flip(dim), atol=3e-4 * float(found.map.max()))  # the solver's
    across = tokencut(x.unflatten(1, (7, 5)).transpose(1, 2).flatten(1, 2), (5, 7))
    assert torch.equal(across.mask, found.mask.mT)


def test_the_mask_is_one_piece_and_holds_the_seed():
    x = twins.random_features(8, 80, seed=9)
    found = tokencut(x, (8, 10))
    for mask, seed in zip(found.mask.numpy(), found.seed.tolist(), strict=True):
        assert mask.any()
        assert np.array_equal(mask, twins.piece(mask, divmod(seed, 10)))


def test_a_weighted_graph_is_another_cut():
    x = twins.random_features(1, 35, seed=2)
    y = twins.eigen(twins.weights(x[0], 0.2, 1e-5, binary=False))[1][:, 1].reshape(7, 5)
    found = tokencut(x, (7, 5), binary=False).eigenvector[0].double().numpy()
    assert np.allclose(found * np.sign((found * y).sum()), y, atol=1e-4)
    assert not np.allclose(found, tokencut(x, (7, 5)).eigenvector[0].numpy(), atol=1e-2)


def empty(found, i):
    assert found.degenerate[i]
    assert found.blank[i]
    assert int(found.seed[i]) == -1
    assert not found.inverted[i]
    assert found.boxes[i].tolist() == [0, 0, 0, 0]
    for part in (found.map, found.mask, found.eigenvector):
        assert part is None or not part[i].any()


def test_images_without_an_object():
    """One colour, all different, nothing, not numbers; and one that has an object, undisturbed among them."""
    good, labels = scene((6, 5), (1, 1, 4, 4))
    D = 30
    good = torch.cat([good, torch.zeros(1, 30, D - 16)], 2)
    x = torch.cat(
        [torch.ones(1, 30, D), torch.eye(30)[None], torch.zeros(1, 30, D), torch.full((1, 30, D), math.nan), good]
    )
    for variant in ("clipped", "eigenvector", "mask"):
        found = tokencut(x, (6, 5), variant=variant)
        for i in range(4):
            empty(found, i)
        assert torch.equal(found.mask[4], labels == 1)
        assert not found.degenerate[4]


@pytest.mark.parametrize("find", [tokencut, lost, lambda x, grid: maskcut(x, grid)])
def test_images_of_a_batch_do_not_meet(find):
    x = twins.random_features(5, 63, seed=6)
    x[3] = 1
    together = find(x, (7, 9))
    for i in range(5):
        alone = find(x[i : i + 1], (7, 9))
        for name, value in vars(together).items():
            if value is not None:
                assert torch.equal(value[i], getattr(alone, name)[0]), name


@pytest.mark.parametrize("find", [tokencut, lost, maskcut])
def test_batches_of_none(find):
    assert find(torch.zeros(0, 12, 4), (3, 4)).map.shape == (0, 3, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "soft"}, "variant='soft'"),
        ({"foreground": "larger"}, "foreground='larger'"),
        ({"foreground": "attention"}, "needs the attention"),
        ({"foreground": "attention", "attention": torch.ones(1, 5)}, r"\(1, 5\)"),
        ({"tau": 2.0}, "tau=2.0"),
    ],
)
def test_options_that_are_not_known(options, message):
    with pytest.raises(ValueError, match=message):
        tokencut(torch.ones(1, 6, 2), (2, 3), **options)


@pytest.mark.parametrize("find", [tokencut, lost, maskcut])
def test_features_that_do_not_fill_the_grid(find):
    with pytest.raises(ValueError, match="3 x 3 grid"):
        find(torch.ones(1, 6, 2), (3, 3))


# -- MaskCut


@pytest.mark.parametrize("grid", [(7, 5), (9, 9), (6, 11)])
@pytest.mark.parametrize("seed", range(3))
def test_maskcut_is_its_slow_twin(grid, seed):
    h, w = grid
    at = ((1, 1, 3, 3), (h - 3, 1, h - 1, 2), (1, w - 2, h - 2, w - 1))
    x, _ = scene(grid, *at, seed=seed, noise=0.1)
    found = maskcut(x, grid)
    assert np.array_equal(found.masks[0].numpy(), twins.maskcut(x[0], grid)[0])
    assert found.boxes[0].tolist() == [twins.box(mask) for mask in found.masks[0].numpy()]


def test_maskcut_of_random_features_is_its_slow_twin():
    """Where one round has a tie, that round and those after it have several right answers."""
    told = 0
    for seed in range(20):
        x = twins.random_features(1, 35, seed=seed)
        masks, clear = twins.maskcut(x[0], (7, 5))
        told += clear
        assert not clear or np.array_equal(maskcut(x, (7, 5)).masks[0].numpy(), masks)
    assert told >= 4


def test_several_objects_are_found_one_after_the_other():
    x, labels = scene((12, 10), (1, 1, 5, 5), (7, 2, 11, 5), (2, 7, 4, 9))
    found = maskcut(x, (12, 10), objects=3)
    assert {tuple(mask.flatten().tolist()) for mask in found.masks[0]} == {
        tuple((labels == i).flatten().tolist()) for i in (1, 2, 3)
    }
    assert torch.equal(found.mask[0], labels > 0)
    assert torch.equal(found.map[0], (labels > 0).float())


def test_masks_are_disjoint_and_the_first_is_tokencuts():
    x = twins.random_features(6, 99, seed=8)
    found = maskcut(x, (9, 11), objects=4, tau=0.2)
    assert found.masks.shape == (6, 4, 9, 11)
    assert found.masks.sum(1).max() <= 1
    first = tokencut(x, (9, 11), foreground="corners")
    assert torch.equal(found.masks[:, 0], first.mask)
    assert torch.equal(found.seeds[:, 0], first.seed)
    assert torch.equal(found.inverted[:, 0], first.inverted)
    assert torch.equal(found.eigenvectors[:, 0], first.eigenvector)
    assert torch.equal(found.masks[:, :2], maskcut(x, (9, 11), objects=2, tau=0.2).masks)


def test_a_mask_of_one_cell_in_a_hundred_is_left_out():
    for grid, kept in (((10, 10), False), ((9, 11), True)):  # 1 of 100 and of 99 cells
        x, labels = scene(grid, (1, 1, 6, 6), (7, 7, 8, 8), noise=0.01)
        second = maskcut(x, grid, objects=2).masks[0, 1]
        if kept:
            assert torch.equal(second, labels == 2)
        else:
            assert not second.any()


def test_one_object_is_not_found_twice():
    x, labels = scene((8, 8), (2, 2, 5, 6), noise=0)
    found = maskcut(x, (8, 8), objects=2)
    assert torch.equal(found.masks[0, 0], labels == 1)
    assert not (found.masks[0, 1] & (labels == 1)).any()


def test_nothing_in_one_colour():
    found = maskcut(torch.ones(2, 20, 3), (4, 5))
    assert not found.masks.any()
    assert found.degenerate.all()
    assert found.blank.all()
    assert (found.seeds == -1).all()


def test_no_objects_wanted():
    with pytest.raises(ValueError, match="objects=0"):
        maskcut(torch.ones(1, 6, 2), (2, 3), objects=0)


# -- LOST


def test_lost_by_hand():
    x = torch.tensor([[[1, 0], [1, 0.2], [-1, 0.1], [0.9, -0.1], [-0.8, -0.3], [-1, 1.5]]])
    found = lost(x, (2, 3), candidates=3)
    assert found.seed.tolist() == [0]
    assert torch.allclose(found.map, torch.tensor([[[2.0, 2.04, 0], [1.78, 0, 0]]]))
    assert found.mask.tolist() == [[[True, True, False], [True, False, False]]]
    assert in_pixels(found.boxes, (2, 3), (32, 48), (30, 48)).tolist() == [[0, 0, 30, 32]]


@pytest.mark.parametrize("grid", [(2, 3), (7, 5), (11, 12)])
@pytest.mark.parametrize("candidates", [1, 20, 100])
def test_lost_is_its_slow_twin(grid, candidates):
    for seed in range(3):
        x = twins.random_features(2, grid[0] * grid[1], seed=seed)
        found = lost(x, grid, candidates=candidates)
        for i in range(2):
            M, mask, at = twins.lost(x[i], grid, candidates)
            assert int(found.seed[i]) == at
            assert np.allclose(found.map[i].numpy(), np.maximum(M, 0), rtol=1e-4, atol=1e-4 * np.abs(M).max())
            assert np.array_equal(found.mask[i].numpy(), mask)
            assert found.boxes[i].tolist() == twins.box(mask)


def test_lost_finds_what_resembles_few():
    x, labels = scene((9, 7), (2, 2, 5, 5))
    x = x - 0.5 * x.mean(1, keepdim=True)  # what differs points away
    found = lost(x, (9, 7), candidates=9)
    assert (labels == 1).flatten()[found.seed[0]]
    assert found.mask[0][labels == 1].float().mean() > 0.5


def test_lost_without_an_object():
    found = lost(torch.zeros(1, 6, 3), (2, 3))
    empty(found, 0)
    found = lost(torch.ones(1, 6, 3), (2, 3))  # all alike: everything is the object, and no place is preferred
    assert found.mask.all()
    assert found.blank.all()
    assert found.inverted.all()
    with pytest.raises(ValueError, match="candidates=0"):
        lost(torch.ones(1, 6, 2), (2, 3), candidates=0)


# -- DINO's mass


def test_mass_by_hand():
    attn = torch.tensor([0.05, 0.3, 0.1, 0.35, 0.2])
    assert mass_mask(attn, 0.6).tolist() == [False, True, False, True, False]
    assert mass_mask(7 * attn[None, None], 0.6).tolist() == [[[False, True, False, True, False]]]
    assert mass_mask(attn, 1.0).all()
    assert not mass_mask(torch.zeros(5)).any()


@pytest.mark.parametrize("keep", [0.1, 0.6, 0.95])
def test_the_smallest_patches_are_left_out(keep):
    attn = torch.rand(40, 30, generator=torch.Generator().manual_seed(0)) ** 4
    mask = mass_mask(attn, keep)
    share = (attn * mask).sum(1) / attn.sum(1)
    smallest = torch.where(mask, attn, torch.inf).amin(1)
    assert (share >= keep - 1e-5).all()
    assert (share - smallest / attn.sum(1) <= keep + 1e-5).all()  # without the patch that crosses the line it is less
    assert (torch.where(mask, 0, attn).amax(1) <= smallest).all()


def test_the_largest_piece_of_the_mass():
    attn = torch.full((1, 4, 5), 0.01)
    attn[0, 0, :2], attn[0, 2:, 3:], attn[0, 0, 4] = 1.0, 0.9, 1.5  # pieces of 2, 4 and 1
    found = dino_mass(attn.flatten(1), (4, 5), keep=0.9)
    assert found.boxes.tolist() == [[2, 3, 4, 5]]
    assert found.mask.sum() == 4
    assert found.seed.tolist() == [4]
    assert torch.equal(found.map, attn)
    one = torch.full((1, 3, 3), 0.01)
    one[0, 1, 1] = 1  # a single piece is it, not the background
    assert dino_mass(one.flatten(1), (3, 3)).boxes.tolist() == [[1, 1, 2, 2]]


def test_attention_that_prefers_no_place():
    found = dino_mass(torch.cat([torch.full((1, 6), 0.1), torch.zeros(1, 6)]), (2, 3))
    empty(found, 0)
    empty(found, 1)
    with pytest.raises(ValueError, match="keep=0"):
        mass_mask(torch.ones(3), 0)
    with pytest.raises(ValueError, match="2 x 2 grid"):
        dino_mass(torch.ones(1, 6), (2, 2))


# -- pieces and boxes


def test_pieces_are_flood_fills():
    g = torch.Generator().manual_seed(0)
    side = torch.rand(20, 6, 9, generator=g) < 0.55
    side[3] = False
    seed = torch.randint(54, (20,), generator=g)
    seed[5] = -1
    found, largest = component_of(side, seed), largest_component(side)
    for i, mask in enumerate(side.numpy()):
        at = divmod(int(seed[i]), 9)
        assert np.array_equal(found[i].numpy(), twins.piece(mask, at) if seed[i] >= 0 else np.zeros_like(mask))
        pieces = [twins.piece(mask, (r, c)) for r, c in zip(*np.nonzero(mask), strict=True)]
        best = max(pieces, key=np.sum) if pieces else np.zeros_like(mask)  # the first of the largest
        assert np.array_equal(largest[i].numpy(), best)


def test_cells_at_a_corner_do_not_touch():
    side = torch.eye(3).bool()[None]
    assert component_of(side, torch.tensor([4])).sum() == 1
    assert component_of(side, torch.tensor([1])).sum() == 0


def test_boxes_are_the_extent_of_masks():
    masks = torch.rand(30, 4, 7, 5, generator=torch.Generator().manual_seed(1)) < 0.08
    boxes = boxes_of(masks)
    assert boxes.dtype == torch.int64
    assert boxes.flatten(0, 1).tolist() == [twins.box(mask) for mask in masks.flatten(0, 1).numpy()]
    assert (boxes == 0).all(-1).any()  # some were empty


def test_boxes_in_pixels():
    boxes = torch.tensor([[0, 0, 2, 3], [1, 2, 2, 3], [0, 0, 0, 0]])
    assert in_pixels(boxes, (2, 3), (32, 48)).tolist() == [[0, 0, 32, 48], [16, 32, 32, 48], [0, 0, 0, 0]]
    assert in_pixels(boxes, (2, 3), (32, 48), (20, 40)).tolist() == [[0, 0, 20, 40], [16, 32, 20, 40], [0, 0, 0, 0]]
    cells = torch.tensor([[i, i, i + 1, i + 1] for i in range(3)])  # 7 pixels on 3 cells: edges at 2 1/3 and 4 2/3
    assert in_pixels(cells, (3, 3), (7, 7))[:, [0, 2]].tolist() == [[0, 3], [2, 5], [4, 7]]
