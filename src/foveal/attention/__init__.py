"""The one door to a vision transformer's attention: read it exactly, with fused kernels left on.

>>> with foveal.read(model, layers=-1) as seen:      # doctest: +SKIP
...     logits = model(images)
>>> seen.class_attention()                           # doctest: +SKIP
"""

from foveal.attention.door import Door, attach, unseen
from foveal.attention.errors import ReadError, UnsupportedModelError
from foveal.attention.glance import glance
from foveal.attention.layout import TokenLayout
from foveal.attention.seen import Layers, Look, Seen, Support, pooling_heads, read, supported

__all__ = [
    "Door",
    "Layers",
    "Look",
    "ReadError",
    "Seen",
    "Support",
    "TokenLayout",
    "UnsupportedModelError",
    "attach",
    "glance",
    "pooling_heads",
    "read",
    "supported",
    "unseen",
]
