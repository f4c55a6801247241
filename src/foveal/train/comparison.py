"""A comparison on disk: comparison.json beside the folders of its runs, read when it is asked for."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from foveal.stats import Interval
from foveal.train.costs import Costs, read_costs
from foveal.train.errors import RunError
from foveal.train.run import Run, read_json

LOWER = ("bg_gap", "ece", "inconsistency")  # metrics of which less is better


def higher_is_better(metric: str) -> bool:
    """Which way a metric (accuracy/<set>, ece/<set>, ...) is better."""
    return metric.partition("/")[0] not in LOWER


@dataclass(frozen=True)
class Agreement:
    """Seeds in which an arm is above (`up`) or below (`down`) its baseline, of `n` that both have."""

    up: int
    down: int
    n: int

    def __str__(self) -> str:
        if self.up == self.down == 0:
            return f"{self.n} of {self.n} equal"
        count, way = (self.up, "up") if self.up >= self.down else (self.down, "down")
        return f"{count} of {self.n} {way}"


@dataclass(frozen=True)
class Comparison:
    """A comparison in its folder. An arm is in it if one of its runs has finished, a metric if some arm has it."""

    folder: Path

    @classmethod
    def load(cls, path: str | Path) -> "Comparison":
        """The comparison in a folder. Raises RunError where there is none or it has not finished."""
        folder = Path(path).expanduser()
        if not (folder / "comparison.json").is_file():
            raise RunError(f"{folder} holds no finished comparison (no comparison.json)")
        return cls(folder)

    @cached_property
    def content(self) -> dict[str, Any]:
        """comparison.json as it is."""
        return read_json(self.folder / "comparison.json")

    @property
    def arms(self) -> list[str]:
        """Names of the arms that have a finished run, in the order in which they were given."""
        return [arm for arm in self.content["arms"] if self.content["runs"][arm]]

    @property
    def missing(self) -> list[str]:
        """Names of the arms without any finished run."""
        return [arm for arm in self.content["arms"] if not self.content["runs"][arm]]

    @property
    def failed(self) -> Mapping[str, str]:
        """Why, by name, of the runs that did not finish."""
        return dict(self.content.get("failed", {}))

    @property
    def baselines(self) -> list[str]:
        """The arms that others are compared with."""
        return [arm for arm in self.arms if arm not in self._baseline_of]

    def baseline(self, arm: str) -> str | None:
        """The arm that this one is compared with; None for a baseline and where it has no finished run."""
        found = self._baseline_of.get(arm)
        return found if found in self.arms else None

    @cached_property
    def _baseline_of(self) -> dict[str, str]:
        arms = list(self.content["arms"])  # of old comparisons the first arm is the only baseline
        return dict(self.content.get("baseline_of", dict.fromkeys(arms[1:], arms[0])))

    @property
    def seeds(self) -> list[int]:
        """The seeds that every arm was to be trained with."""
        return list(self.content["seeds"])

    def seeds_of(self, arm: str) -> list[int]:
        """The seeds of the arm's finished runs."""
        return [run.settings.seed for run in self.runs(arm)]

    @property
    def metrics(self) -> list[str]:
        """What was measured: accuracy, balanced_accuracy, ece, inconsistency, pointing (each /<set>) and bg_gap.

        All are shares; of `LOWER` less is better.
        """
        return list(self.content["metrics"])

    def runs(self, arm: str) -> list[Run]:
        """The finished runs of an arm, in the order of the seeds."""
        return [Run.load(self.folder / name) for name in self.content["runs"][arm]]

    def values(self, metric: str, arm: str) -> list[float]:
        """The metric of each seed of `seeds_of`; nothing where the arm does not have it."""
        return list(self._told(metric, arm).get("values", []))

    def interval(self, metric: str, arm: str, over: str = "seeds", paired: bool = False) -> Interval | None:
        """The metric of an arm, or with `paired` what it is above its baseline on the seeds that both have.

        over: "seeds" or "images". None where there is no such interval.
        """
        told = self._told(metric, arm)
        found = (told.get("paired") or {} if paired else told).get(f"over_{over}")
        if found is None:
            return None
        ends = {name: math.nan if found[name] is None else found[name] for name in ("low", "high")}
        return Interval(**(found | ends))

    def agreement(self, metric: str, arm: str) -> Agreement | None:
        """In how many seeds the arm is above or below its baseline; None without one."""
        paired = self._told(metric, arm).get("paired")
        return Agreement(paired["up"], paired["down"], len(paired["seeds"])) if paired and "up" in paired else None

    def memory(self, arm: str) -> tuple[float, str] | None:
        """(most bytes held by any run of the arm, by what: "device" or "process"); None where that is not known."""
        told = self.content.get("memory", {}).get(arm)
        return (max(told["bytes"]), told["of"]) if told else None

    @cached_property
    def costs(self) -> Costs | None:
        """What a training step of each arm costs; None where that was not measured."""
        return read_costs(self.folder)

    def _told(self, metric: str, arm: str) -> dict[str, Any]:
        return dict(self.content["metrics"][metric].get(arm) or {})
