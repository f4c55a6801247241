"""comparison.csv: a row for each arm and metric, for spreadsheets and data frames. Nothing is rounded."""

import csv
import io
from pathlib import Path
from typing import Any

from foveal.stats import Interval
from foveal.train.comparison import Comparison, higher_is_better
from foveal.train.files import write_text

COLUMNS = (
    *("arm", "metric", "better", "unit", "n", "mean"),
    *("low_over_seeds", "high_over_seeds", "low_over_images", "high_over_images", "low_quartile", "high_quartile"),
    *("baseline", "difference", "difference_low_over_seeds", "difference_high_over_seeds"),
    *("difference_low_over_images", "difference_high_over_images", "seeds_up", "seeds_down", "seeds_compared"),
)


def write_csv(comparison: Comparison) -> Path:
    """Write comparison.csv into the comparison's folder; its path. Raises RunError where the disk does not take it.

    Beside the metrics (shares): step_seconds and step_ratio (medians; of the ratio the quartiles of the rounds too),
    and peak_memory (the largest of the arm's runs, in bytes).
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows(comparison))
    path = comparison.folder / "comparison.csv"
    write_text(path, text.getvalue())
    return path


def rows(comparison: Comparison) -> list[dict[str, Any]]:
    """The rows of comparison.csv; what there is not is left out of a row."""
    found = []
    for arm in comparison.arms:
        for metric in comparison.metrics:
            if values := comparison.values(metric, arm):
                better = "higher" if higher_is_better(metric) else "lower"
                row = {"arm": arm, "metric": metric, "better": better, "unit": "share", "n": len(values)}
                row["mean"] = sum(values) / len(values)
                for over in ("seeds", "images"):
                    row |= _ends("", over, comparison.interval(metric, arm, over))
                found.append(row | _difference(comparison, metric, arm))
        found += _costs(comparison, arm)
    return found


def _difference(comparison: Comparison, metric: str, arm: str) -> dict[str, Any]:
    agreement, seeds = comparison.agreement(metric, arm), comparison.interval(metric, arm, "seeds", paired=True)
    if agreement is None or seeds is None:
        return {}
    row: dict[str, Any] = {"baseline": comparison.baseline(arm), "difference": seeds.mean}
    row |= _ends("difference_", "seeds", seeds)
    row |= _ends("difference_", "images", comparison.interval(metric, arm, "images", paired=True))
    return row | {"seeds_up": agreement.up, "seeds_down": agreement.down, "seeds_compared": agreement.n}


def _costs(comparison: Comparison, arm: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    cost = comparison.costs.arms.get(arm) if comparison.costs else None
    if cost is not None:
        found.append({"metric": "step_seconds", "unit": "seconds", "mean": cost.seconds})
        if cost.ratio is not None:
            ends = {} if cost.low is None else {"low_quartile": cost.low, "high_quartile": cost.high}
            found.append({"metric": "step_ratio", "unit": "ratio", "mean": cost.ratio} | ends)
            found[-1]["baseline"] = comparison.baseline(arm)
    if memory := comparison.memory(arm):
        found.append({"metric": "peak_memory", "unit": f"bytes of the {memory[1]}", "mean": memory[0]})
    return [{"arm": arm, "better": "lower"} | row for row in found]


def _ends(prefix: str, over: str, interval: Interval | None) -> dict[str, Any]:
    if interval is None or not interval.available:
        return {}
    return {f"{prefix}low_over_{over}": interval.low, f"{prefix}high_over_{over}": interval.high}
