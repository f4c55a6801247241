"""Whole images as a source of maps gets them, and the same to draw on.

Maps are made of the whole image, resized to the model's input; so is the picture, in its own shape.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from foveal.data.config import ImageConfig
from foveal.data.errors import DataError
from foveal.data.images import Images
from foveal.explain.frames import Frames
from foveal.explain.overlay import resize
from foveal.maps.store_feed import feed

MOST = 1024  # pixels of a picture's shorter side


def whole_frames(images: Images, config: ImageConfig, device: torch.device | str = "cpu") -> Frames:
    """All of `images`, a handful: inputs resized whole to config.size, pixels as they are, large ones made smaller.

    Raises DataError for an image that cannot be read.
    """
    plain = replace(images, masks=None)
    (part,) = feed(plain, range(len(images)), config, len(images), 0, torch.device(device))
    if part.failed or part.pixels is None:
        i, why = part.failed[0]
        raise DataError(f"cannot read image {images.files[i] if images.files else images.names[i]}: {why}")
    shown = []
    for i in range(len(images)):
        image = images.image(i).cpu()
        side = min(MOST, *image.shape[1:])
        shown.append(torch.from_numpy(resize(image, side).copy()).permute(2, 0, 1))
    return Frames(config.normalise(part.pixels), tuple(shown))
