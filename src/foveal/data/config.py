"""How a model wants its images: size, mean, deviation, interpolation and crop, asked from the model."""

from dataclasses import dataclass
from typing import Any

import timm.data
import torch
from torch import Tensor, nn

from foveal.data.errors import DataError


@dataclass(frozen=True)
class ImageConfig:
    """Input size (h, w) in pixels and normalisation of a model, and how files are framed for evaluation.

    mean, std: per channel, for values in [0, 1].  interpolation: "bilinear", "bicubic", ... as timm names it.
    crop_pct: share of the resized image that the centre crop keeps; crop_mode: timm's "center" (shorter side
    to size / crop_pct, then crop), "squash" or "border".
    """

    size: tuple[int, int]
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        for field in ("size", "mean", "std"):  # lists, as JSON and YAML give them, become tuples
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if len(self.size) != 2 or min(self.size) < 1:
            raise DataError(f"size={self.size} is not an image size: give (height, width) in pixels")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise DataError(f"mean={self.mean}, std={self.std}: give three of each, every std above 0")
        if not 0 < self.crop_pct <= 1:
            raise DataError(f"crop_pct={self.crop_pct} is not in (0, 1]")

    def normalise(self, images: Tensor) -> Tensor:
        """images: (B, 3, h, w), uint8 or float in [0, 255].  Returns float32 (B, 3, h, w), normalised."""
        x = images.to(torch.float32) / 255
        return (x - x.new_tensor(self.mean).view(3, 1, 1)) / x.new_tensor(self.std).view(3, 1, 1)


def image_config(model: nn.Module) -> ImageConfig:
    """The configuration of a timm, torchvision or transformers vision model.

    The size is the one the model was built for (not the one its weights were trained at, where they differ);
    the rest is timm's data configuration, with ImageNet's mean and deviation where the model has none.
    Raises DataError if the model does not tell its input size.
    """
    cfg = timm.data.resolve_data_config(model=model)
    channels = getattr(getattr(getattr(model, "patch_embed", None), "proj", None), "in_channels", 3)
    if channels != 3:
        raise DataError(f"the model takes {channels} channels; images here have 3 (RGB)")
    return ImageConfig(
        size=_built_for(model),
        mean=cfg["mean"],
        std=cfg["std"],
        interpolation=cfg["interpolation"] if cfg["interpolation"] != "random" else "bicubic",
        crop_pct=cfg["crop_pct"],
        crop_mode=cfg["crop_mode"],
    )


def _built_for(model: Any) -> tuple[int, int]:
    known = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    sizes = (
        getattr(getattr(model, "patch_embed", None), "img_size", None),  # timm
        getattr(model, "img_size", None),
        getattr(model, "image_size", None),  # torchvision
        getattr(getattr(model, "config", None), "image_size", None),  # transformers
        known[1:] if known else None,
    )
    for size in sizes:
        if isinstance(size, int):
            return size, size
        if size is not None and len(size) == 2 and all(isinstance(side, int) for side in size):
            return tuple(size)
    raise DataError(
        f"{type(model).__name__} does not tell its input size; build one: ImageConfig(size=(height, width))"
    )
