"""A run that is killed at any moment and resumed ends bit for bit as if it had never been stopped."""

import random
import signal
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from foveal.train import Run, RunError, Settings, fit
from training import TINY, child, die, exit_code, tiny

# What makes a step depend on more than its batch: attention-made labels, a frozen source, averaged weights,
# dropped blocks, accumulated gradients, an uneven last step.
EVERYTHING = {
    "mix": "transmix",
    "guide": "gta",
    "ema": 0.9,
    "drop_path": 0.2,
    "accumulate": 2,
    "epochs": 4,
    "batch_size": 7,
    "smoothing": 0.1,
}


def train(settings: Settings, kill: str = "", count: int = 0) -> None:
    """Train, resuming what is there; kill -9 of ourselves when `kill` happens for the count-th time."""
    from foveal.train import fit

    if kill:
        _arm(kill, count)
    fit(settings, resume=True)


def _arm(kill: str, count: int) -> None:
    from foveal import whole
    from foveal.train import checkpoints, fitting, outcome, record, task

    places = {
        "a step begins": (task.Classify, "training_step"),
        "the epoch ends": (record.Record, "on_train_epoch_end"),
        "rows are to be written": (record.Table, "append"),
        "the checkpoint is being written": (checkpoints._Remembering, "write"),
        "a file is to take its place": (whole.os, "replace"),
        "predictions are to be written": (outcome, "write_predictions"),
        "results are to be written": (fitting, "write_text"),
    }
    where, name = places[kill]
    original = getattr(where, name)
    left = [count]

    def counted(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            die()
        return original(*args, **kwargs)

    setattr(where, name, counted)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "source.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, **TINY).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Run:
    """The run that nothing interrupted."""
    settings = tiny(tmp_path_factory.mktemp("whole"), init=str(weights), **EVERYTHING)
    assert exit_code(train, settings) == 0
    return Run.load(settings.folder)


def assert_same(run: Run, whole: Run) -> None:
    mine, theirs = load_file(run.folder / "model.safetensors"), load_file(whole.folder / "model.safetensors")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert run.steps == whole.steps
    timed = ("seconds", "images_per_second")
    assert [{k: v for k, v in row.items() if k not in timed} for row in run.metrics] == [
        {k: v for k, v in row.items() if k not in timed} for row in whole.metrics
    ]
    assert run.results["sets"] == whole.results["sets"]
    last = [torch.load(r.folder / "checkpoints" / "last.ckpt", weights_only=True) for r in (run, whole)]
    for name, tensor in last[1]["state_dict"].items():  # the raw weights too, not only the averaged ones
        assert torch.equal(last[0]["state_dict"][name], tensor)


def test_killed_everywhere(tmp_path: Path, weights: Path, whole: Run):
    settings = tiny(tmp_path, init=str(weights), **EVERYTHING)
    chance = random.Random(1)
    kills = [
        ("a step begins", 1),
        ("a step begins", chance.randint(2, 8)),  # an epoch is 8 micro-batches in 4 steps
        ("the checkpoint is being written", chance.randint(1, 60)),
        ("rows are to be written", 2),
        ("a step begins", 8 + chance.randint(1, 8)),
        ("a file is to take its place", 4),
        ("the epoch ends", 1),
        ("a step begins", chance.randint(1, 8)),
        ("a file is to take its place", 3),
        ("predictions are to be written", 2),
        ("results are to be written", 1),
    ]
    for kill, count in kills:
        assert exit_code(train, settings, kill, count) == -signal.SIGKILL, (kill, count)
        with pytest.raises(RunError, match="has not finished"):
            Run.load(settings.folder)
    assert exit_code(train, settings) == 0
    assert_same(Run.load(settings.folder), whole)
    assert not list(settings.folder.rglob("*partial*"))


def test_killed_from_outside_at_random_times(tmp_path: Path, weights: Path, whole: Run):
    settings = tiny(tmp_path, init=str(weights), **EVERYTHING)
    chance = random.Random(2)
    steps = settings.folder / "steps.csv"
    for _ in range(3):
        size = steps.stat().st_size if steps.exists() else 0
        process = child(train, settings)
        while process.is_alive() and not (steps.exists() and steps.stat().st_size > size):
            time.sleep(0.005)
        process.join(chance.uniform(0.0, 0.2))
        process.kill()
        process.join()
    assert exit_code(train, settings) == 0
    assert_same(Run.load(settings.folder), whole)


def interrupt(settings: Settings) -> None:
    """Ctrl-C in the second epoch; the message goes to a file."""
    from foveal.train import Interrupted, fit, task

    step = task.Classify.training_step

    def pressed(self, batch, i):
        if self.current_epoch == 1:
            signal.raise_signal(signal.SIGINT)
        return step(self, batch, i)

    task.Classify.training_step = pressed
    try:
        fit(settings)
    except Interrupted as error:
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # Ctrl-C works again
        Path(settings.out, "message").write_text(str(error))


def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(tmp_path: Path, weights: Path, whole: Run):
    settings = tiny(tmp_path, init=str(weights), **EVERYTHING)
    assert exit_code(interrupt, settings) == 0
    assert f"foveal train --resume {settings.folder}" in (tmp_path / "message").read_text()
    assert exit_code(train, settings) == 0
    assert_same(Run.load(settings.folder), whole)


def test_an_uninterrupted_run_repeats_itself(tmp_path: Path, weights: Path, whole: Run):
    settings = tiny(tmp_path, init=str(weights), **EVERYTHING)
    assert exit_code(train, settings) == 0
    assert_same(Run.load(settings.folder), whole)
    other = tiny(tmp_path, init=str(weights), **EVERYTHING, seed=1).replace(name="other")
    assert exit_code(train, other) == 0
    assert Run.load(other.folder).steps != whole.steps


def test_other_images_are_no_resumption(tmp_path: Path):
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (32, 32), (40 * i, 0, 90)).save(tmp_path / "photos" / name / f"{i}.png")
    settings = tiny(tmp_path, data=str(tmp_path / "photos"), workers=0)
    assert exit_code(train, settings, "results are to be written", 1) == -signal.SIGKILL
    (tmp_path / "photos" / "cat" / "0.png").rename(tmp_path / "photos" / "cat" / "9.png")
    with pytest.raises(RunError, match="the data have changed since"):
        fit(settings, resume=True)
    assert len(fit(settings, overwrite=True).metrics) == 3
