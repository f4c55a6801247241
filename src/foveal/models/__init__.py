"""Models that timm lacks: CCT, CVT and ViT-Lite, small vision transformers to train from scratch on small images.

Importing this room registers their names with timm:

>>> import timm, foveal.models                                    # doctest: +SKIP
>>> model = timm.create_model("cct_7_3x1_32", num_classes=100)    # doctest: +SKIP
"""

from foveal.models.compact import Block, CompactTransformer
from foveal.models.named import NAMES
from foveal.models.official import from_official
from foveal.models.pooling import SequencePool
from foveal.models.positions import resize_table, sine_table
from foveal.models.tokenizer import ConvTokenizer

__all__ = [
    "NAMES",
    "Block",
    "CompactTransformer",
    "ConvTokenizer",
    "SequencePool",
    "from_official",
    "resize_table",
    "sine_table",
]
