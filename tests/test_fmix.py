"""FMix: by hand, against NumPy's FFT, edges, statistics."""

import numpy as np
import pytest
import torch
from scipy import stats

from foveal import chance
from foveal.mix import FMix, MaskDraw
from foveal.mix.fmix import brightest, grey_images

FORMS = ("released", "intended")
SIZES = [(4, 4), (5, 7), (7, 5), (6, 9), (32, 20), (3, 40), (40, 3)]


def rng(seed=0):
    return chance.generator(seed, "mix", 0)


def noise(count, size, form, seed=0):
    rows = 2 if form == "released" else size[0]
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, rows, size[1] // 2 + 1 + size[1] % 2, 2, generator=g, dtype=torch.float64)


def min_max(grey):
    return (grey - grey.min()) / (grey.max() - grey.min())


def test_worked_example():
    Z = torch.tensor([[[1, 2], [3, -1], [0.5, 1]], [[-1, 1], [2, 0], [1, 1]]], dtype=torch.float64)
    grey = grey_images(Z[None], (4, 4), 3.0)
    expected = [
        [1, 0.6946, 0.6897, 0.9951],
        [0.8392, 0.5929, 0.3219, 0.5682],
        [0.8621, 0.2808, 0, 0.5813],
        [0.9367, 0.4146, 0.4195, 0.9416],
    ]
    assert torch.allclose(min_max(grey[0]), torch.tensor(expected, dtype=torch.float64), atol=5e-5)  # four digits given
    mask = brightest(grey, torch.tensor([6]))
    assert mask[0].nonzero().tolist() == [[0, 0], [0, 3], [1, 0], [2, 0], [3, 0], [3, 3]]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decay", [0.0, 1.5, 3.0])
def test_grey_images_against_numpy(size, form, decay):
    H, W = size
    Z = noise(2, size, form)
    got = grey_images(Z, size, decay, form)
    columns = np.fft.fftfreq(W)[: W // 2 + (2 if W % 2 else 1)]
    for k in range(2):
        S = np.zeros(Z.shape[1:])
        for v in range(Z.shape[1]):
            for u, fx in enumerate(columns):
                f = np.sqrt(np.fft.fftfreq(H)[v] ** 2 + fx**2)
                S[v, u] = Z[k, v, u].numpy() / max(f, 1 / max(H, W)) ** decay
        spectrum = S[0] + 1j * S[1] if form == "released" else S[..., 0] + 1j * S[..., 1]
        assert np.allclose(got[k].numpy(), np.fft.irfft2(spectrum, s=size), atol=1e-12 * max(H, W) ** decay)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_the_mask_is_the_brightest_pixels_as_many_as_the_weight_says(size, form):
    N, seen = size[0] * size[1], set()
    for seed in range(12):
        draw = FMix(form=form).draw(4, size, rng=rng(seed))
        ones, wanted = int(draw.mask.sum()), float(draw.lam[0]) * N
        assert draw.mask.shape == (1, *size)
        assert abs(ones - wanted) < 1 + 1e-4
        seen.add("up" if ones > wanted else "down")
    assert seen == {"up", "down"}
    grey = grey_images(noise(3, size, form), size, 3.0, form)
    for i, count in enumerate((0, N // 3, N)):
        mask = brightest(grey, torch.full((3,), count))[i]
        assert int(mask.sum()) == count
        if 0 < count < N:
            assert grey[i][mask].min() >= grey[i][~mask].max()


def test_every_image_has_its_own_mask_where_asked():
    for mode, masks in (("batch", 1), ("pair", 4), ("elem", 7)):
        draw = FMix(mode=mode).draw(7, (32, 20), rng=rng())
        assert draw.mask.shape == (masks, 32, 20)
        ones = draw.mask.sum((1, 2))[draw.shared]
        mixed = [i for i in range(7) if i != 3]
        assert ((ones - draw.lam * 640).abs()[mixed] < 1 + 1e-3).all()


def test_a_soft_edge_one_rank_at_a_time():
    grey = grey_images(noise(3, (9, 8), "intended"), (9, 8), 3.0, "intended")
    count, soft = torch.tensor([30, 5, 72]), torch.tensor([10, 1, 0])
    got = brightest(grey, count, soft)
    for k in range(3):
        n, s = int(count[k]), int(soft[k])
        order = sorted(range(72), key=lambda p: -float(grey[k].flatten()[p]))
        expected = np.zeros(72)
        expected[order[: n + s]] = 1.0
        expected[order[n - s :]] = 0.0
        expected[order[n - s : n + s]] = np.linspace(1, 0, 2 * s)
        assert np.allclose(got[k].flatten().numpy(), expected, atol=1e-12)
        assert np.isclose(expected.sum(), n)


@pytest.mark.parametrize("max_soft", [0.1, 0.5])
def test_soft_masks_weigh_pixels_and_keep_the_label(max_soft):
    images = torch.randn(6, 3, 12, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for seed in range(8):
        mixer = FMix(max_soft=max_soft, mode="elem")
        mixed = mixer.apply(images, mixer.draw(6, (12, 10), rng=rng(seed)))
        keep = mixed.keep.double()
        assert torch.allclose(mixed.images, keep * images + (1 - keep) * images.flip(0), atol=1e-12)
        assert ((keep > 0) & (keep < 1)).any()
        assert ((mixed.factors[0].own - mixed.keep.mean((1, 2, 3))).abs() <= 1 / 120 + 1e-6).all()


def test_a_weight_of_one_or_zero_gives_one_image():
    images, mask = torch.randn(2, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.bool)
    perm, shared = torch.tensor([1, 0]), torch.tensor([0, 0])
    swapped = FMix().apply(images, MaskDraw(perm, torch.zeros(2), mask, shared))
    assert torch.equal(swapped.images, images.flip(0))
    assert torch.equal(swapped.targets(torch.arange(2), 2), torch.eye(2).flip(0))
    same = FMix().apply(images, MaskDraw(perm, torch.ones(2), mask, shared))  # what is not mixed has no use of a mask
    assert torch.equal(same.images, images)
    assert torch.equal(same.keep, torch.ones(2, 1, 4, 4))


def edges_per_row(**settings):
    mask = FMix(mode="elem", **settings).draw(64, (48, 64), rng=rng()).mask
    return (mask[..., 1:] != mask[..., :-1]).sum(-1)  # (64, 48)


def test_a_row_of_a_released_mask_is_one_wave():
    assert edges_per_row().max() == 2
    assert edges_per_row(decay=1.0).max() == 2
    assert edges_per_row(form="intended").max() > 2


def test_more_decay_makes_simpler_shapes():
    few, usual, many = (edges_per_row(form="intended", decay=d).double().mean() for d in (4.0, 3.0, 2.0))
    assert few < usual < many


def test_released_images_have_the_two_lowest_columns_of_frequencies_only():
    size = (16, 12)
    spectrum = torch.fft.rfft2(grey_images(noise(2, size, "released"), size, 3.0))
    assert spectrum[..., 2:].abs().max() < 1e-9
    assert (spectrum[..., :2].abs().amax((0, 1)) > 100).all()


def test_weights_are_beta_distributed():
    draw = FMix(alpha=0.5, mode="elem").draw(4000, (4, 4), rng=rng())
    assert stats.kstest(draw.lam.double().numpy(), stats.beta(0.5, 0.5).cdf).pvalue > 1e-3


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: FMix(alpha=0), "alpha=0 never mixes"),
        (lambda: FMix(decay=-1), "decay=-1 is a power"),
        (lambda: FMix(max_soft=0.6), r"\[0, 0.5\]"),
        (lambda: FMix(form="relesed"), "released, intended"),
        (lambda: FMix(mode="all"), "not known"),
        (lambda: FMix().draw(4, (1, 8), rng=rng()), "1 x 8 pixels"),
        (lambda: FMix().apply(torch.zeros(4, 3, 8, 8), FMix().draw(4, (8, 9), rng=rng())), "draw anew"),
        (lambda: FMix().apply(torch.zeros(3, 3, 8, 8), FMix().draw(4, (8, 8), rng=rng())), "4 images given 3"),
    ],
)
def test_bad_settings_and_inputs_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()
