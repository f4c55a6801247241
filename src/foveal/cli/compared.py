"""A comparison in the terminal: a bar while it runs, then a table with intervals that say what they are over."""

import io
import math
from collections.abc import Mapping
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from foveal.stats import Interval, paired_over_seeds
from foveal.train.comparison import Comparison, higher_is_better

NAMES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "ece": "ECE",
    "inconsistency": "inconsistency",
    "pointing": "attention on object",
    "bg_gap": "BG-Gap",
    "drift": "drift",
}


class Watch:
    """Shows how far a comparison is: called with a run's name and the row of its last epoch.

    epochs: how many each run has, by its name.
    """

    def __init__(self, console: Console, epochs: Mapping[str, int]) -> None:
        self.console, self.epochs = console, dict(epochs)
        self.reached = dict.fromkeys(epochs, 0)
        self.trained = 0  # epochs, now and not before
        self._at: set[str] = set()  # runs that were trained now
        self._heard: set[str] = set()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:.0f} of {task.total:.0f} epochs"),
        )
        self.bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, refresh_per_second=4)
        self.entry = self.bar.add_task(self._told(0), total=sum(epochs.values()))
        self.done = 0

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def __call__(self, name: str, row: dict[str, Any]) -> None:
        """An epoch of a run has ended; or the run has: with an empty row well, with {"failed": why} not.

        What a run says is shown once, however many say it.
        """
        if "said" in row:
            if row["said"] and row["said"] not in self._heard and not row["said"].startswith("DataWarning"):
                self._heard.add(row["said"])
                self.console.print(f"{name}: {row['said']}" if name else row["said"], soft_wrap=True, markup=False)
            return  # of the data tells the report
        if "epoch" in row:
            self.trained += 1
            self._at.add(name)
            self.reached[name] = row["epoch"]
        else:
            self.done += 1
            self.reached[name] = self.epochs[name]
            if "failed" in row:
                self.console.print(f"{name} failed: {row['failed']}", soft_wrap=True, markup=False)
            elif name in self._at and not self.console.is_terminal:
                self.console.print(f"{name} done", soft_wrap=True, markup=False)
        self.bar.update(self.entry, completed=sum(self.reached.values()), description=self._told(self.done))

    def _told(self, done: int) -> str:
        return f"{done} of {len(self.epochs)} runs"


def table(comparison: Comparison, width: int = 100) -> str:
    """Means over seeds of each arm, and what each arm is above its baseline, with both intervals; in percent.

    Two arms are columns, more are rows.
    """
    text = io.StringIO()
    console = Console(file=text, width=width, highlight=False)
    few = len(comparison.arms) <= 2 and len(comparison.baselines) <= 1
    for grid in [_two(comparison)] if few else [_main(comparison), *_others(comparison, width)]:
        console.print(grid)
        if not few:
            console.print()
    for line in _explained(comparison, few):
        console.print(Text(line, style="dim"), soft_wrap=True)
    for name, why in comparison.failed.items():
        console.print(Text(f"failed: {name}: {why}"), soft_wrap=True)
    for arm in comparison.missing:
        console.print(Text(f"left out: {arm}, as none of its runs finished"), soft_wrap=True)
    return text.getvalue()


def main_metric(comparison: Comparison) -> str:
    """The metric of the first table: accuracy where backgrounds do not help, or on the first test set."""
    return "accuracy/mixed_rand" if "accuracy/mixed_rand" in comparison.metrics else comparison.metrics[0]


def _two(comparison: Comparison) -> Table:
    """Metrics are rows; columns are the baseline, the other arm and the difference."""
    grid = _grid()
    for arm in comparison.arms:
        grid.add_column(arm, justify="right")
    others = [arm for arm in comparison.arms if comparison.baseline(arm)]
    for _ in others:
        for name in ("difference", "over images", "over seeds", "seeds"):
            grid.add_column(name, justify="right")
    for key in _shown(comparison):
        cells = [_percent(_mean(comparison.values(key, arm))) for arm in comparison.arms]
        for arm in others:
            cells += _difference(comparison, key, arm, "images", "seeds")
        grid.add_row(_name(key), *cells)
    if any(drifts := [_drift(comparison, arm) for arm in comparison.arms]):
        means = [_percent(_mean(list(each.values()))) for each in drifts]
        grid.add_row(NAMES["drift"], *means, *(cell for arm in others for cell in _apart(comparison, arm)))
    costs, memory = (
        [_cost(comparison, arm) for arm in comparison.arms],
        [_memory(comparison, a) for a in comparison.arms],
    )
    if comparison.costs:
        grid.add_row("cost of a step", *costs)
    if any(cell != "-" for cell in memory):
        grid.add_row("peak memory", *memory)
    return grid


def _main(comparison: Comparison) -> Table:
    """Arms are rows: the main metric with all that is known of its difference."""
    key = main_metric(comparison)
    grid = _grid(_name(key))
    for name in ("mean", "difference", "over seeds", "over images", "seeds"):
        grid.add_column(name, justify="right")
    for arm in comparison.arms:
        if arm in comparison.baselines and arm != comparison.arms[0]:
            grid.add_row()
        mean = _percent(_mean(comparison.values(key, arm)))
        if comparison.baseline(arm):
            grid.add_row(arm, mean, *_difference(comparison, key, arm, "seeds", "images"))
        else:
            grid.add_row(arm, mean, "baseline" if arm in comparison.baselines else "-")
    return grid


def _others(comparison: Comparison, width: int) -> list[Table]:
    """Arms are rows: mean and difference of the other metrics, cost and memory; as many tables as `width` takes."""
    columns = [(_short(key), [_both(comparison, key, arm) for arm in comparison.arms]) for key in _further(comparison)]
    if any(drifts := [_drift(comparison, arm) for arm in comparison.arms]):
        cells = [_percent(_mean(list(each.values()))) for each in drifts]
        columns.append((NAMES["drift"], cells))
    if comparison.costs:
        columns.append(("step's\ncost", [_cost(comparison, arm) for arm in comparison.arms]))
    memory = [_memory(comparison, arm) for arm in comparison.arms]
    if any(cell != "-" for cell in memory):
        columns.append(("peak\nmemory", memory))
    names = min(30, max(len(arm) for arm in comparison.arms))
    grids: list[list[tuple[str, list[str]]]] = [[]]
    room = width - names
    for head, cells in columns:
        wide = 2 + max(*(len(cell) for cell in cells), *(len(line) for line in head.split("\n")))
        if wide > room and grids[-1]:
            grids.append([])
            room = width - names
        grids[-1].append((head, cells))
        room -= wide
    return [_by_arm(comparison, grid) for grid in grids if grid]


def _by_arm(comparison: Comparison, columns: list[tuple[str, list[str]]]) -> Table:
    grid = _grid()
    for head, _ in columns:
        grid.add_column(head, justify="right", no_wrap=True)
    for i, arm in enumerate(comparison.arms):
        if arm in comparison.baselines and i:
            grid.add_row()
        grid.add_row(arm, *(cells[i] for _, cells in columns))
    return grid


def _grid(head: str = "") -> Table:
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    grid.add_column(head, overflow="fold", max_width=40)
    return grid


def _shown(comparison: Comparison) -> list[str]:
    """All metrics, but balanced accuracy where it says the same as accuracy."""
    return [key for key in comparison.metrics if not _says_the_same(comparison, key)]


def _further(comparison: Comparison) -> list[str]:
    """Metrics beside the main one; of those that every test set has the main set's."""
    main = main_metric(comparison)
    test = main.partition("/")[2]
    kinds = ("accuracy/", "balanced_accuracy/", "bg_gap")
    return [k for k in _shown(comparison) if k != main and (k.startswith(kinds) or k.endswith(f"/{test}"))]


def _says_the_same(comparison: Comparison, key: str) -> bool:
    kind, _, test = key.partition("/")
    if kind != "balanced_accuracy":
        return False
    pairs = [
        zip(comparison.values(key, arm), comparison.values(f"accuracy/{test}", arm), strict=True)
        for arm in comparison.arms
    ]
    return all(abs(a - b) < 0.0005 for arm in pairs for a, b in arm)


def _name(key: str) -> str:
    kind, _, test = key.partition("/")
    return NAMES.get(kind, kind) + (f", {test}" if test else "")


def _short(key: str) -> str:
    """A metric as the head of a narrow column, in two or three lines."""
    kind, _, test = key.partition("/")
    lines = [NAMES.get(kind, kind), test, "" if higher_is_better(key) else "less is better"]
    return "\n".join(line for line in lines if line)


def _difference(comparison: Comparison, key: str, arm: str, *overs: str) -> list[str]:
    seeds = comparison.interval(key, arm, "seeds", paired=True)
    if seeds is None:
        return ["-"] * (2 + len(overs))
    ends = [_ends(comparison.interval(key, arm, over, paired=True)) for over in overs]
    return [_percent(seeds.mean, sign=True), *ends, str(comparison.agreement(key, arm))]


def _both(comparison: Comparison, key: str, arm: str) -> str:
    """Mean, and difference with a star where its interval over seeds leaves out zero."""
    mean = _percent(_mean(comparison.values(key, arm)))
    found = comparison.interval(key, arm, "seeds", paired=True)
    if found is None:
        return f"{mean}        "
    star = "*" if found.available and (found.low > 0 or found.high < 0) else " "
    return f"{mean} {_percent(found.mean, sign=True):>6}{star}"


def _drift(comparison: Comparison, arm: str) -> dict[int, float]:
    """Share of the attention that lies elsewhere than in the source, by seed; {} where no run of the arm tells."""
    found = {run.settings.seed: run.results.get("drift") for run in comparison.runs(arm)}
    return {seed: drift for seed, drift in found.items() if drift is not None}


def _apart(comparison: Comparison, arm: str) -> list[str]:
    """Cells of what the drift of an arm is above its baseline's, over the seeds that both have."""
    mine, theirs = _drift(comparison, arm), _drift(comparison, str(comparison.baseline(arm)))
    if not (both := [seed for seed in mine if seed in theirs]):
        return ["-"] * 4
    found = paired_over_seeds([mine[seed] for seed in both], [theirs[seed] for seed in both])
    return [_percent(found.mean, sign=True), "-", _ends(found), "-"]


def _cost(comparison: Comparison, arm: str) -> str:
    cost = comparison.costs.arms.get(arm) if comparison.costs else None
    if cost is None:
        return "-"
    if cost.ratio is None:
        return f"{1000 * cost.seconds:.3g} ms"
    return f"x {cost.ratio:.2f}"


def _memory(comparison: Comparison, arm: str) -> str:
    memory = comparison.memory(arm)
    return "-" if memory is None else f"{memory[0] / 1e9:.2f} GB"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _percent(value: float, sign: bool = False) -> str:
    return "-" if math.isnan(value) else f"{100 * value:{'+' if sign else ''}.1f}".replace("-0.0", "0.0")


def _ends(interval: Interval | None) -> str:
    if interval is None or not interval.available:
        return "-"
    return f"[{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"


def _explained(comparison: Comparison, few: bool) -> list[str]:
    """What the columns mean."""
    n = len(comparison.seeds)
    lines = [f"Percent, means over {n} seed{'s' if n > 1 else ''}; BG-Gap and differences in points."]
    lower = dict.fromkeys(NAMES[key.partition("/")[0]] for key in comparison.metrics if not higher_is_better(key))
    if few and lower:
        lines.append(f"less is better: {', '.join(lower)}")
    if any(_drift(comparison, arm) for arm in comparison.arms):
        lines.append("drift: share of the attention that left where the source looks; neither way is better")
    compared = [arm for arm in comparison.arms if comparison.baseline(arm)]
    if compared:
        bases = dict.fromkeys(str(comparison.baseline(arm)) for arm in compared)
        if not few:
            lines.append(f"difference: arm - {' or '.join(bases)}, with the same seeds and on the same images")
        key = main_metric(comparison)
        for over in ("images", "seeds"):
            found = [comparison.interval(key, arm, over, paired=True) for arm in compared]
            if there := [interval for interval in found if interval is not None]:
                interval = next((one for one in there if one.available), there[0])
                of = f"{100 * interval.level:g} % interval of " if interval.available else ""
                lines.append(f"over {over}: {of}{interval.over}")
        lines.append("seeds: in how many the arm is above or below its baseline")
        if not few:
            lines.append("*: the interval of the difference over seeds leaves out zero")
        if len(compared) > 2:
            lines.append(
                f"Of 20 such intervals about one leaves out zero by chance; here are {len(compared)} a metric."
            )
    if comparison.costs and comparison.costs.arms:
        lines.append(f"cost: {comparison.costs.told()}")
    held = [memory for arm in comparison.arms if (memory := comparison.memory(arm))]
    if held:
        lines.append(f"peak memory: the most that a run of the arm held, of the {held[0][1]}")
    return lines
