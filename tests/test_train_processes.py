"""Two processes give what one gives with two accumulation steps: the same losses, weights and evaluation."""

import os
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from foveal.train import Run, Settings
from foveal.train.machine import own
from training import child, tiny


def train(settings: Settings) -> None:
    from foveal.train import fit

    fit(settings)


def as_torchrun(settings: Settings, rank: int, world: int, port: int) -> None:
    """Train as one of the processes that torchrun starts: it tells them who they are by these variables."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in told.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"})
    train(settings)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def together(settings: Settings) -> list[int]:
    port = free_port()
    processes = [child(as_torchrun, settings, rank, 2, port) for rank in range(2)]
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("mix", ["none", "transmix"])
def test_two_processes_are_two_accumulation_steps(tmp_path: Path, mix: str):
    # 51 images in steps of 2 x 6: the last step has 3, and validation and test sets do not divide by 2
    data = "scenes:train=51,val=21,test=25,shortcut=0.8,classes=0-4"
    common = {"data": data, "mix": mix, "batch_size": 6, "epochs": 2, "ema": 0.9, "drop_path": 0.1}
    one = tiny(tmp_path / "one", **common, accumulate=2)
    two = tiny(tmp_path / "two", **common, devices=2)
    alone = child(train, one)
    assert together(two) == [0, 0]
    alone.join()
    a, b = Run.load(one.folder), Run.load(two.folder)
    assert b.results["processes"] == 2
    # exactly: both add two gradients of losses halved beforehand, and halving is exact
    assert a.steps == b.steps
    mine, theirs = load_file(a.folder / "model.safetensors"), load_file(b.folder / "model.safetensors")
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    for row, other in zip(a.metrics, b.metrics, strict=True):
        assert {k: v for k, v in row.items() if k.startswith("val")} == pytest.approx(
            {k: v for k, v in other.items() if k.startswith("val")}, abs=1e-6
        )  # batches are cut elsewhere, and a matrix product's last bit depends on its size
    for name in ("mixed_same", "mixed_rand"):
        one_set, two_set = a.predictions(name), b.predictions(name)
        assert torch.equal(one_set.labels, two_set.labels)
        assert torch.equal(one_set.index, two_set.index)
        assert torch.allclose(one_set.logits, two_set.logits, atol=1e-5)
        assert torch.allclose(one_set.pointing, two_set.pointing, atol=1e-5)
        assert a.results["sets"][name]["accuracy"] == b.results["sets"][name]["accuracy"]


@pytest.mark.parametrize("variable", ["LOCAL_RANK", "SLURM_LOCALID"])
def test_each_process_works_on_its_own_device(variable, monkeypatch):
    """What a process computes beside the trainer (a probe, a source's answers) does not crowd the first device."""
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    one, two = (Settings(data="digits", devices=devices) for devices in (1, 2))
    assert own(torch.device("cuda"), two) == torch.device("cuda", 0)
    monkeypatch.setenv(variable, "1")
    assert own(torch.device("cuda"), two) == torch.device("cuda", 1)
    assert own(torch.device("cuda", 3), one) == torch.device("cuda", 3)
    assert own(torch.device("cpu"), two) == torch.device("cpu")
