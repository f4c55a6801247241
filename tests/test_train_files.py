"""Files are whole or not there; a full disk or a closed folder is one clear error."""

import resource
from pathlib import Path

import pytest
import torch

from foveal.train import RunError, Settings
from foveal.train.checkpoints import WholeCheckpoints
from foveal.train.files import read_tensors, sweep, whole_file, write_text
from foveal.train.table import Table, read_table
from training import exit_code, tiny


def test_a_file_takes_its_place_only_when_it_is_whole(tmp_path: Path):
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as file:
        file.write(b"%d" % (1 // 0))
    assert path.read_text() == "old"
    with whole_file(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_what_killed_processes_left_is_swept(tmp_path: Path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt.partial-123").write_bytes(b"half")
    write_text(tmp_path / "kept", "")
    sweep(tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["kept"]


def test_a_folder_that_is_no_folder(tmp_path: Path):
    write_text(tmp_path / "file", "")
    with pytest.raises(RunError, match=r"cannot write .*/file/inside: Not a directory"):
        write_text(tmp_path / "file" / "inside", "")


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path):
    content = {"weights": {"a": torch.arange(3)}, "epoch": 3, "best": {"loss": float("inf")}}
    disk = WholeCheckpoints()
    disk.save_checkpoint(content, tmp_path / "last.ckpt")
    found = disk.load_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(found["weights"]["a"], torch.arange(3))
    assert (found["epoch"], found["best"]) == (3, {"loss": float("inf")})
    disk.remove_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(RunError, match="there is no file"):
        read_tensors(tmp_path / "last.ckpt")


def fill_the_disk(settings: Settings, limit: int, message: Path) -> None:
    """Train where no file may grow beyond `limit` bytes: like a full disk, every longer write fails."""
    from foveal.train import fit

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        fit(settings)
    except RunError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        message.write_text(str(error))


def train(settings: Settings) -> None:
    from foveal.train import fit

    fit(settings, resume=True)


def test_a_full_disk_is_one_error_and_the_run_goes_on_when_there_is_room(tmp_path: Path):
    settings, message = tiny(tmp_path, epochs=2), tmp_path / "message"
    assert exit_code(fill_the_disk, settings, 200_000, message) == 0  # room for weights, not for a checkpoint
    assert message.read_text().startswith(f"cannot write {settings.folder / 'checkpoints' / 'last.ckpt'}: File too")
    assert not list(settings.folder.rglob("*partial*"))
    assert exit_code(train, settings) == 0
    assert (settings.folder / "results.json").is_file()


def test_a_table_is_cut_back_to_the_checkpoint(tmp_path: Path):
    table = Table(tmp_path / "t.csv", ("epoch", "loss"))
    table.begin(0)
    rows = [{"epoch": epoch, "loss": 0.1 * epoch} for epoch in (1, 2, 3)]
    table.append(rows)
    assert read_table(table.path) == rows  # the very same numbers
    with open(table.path, "a") as file:
        file.write("4,0.4")  # torn: no end of line
    with pytest.raises(RunError, match="not a row"):
        read_table(table.path)
    table.begin(2)
    table.append([{"epoch": 3}])
    assert read_table(table.path) == [*rows[:2], {"epoch": 3, "loss": None}]
    with pytest.raises(RunError, match="cannot read"):
        read_table(tmp_path / "other.csv")
