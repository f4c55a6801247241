"""Train a vision transformer on your images.

  foveal train PHOTOS/                                     fine-tune a ViT-S on a folder of class folders
  foveal train PHOTOS/ --mix transmix --guide gta          labels and guidance from its own attention
  foveal train PHOTOS/ --init ibot.pth --guide gta         keep looking where these weights look
  foveal train PHOTOS/ --config recipe.yaml --lr 1e-4      a recipe, with one thing changed
  foveal train --resume runs/NAME                          go on after a stop

Writes a folder: the model for timm, predictions, metrics and a report.
"""

import argparse
import warnings
from pathlib import Path
from typing import Any, TypeVar

from foveal.cli.flags import add_settings, given_settings
from foveal.train.errors import SettingsError
from foveal.train.plain import Plain, read_yaml
from foveal.train.settings import Settings

Chosen = TypeVar("Chosen", bound=Plain)


def declare(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.set_defaults(run=run)
    parser.add_argument(
        "data", nargs="?", metavar="DATA", help="a folder of class folders, a .npz pack, scenes, digits, cub200, ..."
    )
    parser.add_argument("--config", metavar="RECIPE", help="a YAML file with settings; flags go before it")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run of these settings, or of the run folder DATA"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run that is in the folder")
    parser.add_argument("--no-report", action="store_true", help="do not write report.html")
    add_settings(parser)


def run(values: argparse.Namespace) -> int:
    """Train, report, and say where the results are."""
    settings = settings_of(values)
    from foveal.data import DataWarning
    from foveal.train.fitting import fit

    warnings.simplefilter("ignore", DataWarning)  # the notes on the data, which are shown, have them
    done = fit(settings, resume=values.resume, overwrite=values.overwrite, progress=True)
    if is_first():
        print(_summary(done))
        if not values.no_report:
            _report(done)
    return 0


def settings_of(values: argparse.Namespace) -> Settings:
    """Flags before the recipe before the defaults; or those of the run folder to resume, where that is given."""
    return chosen_settings(values, Settings)


def chosen_settings(values: argparse.Namespace, kind: type[Chosen]) -> Chosen:
    """The settings of a command that trains, of the kind it takes; see settings_of."""
    given = given_settings(values, kind=kind)
    folder = None if values.data is None else Path(values.data)
    if values.resume and folder is not None and (folder / "settings.yaml").is_file():
        if values.config:
            raise SettingsError("--resume RUN takes the run's own settings: leave out --config")
        place = {"out": str(folder.resolve().parent), "name": folder.resolve().name}
        if Path(values.data).name == place["name"]:
            place["out"] = str(folder.parent)
        return kind.from_yaml(folder / "settings.yaml", **given, **place)
    recipe = read_yaml(values.config) if values.config else {}
    data = {} if values.data is None else {"data": values.data}
    settings = kind.from_dict(recipe | given | data)
    if not settings.as_dict()["data"]:
        raise SettingsError(
            f"no data given: foveal {kind.COMMAND} DATA, a folder of images (see foveal {kind.COMMAND} --help)"
        )
    return settings


def is_first() -> bool:
    """Whether this is the process that speaks, of those that train together."""
    from lightning.pytorch.utilities import rank_zero_only

    return int(rank_zero_only.rank) == 0


def _summary(done: Any) -> str:
    results = done.results
    lines = [f"best epoch {results['best_epoch']} of {results['epochs']}, {results['images_per_second']:,.0f} images/s"]
    for name, scores in results["sets"].items():
        line = f"{name}: accuracy {100 * scores['accuracy']:.1f} %"
        line += f", balanced {100 * scores['balanced_accuracy']:.1f} %"
        if scores["pointing"] is not None:
            line += f", attention on the object {100 * scores['pointing']:.1f} %"
        lines.append(f"{line}  ({scores['n']:,} images)")
    if results["bg_gap"] is not None:
        lines.append(f"BG-Gap: {100 * results['bg_gap']:.1f} points")
    return "\n".join([*lines, f"run    {done.folder}"])


def _report(done: Any) -> None:
    from foveal.report import run_page

    print(f"report {run_page(done)}")
