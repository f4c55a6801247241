"""Mixing: train on two images at once, with labels that say how much of each is there.

>>> mixer = foveal.mix.TransMix()                        # doctest: +SKIP
>>> with mixer.on(model, images, labels) as step:        # doctest: +SKIP
...     step.loss(model(step.images)).backward()
"""

from typing import Any

from foveal.mix.alignmix import AlignDraw, AlignMix
from foveal.mix.attentivemix import AttentiveMix
from foveal.mix.cutmix import BoxDraw, CutMix
from foveal.mix.fmix import FMix, MaskDraw
from foveal.mix.gridmix import GridDraw, GridMix
from foveal.mix.guided import MapMixer
from foveal.mix.losses import binary_cross_entropy, paired, soft_cross_entropy
from foveal.mix.manifold import DepthDraw, ManifoldMixup
from foveal.mix.mixed import LabelWeights, Mixed, label_rows
from foveal.mix.mixer import Draw, Mixer, Step
from foveal.mix.mixup import Mixup, MixupDraw
from foveal.mix.mixup_cutmix import BlendBoxDraw, MixupCutMix
from foveal.mix.none import NoMix
from foveal.mix.puzzlemix import PuzzleDraw, PuzzleMix
from foveal.mix.resizemix import ResizeMix
from foveal.mix.saliencymix import SaliencyMix
from foveal.mix.smmix import SMMix
from foveal.mix.smoothmix import BlobDraw, SmoothMix
from foveal.mix.tdattenmix import TdAttenMix
from foveal.mix.token_mixer import TokenMixer
from foveal.mix.token_mixers import TOKEN_MIXERS, token_mixer
from foveal.mix.tokenmix import TokenMix
from foveal.mix.tokenmixup import TokenDraw, TokenMixup
from foveal.mix.transmix import TransMix

MIXERS: dict[str, type[Mixer[Any]]] = {
    "none": NoMix,
    "mixup": Mixup,
    "cutmix": CutMix,
    "mixup+cutmix": MixupCutMix,
    "transmix": TransMix,
    "tdattenmix": TdAttenMix,
    "smmix": SMMix,
    "saliencymix": SaliencyMix,
    "attentivemix": AttentiveMix,
    "tokenmix": TokenMix,
    "puzzlemix": PuzzleMix,
    "fmix": FMix,
    "gridmix": GridMix,
    "resizemix": ResizeMix,
    "smoothmix": SmoothMix,
}

__all__ = [
    "MIXERS",
    "TOKEN_MIXERS",
    "AlignDraw",
    "AlignMix",
    "AttentiveMix",
    "BlendBoxDraw",
    "BlobDraw",
    "BoxDraw",
    "CutMix",
    "DepthDraw",
    "Draw",
    "FMix",
    "GridDraw",
    "GridMix",
    "LabelWeights",
    "ManifoldMixup",
    "MapMixer",
    "MaskDraw",
    "Mixed",
    "Mixer",
    "Mixup",
    "MixupCutMix",
    "MixupDraw",
    "NoMix",
    "PuzzleDraw",
    "PuzzleMix",
    "ResizeMix",
    "SMMix",
    "SaliencyMix",
    "SmoothMix",
    "Step",
    "TdAttenMix",
    "TokenDraw",
    "TokenMix",
    "TokenMixer",
    "TokenMixup",
    "TransMix",
    "binary_cross_entropy",
    "label_rows",
    "paired",
    "soft_cross_entropy",
    "token_mixer",
]
