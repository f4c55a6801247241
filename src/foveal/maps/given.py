"""Maps from outside: gaze, masks, boxes, files; whatever comes along with the images of a call.

    map = given

They are in the images' frame, at any size: who crops and mirrors an image does the same to its map.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from foveal.maps.found import Found, found


@dataclass(kw_only=True)
class Given:
    """The source `given`: hands on the maps of the call, (B, H', W') bool or float, zero or more."""

    model: nn.Module | None = field(default=None, init=False, repr=False)

    def __call__(self, images: Tensor, labels: Tensor | None = None, given: Tensor | None = None) -> Found:
        """The maps `given`, at their own size. A mask that is all object, or none, prefers no place and is blank.

        Raises ValueError where there are none, or not one for each image, or (on the CPU, where asking costs
        nothing) where one is negative.
        """
        if given is None:
            raise ValueError(
                "the map 'given' follows maps that come with the images, and none came: use data with masks (without"
                " randaugment, which loses them), pass given=maps (B, H, W), or choose a map that is made from a model"
                " or from pixels"
            )
        if given.dim() != 3 or len(given) != len(images):
            raise ValueError(f"given maps of shape {tuple(given.shape)} for {len(images)} images: (B, H, W) is needed")
        if given.device.type == "cpu" and given.dtype != torch.bool and bool((given < 0).any()):
            raise ValueError("a given map is negative: maps say how much a place counts, zero or more")
        return found(given.to(images.device, non_blocking=True))
