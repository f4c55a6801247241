"""Batches: the same samples and draws for any number of ranks, accumulation steps and workers."""

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image

from foveal.data import Batches, DataError, ImageConfig, Images
from foveal.data.decode import decode

CONFIG = ImageConfig(size=(16, 16), interpolation="bilinear")


def pixels(n: int = 11, side: int = 16, masks: bool = True) -> Images:
    rng = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=rng)
    return Images(torch.arange(n) % 2, ("a", "b"), x, masks=x[:, 0] > 99 if masks else None)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Images:
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    paths = []
    for i in range(9):
        noise = rng.integers(0, 255, (6, 7, 3)).astype(np.uint8)
        paths.append(folder / f"{i}.png")
        Image.fromarray(noise).resize((60 + 7 * i, 50), Image.Resampling.BICUBIC).save(paths[-1])
    return Images(torch.arange(9) % 2, ("a", "b"), files=tuple(paths))


def by_sample(images: Images, epoch: int = 0, **options) -> dict[int, torch.Tensor]:
    """Each sample's tensor over all ranks."""
    seen = {}
    for rank in range(options.get("world", 1)):
        batches = Batches(images, CONFIG, 2, train=True, seed=1, flip=True, rank=rank, **options)
        batches.set_epoch(epoch)
        for batch in batches:
            seen |= dict(zip(batch.index.tolist(), batch.images, strict=True))
    return seen


def equal(a: dict[int, torch.Tensor], b: dict[int, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[i], b[i]) for i in a)


@pytest.mark.parametrize("randaugment", [False, True])
def test_ranks_and_accumulation_draw_alike(randaugment):
    one = by_sample(pixels(), randaugment=randaugment)
    assert equal(one, by_sample(pixels(), randaugment=randaugment, accumulate=4))
    assert equal(one, by_sample(pixels(), randaugment=randaugment, world=2, accumulate=2))
    assert len(one) == 11


def test_two_processes_see_the_batches_of_two_accumulation_steps():
    one = list(Batches(pixels(), CONFIG, 2, train=True, accumulate=2))
    two = [list(Batches(pixels(), CONFIG, 2, train=True, rank=r, world=2)) for r in range(2)]
    assert [b.micro for b in one] == list(range(6))
    for batch in one:
        twin = two[batch.micro % 2][batch.micro // 2]
        assert (twin.micro, twin.weight) == (batch.micro, batch.weight)
        assert torch.equal(twin.images, batch.images)
        assert torch.equal(twin.labels, batch.labels)
        assert torch.equal(twin.masks, batch.masks)


@pytest.mark.parametrize("randaugment", [False, True])
def test_files_draw_alike_in_workers_and_ranks(photographs, randaugment):
    one = by_sample(photographs, randaugment=randaugment)
    assert equal(one, by_sample(photographs, randaugment=randaugment, workers=2))
    assert equal(one, by_sample(photographs, randaugment=randaugment, world=2))


def test_workers_live_on_and_follow_the_epoch(photographs):
    batches = Batches(photographs, CONFIG, 4, train=True, seed=1, flip=True, workers=1)
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        seen = {i: x for batch in batches for i, x in zip(batch.index.tolist(), batch.images, strict=True)}
        assert equal(seen, by_sample(photographs, epoch=epoch))


@pytest.mark.parametrize("kind", ["pixels", "files"])
def test_epochs_differ_and_repeat(kind, photographs):
    images = pixels() if kind == "pixels" else photographs
    assert equal(by_sample(images, epoch=3), by_sample(images, epoch=3))
    first, second = by_sample(images, epoch=0), by_sample(images, epoch=1)
    assert not any(torch.equal(first[i], second[i]) for i in first)


@pytest.mark.parametrize("randaugment", [False, True])
def test_global_chance_is_neither_used_nor_moved(photographs, randaugment):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = by_sample(photographs, randaugment=randaugment) | by_sample(pixels(), randaugment=randaugment)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(6)
    assert equal(first, by_sample(photographs, randaugment=randaugment) | by_sample(pixels(), randaugment=randaugment))


def test_labels_and_index_belong_to_the_images():
    images = pixels()
    config = ImageConfig(size=(16, 16), mean=(0, 0, 0), std=(1, 1, 1))
    for batch in Batches(images, config, 4, train=True, crop_scale=(1, 1)):
        assert torch.equal(batch.labels, images.labels[batch.index])
        assert batch.index.device.type == "cpu"


def test_evaluation_leaves_images_of_the_right_size_alone():
    images = pixels()
    batches = Batches(images, ImageConfig(size=(16, 16), crop_pct=0.5), 4, train=False)
    assert [len(b) for b in batches] == [4, 4, 3]
    assert len(batches) == 3
    out = torch.cat([b.images for b in batches])
    assert torch.equal(out, batches.config.normalise(images.pixels))
    assert torch.equal(torch.cat([b.masks for b in batches]), images.masks)
    assert torch.equal(torch.cat([b.index for b in batches]), torch.arange(11))


def test_normalise_by_hand():
    config = ImageConfig(size=(1, 1), mean=(0.5, 0.2, 0.0), std=(0.5, 0.1, 2.0))
    x = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    assert torch.allclose(config.normalise(x).flatten(), torch.tensor([-1.0, 0.0, 0.5]))


def test_evaluation_resizes_pixels_whole():
    images = pixels(side=32)
    batch = next(iter(Batches(images, ImageConfig(size=(16, 8), interpolation="bilinear"), 3, train=False)))
    assert batch.images.shape == (3, 3, 16, 8)
    assert batch.masks.shape == (3, 16, 8)
    flat = Images(torch.tensor([0]), ("a", "b"), torch.full((1, 3, 9, 9), 77, dtype=torch.uint8))
    out = next(iter(Batches(flat, ImageConfig(size=(16, 8), mean=(0, 0, 0), std=(1, 1, 1)), 1, train=False)))
    assert torch.allclose(out.images, torch.full((1, 3, 16, 8), 77 / 255))


@pytest.mark.parametrize("size", [(24, 24), (16, 40)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_evaluation_of_files_is_timms(photographs, size, interpolation, crop_mode):
    config = ImageConfig(size, interpolation=interpolation, crop_pct=0.875, crop_mode=crop_mode)
    twin = timm.data.create_transform(
        (3, *size),
        interpolation=interpolation,
        crop_pct=0.875,
        crop_mode=crop_mode,
        mean=config.mean,
        std=config.std,
    )
    out = torch.cat([b.images for b in Batches(photographs, config, 4, train=False)])
    expected = torch.stack([twin(decode(file)) for file in photographs.files])
    assert torch.allclose(out, expected, atol=1e-6)  # order of division and subtraction


def test_masks_follow_the_crop_and_the_mirror():
    """The image shows its own mask: after any crop the two still agree."""
    blob = torch.zeros(8, 1, 32, 32, dtype=torch.bool)
    blob[:, :, 8:20, 4:18] = True
    images = Images(
        torch.arange(8) % 2, ("a", "b"), (blob * 255).to(torch.uint8).expand(-1, 3, -1, -1), masks=blob[:, 0]
    )
    config = ImageConfig(size=(24, 24), mean=(0, 0, 0), std=(1, 1, 1))
    for batch in Batches(images, config, 8, train=True, flip=True):
        assert torch.equal(batch.masks, batch.images[:, 0] >= 0.5)
        assert batch.masks.any()


def test_no_masks_after_randaugment():
    assert next(iter(Batches(pixels(), CONFIG, 4, train=True, randaugment=True))).masks is None
    assert next(iter(Batches(pixels(), CONFIG, 4, train=True))).masks is not None


def test_unreadable_file_is_named_also_from_a_worker(photographs, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"?")
    images = Images(torch.tensor([0, 1]), ("a", "b"), files=(photographs.files[0], tmp_path / "broken.jpg"))
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"^cannot read image .*broken\.jpg: no image format"):
            list(Batches(images, CONFIG, 2, train=True, workers=workers))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"rank": 2, "world": 2}, "rank=2"),
        ({"crop_scale": (0.5, 0.2)}, "crop_scale"),
        ({"crop_scale": (0, 1)}, "crop_scale"),
        ({"images": pixels().subset([])}, "no images"),
        ({"world": 6, "accumulate": 2}, "at most 11"),
    ],
)
def test_what_cannot_be_batched(options, message):
    given = {"images": pixels(), "config": CONFIG, "batch_size": 2, "train": True} | options
    with pytest.raises(ValueError, match=message):
        Batches(**given)


def test_a_view_says_which_part_of_a_file_is_shown(photographs):
    batches = Batches(photographs, CONFIG, 4, train=True, seed=3, flip=True)
    flips = []
    for batch in batches:
        for i, x, box, flip in zip(batch.index.tolist(), batch.images, batch.view.boxes, batch.view.flip, strict=True):
            image = decode(photographs.files[i])
            sides = torch.tensor([image.width, image.height] * 2)
            part = image.crop(tuple((box * sides).round().int().tolist())).resize((16, 16), Image.Resampling.BILINEAR)
            again = torch.from_numpy(np.array(part)).permute(2, 0, 1)
            again = CONFIG.normalise((again.flip(-1) if flip else again)[None])[0]
            assert torch.allclose(x, again, atol=1e-6)
            flips.append(bool(flip))
    assert {*flips} == {True, False}


def test_a_view_says_which_part_of_the_pixels_is_shown():
    ramp = torch.arange(64.0).expand(3, 64, 64)  # a pixel's value says where it lies
    images = Images(
        torch.zeros(5, dtype=torch.int64), ("a",), torch.stack([ramp, ramp.mT]).repeat(3, 1, 1, 1)[:5].byte()
    )
    for batch in Batches(images, ImageConfig(size=(8, 8), mean=(0.0,) * 3, std=(1.0,) * 3), 5, train=True, flip=True):
        for i, x, box, flip in zip(batch.index.tolist(), batch.images, batch.view.boxes, batch.view.flip, strict=True):
            x = x.flip(-1) if flip else x
            low, high = (box[[0, 2]], box[[1, 3]])[i % 2] * 64
            middle = (x[0] if i % 2 == 0 else x[0].mT)[0].mean() * 255
            assert abs(float(middle) - float(low + high) / 2 + 0.5) < 0.51


@pytest.mark.parametrize("options", [{"train": False}, {"train": True, "randaugment": True}])
def test_no_view_where_no_box_says_what_is_shown(photographs, options):
    for images in (photographs, pixels()):
        assert next(iter(Batches(images, CONFIG, 2, **options))).view is None
