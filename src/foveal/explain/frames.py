"""Images as a model gets them, and the same as pixels to draw on.

A file is resized and cropped before the model sees it; a map only fits that crop, so the picture shows the crop.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveal.data.batches import Batches
from foveal.data.config import ImageConfig
from foveal.data.images import Images


@dataclass(frozen=True)
class Frames:
    """inputs: (B, 3, h, w) float32, normalised.  pixels: per image (3, H, W) uint8 that show the same."""

    inputs: Tensor
    pixels: tuple[Tensor, ...]


def frames(images: Images, config: ImageConfig, device: torch.device | str = "cpu") -> Frames:
    """All of `images` in the model's frame, on `device`; a handful, as they are held at once.

    Pixels are shown at their own size where the model sees them whole, files as cropped.
    """
    batch = next(iter(Batches(replace(images, masks=None), config, len(images), train=False, device=device)))
    if images.pixels is not None:
        return Frames(batch.images, tuple(images.pixels.cpu()))
    mean, std = (batch.images.new_tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    shown = ((batch.images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return Frames(batch.images, tuple(shown.cpu()))
