"""From stored image to the model's frame: files one by one (torchvision v2), pixels a batch at once.

Files: in training a random resized crop, mirror and RandAugment; in evaluation timm's own resize and crop.
Pixels are framed already (a digit scene fills its image): evaluation resizes them whole, crop_pct unused.
"""

from dataclasses import dataclass

import numpy as np
import timm.data
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import v2

from foveal.chance import seeded
from foveal.data.augment import crop_and_flip, draw_crops
from foveal.data.config import ImageConfig
from foveal.data.images import Images


@dataclass(frozen=True)
class Augment:
    """How training images are varied. crop_scale: share of the area that a crop keeps, from and to."""

    seed: int
    flip: bool
    crop_scale: tuple[float, float] = (0.2, 1.0)
    randaugment: bool = False


@dataclass(frozen=True, eq=False)
class View:
    """Which part of its image each training sample shows, so that a map of the whole image can follow it.

    boxes: (B, 4) float32: left, top, right, bottom as shares of the upright image.  flip: (B,) bool: mirrored after
    the crop.  On the CPU.
    """

    boxes: Tensor
    flip: Tensor


class FileFrame:
    """Frames one decoded file as uint8 (3, h, w); a training image's chance is keyed by epoch and index."""

    def __init__(self, config: ImageConfig, augment: Augment | None) -> None:
        self.augment = augment
        if augment is None:
            self.transform = timm.data.create_transform(
                (3, *config.size),
                is_training=False,
                use_prefetcher=True,  # leave out normalisation: done for the batch, on the device
                interpolation=config.interpolation,
                mean=config.mean,
                std=config.std,
                crop_pct=config.crop_pct,
                crop_mode=config.crop_mode,
            )
        else:
            mode = v2.InterpolationMode(config.interpolation)
            self.crop = v2.RandomResizedCrop(config.size, scale=augment.crop_scale, interpolation=mode)
            self.transform = v2.RandAugment() if augment.randaugment else v2.Identity()

    def __call__(self, image: Image.Image, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """The framed image and its view: (5,) left, top, right, bottom as shares of the image, and 1 if mirrored."""
        if self.augment is None:
            return torch.as_tensor(self.transform(image)), torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0])
        with seeded(self.augment.seed, "augment", epoch, index):
            box = self.crop.make_params([image])
            framed = self.crop.transform(image, box)
            mirrored = self.augment.flip and bool(torch.rand(1) < 0.5)
            framed = self.transform(v2.functional.horizontal_flip(framed) if mirrored else framed)
        left, top, width, height = box["left"], box["top"], image.width, image.height
        right, bottom = left + box["width"], top + box["height"]
        view = torch.tensor([left / width, top / height, right / width, bottom / height, float(mirrored)])
        return torch.from_numpy(np.array(framed)).permute(2, 0, 1).contiguous(), view


def frame_pixels(
    images: Images, index: Tensor, config: ImageConfig, augment: Augment | None, epoch: int
) -> tuple[Tensor, Tensor | None, View | None]:
    """The samples at `index` in the model's frame, float (B, 3, h, w) in [0, 255], masks, bool (B, h, w), and views.

    Everything happens on the device of images.pixels. A mask follows its image's crop and mirror; a pixel of
    it is on the object if at least half of its area is. RandAugment also shears and turns: no masks or views then.
    """
    assert images.pixels is not None
    at = index.to(images.pixels.device)
    x = images.pixels[at]
    masks = None if images.masks is None else images.masks[at, None] * x.new_full((), 255)
    if augment is None:
        x = resize(x, config.size, config.interpolation)
        return x, None if masks is None else resize(masks, config.size, "bilinear")[:, 0] >= 127.5, None
    crops = draw_crops(
        index.tolist(),
        (x.shape[-2], x.shape[-1]),
        seed=augment.seed,
        epoch=epoch,
        crop_scale=augment.crop_scale,
        flip=augment.flip,
    )
    if augment.randaugment:
        return _randaugment(crop_and_flip(x, crops, config.size), index, augment.seed, epoch), None, None
    sides = torch.tensor([x.shape[-1], x.shape[-2]] * 2)
    view = View(crops.boxes / sides, crops.flip)
    if masks is None:
        return crop_and_flip(x, crops, config.size), None, view
    out = crop_and_flip(torch.cat([x, masks], 1), crops, config.size)  # one pass for both
    return out[:, :3], out[:, 3] >= 127.5, view


def resize(x: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """x: (B, K, H, W), values in [0, 255].  Returns float32 (B, K, h, w), unchanged if the size is right."""
    x = x.to(torch.float32)
    if x.shape[-2:] == size:
        return x
    mode = "bilinear" if interpolation == "bilinear" else "bicubic"  # lanczos has no batched form
    return interpolate(x, size, mode=mode, antialias=True).clamp(0, 255)


def _randaugment(x: Tensor, index: Tensor, seed: int, epoch: int) -> Tensor:
    transform = v2.RandAugment()
    out = torch.empty_like(x)
    for row, i in enumerate(index.tolist()):
        with seeded(seed, "augment", epoch, i, 1):  # 1: not the stream that the crop was drawn from
            out[row] = transform(x[row].round().to(torch.uint8))
    return out
