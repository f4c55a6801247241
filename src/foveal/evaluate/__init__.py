"""Measures of a model and of a way to mix: accuracy, calibration, backgrounds, attention and labels on the object.

>>> found = foveal.evaluate.label_gaps(model, mixer, data.val, config)    # doctest: +SKIP
>>> found.mean                       # how far mixed labels are from what can be seen, in [0, 1]    # doctest: +SKIP
"""

from foveal.evaluate.accuracy import balanced_accuracy, correct
from foveal.evaluate.backgrounds import bg_gap
from foveal.evaluate.calibration import expected_calibration_error
from foveal.evaluate.features import Features, features
from foveal.evaluate.heads import Recipe
from foveal.evaluate.inconsistency import (
    Inconsistency,
    Relation,
    inconsistency,
    own_weight,
    relation,
    share_divergence,
)
from foveal.evaluate.knn import KNN, knn
from foveal.evaluate.label_gaps import LabelGaps, label_gaps
from foveal.evaluate.linear import cached_linear_probe, linear_probe
from foveal.evaluate.logistic import logistic_probe
from foveal.evaluate.occlusion import Occlusion, occlude, occlusion
from foveal.evaluate.pointing import coverage, energy_share
from foveal.evaluate.predict import Predictions
from foveal.evaluate.probe import Probe, Scored, Trial

__all__ = [
    "KNN",
    "Features",
    "Inconsistency",
    "LabelGaps",
    "Occlusion",
    "Predictions",
    "Probe",
    "Recipe",
    "Relation",
    "Scored",
    "Trial",
    "balanced_accuracy",
    "bg_gap",
    "cached_linear_probe",
    "correct",
    "coverage",
    "energy_share",
    "expected_calibration_error",
    "features",
    "inconsistency",
    "knn",
    "label_gaps",
    "linear_probe",
    "logistic_probe",
    "occlude",
    "occlusion",
    "own_weight",
    "relation",
    "share_divergence",
]
