"""ResizeMix: against torch's interpolation, boxes one at a time, what can be seen."""

import math

import pytest
import torch
import torch.nn.functional as F

from foveal import chance
from foveal.mix import BoxDraw, ResizeMix
from foveal.mix.resizemix import scaled_boxes, shrunk_nearest

INTERPOLATIONS = ("nearest", "bilinear")


def rng(seed=0):
    return chance.generator(seed, "mix", 0)


def batch(B, size, dtype=torch.float32):
    return torch.randn(B, 3, *size, generator=torch.Generator().manual_seed(B)).to(dtype)


def pasted_one_by_one(images, draw, interpolation):
    out = images.clone()
    for i, (top, left, bottom, right) in enumerate(draw.box.tolist()):
        if bottom > top:
            partner = images[draw.perm[i]][None]
            out[i, :, top:bottom, left:right] = F.interpolate(
                partner, (bottom - top, right - left), mode=interpolation
            )[0]
    return out


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", [(32, 32), (28, 20), (37, 23), (7, 50)])
@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_agrees_with_torchs_interpolation(interpolation, size, mode):
    mixer, images = ResizeMix(interpolation=interpolation, mode=mode), batch(7, size, torch.float64)
    for seed in range(6):
        draw = mixer.draw(7, size, rng=rng(seed))
        got, expected = mixer.apply(images, draw).images, pasted_one_by_one(images, draw, interpolation)
        if interpolation == "nearest":
            assert torch.equal(got, expected)
        else:
            assert torch.allclose(got, expected, atol=1e-12)


@pytest.mark.parametrize("side", [32, 37, 224])
def test_every_size_of_box_reads_the_pixels_that_torch_reads(side):
    """In float32 floor(y * (H / height)) is not always floor(y H / height) of whole numbers: as torch has it."""
    images = torch.arange(side, dtype=torch.float32).expand(1, 1, 1, side)
    for length in range(1, side + 1):
        first = (side - length) // 2
        box = torch.tensor([[0, first, 1, first + length]])
        got = shrunk_nearest(images, torch.tensor([0]), box)[0, 0, 0, first : first + length]
        assert torch.equal(got, F.interpolate(images, (1, length), mode="nearest")[0, 0, 0])


def test_boxes_one_at_a_time():
    g = torch.Generator().manual_seed(0)
    H, W, B = 23, 40, 500
    scale = 0.1 + 0.7 * torch.rand(B, generator=g, dtype=torch.float64)
    scale[:2] = torch.tensor([0.01, 1.0])
    centre = torch.stack([torch.randint(H, (B,), generator=g), torch.randint(W, (B,), generator=g)], -1)
    for i, box in enumerate(scaled_boxes(scale, centre, (H, W)).tolist()):
        sides = []
        for size, c in zip((H, W), centre[i].tolist(), strict=True):
            half = int(size * float(scale[i])) // 2
            first, last = max(c - half, 0), min(c + half, size)
            sides.append((first, max(last, first + 1)))
        (top, bottom), (left, right) = sides
        assert box == [top, left, bottom, right]
        assert 0 <= top < bottom <= H
        assert 0 <= left < right <= W


def test_a_box_is_never_empty():
    draw = ResizeMix(scale=(0.01, 0.02), mode="elem").draw(8, (8, 8), rng=rng())
    assert ((draw.box[:, 2:] - draw.box[:, :2]) == 1).all()
    assert torch.allclose(ResizeMix().apply(batch(8, (8, 8)), draw).factors[0].partner, torch.tensor(1 / 64))


def test_half_the_sides_is_a_quarter_of_the_label():
    images = torch.arange(32.0).reshape(2, 1, 4, 4)
    box = torch.tensor([[1, 2, 3, 4], [0, 0, 0, 0]])
    mixed = ResizeMix().apply(images, BoxDraw(torch.tensor([1, 0]), box))
    assert mixed.images[0, 0, 1:3, 2:].tolist() == [[16.0, 18.0], [24.0, 26.0]]  # rows and columns 0 and 2
    assert torch.equal(mixed.images[1], images[1])
    assert mixed.targets(torch.tensor([0, 1]), 2).tolist() == [[0.75, 0.25], [0.0, 1.0]]


def test_all_of_a_pasted_partner_can_be_seen_and_nothing_else():
    mixer, images = ResizeMix(mode="elem"), batch(5, (28, 20))
    mixed = mixer.apply(images, mixer.draw(5, (28, 20), rng=rng()))
    expected = torch.ones(5, 1, 28, 20)
    expected[2] = 0  # its own partner: not mixed
    assert torch.equal(mixed.visible_partner, expected)
    assert torch.equal(mixed.visible_own, mixed.keep)
    assert torch.allclose(mixed.factors[0].own, mixed.keep.mean((1, 2, 3)))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(interpolation, dtype):
    mixer, images = ResizeMix(interpolation=interpolation, mode="elem"), batch(4, (20, 28), dtype)
    draw = mixer.draw(4, (20, 28), rng=rng())
    got = mixer.apply(images, draw).images
    assert got.dtype == dtype
    assert torch.equal(got, mixer.apply(images.float(), draw).images.to(dtype))


def test_sides_are_uniform_where_boxes_are_not_clipped():
    side = 8192
    low, high = (2 * int(side * share) // 2 for share in (0.1, 0.8))
    draw = ResizeMix(mode="elem").draw(4000, (side, side), rng=rng())
    box = draw.box[(draw.box != 0).any(1)]
    whole = (box[:, :2] > 0).all(1) & (box[:, 2:] < side).all(1)
    height, width = (box[whole, 2:] - box[whole, :2]).unbind(1)
    assert torch.equal(height, width)
    assert low - 2 <= int(height.min()) < low + 0.01 * side
    # a side t lies inside with probability (1 - t)^2, so sides have the density (1 - t)^2 on [.1, .8]
    share = (0.9**3 - 0.5**3) / (0.9**3 - 0.2**3)
    below = float((height < 0.5 * side).double().mean())
    assert abs(below - share) < 5 * math.sqrt(share * (1 - share) / int(whole.sum()))
    assert int(height.max()) <= high


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ResizeMix(scale=(0.0, 0.8)), "smallest and the largest"),
        (lambda: ResizeMix(scale=(0.8, 0.1)), "smallest and the largest"),
        (lambda: ResizeMix(scale=(0.1, 1.2)), "smallest and the largest"),
        (lambda: ResizeMix(interpolation="bicubic"), "nearest, bilinear"),
    ],
)
def test_bad_settings_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_settings_may_come_as_a_list():
    assert ResizeMix(scale=[0.2, 0.5]) == ResizeMix(scale=(0.2, 0.5))
