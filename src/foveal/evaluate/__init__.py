"""Measures of a trained model: accuracy, reliance on backgrounds, attention on the object."""

from foveal.evaluate.accuracy import balanced_accuracy, correct
from foveal.evaluate.backgrounds import bg_gap
from foveal.evaluate.pointing import coverage, energy_share
from foveal.evaluate.predict import Predictions

__all__ = ["Predictions", "balanced_accuracy", "bg_gap", "correct", "coverage", "energy_share"]
