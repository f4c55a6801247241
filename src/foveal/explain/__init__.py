"""Pictures of where a model looks: overlays, layers x heads, contact sheets."""

from foveal.explain.grid import captioned, head_grid, sheet
from foveal.explain.overlay import enlarge, overlay, resize, strength
from foveal.explain.save import save, save_png

__all__ = ["captioned", "enlarge", "head_grid", "overlay", "resize", "save", "save_png", "sheet", "strength"]
