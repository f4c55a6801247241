"""Pictures of where a model looks: overlays, layers x heads, contact sheets."""

from foveal.explain.discovered import discover, objects
from foveal.explain.files import explain
from foveal.explain.frames import Frames, frames
from foveal.explain.grid import captioned, head_grid, sheet
from foveal.explain.overlay import enlarge, overlay, resize, strength
from foveal.explain.pictures import KINDS, Pictures, pictures
from foveal.explain.save import save, save_png

__all__ = [
    "KINDS",
    "Frames",
    "Pictures",
    "captioned",
    "discover",
    "enlarge",
    "explain",
    "frames",
    "head_grid",
    "objects",
    "overlay",
    "pictures",
    "resize",
    "save",
    "save_png",
    "sheet",
    "strength",
]
