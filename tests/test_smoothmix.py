"""SmoothMix: by hand, pixel by pixel, ranges."""

import math

import pytest
import torch

from foveal import chance
from foveal.mix import BlobDraw, SmoothMix


def rng(seed=0):
    return chance.generator(seed, "mix", 0)


def blob(centre, sigma, B=2):
    rows = torch.arange(B - 1, -1, -1)
    return BlobDraw(rows, torch.tensor([centre]).expand(B, 2), torch.tensor([sigma]).expand(B, 2))


def test_worked_example():
    images = torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])
    mixed = SmoothMix().apply(images, blob((2.5, 0.5), (1.2, 1.2)))
    M = mixed.images[0, 0]
    assert torch.allclose(M[0], torch.tensor([0.1047, 0.1047, 0.0523, 0.0130]), atol=5e-5)  # four digits given
    assert torch.allclose(M[2], torch.tensor([0.8406, 0.8406, 0.4198, 0.1047]), atol=5e-5)
    assert torch.allclose(mixed.factors[0].partner, torch.tensor(0.3617), atol=5e-5)
    assert torch.allclose(mixed.factors[0].own, torch.tensor(0.6383), atol=5e-5)  # not the partner's share


@pytest.mark.parametrize("size", [(4, 4), (9, 14), (28, 20)])
def test_masks_pixel_by_pixel(size):
    B, (H, W) = 5, size
    mixer, images = SmoothMix(mode="elem"), torch.randn(5, 3, *size, dtype=torch.float64)
    draw = mixer.draw(B, size, rng=rng())
    mixed = mixer.apply(images, draw)
    for i in (0, 1, 3, 4):
        (cy, cx), (sy, sx) = draw.centre[i].tolist(), draw.sigma[i].tolist()
        M = [
            [math.exp(-((r - cy) ** 2) / (2 * sy**2) - (c - cx) ** 2 / (2 * sx**2)) for c in range(W)] for r in range(H)
        ]
        M = torch.tensor(M, dtype=torch.float64)
        assert torch.allclose(mixed.keep[i, 0].double(), 1 - M, atol=1e-6)  # float32 masks
        assert torch.allclose(mixed.images[i], (1 - M) * images[i] + M * images[B - 1 - i], atol=1e-5)
        assert abs(float(mixed.factors[0].own[i]) - float(1 - M.mean())) < 1e-6
        assert sy / H == pytest.approx(sx / W, rel=1e-6)


@pytest.mark.parametrize("side", [4, 5])
def test_centres_and_widths_have_the_range_of_the_paper(side):
    draw = SmoothMix(mode="elem").draw(4000, (side, 2 * side), rng=rng())
    offsets = (draw.centre[:, 0] - (side - 1) / 2).double()
    expected = [int(k - side / 2) for k in range(side)]
    for d in set(expected):
        share = expected.count(d) / side
        assert abs(float((offsets == d).double().mean()) - share) < 5 * math.sqrt(share * (1 - share) / 4000)
    width = draw.sigma[:, 0] / side
    assert 0.25 <= float(width.min()) < 0.252
    assert 0.498 < float(width.max()) < 0.5


def test_what_is_not_mixed_is_untouched():
    images = torch.randn(2, 3, 8, 8)
    mixed = SmoothMix().apply(images, blob((3.5, 3.5), (0.0, 0.0)))
    assert torch.equal(mixed.images, images)
    assert torch.equal(mixed.factors[0].own, torch.ones(2))


def test_the_partner_is_clearest_at_the_centre_and_nowhere_cut_off():
    mixed = SmoothMix().apply(torch.zeros(2, 1, 33, 33), blob((10.0, 20.0), (8.0, 8.0)))
    keep = mixed.keep[0, 0]
    assert keep[10, 20] == keep.min() == 0
    steps = torch.cat([(keep[1:] - keep[:-1]).abs().flatten(), (keep[:, 1:] - keep[:, :-1]).abs().flatten()])
    assert steps.max() < 0.61 / 8  # the steepest place of a Gaussian is exp(-1/2) / sigma


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="probability"):
        SmoothMix(prob=1.5)
    with pytest.raises(ValueError, match="did you mean 'batch'"):
        SmoothMix(mode="batches")
