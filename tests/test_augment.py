"""Crop and mirror of a batch on the device: each sample its own draw, exact where it can be said by hand."""

import pytest
import torch
from torch.nn.functional import affine_grid, grid_sample, interpolate
from torchvision.transforms import v2

from foveal.data.augment import RATIO, TRIES, Crops, crop_and_flip, draw_crops, random_boxes

SIZE = (20, 30)


def uniform(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 2 * TRIES + 2, generator=torch.Generator().manual_seed(seed))


def smooth(n: int, height: int, width: int) -> torch.Tensor:
    noise = torch.rand(n, 3, 4, 5, generator=torch.Generator().manual_seed(0)) * 255
    return interpolate(noise, (height, width), mode="bilinear", align_corners=True)


def test_boxes_lie_inside_and_keep_area_and_aspect():
    boxes = random_boxes(uniform(5000), SIZE, (0.2, 1.0))
    left, top, right, bottom = boxes.unbind(1)
    w, h = right - left, bottom - top
    slack = 1e-4  # float32 rounding of coordinates up to 30
    assert (left >= -slack).all()
    assert (top >= -slack).all()
    assert (right <= 30 + slack).all()
    assert (bottom <= 20 + slack).all()
    assert ((w * h) / 600 > 0.2 - slack).all()
    assert (w / h > RATIO[0] - slack).all()
    assert (w / h < RATIO[1] + slack).all()


def test_share_of_area_is_distributed_as_in_torchvision():
    torch.manual_seed(0)
    theirs = []
    image = torch.empty(3, 200, 300)  # large: torchvision rounds its boxes to pixels
    crop = v2.RandomResizedCrop((8, 8), scale=(0.2, 1.0))
    for _ in range(4000):
        p = crop.make_params([image])
        theirs.append(p["height"] * p["width"] / 60000)
    box = random_boxes(uniform(4000), (200, 300), (0.2, 1.0))
    ours = ((box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) / 60000).sort().values
    distance = (ours - torch.tensor(theirs).sort().values).abs().max()
    assert distance < 0.05  # quantiles of two samples of 4,000: 5 standard errors of 0.8 x 0.5 / sqrt(2,000)


def test_whole_area_of_a_square_is_the_whole_square():
    u = uniform(50)
    u[:, TRIES : 2 * TRIES] = 0.5  # aspect 1
    assert torch.allclose(random_boxes(u, (32, 32), (1.0, 1.0)), torch.tensor([0.0, 0, 32, 32]), atol=1e-4)


def test_no_fit_gives_the_largest_centred_box():
    wide = random_boxes(uniform(10), (10, 100), (1.0, 1.0))  # no aspect within 3/4..4/3 can fill it
    assert torch.allclose(wide, torch.tensor([50 - 20 / 3, 0, 50 + 20 / 3, 10]))
    tall = random_boxes(uniform(10), (100, 10), (1.0, 1.0))
    assert torch.allclose(tall, torch.tensor([0, 50 - 20 / 3, 10, 50 + 20 / 3]))


def test_draw_of_a_sample_does_not_depend_on_its_batch():
    together = draw_crops([4, 9, 2], SIZE, seed=1, epoch=3)
    alone = draw_crops([9], SIZE, seed=1, epoch=3)
    assert torch.equal(together.boxes[1:2], alone.boxes)
    assert torch.equal(together.flip[1:2], alone.flip)
    for other in (draw_crops([9], SIZE, seed=2, epoch=3), draw_crops([9], SIZE, seed=1, epoch=4)):
        assert not torch.equal(other.boxes, alone.boxes)


def test_half_are_mirrored_and_none_where_a_mirror_image_is_another_class():
    index = list(range(2000))
    flip = draw_crops(index, SIZE, seed=0, epoch=0, flip=True).flip
    assert abs(float(flip.float().mean()) - 0.5) < 5 * 0.5 / 2000**0.5
    assert not draw_crops(index[:50], SIZE, seed=0, epoch=0, flip=False).flip.any()


def test_crop_on_whole_pixels_is_slicing():
    x = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    crops = Crops(torch.tensor([[1.0, 2, 5, 6], [4, 0, 8, 4]]), torch.tensor([False, False]))
    out = crop_and_flip(x, crops, (4, 4))
    assert torch.equal(out[0], x[0, :, 2:6, 1:5].float())
    assert torch.equal(out[1], x[1, :, 0:4, 4:8].float())


def test_mirror_turns_only_the_chosen_samples():
    x = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    out = crop_and_flip(x, Crops(torch.tensor([[0.0, 0, 4, 4]] * 2), torch.tensor([True, False])), (4, 4))
    assert torch.equal(out[0], x[0].flip(-1).float())
    assert torch.equal(out[1], x[1].float())


def test_enlarging_is_bilinear_interpolation():
    x = smooth(6, 20, 30)
    crops = draw_crops(list(range(6)), SIZE, seed=0, epoch=0, flip=False)
    left, top, right, bottom = crops.boxes.unbind(1)
    theta = torch.zeros(6, 2, 3)  # slow twin: the same box as an affine grid
    theta[:, 0, 0], theta[:, 0, 2] = (right - left) / 30, (right + left) / 30 - 1
    theta[:, 1, 1], theta[:, 1, 2] = (bottom - top) / 20, (bottom + top) / 20 - 1
    grid = affine_grid(theta, (6, 3, 40, 48), align_corners=False)
    twin = grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    assert torch.allclose(crop_and_flip(x, crops, (40, 48)), twin, atol=1e-2)  # float32 positions times 255


def test_reducing_by_a_whole_factor_is_the_mean_of_the_area():
    x = torch.rand(1, 3, 16, 16) * 255
    out = crop_and_flip(x, Crops(torch.tensor([[0.0, 0, 16, 16]]), torch.tensor([False])), (4, 4))
    assert torch.allclose(out, interpolate(x, (4, 4), mode="area"), atol=1e-3)


def test_fine_stripes_do_not_alias():
    stripes = torch.arange(64) % 2 * 255.0
    x = stripes.expand(1, 3, 64, 64).contiguous()
    out = crop_and_flip(x, Crops(torch.tensor([[0.0, 0, 64, 64]]), torch.tensor([False])), (16, 16))
    assert torch.allclose(out, torch.full_like(out, 127.5), atol=1e-3)


@pytest.mark.parametrize("size", [(7, 5), (32, 32)])
def test_a_batch_of_one_and_another_dtype(size):
    x = torch.full((1, 3, 9, 11), 200, dtype=torch.uint8)
    out = crop_and_flip(x, draw_crops([0], (9, 11), seed=0, epoch=0), size)
    assert out.dtype == torch.float32
    assert torch.allclose(out, torch.full((1, 3, *size), 200.0), atol=1e-3)
