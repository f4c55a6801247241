"""Choose the weight of a guide on a held-out part of the training images: nested inside the split, no test image seen.

    lambda* = argmax_lambda accuracy on the held-out part, mean over seeds          (ties: the smaller held-out loss)

Of the training images that the settings allow (a share of the labels, say) a part is held out class by class; each
weight trains on the rest and is judged on that part. Weight 0 is plain fine-tuning: when it wins, guidance does not
help here.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from foveal.train.errors import Interrupted, SettingsError
from foveal.train.files import write_text
from foveal.train.fitting import fit
from foveal.train.guiding import default_weight
from foveal.train.settings import Settings

GTA_WEIGHTS = (0.0, 0.1, 1.0, 10.0, 100.0)  # Seo et al.'s grid, and none
FACTORS = (0.0, 0.1, 1.0, 10.0)  # of another method's own weight
HELD_OUT = 0.2
AGAIN = "stopped; run the same sweep again to go on where it was"


@dataclass(frozen=True)
class Sweep:
    """What the weights of a guide were worth on held-out training images.

    weights: as tried.  accuracy, loss: of each and of each seed, on the held-out part at the best epoch.
    best: the chosen weight.  trained_on, held_out: numbers of images.  warning: of how the source looks, if any.
    """

    guide: str
    weights: tuple[float, ...]
    accuracy: tuple[tuple[float, ...], ...]
    loss: tuple[tuple[float, ...], ...]
    best: float
    trained_on: int
    held_out: int
    warning: str = ""

    def mean(self, weight: float) -> float:
        """Mean accuracy of a weight over the seeds."""
        values = self.accuracy[self.weights.index(weight)]
        return sum(values) / len(values)


def usual_weights(guide: str) -> tuple[float, ...]:
    """The weights that are tried if none are given."""
    return GTA_WEIGHTS if guide == "gta" else tuple(f * default_weight(guide) for f in FACTORS)


def sweep(
    settings: Settings,
    weights: Sequence[float] | None = None,
    seeds: int = 1,
    held_out: float = HELD_OUT,
    out: str | Path | None = None,
    progress: Callable[[str, dict[str, Any]], None] | None = None,
) -> Sweep:
    """Train with each weight on the rest of the training images, and choose by the held-out part.

    settings: of the run that is to be trained afterwards; its label_fraction or per_class holds.  seeds: runs of each
    weight, from the settings' seed on.  out: folder of the runs, by default `out/sweep-NAME`; finished ones are kept,
    and sweep.json says what came out.  progress: called as progress(run's name, row) after each epoch.
    Raises SettingsError without a guide or with weights that cannot be meant.
    """
    tried = tuple(float(w) for w in (usual_weights(settings.guide) if weights is None else weights))
    if settings.guide == "none":
        raise SettingsError("a sweep tries weights of a guide: give one, such as guide=gta")
    if len(set(tried)) != len(tried) or len(tried) < 2 or not all(0 <= w < math.inf for w in tried):
        raise SettingsError(f"weights={list(tried)} must be two or more different numbers, 0 or above")
    if seeds < 1:
        raise SettingsError(f"seeds={seeds} must be 1 or more")
    folder = Path(out) if out is not None else Path(settings.out) / f"sweep-{settings.folder.name}"
    accuracy, loss, sizes, warning = [], [], (0, 0), ""
    for weight in tried:
        scores = []
        for seed in range(settings.seed, settings.seed + seeds):
            name = f"weight-{weight:g}-seed{seed}"
            one = settings.replace(guide_weight=weight, held_out=held_out, seed=seed, out=str(folder), name=name)
            told = False if progress is None else partial(progress, name)
            try:
                run = fit(one, resume=True, progress=told, tested=False)
            except Interrupted:
                raise Interrupted(AGAIN) from None
            scores.append(run.results["val"])
            sizes = run.results["images"], run.split["sets"]["val"]["n"]
            warning = str((run.results.get("source") or {}).get("warning", ""))
        accuracy.append(tuple(float(score["accuracy"]) for score in scores))
        loss.append(tuple(float(score["loss"]) for score in scores))
    found = Sweep(settings.guide, tried, tuple(accuracy), tuple(loss), chosen(tried, accuracy, loss), *sizes, warning)
    write_text(folder / "sweep.json", json.dumps(asdict(found), indent=1) + "\n")
    return found


def chosen(weights: Sequence[float], accuracy: Sequence[Sequence[float]], loss: Sequence[Sequence[float]]) -> float:
    """The weight of the best mean accuracy; of equal ones that of the smallest mean loss, then the smallest."""

    def rank(i: int) -> tuple[float, float, float]:
        return (-sum(accuracy[i]) / len(accuracy[i]), sum(loss[i]) / len(loss[i]), weights[i])

    return weights[min(range(len(weights)), key=rank)]
