"""ResizeMix: paste the whole partner, made smaller, so that its object is always there.

    box side = floor(tau H), floor(tau W)    tau ~ U(0.1, 0.8)    centre uniform over pixels, clipped to the image
    the partner is resized to the clipped box        y = (1 - a) y_i + a y_p,    a = pixels of the box / (H W)

Qin et al., 2020. A box reaches floor(side/2) to both sides of its centre, and is at least one pixel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.mix.cutmix import BoxDraw, box_share, inside, paste
from foveal.mix.draws import Mode, check_mode, check_share, draw_mixes, draw_uniform, reversed_partners
from foveal.mix.mixed import LabelWeights, Mixed
from foveal.mix.mixer import Mixer, check_images


def scaled_boxes(scale: Tensor, centre: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Boxes of `scale` times the image's sides, clipped to it: (B, 4) int64, top, left, bottom, right.

    scale: (B,).  centre: (B, 2) int64, row and column.  The last two are exclusive; no box is empty.
    """
    size = torch.tensor(image_size)
    half = (size * scale.double()[:, None]).long() // 2  # (B, 2)
    first = (centre - half).clamp_min(0)
    last = torch.minimum(centre + half, size)
    return torch.cat([first, torch.maximum(last, first + 1)], dim=-1)


def shrunk_nearest(images: Tensor, perm: Tensor, box: Tensor) -> Tensor:
    """Each partner resized to its box by the nearest pixel, in place: (B, channels, H, W), arbitrary outside the box.

    images: (B, channels, H, W).  perm: (B,).  box: (B, 4).  Pixel y of a box of `height` rows from `top` reads row
    floor((y - top) H / height), with torch's rounding (float32), so that it equals torch's interpolation bit for bit.
    """
    channels, H, W = images.shape[1:]
    rows, columns = _read(box[:, 0], box[:, 2], H), _read(box[:, 1], box[:, 3], W)
    pixel = (rows[:, :, None] * W + columns[:, None, :]).flatten(1)  # (B, H W)
    read = images[perm].flatten(2).gather(2, pixel[:, None].expand(-1, channels, -1))
    return read.view_as(images)


def _read(first: Tensor, last: Tensor, pixels: int) -> Tensor:
    """Which of the partner's rows each row shows: (B, pixels) int64."""
    length = (last - first).clamp_min(1)[:, None]
    place = torch.arange(pixels, device=first.device) - first[:, None]
    place = torch.minimum(place.clamp_min(0), length - 1)
    step = torch.full_like(length, pixels).float() / length
    return (place * step).long().clamp_max(pixels - 1)


def shrunk_bilinear(images: Tensor, perm: Tensor, box: Tensor) -> Tensor:
    """The same by bilinear interpolation between pixel centres, as torch's with align_corners=False."""
    H, W = images.shape[-2:]
    y = _between(box[:, 0], box[:, 2], H)[:, :, None].expand(-1, H, W)
    x = _between(box[:, 1], box[:, 3], W)[:, None, :].expand(-1, H, W)
    wide = torch.promote_types(images.dtype, torch.float32)
    where = torch.stack([x, y], dim=-1).to(wide)
    shrunk = F.grid_sample(images[perm].to(wide), where, padding_mode="border", align_corners=False)
    return shrunk.to(images.dtype)


def _between(first: Tensor, last: Tensor, pixels: int) -> Tensor:
    """The partner's place that each row shows, -1 its first edge and 1 its last: (B, pixels) float64."""
    length = (last - first).clamp_min(1)[:, None]
    centre = torch.arange(pixels, device=first.device, dtype=torch.float64) + 0.5 - first[:, None]
    return (2.0 * centre / length - 1.0).clamp(-1.0, 1.0)


SHRINK = {"nearest": shrunk_nearest, "bilinear": shrunk_bilinear}


@dataclass(kw_only=True)
class ResizeMix(Mixer[BoxDraw]):
    """Paste the whole partner, made smaller, into a random box.

    scale: smallest and largest side of the box as a share of the image's, before it is clipped.
    interpolation: `nearest` as released, or `bilinear`.
    prob: probability that a draw mixes at all.  mode: what shares a draw, `batch`, `pair` or `elem`.
    """

    scale: tuple[float, float] = (0.1, 0.8)
    interpolation: Literal["nearest", "bilinear"] = "nearest"
    prob: float = 1.0
    mode: Mode = "batch"

    def __post_init__(self) -> None:
        self.scale = (float(self.scale[0]), float(self.scale[1]))
        if not 0.0 < self.scale[0] <= self.scale[1] <= 1.0:
            raise ValueError(
                f"scale={self.scale} are the smallest and the largest side, shares of the image's in (0, 1]"
            )
        if self.interpolation not in SHRINK:
            raise ValueError(f"interpolation={self.interpolation!r} is not known; use one of {', '.join(SHRINK)}")
        check_share("prob", self.prob)
        check_mode(self.mode)

    def draw(
        self, batch: int, image_size: tuple[int, int], grid: tuple[int, int] | None = None, *, rng: torch.Generator
    ) -> BoxDraw:
        """Partners and boxes."""
        perm = reversed_partners(batch)
        mixes = draw_mixes(self.prob, perm, self.mode, rng)
        low, high = self.scale
        scale = low + (high - low) * draw_uniform(batch, self.mode, rng)
        place = torch.stack([draw_uniform(batch, self.mode, rng), draw_uniform(batch, self.mode, rng)], dim=-1)
        box = scaled_boxes(scale, (place * torch.tensor(image_size)).long(), image_size)
        return BoxDraw(perm, box * mixes[:, None])

    def apply(self, images: Tensor, draw: BoxDraw) -> Mixed:
        """Paste the partners into the drawn boxes. All of a pasted partner can be seen, in its own frame."""
        check_images(images, len(draw.perm))
        draw = draw.to(images.device)
        size = (images.shape[-2], images.shape[-1])
        pasted, area = inside(draw.box, size), box_share(draw.box, size)
        small = SHRINK[self.interpolation](images, draw.perm, draw.box)
        weights = LabelWeights(1.0 - area, draw.perm, area)
        seen = (area > 0).float()[:, None, None, None].expand(-1, 1, *size)
        return Mixed(paste(images, small, pasted), draw.perm, (~pasted).float(), (weights,), moved_partner=seen)
