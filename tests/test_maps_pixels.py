"""Maps of pixels or from outside: slow twins, OpenCV's values, symmetries, blank maps, fixations and boxes."""

import math

import numpy as np
import pytest
import scipy.ndimage
import torch

from foveal.data import ImageConfig
from foveal.maps import on_grid
from foveal.maps.annotations import box_mask, fixation_map
from foveal.maps.centre_surround import NEIGHBOURHOODS, CentreSurround, centre_surround, contrast, grey, summed_area
from foveal.maps.given import Given
from foveal.maps.pixels import pixels_of
from foveal.maps.spectral import SpectralResidual, gaussian_blur, residual_energy, spectral_residual

CONFIG = ImageConfig((8, 8))
NORMAL = {"mean": CONFIG.mean, "std": CONFIG.std}


def pictures(B, size, seed=0):
    """Smooth blobs and noise: bytes (B, 3, H, W)."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(B, 3, 3, 4, generator=g)
    x = 200 * torch.nn.functional.interpolate(coarse, size, mode="bilinear") + 55 * torch.rand(B, 3, *size, generator=g)
    return x.to(torch.uint8)


# -- back to pixels


def test_bytes_come_back_from_what_a_model_is_given():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16).contiguous()
    assert torch.equal(pixels_of(CONFIG.normalise(x), **NORMAL), x)
    assert torch.equal(pixels_of(CONFIG.normalise(x).double(), **NORMAL), x)


def test_values_outside_the_bytes_are_clipped():
    x = torch.tensor([-9.0, 9.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    assert pixels_of(x, **NORMAL)[:, 0, 0, 0].tolist() == [0, 255]


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(2, 1, 4, 4), ValueError, "need RGB images"),
        (torch.zeros(3, 4, 4), ValueError, "need RGB images"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), TypeError, "normalised"),
    ],
)
def test_images_that_pixels_cannot_be_had_of(images, error, message):
    with pytest.raises(error, match=message):
        pixels_of(images, **NORMAL)


# -- centre and surround


def slow(pixels):
    """The detector in loops, for one image (3, H, W) uint8, in float32 as OpenCV has it. Returns (H, W)."""
    red, green, blue = pixels.numpy().astype(int)
    v = (9798 * red + 19235 * green + 3735 * blue + 16384) // 32768
    H, W = v.shape

    def at(y, x):  # mirrored without repeating the edge
        y, x = (abs(i) if i < n else 2 * n - 2 - i for i, n in ((y, H), (x, W)))
        return v[y if H > 1 else 0, x if W > 1 else 0]

    for _ in range(2):
        new = np.zeros_like(v)
        for y in range(H):
            for x in range(W):
                terms = [at(y + i, x + j) * (2 - abs(i)) * (2 - abs(j)) for i in (-1, 0, 1) for j in (-1, 0, 1)]
                new[y, x] = (sum(terms) + 8) // 16
        v = new
    on, off = np.zeros((H, W)), np.zeros((H, W))
    for n in (12, 24, 48, 28, 56, 112):
        for y in range(H):
            for x in range(W):
                window = v[max(y - n + 1, 0) : min(y + n + 1, H), max(x - n + 1, 0) : min(x + n + 1, W)]
                if window.size > 1:
                    mean = np.float32(window.sum() - v[y, x]) / np.float32(window.size - 1)
                    on[y, x] += math.floor(max(v[y, x] - mean, 0))
                    off[y, x] += math.floor(max(mean - v[y, x], 0))
    on, off = (np.floor(255.0 * (part / part.max())) if part.max() > 0 else part for part in (on, off))
    most = max(on.max(), off.max())
    return np.floor(255.0 * (on + off) / most).astype(int) % 256 if most > 0 else np.zeros((H, W), int)


@pytest.mark.parametrize("size", [(1, 9), (9, 1), (2, 2), (7, 5), (31, 26), (14, 53)])
def test_detector_is_its_slow_twin(size):
    x = pictures(2, size, seed=size[0])
    found = centre_surround(x)
    assert found.dtype == torch.uint8
    assert found.shape == (2, *size)
    for one, image in zip(found, x, strict=True):
        assert np.array_equal(one.numpy(), slow(image))


def test_detector_gives_opencvs_bytes():
    """What cv2.saliency.StaticSaliencyFineGrained of OpenCV 5.0.0 makes of two formulas, times 255."""
    y, x, c = np.mgrid[0:5, 0:7, 0:3]
    image = ((37 * y * y + 91 * x + 53 * c * (y + 1)) % 256).astype(np.uint8)
    assert centre_surround(torch.from_numpy(image).permute(2, 0, 1)[None])[0].tolist() == [
        [25, 76, 76, 63, 178, 255, 229],
        [38, 89, 76, 38, 140, 229, 216],
        [0, 25, 12, 36, 38, 127, 127],
        [97, 97, 145, 170, 60, 36, 72],
        [157, 182, 255, 242, 109, 133, 194],
    ]
    y, x, c = np.mgrid[0:40, 0:33, 0:3]
    image = ((37 * y * y + 9 * x * y + 53 * c * (y + 1)) % 256).astype(np.uint8)
    found = centre_surround(torch.from_numpy(image).permute(2, 0, 1)[None])[0]
    assert found[20, :16].tolist() == [31, 31, 36, 64, 111, 83, 14, 4, 33, 46, 65, 65, 22, 12, 37, 62]
    assert int(found.int().sum()) == 63590


def test_grey_of_grey_is_itself():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(grey(x), x[:, 0].int())


def test_images_of_a_batch_do_not_meet():
    x = pictures(3, (20, 17))
    assert torch.equal(centre_surround(x), torch.cat([centre_surround(one[None]) for one in x]))


def test_mirrored_image_mirrored_map_but_for_the_windows_side():
    """Windows reach one pixel further down and right; where they hold the whole image that does not matter."""
    x = pictures(2, (11, 12))  # smaller than the smallest window
    assert min(NEIGHBOURHOODS) >= 12
    assert torch.equal(centre_surround(x.flip(-1)), centre_surround(x).flip(-1))
    assert torch.equal(centre_surround(x.flip(-2)), centre_surround(x).flip(-2))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (30, 30)])
def test_one_colour_has_a_blank_map(size):
    assert not centre_surround(torch.full((1, 3, *size), 77, dtype=torch.uint8)).any()
    found = CentreSurround(**NORMAL)(CONFIG.normalise(torch.full((1, 3, *size), 77)))
    assert found.blank.tolist() == [True]
    assert not found.map.any()


def test_sums_stay_right_where_the_table_overflows():
    values = pictures(1, (40, 30))[:, 0].int()
    table = summed_area(values)
    beyond = (table.long() + 2**31 - 50_000).to(torch.int32)  # as under and beside 8.4 million white pixels
    assert beyond.min() < 0 < beyond.max()
    for n in (3, 12, 100):
        assert torch.equal(contrast(values, beyond, n), contrast(values, table, n))


def test_source_detects_the_pixels_and_not_the_normalised_floats():
    x = pictures(2, (16, 12))
    found = CentreSurround(**NORMAL)(CONFIG.normalise(x), labels=None)
    assert torch.equal(found.map, centre_surround(x).float())
    assert found.map.dtype == torch.float32
    assert found.logits is None
    assert CentreSurround(**NORMAL).model is None


@pytest.mark.parametrize("detect", [centre_surround, spectral_residual])
def test_pixels_that_are_none(detect):
    with pytest.raises(TypeError, match="bytes"):
        detect(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="RGB"):
        detect(torch.zeros(3, 4, 4, dtype=torch.uint8))


# -- spectral residual


def test_residual_is_its_slow_twin():
    """The transform as sums of cosines and sines, in float64."""
    grey_image = torch.rand(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).numpy()
    h, w = grey_image.shape
    v, u = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    spectrum = np.zeros((h, w), complex)
    for r in range(h):
        for c in range(w):
            spectrum[r, c] = (grey_image * np.exp(-2j * np.pi * (r * v / h + c * u / w))).sum()
    log = np.log(np.abs(spectrum))
    mean = np.zeros((h, w))
    for r in range(h):
        for c in range(w):
            mean[r, c] = np.mean([log[(r + i) % h, (c + j) % w] for i in (-1, 0, 1) for j in (-1, 0, 1)])
    residual = np.exp(log - mean + 1j * np.angle(spectrum))
    energy = np.zeros((h, w))
    for r in range(h):
        for c in range(w):
            energy[r, c] = np.abs((residual * np.exp(2j * np.pi * (r * v / h + c * u / w))).mean()) ** 2
    assert np.allclose(residual_energy(torch.from_numpy(grey_image)[None])[0].numpy(), energy, atol=1e-12)


def test_residual_moves_with_the_image():
    x = torch.rand(2, 16, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    energy = residual_energy(x)
    assert torch.allclose(residual_energy(x.roll((3, 5), (1, 2))), energy.roll((3, 5), (1, 2)), atol=1e-10)
    assert torch.allclose(residual_energy(x.flip(1)), energy.flip(1), atol=1e-10)
    assert torch.allclose(residual_energy(x.mT), energy.mT, atol=1e-10)


@pytest.mark.parametrize(
    ("size", "grid"),
    [((128, 256), (32, 64)), ((200, 100), (128, 64)), ((32, 32), (32, 32)), ((1, 300), (1, 64)), ((5, 1), (5, 1))],
)
def test_map_is_at_most_64_wide(size, grid):
    found = spectral_residual(pictures(2, size))
    assert found.shape == (2, *grid)
    assert found.dtype == torch.float32
    assert (found >= 0).all()
    assert found.isfinite().all()


def test_blur_is_scipys():
    x = torch.rand(2, 9, 30, generator=torch.Generator().manual_seed(2))
    twin = np.stack([scipy.ndimage.gaussian_filter(one, 2.5, mode="nearest", truncate=4) for one in x.numpy()])
    assert np.allclose(gaussian_blur(x, 2.5).numpy(), twin, atol=1e-6)  # float32


def test_the_odd_one_out_stands_out():
    """A bar that leans the other way among rows of bars."""
    x = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    for top in range(4, 64, 12):
        for left in range(4, 64, 12):
            x[..., top : top + 6, left : left + 2] = 255
    x[..., 28:34, 40:42] = 0
    x[..., 30:32, 38:44] = 255
    found = spectral_residual(x)[0]
    row, column = divmod(int(found.argmax()), 64)
    assert abs(row - 31) <= 3
    assert abs(column - 41) <= 3


@pytest.mark.parametrize("size", [(1, 1), (40, 30), (100, 100)])
def test_one_grey_has_no_residual(size):
    found = SpectralResidual(**NORMAL)(CONFIG.normalise(torch.full((2, 3, *size), 131)))
    assert found.blank.all()
    assert not found.map.any()


def test_spectral_source_sees_each_image_alone():
    x = pictures(3, (70, 90))
    found = SpectralResidual(**NORMAL)(CONFIG.normalise(x))
    assert torch.equal(found.map, spectral_residual(x))
    assert torch.allclose(found.map[1:2], spectral_residual(x[1:2]), rtol=1e-5)
    assert not found.blank.any()


@pytest.mark.parametrize("source", [CentreSurround(**NORMAL), SpectralResidual(**NORMAL)])
def test_autocast_changes_no_map(source):
    images = CONFIG.normalise(pictures(2, (70, 80)))
    with torch.autocast("cpu", torch.bfloat16):
        found = source(images)
    assert found.map.dtype == torch.float32
    assert torch.equal(found.map, source(images).map)


# -- given


def test_given_maps_are_handed_on():
    images, maps = torch.zeros(2, 3, 8, 8), torch.rand(2, 5, 7)
    assert torch.equal(Given()(images, given=maps).map, maps)
    masks = maps > 0.5
    found = Given()(images, torch.zeros(2, dtype=torch.int64), masks)
    assert torch.equal(found.map, masks.float())
    assert not found.blank.any()


def test_given_masks_without_edge_prefer_no_place():
    masks = torch.stack([torch.zeros(4, 4), torch.ones(4, 4), torch.eye(4)]) > 0
    found = Given()(torch.zeros(3, 3, 8, 8), given=masks)
    assert found.blank.tolist() == [True, True, False]
    assert not found.map[1].any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "none came"),
        (torch.ones(2, 4, 4), "for 3 images"),
        (torch.ones(3, 16), r"\(B, H, W\)"),
        (torch.full((3, 2, 2), -1.0), "negative"),
    ],
)
def test_given_maps_that_do_not_fit(given, message):
    with pytest.raises(ValueError, match=message):
        Given()(torch.zeros(3, 3, 8, 8), given=given)


# -- fixations and boxes


def test_fixations_are_a_blurred_histogram():
    g = np.random.default_rng(0)
    x, y, weights = g.uniform(-1.4, 31.4, 40), g.uniform(-1.4, 21.4, 40), g.uniform(0, 2, 40)
    histogram = np.zeros((21, 31))
    for column, row, weight in zip(np.rint(x).astype(int), np.rint(y).astype(int), weights, strict=True):
        if 0 <= column < 31 and 0 <= row < 21:
            histogram[row, column] += weight
    assert np.allclose(fixation_map(x, y, (21, 31), 0, weights), histogram, atol=1e-6)
    twin = scipy.ndimage.gaussian_filter(histogram, 2.0, mode="constant", truncate=20)
    assert np.allclose(fixation_map(x, y, (21, 31), 2.0, weights), twin, atol=1e-6)
    assert histogram.sum() < weights.sum()  # some lay outside


def test_fixations_by_hand():
    found = fixation_map([2, 2, 0], [1, 1, 0], (2, 4), 0)
    assert found.tolist() == [[1, 0, 0, 0], [0, 0, 2, 0]]
    assert fixation_map([], [], (2, 3), 5.0).tolist() == [[0, 0, 0], [0, 0, 0]]
    peak = fixation_map([3.2], [2.4], (5, 7), 1.0)
    assert peak[2, 3] == pytest.approx(1 / (2 * math.pi))
    assert peak[1, 3] == pytest.approx(math.exp(-0.5) / (2 * math.pi))
    assert float(fixation_map([50], [50], (101, 101), 5.0, [3.0]).sum()) == pytest.approx(3.0, abs=1e-5)


@pytest.mark.parametrize(
    ("x", "y", "sigma", "weights", "message"),
    [
        ([1, 2], [1], 1.0, None, "must be"),
        ([1], [1], 1.0, [1, 2], "must be"),
        ([1], [1], -1.0, None, "zero or more"),
        ([1], [1], 1.0, [-1], "zero or more"),
    ],
)
def test_fixations_that_make_no_sense(x, y, sigma, weights, message):
    with pytest.raises(ValueError, match=message):
        fixation_map(x, y, (4, 4), sigma, weights)


def test_boxes_are_cut_at_the_border():
    assert box_mask([1, 0, 3, 2], (3, 4)).tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    boxes = torch.tensor([[-2, -2, 1, 9], [2, 2, 2, 4]])
    assert box_mask(boxes, (3, 3)).sum((1, 2)).tolist() == [3, 0]
    with pytest.raises(ValueError, match="top, left, bottom, right"):
        box_mask([1, 2, 3], (3, 3))


def test_a_box_on_a_grid_keeps_its_share():
    mask = box_mask([3, 5, 20, 27], (32, 32))
    assert float(on_grid(mask[None].float(), (7, 5)).mean()) == pytest.approx(17 * 22 / 1024, abs=1e-6)
