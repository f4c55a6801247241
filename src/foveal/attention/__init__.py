"""The one door to a vision transformer's attention: read it exactly, with fused kernels left on.

>>> with foveal.read(model, layers=-1) as seen:      # doctest: +SKIP
...     logits = model(images)
>>> seen.class_attention()                           # doctest: +SKIP
"""

from foveal.attention.door import Door, attach, unseen
from foveal.attention.errors import ReadError, UnsupportedModelError
from foveal.attention.layout import TokenLayout
from foveal.attention.seen import Look, Seen, Support, read, supported

__all__ = [
    "Door",
    "Look",
    "ReadError",
    "Seen",
    "Support",
    "TokenLayout",
    "UnsupportedModelError",
    "attach",
    "read",
    "supported",
    "unseen",
]
