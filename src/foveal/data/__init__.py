"""Data sets: images with class names, and masks where they exist."""

from foveal.data.images import Data, DataError, DataWarning, Images, Packed

__all__ = ["Data", "DataError", "DataWarning", "Images", "Packed"]
