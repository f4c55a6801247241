"""See what guided attention is for: offline, in about two minutes on two cores.

A tiny encoder that finds digits (it comes with foveal, trained without labels) is tuned to name them on few
images whose backgrounds mislead: plainly, and with its attention kept where it was (GTA), three seeds each.
What is learnt from the background helps on mixed_same and hurts on mixed_rand.

  foveal demo                  ends with the path of a report with pictures
"""

import argparse
import shutil
from pathlib import Path

from foveal.demo import arms
from foveal.train.errors import SettingsError
from foveal.train.settings import Settings


def declare(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.set_defaults(run=run)
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each arm (default: 3)")
    parser.add_argument("--out", default="runs/demo", metavar="FOLDER", help="where to write (default: runs/demo)")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: one per core)")
    parser.add_argument("--again", action="store_true", help="train anew, also what is finished")


def run(values: argparse.Namespace) -> int:
    """Compare, print the table, write the report."""
    from rich.console import Console

    from foveal.cli.compare import finish
    from foveal.cli.compared import Watch
    from foveal.train.comparing import compare
    from foveal.train.room import cores

    if values.seeds < 1:
        raise SettingsError(f"--seeds {values.seeds} must be 1 or more")
    out, seeds = Path(values.out), range(values.seeds)
    ways = arms()
    if values.again or _is_stale(out, ways, seeds):
        _forget(out, ways)
    console = Console(stderr=True, highlight=False)
    console.print("Tuning a tiny encoder on few images with misleading backgrounds:")
    console.print(f"plainly, and guided by its own attention. {2 * values.seeds} short runs on the CPU, offline.")
    jobs = min(cores(), 2 * values.seeds) if values.jobs is None else values.jobs
    epochs = {f"{arm}-seed{k}": settings.epochs for k in seeds for arm, settings in ways.items()}
    with Watch(console, epochs) as watch:
        comparison = compare(ways, seeds, out, jobs=None if jobs == 1 else jobs, progress=watch)
    if watch.trained == 0:
        console.print(f"All runs in {out} were finished before; --again trains them anew.", soft_wrap=True)
    return finish(comparison, "foveal demo" + (f" --seeds {values.seeds}" if values.seeds != 3 else ""))


def _is_stale(out: Path, ways: dict[str, Settings], seeds: range) -> bool:
    """Whether a run there was made by a demo with other settings, of another version of foveal."""
    for arm, settings in ways.items():
        for seed in seeds:
            kept, mine = out / f"{arm}-seed{seed}" / "settings.yaml", {"out": settings.out, "name": settings.name}
            try:
                if kept.is_file() and Settings.from_yaml(kept, **mine) != settings.replace(seed=seed):
                    return True
            except SettingsError:
                return True
    return False


def _forget(out: Path, ways: dict[str, Settings]) -> None:
    """Remove an earlier demo's runs, and nothing else that may be in the folder."""
    for arm in ways:
        for kept in out.glob(f"{arm}-seed*/settings.yaml"):
            shutil.rmtree(kept.parent)
    for name in ("comparison.json", "comparison.csv", "report.html"):
        (out / name).unlink(missing_ok=True)
