"""Packs of both layouts, written here in miniature: what goes in comes out."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from foveal.data import DataError, load, read_pack
from foveal.data.decode import decode_tensor


def encoded(image: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def blobs(files: list[bytes], field: str) -> dict[str, np.ndarray]:
    offset = np.cumsum([0, *map(len, files)])
    return {f"{field}_blob": np.frombuffer(b"".join(files), np.uint8), f"{field}_offset": offset}


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def sheets(path: Path, counts: tuple[int, ...], side: int = 4, **change: np.ndarray) -> np.ndarray:
    """A pack of sheets; returns its tiles (N, side, side, 3)."""
    tiles, files = noise(sum(counts), side, side, 3), []
    for first, n in zip(np.cumsum([0, *counts[:-1]]), counts, strict=True):
        rows = -(-n // 25)
        grid = np.zeros((rows * 25, side, side, 3), np.uint8)
        grid[:n] = tiles[first : first + n]
        sheet = grid.reshape(rows, 25, side, side, 3).transpose(0, 2, 1, 3, 4).reshape(rows * side, 25 * side, 3)
        files.append(encoded(np.ascontiguousarray(sheet), "WEBP", lossless=True))
    cut = blobs(files, "sheet")
    arrays = {
        "blob": cut["sheet_blob"],
        "sheet_offset": cut["sheet_offset"],
        "sheet_count": np.array(counts, np.int32),
        "label": np.repeat(np.arange(len(counts)), counts).astype(np.int16),
        "name": np.array([f"n{i}" for i in range(sum(counts))], "S"),
        "classes": np.array([f"class {i}" for i in range(len(counts))]),
    }
    np.savez(path, **(arrays | change))
    return tiles


def one_by_one(path: Path, images: list[np.ndarray], labelled: bool = True, **more: np.ndarray) -> None:
    arrays = blobs([encoded(image) for image in images], "image")
    arrays["name"] = np.array([f"n{i}" for i in range(len(images))], "S")
    if labelled:
        arrays |= {"label": np.arange(len(images)) % 2, "classes": np.array(["a", "b"])}
    np.savez(path, **(arrays | more))


def test_sheets_come_out_as_they_went_in(tmp_path):
    tiles = sheets(tmp_path / "a.npz", (30, 3))
    images = read_pack(tmp_path / "a.npz")
    assert torch.equal(images.pixels, torch.from_numpy(tiles).permute(0, 3, 1, 2))
    assert images.labels.tolist() == [0] * 30 + [1] * 3
    assert images.classes == ("class 0", "class 1")
    assert images.names[31] == "n31"


def test_images_of_one_size_become_pixels(tmp_path):
    given = list(noise(4, 5, 6, 3))
    one_by_one(tmp_path / "a.npz", given)
    images = read_pack(tmp_path / "a.npz")
    assert torch.equal(images.pixels, torch.from_numpy(np.stack(given)).permute(0, 3, 1, 2))
    assert images.labels.tolist() == [0, 1, 0, 1]


def test_images_of_many_sizes_stay_encoded(tmp_path):
    given = [noise(5 + i, 6, 3, seed=i) for i in range(4)]
    one_by_one(tmp_path / "a.npz", given)
    images = read_pack(tmp_path / "a.npz")
    assert images.pixels is None
    for i, image in enumerate(given):
        assert torch.equal(images.image(i), torch.from_numpy(image).permute(2, 0, 1))
        assert torch.equal(decode_tensor(images.files[i]), images.image(i))
    assert str(images.files[2]) == "a.npz:n2"


def test_boxes_are_inclusive(tmp_path):
    one_by_one(tmp_path / "a.npz", list(noise(2, 5, 6, 3)), box=np.array([[1, 2, 3, 3], [0, 0, 5, 4]], np.int16))
    masks = read_pack(tmp_path / "a.npz").masks
    expected = torch.zeros(5, 6, dtype=torch.bool)
    expected[2:4, 1:4] = True
    assert torch.equal(masks[0], expected)
    assert masks[1].all()


def test_one_bit_masks(tmp_path):
    given = noise(3, 5, 6) > 127
    files = [encoded(mask) for mask in given]
    one_by_one(tmp_path / "a.npz", list(noise(3, 5, 6, 3)), **blobs(files, "mask"))
    assert torch.equal(read_pack(tmp_path / "a.npz").masks, torch.from_numpy(given))


def test_masks_of_many_sizes_are_brought_to_the_central_square(tmp_path):
    wide, tall = np.zeros((4, 8), bool), np.zeros((8, 4), bool)
    wide[:, 2:4], tall[4:6] = True, True
    pictures = [np.repeat(m[..., None] * np.uint8(255), 3, 2) for m in (wide, tall)]
    one_by_one(tmp_path / "a.npz", pictures, **blobs([encoded(wide), encoded(tall)], "mask"))
    images = read_pack(tmp_path / "a.npz")
    assert images.pixels.shape == (2, 3, 4, 4)
    assert torch.equal(images.masks, images.pixels[:, 0] > 127)
    assert images.masks[0, 0].tolist() == [True, True, False, False]
    assert read_pack(tmp_path / "a.npz", image_size=8).masks.shape == (2, 8, 8)


def test_folder_of_packs_is_a_data_set(tmp_path):
    sheets(tmp_path / "train_a.npz", (20, 20))
    sheets(tmp_path / "train_b.npz", (10, 10))
    sheets(tmp_path / "test.npz", (3, 4))
    data = load(tmp_path)
    assert (len(data.train) + len(data.val), len(data.tests["test"])) == (60, 7)
    assert data.train.pixels.shape[1:] == (3, 4, 4)


def test_val_pack_alone_is_the_test_set(tmp_path):
    one_by_one(tmp_path / "train.npz", list(noise(20, 5, 6, 3)), box=np.tile([0, 0, 1, 1], (20, 1)))
    one_by_one(tmp_path / "val.npz", list(noise(4, 5, 6, 3)), box=np.tile([0, 0, 1, 1], (4, 1)))
    data = load(tmp_path)
    assert list(data.tests) == ["val"]
    assert data.train.masks[:, :2, :2].all()


def test_lone_pack_is_split_and_says_what_lies_beside_it(tmp_path):
    sheets(tmp_path / "train.npz", (20, 20))
    data = load(tmp_path / "train.npz")
    assert [len(data.train), len(data.val), len(data.tests["test"])] == [28, 6, 6]
    sheets(tmp_path / "test.npz", (3, 4))
    assert "would use test.npz" in load(tmp_path / "train.npz").notes[0]


def test_pack_without_labels_is_read_but_not_trained_on(tmp_path):
    one_by_one(tmp_path / "a.npz", list(noise(3, 5, 6, 3)), labelled=False)
    assert read_pack(tmp_path / "a.npz").classes == ("object",)
    with pytest.raises(DataError, match="no labels of two classes"):
        load(tmp_path / "a.npz")


def test_classes_that_differ(tmp_path):
    sheets(tmp_path / "train.npz", (20, 20))
    sheets(tmp_path / "test.npz", (3, 4), classes=np.array(["x", "y"]))
    with pytest.raises(DataError, match="classes of test are not those of train"):
        load(tmp_path)


def test_files_that_are_no_packs(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"?")
    with pytest.raises(DataError, match=r"a\.npz cannot be read as an \.npz pack"):
        load(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", x=np.zeros(3), y=np.zeros(3))
    with pytest.raises(DataError, match="holds the arrays x, y but not image_blob, image_offset"):
        load(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", blob=np.array([object()], object))
    with pytest.raises(DataError, match="cannot be read as an"):
        load(tmp_path / "c.npz")
    (tmp_path / "folder").mkdir()
    np.savez(tmp_path / "folder" / "b.npz", x=np.zeros(3))
    with pytest.raises(DataError, match=r"has b\.npz but no train\.npz"):
        load(tmp_path / "folder")


def test_packs_that_contradict_themselves(tmp_path):
    sheets(tmp_path / "a.npz", (3, 4), sheet_count=np.array([3, 40]))
    with pytest.raises(DataError, match="sheet 1 is 4 x 100 pixels, which is not 2 rows"):
        read_pack(tmp_path / "a.npz")
    one_by_one(tmp_path / "b.npz", list(noise(2, 5, 6, 3)), image_offset=np.array([0, 10, 20]))
    with pytest.raises(DataError, match="does not cut"):
        read_pack(tmp_path / "b.npz")
    masks = blobs([encoded(np.zeros((2, 2), bool))] * 2, "mask")
    one_by_one(tmp_path / "c.npz", list(noise(2, 5, 6, 3)), **masks)
    with pytest.raises(DataError, match="masks 0, 1 are not of the size"):
        read_pack(tmp_path / "c.npz")
