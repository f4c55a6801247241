"""Mixing: train on two images at once, with labels that say how much of each is there.

>>> mixer = foveal.mix.TransMix()                        # doctest: +SKIP
>>> with mixer.on(model, images, labels) as step:        # doctest: +SKIP
...     step.loss(model(step.images)).backward()
"""

from typing import Any

from foveal.mix.cutmix import BoxDraw, CutMix
from foveal.mix.losses import binary_cross_entropy, paired, soft_cross_entropy
from foveal.mix.mixed import LabelWeights, Mixed, label_rows
from foveal.mix.mixer import Draw, Mixer, Step
from foveal.mix.mixup import Mixup, MixupDraw
from foveal.mix.mixup_cutmix import BlendBoxDraw, MixupCutMix
from foveal.mix.none import NoMix
from foveal.mix.transmix import TransMix

MIXERS: dict[str, type[Mixer[Any]]] = {
    "none": NoMix,
    "mixup": Mixup,
    "cutmix": CutMix,
    "mixup+cutmix": MixupCutMix,
    "transmix": TransMix,
}

__all__ = [
    "MIXERS",
    "BlendBoxDraw",
    "BoxDraw",
    "CutMix",
    "Draw",
    "LabelWeights",
    "Mixed",
    "Mixer",
    "Mixup",
    "MixupCutMix",
    "MixupDraw",
    "NoMix",
    "Step",
    "TransMix",
    "binary_cross_entropy",
    "label_rows",
    "paired",
    "soft_cross_entropy",
]
