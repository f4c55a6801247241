"""Find out which way of training helps on your images: every combination, several seeds, paired differences.

  foveal compare PHOTOS/ --mix none cutmix transmix tdattenmix --seeds 5
  foveal compare PHOTOS/ --guide none gta --label-fraction 0.15 1 --seeds 5 --jobs 4 --memory 24
  foveal compare PHOTOS/ --guide none none:tune=head none:head_start=probe l2_sp gta gta:weight=10,schedule=cosine
  foveal compare PHOTOS/ --mix none "tdattenmix:map=label_biased,map.sigma=0.5,beta=0.1"

Arms are all combinations of the listed mixers, guides and label fractions. Each is compared with the first
combination listed for its label fraction, so list first what you do today, or none. With the same seed all arms have
the same split, initial weights and order of batches. After a colon come settings: of the mixer (beta=0.1), of the
map that it follows (map=..., map.sigma=..., map_model=..., map_warmup=...), of a token mixer on top of it
(token_mix=horizontal, token.KEY=...), of the guide (gta:weight=10,schedule=cosine,source=runs/OTHER,match=centred),
and with any guide or none, of what is trained (tune=lora,tune.rank=4) and how the head begins (head_start=probe).

The same command goes on after a stop, tries again what failed, adds arms or seeds to what is there, and prints the
results when all is done. They are also in comparison.csv and report.html.
"""

import argparse
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

from foveal.cli.flags import add_settings, given_settings
from foveal.train.arms import OWN, Arms, arms_of
from foveal.train.errors import RunError, SettingsError
from foveal.train.plain import read_yaml

LISTED = ("mix", "mix_args", "guide", "label_fraction", "seed", "out", "name")  # not as for foveal train


def declare(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.set_defaults(run=run)
    parser.add_argument(
        "data", nargs="?", metavar="DATA", help="a folder of class folders, a .npz pack, scenes, digits, cub200, ..."
    )
    parser.add_argument("--mix", nargs="+", metavar="MIX", help="mixers to compare (default: the recipe's, or none)")
    parser.add_argument(
        "--guide",
        nargs="+",
        metavar="GUIDE",
        help="guides to compare: none, gta, l2_sp, delta, bss, co_tuning, attention_transfer, attn_distill;"
        " none:tune=head trains the head alone",
    )
    parser.add_argument(
        "--label-fraction", nargs="+", metavar="X", help="shares of the training images of each class, in (0, 1]"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each arm: seeds 0 to N - 1")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that train at a time (default: 1)")
    parser.add_argument(
        "--memory", type=float, metavar="GB", help="a further run begins only if all of them stay within this"
    )
    parser.add_argument("--out", metavar="FOLDER", help="where to write (default: runs/compare-DATA)")
    parser.add_argument("--config", metavar="RECIPE", help="a YAML file with settings; flags go before it")
    parser.add_argument("--no-costs", action="store_true", help="do not measure what a training step costs")
    add_settings(parser, leave_out=LISTED)


def run(values: argparse.Namespace) -> int:
    """Compare, print the table, write the report; exit code 2 if a run failed."""
    arms, out = arms_and_folder(values)
    if values.seeds < 1:
        raise SettingsError(f"--seeds {values.seeds} must be 1 or more")
    from rich.console import Console

    from foveal.cli.compared import Watch
    from foveal.data import DataWarning
    from foveal.train.comparing import compare

    warnings.simplefilter("ignore", DataWarning)  # in the report, with the data
    seeds = range(values.seeds)
    console = Console(stderr=True, highlight=False)
    epochs = {f"{arm}-seed{k}": settings.epochs for k in seeds for arm, settings in arms.settings.items()}
    with Watch(console, epochs) as watch:
        _say(console, arms, values.seeds, out)
        comparison = compare(
            arms.settings,
            seeds,
            out,
            jobs=values.jobs,
            memory=values.memory,
            progress=watch,
            baseline_of=arms.baseline_of,
        )
    if not values.no_costs:
        _measure(console, comparison, arms)
    return finish(comparison, command_of(values))


def arms_and_folder(values: argparse.Namespace) -> tuple[Arms, Path]:
    """What the flags and the recipe ask to compare, and where. Raises SettingsError."""
    recipe = read_yaml(values.config) if values.config else {}
    given = given_settings(values, leave_out=LISTED)
    common = {name: value for name, value in recipe.items() if name not in (*LISTED, *OWN)} | given
    if values.data is not None:
        common["data"] = values.data
    if not common.get("data"):
        raise SettingsError("no data given: foveal compare DATA, a folder of class folders (see foveal compare --help)")
    fractions = [None if word == "null" else _share(word) for word in values.label_fraction or []]
    arms = arms_of(
        common,
        values.mix or [recipe.get("mix", "none")],
        values.guide or [recipe.get("guide", "none")],
        fractions or [recipe.get("label_fraction")],
        recipe,
    )
    return arms, Path(values.out or f"runs/compare-{_plain(common['data'])}")


def finish(comparison: Any, command: str) -> int:
    """Print the table, write comparison.csv and report.html; the exit code: 2 if a run failed."""
    from foveal.cli.compared import table
    from foveal.report import comparison_page
    from foveal.train.tidy import write_csv

    print(table(comparison, width=screen()), end="", flush=True)
    print(f"table  {write_csv(comparison).resolve()}", flush=True)
    print(f"report {comparison_page(comparison, command=command).resolve()}")
    return 2 if comparison.failed else 0


def screen() -> int:
    """Columns to print a table in: those of the terminal within reason, 100 elsewhere."""
    return max(80, min(140, os.get_terminal_size().columns)) if sys.stdout.isatty() else 100


def command_of(values: argparse.Namespace) -> str:
    """The command line that compares the same again."""
    words = ["foveal", "compare", *([values.data] if values.data else [])]
    for name in ("mix", "guide", "label_fraction"):
        if listed := getattr(values, name):
            words += [f"--{name.replace('_', '-')}", *listed]
    words += ["--seeds", str(values.seeds)]
    for name in ("out", "config"):
        if value := getattr(values, name):
            words += [f"--{name}", value]
    for name in given_settings(values, leave_out=LISTED):
        flag, said = name.replace("_", "-"), getattr(values, name)
        if isinstance(said, bool):
            words.append(f"--{flag}" if said else f"--no-{flag}")
        else:
            words += [f"--{flag}", *([said] if isinstance(said, str) else said)]
    return shlex.join(words)


def _say(console: Any, arms: Arms, seeds: int, out: Path) -> None:
    count = len(arms.settings)
    console.print(
        f"{count} arm{'s' if count > 1 else ''} x {seeds} seed{'s' if seeds > 1 else ''} -> {out}", soft_wrap=True
    )
    bases = [arm for arm in arms.settings if arm not in arms.baseline_of]
    if count > len(bases):
        console.print(f"baseline: {', '.join(bases)} (the first combination listed)", soft_wrap=True, markup=False)
    if arms.pool:
        said = ", ".join(f"{name}={value}" for name, value in arms.pool.items())
        console.print(
            f"in every arm the classifier reads the class token ({said}), whose attention is guided in some;"
            " say --model-args global_pool=avg for the mean of patches",
            soft_wrap=True,
            markup=False,
        )


def _measure(console: Any, comparison: Any, arms: Arms) -> None:
    """Measure costs, or say why not: the comparison stands without them."""
    from foveal.train.costs import costs

    there = {arm: arms.settings[arm] for arm in comparison.arms}
    with console.status("measuring what a training step costs"):
        try:
            found = costs(comparison.folder, there, arms.baseline_of)
        except (RuntimeError, ValueError, OSError, RunError) as error:
            console.print(f"what a step costs could not be measured: {error}", soft_wrap=True, markup=False)
            return
    for arm, why in found.failed.items():
        console.print(f"what a step of {arm} costs could not be measured: {why}", soft_wrap=True, markup=False)


def _share(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise SettingsError(f"--label-fraction {word!r} does not fit: expected shares such as 0.15 1") from None


def _plain(data: str) -> str:
    name = Path(data.rstrip("/")).name or "data"
    return "".join(c if c.isalnum() or c in "._+=-" else "_" for c in name)
