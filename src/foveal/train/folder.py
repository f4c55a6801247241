"""The folder of a run that is being made: who may write in it, and what is there already."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from foveal.train.errors import RunError
from foveal.train.files import cannot_write, write_text
from foveal.train.plain import read_yaml
from foveal.train.pretrain_settings import PretrainSettings
from foveal.train.settings import Settings

OURS = (
    *("settings.yaml", "split.json", "metrics.csv", "steps.csv", "results.json", "report.html", "samples.npz"),
    *("decoder.safetensors", "reconstructions.png", "evaluation.json"),
    *("model.json", "model.safetensors", "tensorboard", "checkpoints", "predictions", "explain"),
)
ELSEWHERE = ("device", "workers", "out", "name")  # may differ when a run is continued
SPREAD = ("devices", "accumulate")  # may, if their product stays


def is_finished(folder: Path) -> bool:
    """Whether a run in this folder has reached its end."""
    return (folder / "results.json").is_file()


def prepare(settings: Settings | PretrainSettings, *, resume: bool, overwrite: bool) -> Path | None:
    """Make the run's folder ready; the checkpoint to continue from, or None to begin.

    Raises RunError if there is a run already and neither resume nor overwrite is asked, if the settings are not
    those of the run to continue, or if the folder cannot be written.
    """
    folder = settings.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = sorted(path.name for path in folder.iterdir() if path.name != ".lock")
    except OSError as error:
        raise cannot_write(folder, error) from error
    if there and "settings.yaml" not in there:
        raise RunError(f"{folder} is not empty and not a run (it has {', '.join(there[:3])}): choose another name")
    if there and overwrite:
        for name in OURS:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        there = []
    if there and not resume:
        state = "a finished run" if is_finished(folder) else "an unfinished run"
        go_on = "" if is_finished(folder) else "continue it with --resume, "
        raise RunError(f"{folder} holds {state}: {go_on}replace it with --overwrite, or choose another --name")
    if there:
        check_same(settings, settings_in(folder), folder)
    try:
        for name in ("checkpoints", "predictions"):
            (folder / name).mkdir(exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    if not there:
        write_text(folder / "settings.yaml", settings.to_yaml())
    checkpoint = folder / "checkpoints" / "last.ckpt"
    return checkpoint if checkpoint.is_file() else None


def settings_in(folder: Path) -> Settings | PretrainSettings:
    """The settings of the run in a folder, of whichever command. Raises SettingsError where they cannot be read."""
    values = read_yaml(folder / "settings.yaml")
    return PretrainSettings.from_dict(values) if "mask_ratio" in values else Settings.from_dict(values)


def check_same(now: Settings | PretrainSettings, then: Settings | PretrainSettings, folder: Path) -> None:
    """Raise RunError, naming the differences, unless `now` continues the training that `then` began."""
    if type(now) is not type(then):
        raise RunError(f"{folder} holds a run of foveal {then.COMMAND}: choose another name")
    one, other = now.as_dict(), then.as_dict()
    differ = [name for name in one if name not in (*ELSEWHERE, *SPREAD) and one[name] != other[name]]
    if now.devices * now.accumulate != then.devices * then.accumulate:
        differ += SPREAD
    if differ:
        told = ", ".join(f"{name} was {json.dumps(other[name])}, now {json.dumps(one[name])}" for name in differ)
        raise RunError(
            f"cannot continue {folder} with other settings: {told}; keep those, or choose another name or folder"
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one process at a time trains in a folder; the lock goes with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows: no such locks
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        try:
            # lockf, not flock: processes that decode images outlive a kill by seconds and would keep a flock
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise RunError(f"another process is training in {folder}") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)
