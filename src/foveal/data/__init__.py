"""Data sets: images with class names, and masks where they exist."""

from foveal.data.decode import Packed
from foveal.data.errors import DataError, DataWarning
from foveal.data.images import Data, Images

__all__ = ["Data", "DataError", "DataWarning", "Images", "Packed"]
