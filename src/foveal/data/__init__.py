"""Data sets: images with class names, and masks where they exist.

data = foveal.data.load("PHOTOS/")
batches = Batches(data.train, image_config(model), 32, train=True, flip=data.flip)
"""

from foveal.data.batches import Batch, Batches
from foveal.data.config import ImageConfig, image_config
from foveal.data.decode import Packed, decode_tensor
from foveal.data.errors import DataError, DataWarning
from foveal.data.images import Data, Images, concatenate
from foveal.data.packs import read_pack
from foveal.data.sources import SOURCES, load
from foveal.data.subsets import listed, subset
from foveal.data.unlabelled import load_unlabelled

__all__ = [
    "SOURCES",
    "Batch",
    "Batches",
    "Data",
    "DataError",
    "DataWarning",
    "ImageConfig",
    "Images",
    "Packed",
    "concatenate",
    "decode_tensor",
    "image_config",
    "listed",
    "load",
    "load_unlabelled",
    "read_pack",
    "subset",
]
