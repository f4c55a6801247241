"""The bilateral solver: cells by hand, a dense twin, edges are followed, large objects stay objects."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from foveal.maps.discover import refine
from foveal.maps.discover.bilateral import (
    OFFSET,
    YUV,
    bilateral_solver,
    conjugate_gradients,
    largest_piece,
    occupied_cells,
)


def picture(size, seed=0):
    """Bytes (H, W, 3) of few colours, so that cells are shared."""
    g = np.random.default_rng(seed)
    coarse = g.integers(0, 256, (size[0] // 6 + 1, size[1] // 6 + 1, 3))
    return (np.kron(coarse, np.ones((6, 6, 1)))[: size[0], : size[1]] * 0.9 + g.integers(0, 25, (*size, 3))).astype(
        np.uint8
    )


def dense_twin(pixels, target, sigmas=(16, 16, 8)):
    """The solver with dictionaries and dense matrices, solved exactly. Returns (H, W)."""
    H, W, _ = pixels.shape
    cells, order = {}, []
    for y in range(H):
        for x in range(W):
            Y, U, V = YUV @ pixels[y, x] + OFFSET
            key = (x // sigmas[0], y // sigmas[0], int(Y / sigmas[1]), int(U / sigmas[2]), int(V / sigmas[2]))
            order.append(cells.setdefault(key, len(cells)))
    n = len(cells)
    S = np.zeros((n, H * W))
    S[order, np.arange(H * W)] = 1
    B = 10 * np.eye(n)
    for key, i in cells.items():
        for axis in range(5):
            for step in (-1, 1):
                near = (*key[:axis], key[axis] + step, *key[axis + 1 :])
                if near in cells:
                    B[i, cells[near]] += 1
    m, v = S.sum(1), np.ones(n)
    for _ in range(10):
        v = np.sqrt(v * m / (B @ v))
    m = v * (B @ v)
    system = 256 * (np.diag(m) - np.diag(v) @ B @ np.diag(v)) + np.diag(0.999 * S.sum(1))
    return (S.T @ np.linalg.solve(system, 0.999 * S @ target.ravel())).reshape(H, W)


@pytest.mark.parametrize("size", [(20, 33), (35, 17), (1, 40)])
def test_solver_is_its_dense_twin(size):
    pixels = picture(size)
    target = np.zeros(size)
    target[: size[0] // 2 + 1, 3:15] = 1
    soft = bilateral_solver(pixels, target)
    # conjugate gradients stop at 1e-5 of the right side or after 25 steps
    assert np.allclose(soft, dense_twin(pixels, target), atol=2e-3)
    assert soft.std() > 0.01


def test_gradients_reach_the_solution_of_a_small_system():
    g = np.random.default_rng(0)
    A = g.normal(size=(8, 8))
    A = A @ A.T + 8 * np.eye(8)
    b = g.normal(size=8)
    x = conjugate_gradients(lambda y: A @ y, b, np.zeros(8), A.diagonal())
    assert np.allclose(x, np.linalg.solve(A, b), atol=1e-4)
    assert not conjugate_gradients(lambda y: A @ y, np.zeros(8), np.zeros(8), A.diagonal()).any()


def test_cells_by_hand():
    """Black, white and three greys in one block; a second block to the right of the first."""
    pixels = np.zeros((1, 18, 3), np.uint8)
    pixels[0, 1], pixels[0, 2], pixels[0, 3], pixels[0, 5] = 255, 100, 97, 90
    cell, near = occupied_cells(pixels, 16, 16, 8)
    assert len(set(cell)) == near.shape[0] == 5
    assert cell[0] == cell[4] == cell[15]  # black, in block 0
    assert cell[16] == cell[17] != cell[0]  # black, in block 1
    assert near[cell[0], cell[16]] == near[cell[16], cell[0]] == 1
    assert cell[2] == cell[3] != cell[5]  # 100 / 16 and 97 / 16 are six and some, 90 / 16 is five and some
    assert near[cell[2], cell[5]] == 1
    assert near[cell[0], cell[1]] == near[cell[0], cell[5]] == near[cell[0], cell[0]] == 0
    assert (near != near.T).nnz == 0


def test_answers_stay_between_the_masks_values():
    pixels = picture((40, 30), seed=1)
    target = (np.arange(30) < 12)[None].repeat(40, 0).astype(float)
    soft = bilateral_solver(pixels, target)
    assert soft.min() > -1e-3
    assert soft.max() < 1 + 1e-3
    assert np.allclose(bilateral_solver(pixels, np.ones((40, 30))), 1, atol=1e-6)
    assert np.allclose(bilateral_solver(pixels, np.zeros((40, 30))), 0)


def bright_disc(radius, side=96, centre=(48, 48)):
    y, x = np.mgrid[:side, :side]
    disc = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2
    pixels = np.where(disc[..., None], (220, 190, 60), (40, 70, 110)).astype(np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None], torch.from_numpy(disc)


def iou(a, b):
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize("radius", [20, 30, 44, 54])
def test_edges_are_followed(radius):
    """Also where the object is larger than the rest, which the release takes for the object."""
    pixels, disc = bright_disc(radius)
    coarse = disc[8::16, 8::16][None]  # one cell of sixteen pixels
    refined = refine(pixels, coarse)
    before = torch.nn.functional.interpolate(coarse[:, None].float(), (96, 96))[0, 0] > 0.5
    assert refined.agrees.all()
    assert refined.soft.shape == refined.mask.shape == (1, 96, 96)
    assert iou(refined.mask[0], disc) > max(iou(before, disc), 0.97)


def test_an_answer_that_disagrees_is_left():
    """A mask on one of two things of one colour that touch: the solver takes both, or none."""
    pixels, _ = bright_disc(40)
    coarse = torch.zeros(1, 12, 12, dtype=torch.bool)
    coarse[0, 5, 5] = True  # a small part of a uniform disc
    refined = refine(pixels, coarse)
    assert refined.agrees.tolist() == [False]
    assert refined.mask.sum() == 64  # the patch itself


def test_no_mask_no_answer():
    pixels, _ = bright_disc(20)
    refined = refine(pixels.expand(2, -1, -1, -1), torch.stack([torch.zeros(6, 6), torch.eye(6)]) > 0)
    assert not refined.soft[0].any()
    assert not refined.mask[0].any()
    assert refined.soft[1].any()


def test_largest_piece_without_holes():
    mask = np.zeros((9, 9), bool)
    mask[1:6, 1:6], mask[3, 3], mask[8, 8] = True, False, True
    expected = np.zeros((9, 9), bool)
    expected[1:6, 1:6] = True
    assert np.array_equal(largest_piece(mask), expected)
    assert not largest_piece(np.zeros((3, 3), bool)).any()
    most = np.ones((9, 9), bool)
    most[0] = False
    assert np.array_equal(largest_piece(most), most)
    assert ndimage.label(largest_piece(np.random.default_rng(0).random((9, 9)) < 0.4))[1] == 1


def test_images_of_a_batch_do_not_meet():
    pixels = torch.stack([torch.from_numpy(picture((30, 40), seed)).permute(2, 0, 1) for seed in range(3)])
    masks = torch.rand(3, 5, 6, generator=torch.Generator().manual_seed(0)) < 0.4
    together = refine(pixels, masks)
    for i in range(3):
        alone = refine(pixels[i : i + 1], masks[i : i + 1])
        assert torch.equal(together.soft[i], alone.soft[0])
        assert torch.equal(together.mask[i], alone.mask[0])


@pytest.mark.parametrize(
    ("pixels", "masks", "options", "error", "message"),
    [
        (torch.zeros(1, 3, 8, 8), torch.ones(1, 2, 2), {}, TypeError, "bytes"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.ones(1, 2, 2), {}, ValueError, "must be"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.ones(1, 2, 2), {}, ValueError, "must be"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.ones(1, 2, 2), {"sigma_luma": 0}, ValueError, "above 0"),
    ],
)
def test_inputs_that_do_not_fit(pixels, masks, options, error, message):
    with pytest.raises(error, match=message):
        refine(pixels, masks, **options)
