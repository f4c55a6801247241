"""No mixing, in the form of a mixer: the same training step with and without."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.mix.mixed import LabelWeights, Mixed
from foveal.mix.mixer import Draw, Mixer, check_images


@dataclass(kw_only=True)
class NoMix(Mixer[Draw]):
    """Images and labels as they are. Draws nothing."""

    def draw(
        self, batch: int, image_size: tuple[int, int], grid: tuple[int, int] | None = None, *, rng: torch.Generator
    ) -> Draw:
        """Every image with itself."""
        return Draw(torch.arange(batch))

    def apply(self, images: Tensor, draw: Draw) -> Mixed:
        """The images themselves."""
        check_images(images, len(draw.perm))
        perm = draw.perm.to(images.device, non_blocking=True)
        B, _, H, W = images.shape
        one = torch.ones(B, device=images.device)
        keep = one[:, None, None, None].expand(B, 1, H, W)
        return Mixed(images, perm, keep, (LabelWeights(one, perm, torch.zeros_like(one)),))
