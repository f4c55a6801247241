"""Choose the weight of a guide on held-out training images, before any test image is looked at.

  foveal sweep PHOTOS/ --guide gta                                 weights 0, 0.1, 1, 10, 100
  foveal sweep PHOTOS/ --guide gta --label-fraction 0.15 --seeds 3
  foveal sweep PHOTOS/ --guide bss --weights 0 0.0001 0.001 0.01

A fifth of the training images is held out, class by class; each weight trains on the rest. The same command goes on
after a stop. It ends with the command that trains with the weight that was best.
"""

import argparse
import sys
import warnings
from typing import Any

from foveal.cli.flags import add_settings
from foveal.cli.train import is_first, settings_of
from foveal.train.errors import SettingsError
from foveal.train.settings import Settings


def declare(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.set_defaults(run=run, resume=False)
    parser.add_argument(
        "data", nargs="?", metavar="DATA", help="a folder of class folders, a .npz pack, scenes, digits, cub200, ..."
    )
    parser.add_argument("--weights", nargs="+", metavar="X", help="weights to try; 0 is no guidance")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each weight (default: 1)")
    parser.add_argument("--config", metavar="RECIPE", help="a YAML file with settings; flags go before it")
    add_settings(parser, leave_out=("guide_weight",))


def run(values: argparse.Namespace) -> int:
    """Sweep, print what came out and the command that trains with the chosen weight."""
    settings = settings_of(values)
    weights = None if values.weights is None else [_number(word) for word in values.weights]
    from foveal.data import DataWarning
    from foveal.train.sweeping import HELD_OUT, sweep

    warnings.simplefilter("ignore", DataWarning)
    held_out = settings.held_out or HELD_OUT
    found = sweep(settings, weights, values.seeds, held_out, progress=_Told())
    if not is_first():
        return 0
    print(f"{found.held_out:,} of {found.held_out + found.trained_on:,} training images held out")
    for weight in found.weights:
        chosen = "  <- chosen" if weight == found.best else ""
        print(f"{found.guide} weight {weight:<8g} held-out accuracy {100 * found.mean(weight):5.1f} %{chosen}")
    if not found.best:
        print(f"no weight of {found.guide} was better than none on the held-out images")
    if found.warning:
        print(f"warning: {found.warning}")
    kind = settings.replace(guide_weight=found.best) if found.best else _plain(settings)
    print(f"train with: {kind.command()}")
    return 0


def _plain(settings: Settings) -> Settings:
    """The run that weight 0 was: without the guide, but with the model that it was swept on."""
    from foveal.train.models import class_pool

    unguided = settings.replace(
        guide="none", guide_weight=None, guide_args={}, guide_schedule="constant", guide_source="init"
    )
    return unguided.replace(model_args=settings.model_args | class_pool(settings))


class _Told:
    """A line when a run begins its last epoch; a moving one on a terminal."""

    def __init__(self) -> None:
        self.name = ""

    def __call__(self, name: str, row: dict[str, Any]) -> None:
        if sys.stderr.isatty():
            print(f"\r{name}: epoch {row['epoch']}  ", end="", file=sys.stderr, flush=True)
        elif name != self.name:
            print(name, file=sys.stderr, flush=True)
        self.name = name


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise SettingsError(f"--weights {word!r} does not fit: expected numbers such as 0 0.1 1 10") from None
