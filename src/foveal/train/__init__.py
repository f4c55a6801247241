"""Training: settings, runs on disk, comparisons. Lightning is imported when something is trained.

>>> run = foveal.train.fit(foveal.train.Settings(data="PHOTOS/", mix="transmix"))   # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from foveal.train.errors import DivergedError, Interrupted, RunError, SettingsError
from foveal.train.pretrain_settings import PretrainSettings
from foveal.train.settings import Settings

if TYPE_CHECKING:
    from foveal.train.comparing import compare
    from foveal.train.comparison import Comparison
    from foveal.train.fitting import fit
    from foveal.train.pretraining import pretrain
    from foveal.train.run import Run

__all__ = [
    "Comparison",
    "DivergedError",
    "Interrupted",
    "PretrainSettings",
    "Run",
    "RunError",
    "Settings",
    "SettingsError",
    "compare",
    "fit",
    "pretrain",
]

_LATER = {  # these import torch, and some Lightning: seconds
    "fit": "fitting",
    "compare": "comparing",
    "pretrain": "pretraining",
    "Comparison": "comparison",
    "Run": "run",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        value = getattr(import_module(f"foveal.train.{_LATER[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'foveal.train' has no attribute {name!r}")
