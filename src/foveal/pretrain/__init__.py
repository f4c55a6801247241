"""Masked pre-training: hide patches, predict them, and let errors on objects cost more.

>>> autoencoder = foveal.pretrain.MaskedAutoencoder(encoder)                              # doctest: +SKIP
>>> out = autoencoder(images, noise)                                                      # doctest: +SKIP
>>> target = autoencoder.target(images)                                                   # doctest: +SKIP
>>> guided_reconstruction(out.prediction, target, out.removed, map).loss.backward()       # doctest: +SKIP
"""

from foveal.pretrain.autoencoder import MaskedAutoencoder, Reconstruction
from foveal.pretrain.decoder import Decoder
from foveal.pretrain.guided import (
    Guided,
    guided_reconstruction,
    object_weights,
    temperature_at,
    to_patches,
    unit,
)
from foveal.pretrain.masking import Masking, mask_by_map, random_masking
from foveal.pretrain.official import from_official, is_official
from foveal.pretrain.optimise import mae_rate, parameter_groups, peak_rate
from foveal.pretrain.patches import denormalise, normalise, patchify, unpatchify
from foveal.pretrain.positions import sincos_table

__all__ = [
    "Decoder",
    "Guided",
    "MaskedAutoencoder",
    "Masking",
    "Reconstruction",
    "denormalise",
    "from_official",
    "guided_reconstruction",
    "is_official",
    "mae_rate",
    "mask_by_map",
    "normalise",
    "object_weights",
    "parameter_groups",
    "patchify",
    "peak_rate",
    "random_masking",
    "sincos_table",
    "temperature_at",
    "to_patches",
    "unit",
    "unpatchify",
]
