"""Back from what a model is given to the pixels: for maps that are made from pixels alone.

    pixel = round(255 (x std + mean)), clipped to 0 ... 255

Exact for images that ImageConfig.normalise made of bytes; interpolated, blurred or erased ones go to the nearest byte.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def pixels_of(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The bytes (B, 3, H, W) uint8 of normalised images (B, 3, H, W), any float type.

    mean, std: of the three channels, for values in [0, 1], as the images were normalised with.
    Raises ValueError where these are not three channels, TypeError for images that are not float.
    """
    if images.dim() != 4 or images.shape[1] != 3 or len(mean) != 3 or len(std) != 3:
        raise ValueError(
            f"images of shape {tuple(images.shape)} with mean {tuple(mean)} and std {tuple(std)}: maps of pixels need"
            " RGB images (B, 3, H, W), and three numbers of each"
        )
    if not images.is_floating_point():
        raise TypeError(f"images of type {images.dtype}: give them normalised, as the model gets them")
    # by channel: a tensor of mean and std would have to be sent to the device at every step
    channels = [images[:, c].float() * (255.0 * std[c]) + 255.0 * mean[c] for c in range(3)]
    return torch.stack(channels, dim=1).round_().clamp_(0, 255).to(torch.uint8)
