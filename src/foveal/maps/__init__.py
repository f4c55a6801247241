"""Where to look: maps of the important places of images, from models, pixels or outside.

>>> source = foveal.maps.HeadCosine(model)                # doctest: +SKIP
>>> found = source(images, labels)                        # doctest: +SKIP
>>> found.map                                             # (B, h, w)    # doctest: +SKIP
"""

from collections.abc import Callable
from typing import Any

from foveal.maps.annotations import box_mask, fixation_map
from foveal.maps.attended import ClassAttention, ReceivedAttention
from foveal.maps.cells import cells
from foveal.maps.centre_surround import CentreSurround
from foveal.maps.discover import DinoMass, Discovered, Lost, MaskCut, Objects, TokenCut
from foveal.maps.errors import MapModelError, MapStoreError, MapWarning
from foveal.maps.features import Features, classifier, features
from foveal.maps.found import Found, Source, found, on_grid
from foveal.maps.given import Given
from foveal.maps.grad_cam import GradCAM
from foveal.maps.gradient import InputGradient
from foveal.maps.head_cosine import HeadCosine
from foveal.maps.label_biased import LabelBiased
from foveal.maps.label_term import above, class_means, label_cosine
from foveal.maps.make import make
from foveal.maps.spectral import SpectralResidual
from foveal.maps.store import MapStore, make_store
from foveal.maps.topdown import TopDown, topdown_loss

MAPS: dict[str, Callable[..., Any]] = {
    "head_cosine": HeadCosine,
    "topdown": TopDown,
    "label_biased": LabelBiased,
    "class_attention": ClassAttention,
    "received_attention": ReceivedAttention,
    "centre_surround": CentreSurround,
    "spectral_residual": SpectralResidual,
    "input_gradient": InputGradient,
    "grad_cam": GradCAM,
    "tokencut": TokenCut,
    "maskcut": MaskCut,
    "lost": Lost,
    "dino": DinoMass,
    "given": Given,
}
"""Sources by name. One that takes `model` is given the model, one that takes `mean` and `std` the normalisation."""

__all__ = [
    "MAPS",
    "CentreSurround",
    "ClassAttention",
    "DinoMass",
    "Discovered",
    "Features",
    "Found",
    "Given",
    "GradCAM",
    "HeadCosine",
    "InputGradient",
    "LabelBiased",
    "Lost",
    "MapModelError",
    "MapStore",
    "MapStoreError",
    "MapWarning",
    "MaskCut",
    "Objects",
    "ReceivedAttention",
    "Source",
    "SpectralResidual",
    "TokenCut",
    "TopDown",
    "above",
    "box_mask",
    "cells",
    "class_means",
    "classifier",
    "features",
    "fixation_map",
    "found",
    "label_cosine",
    "make",
    "make_store",
    "on_grid",
    "topdown_loss",
]
