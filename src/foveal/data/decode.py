"""One encoded image to upright 8-bit RGB: the only place that knows what image files can look like.

EXIF orientation is applied, grey is repeated, transparency is laid on white, CMYK is converted, 16-bit and
floating-point grey is scaled to 8 bits (not cut off at 255), of an animation the first frame is taken.
"""

import io
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from foveal.data.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True)
class Packed:
    """An encoded image (JPEG, PNG, WebP, ...) held in memory instead of in a file of its own."""

    name: str
    data: bytes

    def __str__(self) -> str:
        return self.name


def decode(source: Path | Packed) -> Image.Image:
    """The image as an upright PIL image of mode RGB. Raises DataError with the name if unreadable."""
    try:
        with Image.open(io.BytesIO(source.data) if isinstance(source, Packed) else source) as opened:
            opened.load()
            return _rgb(_upright(opened))
    except Exception as error:  # a broken file raises a dozen different types in Pillow
        raise DataError(f"cannot read image {source}: {_reason(error)}") from error


def decode_tensor(source: Path | Packed) -> Tensor:
    """The image as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(decode(source))).permute(2, 0, 1).contiguous()


def why_unreadable(path: Path) -> str | None:
    """What is wrong with an image file, or None: looks at its first and last bytes and decodes only in doubt.

    A JPEG or PNG that begins and ends as it should is taken to be whole (damage in between shows when it is
    decoded); of other formats the header is read; one with a wrong beginning or end is decoded to find out.
    """
    try:
        with path.open("rb") as file:
            head = file.read(24)
            file.seek(max(0, file.seek(0, io.SEEK_END) - 16))
            tail = file.read()
    except OSError as error:
        return _reason(error)
    if not head:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer instead of the image (git lfs pull fetches it)"
    if head.startswith(b"\xff\xd8\xff") and tail.rstrip(b"\0\r\n").endswith(b"\xff\xd9"):
        return None
    if head.startswith(b"\x89PNG\r\n\x1a\n") and b"IEND" in tail:
        return None
    try:
        if head.startswith((b"\xff\xd8\xff", b"\x89PNG")):
            decode(path)
        else:
            with Image.open(path) as opened:
                opened.verify()
    except Exception as error:
        return _reason(error.__cause__ or error)
    return None


def _upright(image: Image.Image) -> Image.Image:
    with suppress(Exception):  # damaged EXIF is no reason to lose a readable picture
        return ImageOps.exif_transpose(image)
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _eight_bits(np.asarray(image)).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        # LA and PA go by way of RGBA; transparency in a palette or of one colour is made alpha by convert
        seen = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    return image.convert("RGB")


def _eight_bits(grey: np.ndarray) -> Image.Image:
    """Grey of 16 bits (0 to 65535) or floats (0 to 1, or 0 to 255) as 8 bits."""
    low, high = float(grey.min()), float(grey.max())
    if not (np.isfinite(low) and np.isfinite(high)) or low < 0 or high > 65535:
        raise DataError(f"values from {low:g} to {high:g} are neither 16-bit grey nor floats in [0, 1]")
    if grey.dtype.kind == "f":
        top = 1.0 if high <= 1 else 255.0 if high <= 255 else 65535.0
    else:
        top = 65535.0
    return Image.fromarray((grey.astype(np.float64) * (255 / top) + 0.5).astype(np.uint8))


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return "no image format that can be read" if "cannot identify image file" in text else text
