"""Random resized crop and mirror for a batch that is already on the device, each sample with its own draw.

The draw is that of torchvision's RandomResizedCrop (area uniform in crop_scale, log-uniform aspect, ten
tries) with boxes that need not sit on whole pixels; it is made on the CPU and keyed by (seed, "augment",
epoch, sample). The crop itself is RoIAlign: where a box is enlarged that is bilinear interpolation; where it
is reduced every output pixel averages over its whole area, so nothing aliases. (The model's own interpolation
is used for files and for evaluation.)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import roi_align

from foveal.chance import generator

TRIES = 10
RATIO = (3 / 4, 4 / 3)  # width / height of a crop


@dataclass(frozen=True, eq=False)
class Crops:
    """boxes: (B, 4) float: left, top, right, bottom in pixels of the source.  flip: (B,) bool: mirror."""

    boxes: Tensor
    flip: Tensor


def draw_crops(
    index: Sequence[int],
    image_size: tuple[int, int],
    *,
    seed: int,
    epoch: int,
    crop_scale: tuple[float, float] = (0.2, 1.0),
    flip: bool = True,
) -> Crops:
    """All chance of a batch. index: position of each sample in its set; image_size: (H, W) of the source."""
    draws = [torch.rand(2 * TRIES + 3, generator=generator(seed, "augment", epoch, i)) for i in index]
    u = torch.stack(draws)  # (B, 23): areas, aspects, left, top, mirror
    boxes = random_boxes(u[:, : 2 * TRIES + 2], image_size, crop_scale)
    return Crops(boxes, (u[:, -1] < 0.5) & flip)


def random_boxes(u: Tensor, image_size: tuple[int, int], crop_scale: tuple[float, float]) -> Tensor:
    """Boxes from uniform numbers. u: (B, 22) in [0, 1): ten areas, ten aspects, left, top.  Returns (B, 4).

    The first of the ten (area, aspect) pairs that fits into the image is used; if none does, the largest
    centred box whose aspect is within RATIO.
    """
    height, width = image_size
    area = height * width * (crop_scale[0] + (crop_scale[1] - crop_scale[0]) * u[:, :TRIES])
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    aspect = torch.exp(low + (high - low) * u[:, TRIES : 2 * TRIES])
    w, h = (area * aspect).sqrt(), (area / aspect).sqrt()  # (B, 10)
    fits = (w <= width) & (h <= height)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)  # 0 if none fits: replaced below
    w, h = w.gather(1, first)[:, 0], h.gather(1, first)[:, 0]
    found = fits.any(1)
    w = torch.where(found, w, w.new_tensor(min(width, height * RATIO[1])))
    h = torch.where(found, h, h.new_tensor(min(height, width / RATIO[0])))
    left = torch.where(found, u[:, -2], 0.5) * (width - w)
    top = torch.where(found, u[:, -1], 0.5) * (height - h)
    return torch.stack([left, top, left + w, top + h], 1)


def crop_and_flip(images: Tensor, crops: Crops, size: tuple[int, int]) -> Tensor:
    """images: (B, K, H, W), any dtype.  Returns float32 (B, K, h, w), same range, same device."""
    x = images.to(torch.float32)
    boxes = crops.boxes.to(x.device, torch.float32)
    sample = torch.arange(len(x), device=x.device, dtype=torch.float32)[:, None]
    out: Tensor = roi_align(x, torch.cat([sample, boxes], 1), size, sampling_ratio=-1, aligned=True)
    mirrored = crops.flip.nonzero()[:, 0].to(x.device)  # counted on the CPU: no waiting for the device
    out[mirrored] = out[mirrored].flip(-1)
    return out
