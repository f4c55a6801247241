"""The demo: fine-tune one encoder on few scenes whose backgrounds mislead, plainly and guided, and report.

The bundled encoder (`foveal.assets`, trained without labels) finds digits on photographs. It is tuned to tell
five digits apart from 180 scenes of which 84 % have the photograph of their class behind the digit. Plain tuning
learns the photographs; with GTA the class token keeps looking where the encoder looked. What the numbers are is
seen on two test sets that differ in nothing but the backgrounds.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from foveal.stats import Interval
from foveal.train import Comparison, Settings, SettingsError

DATA = "scenes:shortcut=0.8,train=180,val=100,test=500,classes=5-9,size=32,stage=target"
ARMS = {"plain": "plain fine-tuning", "gta": "guided (GTA)"}
OUT = Path("runs") / "demo"

# metric of comparison.json -> what the table calls it
ROWS = {
    "accuracy/mixed_same": "accuracy, background of its own class",
    "accuracy/mixed_rand": "accuracy, any background",
    "bg_gap": "BG-Gap, the difference of the two",
    "pointing/mixed_rand": "attention on the digit, any background",
}


def settings(arm: str, seed: int = 0) -> Settings:
    """Settings of one training of the demo. arm: "plain" or "gta"; all else is equal."""
    if arm not in ARMS:
        raise SettingsError(f"the demo has no arm {arm!r}; it compares {' and '.join(ARMS)}")
    return Settings(
        data=DATA,
        data_seed=None,  # every seed draws its own training scenes; the test scenes are the same for all
        model="demo",
        init="demo",
        guide="gta" if arm == "gta" else "none",
        guide_weight=1.0,
        epochs=30,
        batch_size=32,
        lr=1e-3,
        layer_decay=1.0,
        crop_scale=(0.6, 1.0),
        precision="float32",
        device="cpu",
        workers=0,
        seed=seed,
    )


def run(
    out: str | Path = OUT, seeds: int | Sequence[int] = 3, jobs: int | None = None, console: Console | None = None
) -> Path:
    """Train both arms with every seed, print the table, write the report; the path of the report.

    out: folder of the comparison; if a finished one is there, the next free name out-2, out-3, ... is taken, while
    an unfinished one goes on.  seeds: how many (0, 1, ...) or which.  jobs: trainings at a time, one thread each;
    None: one for each core, at most four.  console: where to print.
    Raises SettingsError and RunError as `foveal.train.compare`.
    """
    from foveal.report import comparison_page  # here: these two import Lightning and matplotlib, seconds
    from foveal.train import compare

    console = console or Console()
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    folder = free(Path(out))
    arms = {arm: settings(arm) for arm in ARMS}
    epochs = arms["plain"].epochs
    total = len(arms) * len(chosen)
    console.print(
        f"[bold]foveal demo[/]: one tiny encoder, {total} fine-tunings on {_number('train')} scenes with misleading"
        f" backgrounds, {len(chosen)} with plain settings and {len(chosen)} with guided attention.",
        highlight=False,
    )
    with _bar(console) as bar:
        task = bar.add_task("training", total=total * epochs)

        def tell(name: str, row: dict[str, Any]) -> None:
            if row:
                bar.update(task, advance=1, description=name)

        found = compare(arms, chosen, folder, jobs=jobs or min(os.cpu_count() or 1, 4, total), progress=tell)
        bar.update(task, completed=total * epochs, description="trained")
    console.print(table(found))
    page = comparison_page(found, command=command(out, chosen))
    console.print(
        f"Where the models look, and everything else: [bold]{page.resolve()}[/]", soft_wrap=True, highlight=False
    )
    return page


def table(found: Comparison) -> Table:
    """The arms side by side in percent, and the paired difference in points with its two 95 % intervals."""
    shown = Table(title=f"{len(found.seeds)} seeds, {_number('test')} scenes per test set", title_justify="left")
    shown.add_column("in percent; differences in points")
    for arm in found.arms:
        shown.add_column(ARMS.get(arm, arm), justify="right")
    shown.add_column("difference", justify="right")
    shown.add_column("95 % over images", justify="right")
    shown.add_column("95 % over seeds", justify="right")
    for metric, name in ROWS.items():
        means = [_mean(found.values(metric, arm)) for arm in found.arms]
        last = found.arms[-1]
        shown.add_row(
            name,
            *(f"{100 * mean:.1f}" for mean in means),
            f"{100 * (means[-1] - means[0]):+.1f}",
            *(_between(found.interval(metric, last, over, paired=True)) for over in ("images", "seeds")),
        )
    return shown


def free(out: Path) -> Path:
    """`out`, or the first of out-2, out-3, ... that holds no finished comparison."""
    folder, n = out, 1
    while (folder / "comparison.json").exists():
        n += 1
        folder = out.with_name(f"{out.name}-{n}")
    return folder


def command(out: str | Path, seeds: Sequence[int]) -> str:
    """The command line that gives the demo again."""
    words = ["foveal", "demo"]
    if Path(out) != OUT:
        words += ["--out", str(out)]
    if list(seeds) == list(range(len(seeds))) and len(seeds) != 3:
        words += ["--seeds", str(len(seeds))]
    return " ".join(words)


def _number(option: str) -> int:
    from foveal.data.scenes import parse

    return int(getattr(parse(DATA), option))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _between(interval: Interval | None) -> str:
    if interval is None or not interval.available:
        return "not available"
    return f"{100 * interval.low:+.1f} to {100 * interval.high:+.1f}"


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"))
    return Progress(*columns, TimeElapsedColumn(), console=console)
