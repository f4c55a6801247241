"""Masking, patches and position tables of masked pre-training."""

import pytest
import torch
from timm.layers import build_sincos2d_pos_embed

from foveal.chance import generator
from foveal.pretrain import denormalise, mask_by_map, normalise, patchify, random_masking, sincos_table, unpatchify
from foveal.pretrain.masking import kept


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=generator(seed, "mask"))


def test_worked_example():
    masking = random_masking(torch.tensor([[0.7, 0.1, 0.9, 0.3, 0.5, 0.2]]), 0.75)
    assert masking.keep.tolist() == [[1]]
    assert masking.restore.tolist() == [[4, 0, 5, 2, 3, 1]]
    assert masking.removed.tolist() == [[1, 0, 1, 1, 1, 1]]
    assert masking.removed.dtype == torch.float32


@pytest.mark.parametrize(("patches", "ratio", "keeps"), [(196, 0.75, 49), (49, 0.75, 12), (16, 0.9, 1), (16, 0.6, 6)])
def test_kept_count_is_cut_off_in_floating_point(patches, ratio, keeps):
    masking = random_masking(noise(3, patches), ratio)
    assert masking.keep.shape == (3, keeps)
    assert masking.removed.sum(1).tolist() == [patches - keeps] * 3


def test_a_ratio_that_keeps_nothing_is_an_error_that_says_what_fits():
    with pytest.raises(ValueError, match=r"keeps none of 10 patches.*use at most 0\.8999") as error:
        random_masking(noise(2, 10), 0.9)
    assert "smaller patches" in str(error.value)
    assert kept(10, 0.8999) == 1
    for patches in range(1, 300):  # what the message offers does fit
        with pytest.raises(ValueError, match="use at most") as error:
            kept(patches, 1 - 1e-9)
        assert kept(patches, float(str(error.value).split("use at most ")[1].split(",")[0])) >= 1
    for ratio in (1.0, -0.1, 75):
        with pytest.raises(ValueError, match=r"a value in \[0, 1\)"):
            kept(196, ratio)
    with pytest.raises(ValueError, match=r"\(B, N\)"):
        random_masking(noise(6), 0.5)


def test_restore_undoes_the_shuffle_and_removed_is_what_was_not_kept():
    n = noise(5, 35)
    masking = random_masking(n, 0.6)
    order = n.argsort(1)
    assert torch.equal(masking.restore, order.argsort(1))
    assert torch.equal(n.gather(1, order).gather(1, masking.restore), n)
    assert torch.equal(masking.keep, order[:, : masking.keep.shape[1]])
    assert torch.equal(masking.removed.gather(1, masking.keep), torch.zeros(masking.keep.shape))


def test_ratio_zero_removes_nothing():
    masking = random_masking(noise(2, 7), 0.0)
    assert masking.keep.shape == (2, 7)
    assert masking.removed.sum() == 0


def test_high_map_is_removed_first_with_the_same_budget():
    map = torch.zeros(1, 4, 4)
    map[0, 1:3, 1:3] = torch.tensor([[4.0, 3.0], [2.0, 1.0]])
    n = noise(1, 16)
    masking = random_masking(mask_by_map(map, n), 0.75)
    assert masking.removed.sum() == 12
    assert masking.removed.view(4, 4)[1:3, 1:3].min() == 1
    only_three = random_masking(mask_by_map(map, n), 0.1875 + 1e-6)  # keeps 12, removes 4: the object exactly
    assert torch.equal(only_three.removed.view(1, 4, 4), (map > 0).float())


def test_equal_places_of_a_map_are_decided_by_the_noise():
    n = noise(4, 30)
    blind = mask_by_map(torch.full((4, 5, 6), 0.3), n)
    assert torch.equal(blind.argsort(1), n.argsort(1))
    assert torch.equal(blind.sort(1).values, (torch.arange(30) / 30).expand(4, 30))
    halves = torch.zeros(4, 30)
    halves[:, 15:] = 1
    order = mask_by_map(halves, n).argsort(1)
    assert torch.equal(order[:, :15], n[:, :15].argsort(1))
    assert torch.equal(order[:, 15:], n[:, 15:].argsort(1) + 15)


def test_a_map_that_is_not_finite_masks_at_random():
    n = noise(2, 9)
    map = torch.rand(2, 3, 3)
    map[0, 1, 1] = float("nan")
    order = mask_by_map(map, n).argsort(1)
    assert torch.equal(order[0], n[0].argsort())
    assert torch.equal(order[1], map[1].flatten().argsort())
    with pytest.raises(ValueError, match="on_grid"):
        mask_by_map(torch.rand(2, 6, 6), n)


def test_patches_run_row_by_row_and_channel_last():
    images = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    patches = patchify(images, (2, 3))
    assert patches.shape == (2, 4, 18)
    for n, y, x, ch in [(0, 0, 0, 0), (1, 1, 2, 2), (2, 0, 1, 1), (3, 1, 0, 2)]:
        r, c = divmod(n, 2)
        assert patches[1, n, (y * 3 + x) * 3 + ch] == images[1, ch, r * 2 + y, c * 3 + x]


@pytest.mark.parametrize(
    ("size", "patch", "grid"), [((8, 8), 4, (2, 2)), ((6, 20), (3, 5), (2, 4)), ((4, 12), 4, (1, 3))]
)
def test_patches_go_back_bit_for_bit(size, patch, grid):
    images = torch.randn(3, 3, *size)
    assert torch.equal(unpatchify(patchify(images, patch), grid, patch), images)


def test_patches_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match="not whole patches of 4 x 4"):
        patchify(torch.zeros(1, 3, 8, 10), 4)
    with pytest.raises(ValueError, match="do not fill a 2 x 3 grid"):
        unpatchify(torch.zeros(1, 4, 48), (2, 3), 4)
    with pytest.raises(ValueError, match="patches of 5 x 5"):
        unpatchify(torch.zeros(1, 4, 48), (2, 2), 5)


def test_normalised_patch_worked_example():
    patch = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]], dtype=torch.float64)
    expected = torch.tensor([-1.161895, -0.387298, 0.387298, 1.161895], dtype=torch.float64)
    torch.testing.assert_close(normalise(patch)[0, 0], expected, atol=1e-6, rtol=0)
    assert torch.equal(normalise(torch.full((1, 1, 4), 7.0)), torch.zeros(1, 1, 4))


def test_normalised_patches_get_their_pixels_back():
    patches = torch.rand(2, 5, 48, dtype=torch.float64)
    torch.testing.assert_close(denormalise(normalise(patches), patches), patches, atol=1e-12, rtol=0)


def test_position_worked_example():
    row = sincos_table((3, 4), 8)[1 * 4 + 2]
    expected = torch.tensor([0.909297, 0.019999, -0.416147, 0.999800, 0.841471, 0.010000, 0.540302, 0.999950])
    torch.testing.assert_close(row, expected, atol=1e-6, rtol=0)


def test_position_table_is_timms_with_its_halves_swapped():
    table = build_sincos2d_pos_embed([3, 5], 32, interleave_sin_cos=True)
    torch.testing.assert_close(sincos_table((3, 5), 32), table.roll(16, dims=1), atol=1e-6, rtol=0)


def test_prefix_rows_are_zero():
    table = sincos_table((2, 3), 16, prefix=3)
    assert table.shape == (9, 16)
    assert table.dtype == torch.float32
    assert not table[:3].any()
    assert torch.equal(table[3:], sincos_table((2, 3), 16))
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_table((2, 2), 10)
