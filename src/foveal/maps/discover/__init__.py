"""Objects found without labels, in the features of any vision transformer: TokenCut, MaskCut, LOST, DINO's mass.

The functions take features (B, N, D) on a grid (h, w) and can be used alone; the sources read them off a model.

>>> found = foveal.maps.discover.tokencut(features, (14, 14))            # doctest: +SKIP
>>> found.map, found.mask, found.boxes, found.inverted                   # doctest: +SKIP
"""

from foveal.maps.discover.bilateral import Refined, refine
from foveal.maps.discover.components import boxes_of, component_of, in_pixels, largest_component
from foveal.maps.discover.cut import Cut, normalised_cut
from foveal.maps.discover.discovered import Discovered, Objects
from foveal.maps.discover.graph import graph
from foveal.maps.discover.lost import lost
from foveal.maps.discover.maskcut import maskcut
from foveal.maps.discover.mass import dino_mass, mass_mask
from foveal.maps.discover.sources import DinoMass, Lost, MaskCut, TokenCut
from foveal.maps.discover.tokencut import object_side, tokencut

__all__ = [
    "Cut",
    "DinoMass",
    "Discovered",
    "Lost",
    "MaskCut",
    "Objects",
    "Refined",
    "TokenCut",
    "boxes_of",
    "component_of",
    "dino_mass",
    "graph",
    "in_pixels",
    "largest_component",
    "lost",
    "maskcut",
    "mass_mask",
    "normalised_cut",
    "object_side",
    "refine",
    "tokencut",
]
