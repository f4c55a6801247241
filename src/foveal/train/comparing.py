"""Compare ways to train: every arm with every seed, then differences to the baseline with intervals.

The same seed gives every arm the same split, initial weights and order of batches, so that differences pair. A
comparison that was stopped goes on where it was: finished runs are kept, an unfinished one resumes. A run that fails
is noted, and the others go on.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from foveal import __version__
from foveal.data import DataError
from foveal.train.comparison import Comparison
from foveal.train.errors import Interrupted, RunError, SettingsError
from foveal.train.files import write_text
from foveal.train.folder import check_same, is_finished
from foveal.train.machine import device_of
from foveal.train.measuring import memory_of, metrics_of
from foveal.train.models import resolve
from foveal.train.room import can_be_read
from foveal.train.run import Run, read_json
from foveal.train.settings import Settings

__all__ = ["Comparison", "compare"]

AGAIN = "stopped; run the same comparison again to go on where it was"
FORMAT = 2  # of comparison.json: another number makes it anew
GB = 1e9

Tell = Callable[[str, dict[str, Any]], None]


def compare(
    arms: Mapping[str, Settings],
    seeds: Sequence[int],
    out: str | Path,
    jobs: int | None = None,
    memory: float | None = None,
    progress: Tell | None = None,
    baseline_of: Mapping[str, str] | None = None,
) -> Comparison:
    """Train every arm with every seed into `out`/<arm>-seed<k>, then compare the arms with their baselines.

    jobs: processes that train, a run each at a time, with an equal share of the cores and, where there are several,
    a CUDA device each; None trains here, one run after the other. memory: GB (1e9 bytes) of the machine's memory that
    these processes may hold, see foveal.train.room. progress: called as progress(run's name, row of metrics.csv) after
    each epoch, with an empty row when a run is done, {"failed": why} when it failed, and {"said": line} for what its
    process prints on stderr. baseline_of: the arm that each
    arm but the baselines is compared with; by default the first.
    Raises SettingsError before anything is trained, for arms or seeds that cannot be compared; DataError; RunError for
    a folder with runs of other settings; Interrupted after Ctrl-C; where all runs failed, the error of the first.
    """
    out = Path(out)
    if baseline_of is None:
        baseline_of = dict.fromkeys(list(arms)[1:], next(iter(arms), ""))
    _check(arms, seeds, jobs, memory, baseline_of)
    runs = {
        arm: [settings.replace(seed=seed, out=str(out), name=f"{arm}-seed{seed}") for seed in seeds]
        for arm, settings in arms.items()
    }
    # seed by seed, so that a comparison that is stopped early has whole pairs
    order = [runs[arm][k] for k in range(len(seeds)) for arm in arms]
    for settings in order:
        if (settings.folder / "settings.yaml").is_file():
            check_same(settings, Settings.from_yaml(settings.folder / "settings.yaml"), settings.folder)
    tell = progress or _say_nothing
    for settings in [one for one in order if is_finished(one.folder)]:
        order.remove(settings)
        tell(str(settings.name), {})
    failed = _train(order, jobs, memory, tell)
    done = {arm: [Run.load(one.folder) for one in made if is_finished(one.folder)] for arm, made in runs.items()}
    if failed and not any(done.values()):
        name, error = next(iter(failed.items()))
        kind = type(error) if type(error).__module__ == RunError.__module__ else RunError
        raise kind(f"{name}: {error}") from error
    told = _told(arms, seeds, baseline_of, done) | {"failed": {name: _line(error) for name, error in failed.items()}}
    if not _is_written(out, told):
        told |= {"metrics": metrics_of(done, baseline_of), "memory": memory_of(done)}
        write_text(out / "comparison.json", json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    return Comparison(out)


def _train(order: Sequence[Settings], jobs: int | None, memory: float | None, tell: Tell) -> dict[str, Exception]:
    """Train the runs; what failed, by name."""
    if not order:
        return {}
    try:
        if jobs is None:
            return dict(_one_by_one(order, tell))
        from foveal.train.crew import train_all
        from foveal.train.fitting import load_data

        load_data(order[0])  # what is wrong with the data is told before a process is started
        return train_all(order, min(jobs, len(order)), tell, None if memory is None else memory * GB)
    except KeyboardInterrupt:
        raise Interrupted(AGAIN) from None


def _one_by_one(order: Sequence[Settings], tell: Tell) -> Iterator[tuple[str, Exception]]:
    from foveal.train.fitting import fit

    for settings in order:
        name = str(settings.name)
        try:
            fit(settings, resume=True, progress=partial(tell, name))
        except DataError:
            raise  # the data are the same for all
        except Exception as error:
            told = error if isinstance(error, ValueError | RunError) else RunError(f"{type(error).__name__}: {error}")
            tell(name, {"failed": _line(told)})
            yield name, told
        else:
            tell(name, {})


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _say_nothing(name: str, row: dict[str, Any]) -> None:
    pass


def _check(
    arms: Mapping[str, Settings],
    seeds: Sequence[int],
    jobs: int | None,
    memory: float | None,
    baseline_of: Mapping[str, str],
) -> None:
    if not arms:
        raise SettingsError("no arms to compare: give a name and settings for each")
    for arm in arms:
        if not re.fullmatch(r"[\w.+=%-]+", arm):
            raise SettingsError(f"arm {arm!r} cannot name a folder: use letters, digits and . _ + = % -")
    for arm, base in baseline_of.items():
        if arm not in arms or base not in arms or base in baseline_of:
            raise SettingsError(f"baseline_of has {base!r} for {arm!r}: both must be arms, and a baseline has none")
    if not seeds or len(set(seeds)) != len(seeds):
        raise SettingsError(f"seeds={list(seeds)}: give one or more, each once")
    if jobs is not None and jobs < 1:
        raise SettingsError(f"jobs={jobs} must be 1 or more")
    if memory is not None and not memory > 0:
        raise SettingsError(f"memory={memory} must be above 0: it is in GB")
    if memory is not None and not can_be_read():
        raise SettingsError("memory needs to see what processes hold: that takes Linux, or the package psutil")
    if not all(settings.data for settings in arms.values()):
        raise SettingsError("no data given: a folder of class folders, a .npz pack, scenes, digits, cifar10, ...")
    for settings in {(one.model, one.image_size, str(one.model_args)): one for one in arms.values()}.values():
        resolve(settings)
    for settings in {one.device: one for one in arms.values()}.values():
        device_of(settings.device)
    if jobs is not None and any(settings.devices > 1 for settings in arms.values()):
        raise SettingsError("devices must be 1 here: with jobs=N each of N processes takes a device of its own")


def _told(
    arms: Mapping[str, Settings], seeds: Sequence[int], baseline_of: Mapping[str, str], done: Mapping[str, list[Run]]
) -> dict[str, Any]:
    """What comparison.json says of how it was made."""
    return {
        "format": FORMAT,
        "version": __version__,
        "baseline": next(iter(arms)),
        "baseline_of": dict(baseline_of),
        "arms": list(arms),
        "seeds": list(seeds),
        "runs": {arm: [run.folder.name for run in made] for arm, made in done.items()},
        "finished": {run.folder.name: run.results.get("finished") for made in done.values() for run in made},
        "settings": {arm: settings.as_dict() for arm, settings in arms.items()},
    }


def _is_written(out: Path, told: Mapping[str, Any]) -> bool:
    """Whether comparison.json is that of these runs: with many images its intervals take a while."""
    try:
        kept = read_json(out / "comparison.json")
    except RunError:
        return False
    return all(kept.get(name) == value for name, value in told.items()) and "metrics" in kept
