"""Where to look: maps of the important places of images, from models, pixels or outside.

>>> source = foveal.maps.HeadCosine(model)                # doctest: +SKIP
>>> found = source(images, labels)                        # doctest: +SKIP
>>> found.map                                             # (B, h, w)    # doctest: +SKIP
"""

from foveal.maps.found import Found, Source, found, on_grid

__all__ = ["Found", "Source", "found", "on_grid"]
