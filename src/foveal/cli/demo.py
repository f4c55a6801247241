"""See what guided attention is for: offline, in about two minutes on two cores.

A tiny encoder that finds digits (it comes with foveal, trained without labels) is tuned to name them on few
images whose backgrounds mislead: plainly, and with its attention kept where it was (GTA), three seeds each.
What is learnt from the background helps on mixed_same and hurts on mixed_rand.

  foveal demo                  ends with the path of a report with pictures
"""

import argparse
import os
import shutil
import sys
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

    from foveal.cli.compared import Watch, table
    from foveal.report import comparison_page
    from foveal.train.comparing import compare

    if values.seeds < 1:
        raise SettingsError(f"--seeds {values.seeds} must be 1 or more")
    out, seeds = Path(values.out), range(values.seeds)
    ways = arms()
    if values.again or _is_stale(out, ways, seeds):
        _forget(out, ways)
    console = Console(stderr=True, highlight=False)
    console.print("Tuning a tiny encoder on few images with misleading backgrounds:")
    console.print(f"plainly, and guided by its own attention. {2 * values.seeds} short runs on the CPU, offline.")
    jobs = values.jobs or min(_cores(), 2 * values.seeds)
    total = sum(settings.epochs for settings in ways.values()) * values.seeds
    with Watch(console, total) as watch:
        comparison = compare(ways, seeds, out, jobs=jobs, progress=watch)
    if watch.epochs == 0:
        console.print(f"All runs in {out} were finished before; --again trains them anew.", soft_wrap=True)
    print(table(comparison, width=_width()))
    command = "foveal demo" + (f" --seeds {values.seeds}" if values.seeds != 3 else "")
    print(f"report {comparison_page(comparison, command=command).resolve()}")
    return 0


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _width() -> int:
    return max(80, min(120, os.get_terminal_size().columns)) if sys.stdout.isatty() else 100


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
    for name in ("comparison.json", "report.html"):
        (out / name).unlink(missing_ok=True)
