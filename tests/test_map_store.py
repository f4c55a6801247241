"""The store of maps: sampled as the exact way, computed once whatever happens, refused by name."""

import errno
import json
import multiprocessing
import os
import signal
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d, interpolate

from foveal.data import Images
from foveal.data.config import ImageConfig
from foveal.data.decode import Packed
from foveal.data.errors import DataWarning
from foveal.maps import Given, MapStore, MapStoreError, MapWarning, make_store
from foveal.maps import store_files as files
from foveal.maps.fitted import fitted
from foveal.maps.found import found
from foveal.maps.store import quantised
from foveal.maps.store_key import describe, fingerprint
from map_models import vit

FORK = multiprocessing.get_context("fork")  # another process at once: importing torch anew takes seconds
CONFIG = ImageConfig((16, 16), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SETTINGS = {"map": "bright", "options": {}, "model": None}


class Bright:
    """A source whose map is the image's brightness; it counts the images that it was asked for."""

    model = None

    def __init__(self):
        self.asked = 0

    def __call__(self, images, labels=None, given=None):
        self.asked += len(images)
        return found(images.mean(1) - images.flatten(1).amin(1)[:, None, None] + 1)


def pixels(n=6, size=(20, 24), seed=0, masks=False):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(256, (n, 3, *size), generator=g, dtype=torch.uint8)
    m = torch.rand(n, *size, generator=g) < 0.3 if masks else None
    return Images(torch.arange(n) % 2, ("a", "b"), pixels=x, masks=m)


def write_images(folder, n=6, seed=0, size=(20, 24)):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    paths = []
    for i in range(n):
        paths.append(folder / f"{i:03d}.png")
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(paths[-1])
    return paths


def of(paths):
    return Images(
        torch.zeros(len(paths), dtype=torch.int64), ("image",), files=tuple(paths), names=[p.name for p in paths]
    )


def make(path, images, source=None, settings=None, **options):
    return make_store(path, images, source or Bright(), settings or SETTINGS, config=CONFIG, **options)


def expected(images, i, side=30):
    x = images.image(i)[None].float()
    x = interpolate(x, CONFIG.size, mode="bicubic", antialias=True).clamp(0, 255)
    if images.files is not None:
        pil = Image.fromarray(images.image(i).permute(1, 2, 0).numpy()).resize(CONFIG.size, Image.Resampling.BICUBIC)
        x = torch.from_numpy(np.array(pil)).permute(2, 0, 1)[None].float()
    return quantised(CONFIG.normalise(x).mean(1), side)[0][0].float() / 255


# -- maps as they are stored


def test_maps_are_normalised_then_resized_then_bytes():
    x = torch.rand(4, 7, 5, generator=torch.Generator().manual_seed(0))
    maps, blank = quantised(3 * x + 2, 30)
    low, high = (x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True))
    wanted = fitted((x - low) / (high - low), 30)
    assert maps.dtype == torch.uint8
    assert (maps.float() / 255 - wanted).abs().max() <= 0.5 / 255 + 1e-5
    assert not blank.any()


@pytest.mark.parametrize(("size", "side"), [((14, 14), 20), ((7, 40), 12), ((50, 64), 16), ((1, 2), 3)])
def test_no_other_map_is_nearer_when_read_bilinearly(size, side):
    """Least squares: the difference is orthogonal to everything that the small grid can say."""
    x = 0.3 + 0.4 * torch.rand(1, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    at = tuple(cells * -(-8 * side // cells) for cells in size)
    fit = fitted(x, side)
    assert ((fit > 0) & (fit < 1)).all()  # nothing was cut off

    def read(map):
        return interpolate(map[:, None], at, mode="bilinear")[:, 0]

    fine = read(x)
    unit = torch.eye(side * side, dtype=torch.float64).view(-1, side, side)
    slope = (read(unit) * (read(fit) - fine)).sum((1, 2))
    if min(size) > 1:  # a line of one value is exact
        assert (read(fit) - fine).abs().max() > 1e-3
    assert slope.abs().max() < 1e-10


def test_background_and_peaks_stay_exactly_that():
    x = torch.zeros(1, 64, 64)
    x[0, 20:50, 10:40] = 1
    fit, plain = fitted(x, 30), interpolate(x[:, None], (30, 30), mode="bilinear", antialias=True)[:, 0]
    assert (fit[plain == 0] == 0).all()
    assert (fit[plain == 1] == 1).all()
    assert ((fit >= 0) & (fit <= 1)).all()
    assert (plain == 0).sum() > 500


def test_a_map_of_the_stores_side_is_only_rounded():
    x = torch.tensor([[[0.0, 1.0], [0.25, 0.5]]])
    assert quantised(x, 2)[0].tolist() == [[[0, 255], [64, 128]]]


def test_maps_that_prefer_no_place_are_zero_and_blank():
    x = torch.rand(5, 3, 3)
    x[0], x[1, 0, 0], x[2, 1, 1], x[3] = 7, float("nan"), float("inf"), 0
    maps, blank = quantised(x, 4)
    assert blank.tolist() == [True, True, True, True, False]
    assert not maps[:4].any()
    assert maps[4].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_float_type_and_range(dtype):
    top = torch.finfo(dtype).max
    x = torch.tensor([[[-top, top], [0, 0]]], dtype=dtype)  # the difference of extremes overflows
    assert quantised(x, 2)[0].tolist() == [[[0, 255], [128, 128]]]


# -- sampling


def smooth_maps(n, size, seed):
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 1, 5, 5, generator=g)
    x = interpolate(coarse, size, mode="bicubic", align_corners=False)[:, 0]
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    return (x - low) / (high - low)


def stored(tmp_path, maps, side=30):
    """A store whose maps are these, (N, h, w) in [0, 1]."""
    n = len(maps)
    images = Images(torch.zeros(n, dtype=torch.int64), ("a",), pixels=pixels(n).pixels, masks=None)

    class Fixed:
        model = None
        at = 0

        def __call__(self, images, labels=None, given=None):
            self.at += len(images)
            return found(maps[self.at - len(images) : self.at])

    return make(tmp_path / "store", images, Fixed(), side=side), images


@pytest.mark.parametrize("cells", [(14, 14), (12, 16), (28, 28), (30, 30), (56, 40), "input"])
@pytest.mark.parametrize(("size", "patch"), [((224, 224), 16), ((192, 256), 16), ((240, 160), 20)])
def test_sampling_is_close_to_the_exact_way(tmp_path, cells, size, patch):
    """Cut out the map as a picture, resize it to the input, mirror, average over patches."""
    n, (H, W) = 40, size
    maps = smooth_maps(n, size if cells == "input" else cells, seed=0)
    store, _ = stored(tmp_path, maps)
    maps = interpolate(maps[:, None], size, mode="bilinear", antialias=True)[:, 0]
    g = torch.Generator().manual_seed(1)
    boxes, flip, exact = [], torch.rand(n, generator=g) < 0.5, []
    for i in range(n):
        scale = 0.2 + 0.8 * float(torch.rand((), generator=g))
        h, w = round(H * scale**0.5), round(W * scale**0.5)
        top, left = (int(torch.randint(0, s - c + 1, (), generator=g)) for s, c in ((H, h), (W, w)))
        crop = maps[i, top : top + h, left : left + w][None, None]
        x = interpolate(crop, size, mode="bilinear", antialias=True)
        x = x.flip(-1) if flip[i] else x
        exact.append(avg_pool2d(x, patch)[0, 0])
        boxes.append([left / W, top / H, (left + w) / W, (top + h) / H])
    cells, missing = store.sample(torch.arange(n), torch.tensor(boxes), flip, (H // patch, W // patch))
    error = (cells - torch.stack(exact)).abs()
    assert cells.dtype == torch.float32
    assert not missing.any()
    assert error.mean() < 1e-3
    assert error.max() < 2e-2


def test_the_whole_image_is_the_map_itself(tmp_path):
    maps = smooth_maps(3, (12, 12), 0)
    store, _ = stored(tmp_path, maps, side=12)
    whole, _ = store.sample(torch.tensor([2, 0]), None, None, (3, 4))
    for cells, i in zip(whole, (2, 0), strict=True):  # 4 x 4 samples of a part of 4 x 3 cells
        assert torch.allclose(cells, avg_pool2d(store.map(i)[None], (4, 3))[0], atol=0.02)
    mirrored, _ = store.sample(torch.tensor([2, 0]), None, torch.tensor([True, False]), (3, 4))
    assert torch.equal(mirrored[0], whole[0].flip(-1))
    assert torch.equal(mirrored[1], whole[1])
    same, _ = store.sample(torch.tensor([2, 0]), torch.tensor([[0.0, 0, 1, 1]] * 2), None, (3, 4))
    assert torch.equal(same, whole)


def test_a_crop_of_background_stays_background(tmp_path):
    maps = torch.zeros(1, 30, 30)
    maps[0, 20:25, 20:25] = 1
    store, _ = stored(tmp_path, maps)
    cells, _ = store.sample(torch.tensor([0]), torch.tensor([[0.0, 0, 0.5, 0.5]]), None, (7, 7))
    assert not cells.any()
    cells, _ = store.sample(torch.tensor([0]), torch.tensor([[0.7, 0.7, 0.8, 0.8]]), None, (2, 2))
    assert torch.allclose(cells, torch.ones(1, 2, 2))


def test_left_is_left_and_top_is_top(tmp_path):
    maps = torch.zeros(1, 10, 10)
    maps[0, :, :5] = 1
    maps[0, 0, 5:] = 0.5
    store, _ = stored(tmp_path, maps, side=10)
    left, _ = store.sample(torch.tensor([0]), torch.tensor([[0.0, 0, 0.4, 1]]), None, (1, 1))
    right, _ = store.sample(torch.tensor([0]), torch.tensor([[0.6, 0.3, 1, 1]]), None, (1, 1))
    top, _ = store.sample(torch.tensor([0]), torch.tensor([[0.6, 0, 1, 0.05]]), None, (1, 1))
    assert left.item() == 1
    assert right.item() == 0
    assert 0.49 < top.item() < 0.51


def test_missing_maps_are_zero_told_and_counted(tmp_path):
    images = pixels(4)
    make(tmp_path / "s", images.subset([0, 2]))
    store = MapStore.open(tmp_path / "s", images, missing="weigh")
    assert store.found.tolist() == [True, False, True, False]
    with pytest.warns(MapWarning, match="2 images of 4"):
        cells, missing = store.sample(torch.tensor([0, 1, 3, 2]), None, None, (4, 4))
    assert missing.tolist() == [False, True, True, False]
    assert not cells[1:3].any()
    assert cells[0].any()
    assert cells[3].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        store.sample(torch.tensor([1]), None, None, (4, 4))
    assert store.missed == 3
    assert not store.map(1).any()


def test_batches_of_one_and_none(tmp_path):
    images = pixels(3)
    store = make(tmp_path / "s", images)
    all_, _ = store.sample(torch.arange(3), None, None, (5, 3))
    for i in range(3):
        assert torch.equal(store.sample(torch.tensor([i]), None, None, (5, 3))[0][0], all_[i])
    none, missing = store.sample(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), None, (5, 3))
    assert none.shape == (0, 5, 3)
    assert missing.shape == (0,)
    with pytest.raises(ValueError, match="boxes of shape"):
        store.sample(torch.arange(3), torch.zeros(2, 4), None, (5, 3))


# -- made once


@pytest.mark.parametrize("kind", ["pixels", "files", "packed"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_each_map_is_that_of_its_image(tmp_path, kind, batch_size):
    if kind == "pixels":
        images = pixels(5)
    else:
        paths = write_images(tmp_path / "photos", 5)
        images = of(paths)
        if kind == "packed":
            images = Images(images.labels, ("image",), files=tuple(Packed(p.name, p.read_bytes()) for p in paths))
    source = Bright()
    store = make(tmp_path / "s", images, source, batch_size=batch_size)
    assert source.asked == len(store) == 5
    assert store.found.all()
    for i in range(5):
        assert torch.allclose(store.map(i), expected(images, i), atol=2.1 / 255)
    again = make(tmp_path / "s", images, source)
    assert source.asked == 5
    assert all(torch.equal(again.map(i), store.map(i)) for i in range(5))
    back = images.subset([4, 0, 2])
    assert torch.equal(MapStore.open(tmp_path / "s", back).map(0), store.map(4))


def test_workers_make_the_same_maps(tmp_path):
    images = of(write_images(tmp_path / "photos", 7))
    here, there = make(tmp_path / "a", images, batch_size=3), make(tmp_path / "b", images, batch_size=3, workers=2)
    assert all(torch.equal(here.map(i), there.map(i)) for i in range(7))


def test_more_images_are_added(tmp_path):
    paths, source = write_images(tmp_path / "photos", 6), Bright()
    make(tmp_path / "s", of(paths[:4]), source)
    store = make(tmp_path / "s", of(paths), source)
    assert source.asked == 6
    assert store.found.all()
    assert len(MapStore.open(tmp_path / "s")) == 6


def test_the_same_pixels_are_asked_for_once(tmp_path):
    images = pixels(3).subset([0, 1, 0, 2, 1, 0])
    source = Bright()
    store = make(tmp_path / "s", images, source)
    assert source.asked == 3
    assert store.found.all()
    assert torch.equal(store.map(0), store.map(5))
    assert not torch.equal(store.map(0), store.map(1))


def test_a_changed_file_gets_a_new_map(tmp_path):
    paths, source = write_images(tmp_path / "photos", 4), Bright()
    before = make(tmp_path / "s", of(paths), source)
    write_images(tmp_path / "photos", 2, seed=9)  # the first two are others now
    with pytest.raises(MapStoreError, match="no map of 2 of 4 images"):
        MapStore.open(tmp_path / "s", of(paths))
    after = make(tmp_path / "s", of(paths), source)
    assert source.asked == 6
    for i in range(4):
        assert torch.equal(after.map(i), before.map(i)) == (i >= 2)
        assert torch.allclose(after.map(i), expected(of(paths), i), atol=2.1 / 255)


def test_a_file_of_the_same_size_and_another_time_is_read(tmp_path):
    path = tmp_path / "a.bmp"
    images, source = of([path]), Bright()
    for k, colour in enumerate(("red", "blue")):
        picture = Image.new("RGB", (8, 8), colour)
        picture.putpixel((k, 3), (255, 255, 255))
        picture.save(path)
        os.utime(path, ns=(k, k))
        store = make(tmp_path / "s", images, source)
        assert source.asked == k + 1
        assert torch.allclose(store.map(0), expected(images, 0), atol=2.1 / 255)


def test_a_file_that_was_moved_or_touched_keeps_its_map(tmp_path):
    paths, source = write_images(tmp_path / "photos", 3), Bright()
    before = make(tmp_path / "s", of(paths), source)
    os.utime(paths[0], ns=(5, 5))
    paths[1] = paths[1].rename(tmp_path / "photos" / "new.png")
    opened = MapStore.open(tmp_path / "s", of(paths))
    after = make(tmp_path / "s", of(paths), source)
    assert source.asked == 3
    for store in (opened, after):
        assert all(torch.equal(store.map(i), before.map(i)) for i in range(3))


def test_of_a_moved_file_no_byte_is_read_again(tmp_path, monkeypatch):
    paths = write_images(tmp_path / "photos", 3)
    make(tmp_path / "s", of(paths))
    paths[1] = paths[1].rename(tmp_path / "photos" / "new.png")
    make(tmp_path / "s", of(paths))
    monkeypatch.setattr("foveal.maps.store_key.read_file", None)
    assert MapStore.open(tmp_path / "s", of(paths)).found.all()


def test_an_unreadable_image_is_left_out_and_named(tmp_path):
    paths = write_images(tmp_path / "photos", 4)
    paths[1].write_bytes(paths[1].read_bytes()[:60])
    paths[3] = tmp_path / "photos" / "gone.png"
    for batch_size in (1, 4):
        with pytest.warns(DataWarning, match=r"2 images left out: 001.png \(.*gone.png"):
            store = make(tmp_path / f"s{batch_size}", of(paths), batch_size=batch_size)
        assert store.found.tolist() == [True, False, True, False]
        assert [name for name, _ in store.unreadable] == ["001.png", "gone.png"]


def test_flags_are_kept(tmp_path):
    from foveal.maps import TokenCut

    images = pixels(3, (32, 32))
    images.pixels[1] = 7  # one colour
    model = vit()
    config = ImageConfig((32, 32))
    made = TokenCut(model)(config.normalise(images.pixels))
    store = make_store(tmp_path / "s", images, TokenCut(model), SETTINGS, config=config)
    assert torch.equal(store.degenerate, made.degenerate)
    assert torch.equal(store.inverted, made.inverted)
    assert torch.equal(store.blank, made.blank)
    for i in range(3):
        assert torch.equal(store.map(i), quantised(made.map, 30)[0][i].float() / 255)


def test_labels_are_given_where_asked(tmp_path):
    images = pixels(4)

    class Labelled:
        model = None
        seen = ()

        def __call__(self, images, labels=None, given=None):
            self.seen += () if labels is None else tuple(labels.tolist())
            return found(images.mean(1) + 3)

    source = Labelled()
    make(tmp_path / "a", images, source)
    assert source.seen == ()
    make(tmp_path / "b", images, source, labels=True)
    assert source.seen == (0, 1, 0, 1)
    relabelled = Images(torch.tensor([0, 0, 0, 1]), ("a", "b"), pixels=images.pixels)
    make(tmp_path / "b", relabelled, source, labels=True)
    assert source.seen == (0, 1, 0, 1, 0)  # the second image's label is another


def test_given_masks_are_the_images_own(tmp_path):
    images = pixels(4, masks=True)
    store = make(tmp_path / "s", images, Given())
    for i in range(4):
        assert torch.equal(store.map(i), quantised(images.masks[i][None].float(), 30)[0][0].float() / 255)
    other = Images(images.labels, images.classes, pixels=images.pixels, masks=images.masks.flip(1))
    mended = make(tmp_path / "s", other, Given())
    for i in range(4):
        assert torch.equal(mended.map(i), quantised(other.masks[i][None].float(), 30)[0][0].float() / 255)


# -- killed, damaged, full


class Slow(Bright):
    """Notes in a file how many images it was asked for."""

    def __init__(self, told):
        super().__init__()
        self.told = told

    def __call__(self, images, labels=None, given=None):
        time.sleep(0.05)
        with open(self.told, "a") as file:
            file.write("x" * len(images))
        return super().__call__(images)


def test_killed_and_run_again(tmp_path):
    images = of(write_images(tmp_path / "photos", 60, size=(8, 8)))
    folder, told = tmp_path / "s", tmp_path / "told"
    process = FORK.Process(target=make, args=(folder, images, Slow(told)), kwargs={"batch_size": 2, "shard": 4})
    process.start()
    while len(list(folder.glob("maps-*.npy"))) < 3:
        assert process.is_alive(), "it should have been slower"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    kept = int(MapStore.open(folder, images, missing="weigh").found.sum())
    made = len(told.read_text())
    assert 12 <= kept <= made <= kept + 6 < 60
    source = Bright()
    store = make(folder, images, source)
    assert source.asked == 60 - kept
    whole = make(tmp_path / "other", images)
    assert all(torch.equal(store.map(i), whole.map(i)) for i in range(60))
    assert not list(folder.glob("*.partial*"))


def test_stopped_by_an_error_what_was_made_is_kept(tmp_path):
    images = pixels(8)

    class Stops(Bright):
        def __call__(self, images, labels=None, given=None):
            if self.asked >= 4:
                raise KeyboardInterrupt
            return super().__call__(images)

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "s", images, Stops(), batch_size=2)
    source = Bright()
    assert make(tmp_path / "s", images, source).found.all()
    assert source.asked == 4


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_damaged_shard_is_noticed_and_made_again(tmp_path, damage, monkeypatch):
    monkeypatch.setattr(files, "join", lambda *_: None)  # small shards stay small
    images = pixels(8)
    store = make(tmp_path / "s", images, shard=2)
    before = [store.map(i) for i in range(8)]  # not through a file that is cut under the reader
    path = sorted((tmp_path / "s").glob("maps-*.npy"))[1]
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes({"cut": data[:-50], "changed": data, "empty": b""}[damage])
    with pytest.warns(MapWarning, match=path.name), pytest.raises(MapStoreError, match="no map of 2 of 8 images"):
        MapStore.open(tmp_path / "s", images)
    source = Bright()
    with pytest.warns(MapWarning, match="damaged, to be made again"):
        after = make(tmp_path / "s", images, source)
    assert source.asked == 2
    assert all(torch.equal(after.map(i), before[i]) for i in range(8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MapStore.open(tmp_path / "s", images)


def test_what_a_killed_writer_left_is_removed_and_never_read(tmp_path):
    images = pixels(4)
    make(tmp_path / "s", images.subset([0, 1]))
    left = tmp_path / "s" / "maps-0000-000002-0123456789abcdef.npy.partial"
    left.write_bytes(b"half")
    assert MapStore.open(tmp_path / "s", images, missing="weigh").found.sum() == 2
    make(tmp_path / "s", images)
    assert not left.exists()


def test_a_full_disk_is_one_error_and_loses_nothing(tmp_path, monkeypatch):
    images, whole = pixels(8), files.os.fsync

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    make(tmp_path / "s", images.subset(range(4)))
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(MapStoreError, match=r"cannot write .*No space left on device; free space"):
        make(tmp_path / "s", images, shard=2)
    monkeypatch.setattr(files.os, "fsync", whole)
    assert not list((tmp_path / "s").glob("*.partial*"))
    source = Bright()
    assert make(tmp_path / "s", images, source).found.all()
    assert source.asked == 4


def test_small_shards_are_joined(tmp_path):
    images = pixels(9)
    store = make(tmp_path / "s", images, shard=2)
    shards = list((tmp_path / "s").glob("maps-*.npy"))
    assert len(shards) == 1
    whole = make(tmp_path / "other", images)
    assert all(torch.equal(store.map(i), whole.map(i)) for i in range(9))


def test_more_shards_than_can_be_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "join", lambda *_: None)
    monkeypatch.setattr(files, "MAPPED", 2)
    images = pixels(9)
    store = make(tmp_path / "s", images, shard=2)
    shards, _ = files.read_shards(tmp_path / "s")
    assert [isinstance(shard.records, np.memmap) for shard in shards].count(True) == 2
    assert len(shards) == 5
    whole = make(tmp_path / "other", images)
    assert all(torch.equal(store.map(i), whole.map(i)) for i in range(9))


def test_joining_that_is_killed_loses_nothing(tmp_path, monkeypatch):
    images = pixels(6)
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: None)  # dies before it removes
    store = make(tmp_path / "s", images, shard=2)
    assert len(list((tmp_path / "s").glob("maps-*.npy"))) == 4
    assert store.found.all()
    assert len(MapStore.open(tmp_path / "s")) == 6


def test_changed_images_leave_no_old_maps_behind(tmp_path):
    paths = write_images(tmp_path / "photos", 4)
    source = Bright()
    for seed in range(3):
        write_images(tmp_path / "photos", 4, seed=seed)
        store = make(tmp_path / "s", of(paths), source)
    assert source.asked == 12
    assert len(MapStore.open(tmp_path / "s")) == 4
    assert sum(len(shard.records) for shard in files.read_shards(tmp_path / "s")[0]) == 4
    assert all(torch.allclose(store.map(i), expected(of(paths), i), atol=2.1 / 255) for i in range(4))


# -- several processes


def test_ranks_write_disjoint_shares_and_a_reader_sees_all(tmp_path):
    images = pixels(7)
    sources = [Bright() for _ in range(3)]
    for rank in (2, 0, 1):
        store = make(tmp_path / "s", images, sources[rank], rank=rank, world=3, shard=2)
    assert [source.asked for source in sources] == [2, 2, 3]
    assert store.found.all()
    one = make(tmp_path / "one", images)
    assert all(torch.equal(store.map(i), one.map(i)) for i in range(7))
    source = Bright()
    make(tmp_path / "s", images, source)  # in another number of processes
    assert source.asked == 0


def test_damage_of_a_rank_that_is_gone(tmp_path):
    images = pixels(6)
    for rank in range(3):
        make(tmp_path / "s", images, rank=rank, world=3)
    path = next((tmp_path / "s").glob("maps-0002-*.npy"))
    path.write_bytes(b"")
    source = Bright()
    with pytest.warns(MapWarning, match="damaged"):
        make(tmp_path / "s", images, source)
    assert source.asked == 2
    assert not path.exists()


def test_ranks_at_the_same_time(tmp_path):
    images = pixels(12)
    both = [
        FORK.Process(target=make, args=(tmp_path / "s", images), kwargs={"rank": rank, "world": 2, "shard": 2})
        for rank in range(2)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert sum(len(s.records) for s in files.read_shards(tmp_path / "s")[0]) == 12
    assert MapStore.open(tmp_path / "s", images).found.all()


def hold(folder, ready):
    with files.writing(folder, 0):
        ready.set()
        time.sleep(60)


def test_a_second_process_of_the_same_rank_is_refused(tmp_path):
    ready = FORK.Event()
    process = FORK.Process(target=hold, args=(tmp_path / "s", ready))
    process.start()
    assert ready.wait(60)
    with pytest.raises(MapStoreError, match="another process is writing maps"):
        make(tmp_path / "s", pixels(2))
    process.kill()
    process.join()
    make(tmp_path / "s", pixels(2))  # the lock went with it


# -- other settings, other images


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {**SETTINGS, "map": "dark"}}, 'map was "bright", now "dark"'),
        ({"settings": {**SETTINGS, "options": {"tau": 0.3}}}, 'options was {}, now {"tau": 0.3}'),
        ({"settings": {"map": "bright", "options": {}}}, "model was null, now not given"),
        ({"settings": {**SETTINGS, "weights": "ab"}}, 'weights was not given, now "ab"'),
        ({"side": 14}, "side was 30, now 14"),
        ({"labels": True}, "labels was false, now true"),
    ],
)
def test_a_store_of_other_settings_is_refused(tmp_path, change, message):
    images, source = pixels(2), Bright()
    make(tmp_path / "s", images)
    with pytest.raises(MapStoreError) as error:
        make(tmp_path / "s", images, source, **change)
    assert message in str(error.value)
    assert str(tmp_path / "s") in str(error.value)
    assert source.asked == 0


def test_another_input_size_is_another_setting(tmp_path):
    images = pixels(2)
    make(tmp_path / "s", images)
    with pytest.raises(MapStoreError, match=r"image was .*16, 16.*now .*32, 32"):
        make_store(tmp_path / "s", images, Bright(), SETTINGS, config=ImageConfig((32, 32)))


def test_another_version_of_foveal_goes_on(tmp_path, monkeypatch):
    images, source = pixels(2), Bright()
    made = make(tmp_path / "s", images, source)
    assert made.settings["made_by"].startswith("foveal ")
    monkeypatch.setattr("foveal.maps.store.__version__", "99")
    make(tmp_path / "s", images, source)
    assert source.asked == 2


def test_open_checks_the_settings_it_is_given(tmp_path):
    images = pixels(2)
    make(tmp_path / "s", images)
    store = MapStore.open(tmp_path / "s", images, settings=SETTINGS)
    assert {name: store.settings[name] for name in SETTINGS} == SETTINGS
    assert store.settings["side"] == store.side == 30
    with pytest.raises(MapStoreError, match='map was "bright", now "dark"'):
        MapStore.open(tmp_path / "s", images, settings={"map": "dark"})


def test_unknown_images_are_counted_and_named(tmp_path):
    paths = write_images(tmp_path / "photos", 6)
    make(tmp_path / "s", of(paths[:2]))
    with pytest.raises(MapStoreError, match=r"no map of 4 of 6 images \(002.png, 003.png, 004.png and 1 more\)"):
        MapStore.open(tmp_path / "s", of(paths))
    with pytest.raises(ValueError, match="missing='ignore'"):
        MapStore.open(tmp_path / "s", of(paths), missing="ignore")


def test_folders_that_are_no_store(tmp_path):
    with pytest.raises(MapStoreError, match="holds no map store"):
        MapStore.open(tmp_path / "nowhere", pixels(2))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(MapStoreError, match=r"not empty and no map store \(it has letter.txt\)"):
        make(tmp_path / "full", pixels(2))
    (tmp_path / "full" / "store.json").write_text("{")
    with pytest.raises(MapStoreError, match="cannot read"):
        MapStore.open(tmp_path / "full")
    (tmp_path / "file").write_text("")
    with pytest.raises(MapStoreError, match="cannot write"):
        make(tmp_path / "file", pixels(2))


@pytest.mark.parametrize("options", [{"side": 0}, {"batch_size": 0}, {"rank": 2, "world": 2}, {"workers": -1}])
def test_sizes_that_make_no_sense(tmp_path, options):
    with pytest.raises(ValueError, match="sizes must be"):
        make(tmp_path / "s", pixels(2), **options)


def test_a_store_without_images_lists_its_own(tmp_path):
    paths = write_images(tmp_path / "photos", 3)
    made = make(tmp_path / "s", of(paths))
    store = MapStore.open(tmp_path / "s")
    assert store.names == tuple(str(path) for path in paths)
    assert all(torch.equal(store.map(i), made.map(i)) for i in range(3))
    with pytest.raises(IndexError):
        store.map(3)


def test_what_describes_a_model():
    one, same, other = vit(), vit(), vit()
    with torch.no_grad():
        other.head.bias[0] += 1
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    assert fingerprint(vit(dtype=torch.bfloat16)) != fingerprint(one)
    told = describe("tokencut", {"tau": 0.2}, one, "vit")
    assert told == {"map": "tokencut", "options": {"tau": 0.2}, "model": "vit", "weights": fingerprint(one)}
    assert json.loads(json.dumps(told)) == told
    assert describe("given", {}, None, None)["weights"] is None


def test_progress_is_told(tmp_path):
    images, told = pixels(5), []
    make(tmp_path / "s", images.subset([0]))
    make(tmp_path / "s", images, batch_size=3, progress=lambda *now: told.append(now))
    assert told == [(0, 4), (3, 4), (4, 4)]
