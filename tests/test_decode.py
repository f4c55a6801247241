"""Every kind of image file becomes upright 8-bit RGB; unreadable ones are found without decoding whole sets."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from foveal.data.decode import Packed, decode, decode_tensor, why_unreadable
from foveal.data.errors import DataError


def gradient(height: int = 4, width: int = 6) -> np.ndarray:
    """RGB, each value different enough to tell turned and mirrored pictures apart."""
    return (np.arange(height * width * 3).reshape(height, width, 3) * 3 % 251).astype(np.uint8)


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def test_rgb_is_untouched(tmp_path):
    path = saved(Image.fromarray(gradient()), tmp_path / "a.png")
    assert torch.equal(decode_tensor(path), torch.from_numpy(gradient()).permute(2, 0, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path, orientation):
    turn = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),  # stored a quarter turn to the left of how it is seen
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(turn(gradient())))
    path = saved(stored, tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(decode(path)), gradient())


def test_damaged_exif_does_not_lose_the_picture(tmp_path):
    path = saved(Image.fromarray(gradient()), tmp_path / "a.png", exif=b"Exif\0\0II*\0\xff\xff")
    assert np.array_equal(np.asarray(decode(path)), gradient())


def test_grey_is_repeated(tmp_path):
    grey = gradient()[..., 0]
    seen = decode_tensor(saved(Image.fromarray(grey), tmp_path / "a.png"))
    assert torch.equal(seen, torch.from_numpy(grey).expand(3, -1, -1))


def test_transparency_is_laid_on_white(tmp_path):
    rgba = np.dstack([gradient(), np.zeros((4, 6), np.uint8)])
    rgba[0, :, 3] = 255
    seen = np.asarray(decode(saved(Image.fromarray(rgba), tmp_path / "a.png")))
    assert np.array_equal(seen[0], gradient()[0])
    assert (seen[1:] == 255).all()


def test_half_transparent_black_is_middle_grey(tmp_path):
    path = saved(Image.new("RGBA", (2, 2), (0, 0, 0, 128)), tmp_path / "a.png")
    assert set(np.asarray(decode(path)).ravel()) == {127}


def test_grey_with_alpha_and_transparent_palette(tmp_path):
    grey_alpha = saved(Image.new("LA", (2, 2), (10, 0)), tmp_path / "la.png")
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([1, 2, 3, 4, 5, 6])
    see_through = saved(palette, tmp_path / "p.png", transparency=1)
    opaque = saved(palette, tmp_path / "q.png")
    assert (np.asarray(decode(grey_alpha)) == 255).all()
    assert (np.asarray(decode(see_through)) == 255).all()
    assert np.asarray(decode(opaque))[0, 0].tolist() == [4, 5, 6]


def test_cmyk_becomes_rgb(tmp_path):
    path = saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "a.jpg", quality=100)
    red = np.asarray(decode(path))[4, 4]
    assert red[0] > 250
    assert max(red[1:]) < 5


def test_sixteen_bits_are_scaled_not_cut_off(tmp_path):
    grey = np.array([[0, 128 * 257, 65535]], np.uint16)
    for name in ("a.png", "a.tif"):
        path = saved(Image.fromarray(grey), tmp_path / name)
        assert np.asarray(decode(path))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("top", [1.0, 255.0])
def test_float_grey_is_scaled(tmp_path, top):
    grey = np.array([[0, 0.5, 1]], np.float32) * top
    path = saved(Image.fromarray(grey), tmp_path / "a.tif")
    assert np.asarray(decode(path))[0, :, 0].tolist() == [0, 128, 255]


def test_float_grey_out_of_range_is_an_error(tmp_path):
    path = saved(Image.fromarray(np.array([[-1.0, 2]], np.float32)), tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif: values from -1 to 2"):
        decode(path)


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (2, 2), c) for c in ("red", "blue")]
    path = saved(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert np.asarray(decode(path))[0, 0].tolist() == [255, 0, 0]


def test_packed_image_is_its_file(tmp_path):
    path = saved(Image.fromarray(gradient()), tmp_path / "a.png")
    assert torch.equal(decode_tensor(Packed("a", path.read_bytes())), decode_tensor(path))


def test_unreadable_image_is_named(tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"bad\.jpg: no image format"):
        decode(tmp_path / "bad.jpg")
    with pytest.raises(DataError, match="cannot read image number 3"):
        decode(Packed("number 3", b"\xff\xd8\xff"))


def whole(kind: str) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "bmp", "gif", "tiff"])
def test_whole_files_pass(tmp_path, kind):
    path = tmp_path / "a"
    path.write_bytes(whole(kind))
    assert why_unreadable(path) is None


def test_whole_jpeg_and_png_pass_without_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("opened"))
    for kind in ("jpeg", "png"):
        (tmp_path / kind).write_bytes(whole(kind))
        assert why_unreadable(tmp_path / kind) is None


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_cut_files_are_found_and_trailing_bytes_are_not_damage(tmp_path, kind):
    path = tmp_path / "a"
    path.write_bytes(whole(kind)[:-2000])
    assert "truncated" in why_unreadable(path)
    path.write_bytes(whole(kind) + b"a camera's own notes, longer than what is looked at")
    assert why_unreadable(path) is None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        (b"<html>404</html>", "no image format"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, content, reason):
    (tmp_path / "a.jpg").write_bytes(content)
    assert reason in why_unreadable(tmp_path / "a.jpg")
    assert "No such file" in why_unreadable(tmp_path / "missing.jpg")
