"""A comparison in the terminal: a bar while it runs, then a table with intervals that say what they are over."""

import io
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from foveal.stats import Interval
from foveal.train.comparing import Comparison


class Watch:
    """Shows how far a comparison is: called with a run's name and the row of its last epoch."""

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.total, self.epochs, self.runs = console, total, 0, 0
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn())
        self.bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, refresh_per_second=4)
        self.entry = self.bar.add_task("epochs", total=total)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def __call__(self, name: str, row: dict[str, Any]) -> None:
        """An epoch of a run has ended; or, with an empty row, the run has."""
        if row:
            self.epochs += 1
            self.bar.advance(self.entry)
        else:
            self.runs += 1
            if not self.console.is_terminal:
                self.console.print(f"{name} done", soft_wrap=True)


def table(comparison: Comparison, width: int = 100) -> str:
    """Means over seeds of each arm, and what each arm is above the baseline, with both intervals; in percent."""
    arms, baseline = comparison.arms, comparison.arms[0]
    shown = [key for key in comparison.metrics if not key.startswith("balanced_accuracy/")]
    grid = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    grid.add_column("")
    for arm in arms:
        grid.add_column(arm, justify="right")
    for arm in arms[1:]:
        grid.add_column(f"{arm} - {baseline}" if len(arms) > 2 else "difference", justify="right")
        grid.add_column("over images", justify="right")
        grid.add_column("over seeds", justify="right")
    for key in shown:
        cells = [_percent(_mean(comparison.values(key, arm))) for arm in arms]
        for arm in arms[1:]:
            seeds = comparison.interval(key, arm, "seeds", paired=True)
            images = comparison.interval(key, arm, "images", paired=True)
            assert seeds is not None
            cells += [_percent(seeds.mean, sign=True), _ends(images), _ends(seeds)]
        grid.add_row(_name(key), *cells)
    text = io.StringIO()
    console = Console(file=text, width=width, highlight=False)
    console.print(grid)
    for line in _explained(comparison):
        console.print(Text(line, style="dim"), soft_wrap=True)
    return text.getvalue()


def _name(key: str) -> str:
    kind, _, test = key.partition("/")
    return {"accuracy": f"accuracy, {test}", "pointing": f"attention on object, {test}", "bg_gap": "BG-Gap"}[kind]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _percent(value: float, sign: bool = False) -> str:
    return f"{100 * value:{'+' if sign else ''}.1f}"


def _ends(interval: Interval | None) -> str:
    if interval is None or not interval.available:
        return "-"
    return f"[{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"


def _explained(comparison: Comparison) -> list[str]:
    """What the columns mean."""
    arms, n = comparison.arms, len(comparison.seeds)
    lines = [f"Percent, means over {n} seed{'s' if n > 1 else ''}; BG-Gap and differences in points."]
    if len(arms) > 1:
        key = comparison.metrics[0]
        for over in ("images", "seeds"):
            interval = comparison.interval(key, arms[1], over, paired=True)
            if interval is not None:
                lines.append(f"over {over}: {100 * interval.level:g} % interval of {interval.over}")
    return lines
