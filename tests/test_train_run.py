"""A run's folder: what is in it, who else can read it, and that a run is never spoilt by another."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from foveal.data import DataError
from foveal.train import Run, RunError, Settings, SettingsError, fit
from foveal.train.files import write_text
from foveal.train.folder import locked
from foveal.train.precision import choose
from foveal.train.settings import Settings as SettingsClass
from training import child, tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fit(tiny(tmp_path_factory.mktemp("run"), mix="cutmix", label_fraction=0.5, epochs=2))


def test_what_a_run_leaves_behind(run: Run):
    assert {path.name for path in run.folder.iterdir()} - {".lock"} == {
        "checkpoints",
        "metrics.csv",
        "model.json",
        "model.safetensors",
        "predictions",
        "results.json",
        "samples.npz",
        "settings.yaml",
        "split.json",
        "steps.csv",
        "tensorboard",
    }
    assert [path.name for path in (run.folder / "checkpoints").iterdir()] == ["last.ckpt"]


def test_the_model_loads_with_timm_alone(run: Run):
    program = f"""
import sys
sys.modules["foveal"] = sys.modules["lightning"] = None      # importing them fails
import json, pathlib, numpy, timm, torch
folder = pathlib.Path({str(run.folder)!r})
card = json.loads((folder / "model.json").read_text())
model = timm.create_model(card["architecture"], checkpoint_path=folder / "model.safetensors", **card["arguments"])
shown = numpy.load(folder / "samples.npz")["images"]
x = (torch.from_numpy(shown).float() / 255 - torch.tensor(card["image"]["mean"]).view(3, 1, 1))
x = x / torch.tensor(card["image"]["std"]).view(3, 1, 1)
with torch.no_grad():
    numpy.save(folder / "by_timm.npy", model.eval()(x).numpy())
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    shown = torch.from_numpy(np.load(run.folder / "samples.npz")["images"])
    with torch.no_grad():
        logits = run.model()(run.config.normalise(shown))
    by_timm = run.folder / "by_timm.npy"
    assert torch.allclose(logits, torch.from_numpy(np.load(by_timm)), atol=1e-5)  # threads may differ
    by_timm.unlink()
    assert run.classes == ("0", "1", "2", "3", "4")


def test_results_are_those_of_the_saved_predictions(run: Run):
    for name, scores in run.results["sets"].items():
        made = run.predictions(name)
        assert made.logits.shape == (20, 5)
        right = (made.logits.argmax(-1) == made.labels).double()
        recalls = [right[made.labels == c].mean() for c in range(5)]
        assert scores["accuracy"] == float(right.mean())
        assert scores["balanced_accuracy"] == pytest.approx(float(sum(recalls) / 5))
        assert scores["pointing"] == pytest.approx(float(made.pointing.mean()), rel=1e-5)
        assert made.attention.shape == (20, 4, 4)
        assert made.attention_kind == "class"
    sets = run.results["sets"]
    assert run.results["bg_gap"] == sets["mixed_same"]["accuracy"] - sets["mixed_rand"]["accuracy"]
    with pytest.raises(RunError, match="unknown test set 'mixed_sane': did you mean 'mixed_same'"):
        run.predictions("mixed_sane")


def test_the_best_epoch_on_validation_is_the_one_kept(run: Run):
    best = max(run.metrics, key=lambda row: (row["val_accuracy"], -row["val_loss"], -row["epoch"]))
    assert run.results["best_epoch"] == best["epoch"]
    assert run.results["val"]["accuracy"] == best["val_accuracy"]
    assert run.results["command"] == run.settings.command()


def test_the_split_says_which_image_was_used_for_what(run: Run):
    split = run.split
    assert {name: held["n"] for name, held in split["sets"].items()} == {
        "train": 25,
        "val": 20,
        "test/mixed_same": 20,
        "test/mixed_rand": 20,
    }
    assert split["sets"]["train"]["per_class"] == [5] * 5
    assert len(set(split["sets"]["train"]["images"])) == 25
    assert "25 of 50 training images used" in split["notes"]


def test_samples_show_mixed_images_with_their_labels(run: Run):
    with np.load(run.folder / "samples.npz") as held:
        assert held["images"].shape == (8, 3, 32, 32)
        assert held["targets"].sum(1) == pytest.approx(np.ones(8))
        share = held["keep"].mean((1, 2, 3))  # CutMix: labels by area
        for i in range(8):
            expected = np.zeros(5)
            expected[held["labels"][i]] += share[i]
            expected[held["partners"][i]] += 1 - share[i]
            assert held["targets"][i] == pytest.approx(expected, abs=1e-6)


def test_logs_for_tensorboard_and_spreadsheets(run: Run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    assert {"step/loss", "step/lr", "epoch/val_accuracy", "epoch/train_loss"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("step/loss")] == [row["step"] for row in run.steps]
    assert [event.value for event in events.Scalars("step/loss")] == pytest.approx([row["loss"] for row in run.steps])
    with open(run.folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["val_loss"]) == run.metrics[1]["val_loss"]


def test_settings_are_kept_as_plain_values(run: Run):
    import yaml

    kept = yaml.safe_load((run.folder / "settings.yaml").read_text())
    assert SettingsClass.from_dict(kept) == run.settings
    assert json.loads((run.folder / "model.json").read_text())["settings"] == run.settings.as_dict()


def test_a_finished_run_is_not_overwritten_unless_asked(run: Run):
    results = (run.folder / "results.json").read_bytes()
    with pytest.raises(RunError, match="holds a finished run: replace it with --overwrite, or choose another --name"):
        fit(run.settings)
    assert fit(run.settings, resume=True).folder == run.folder
    assert (run.folder / "results.json").read_bytes() == results
    with pytest.raises(RunError, match=r"other settings: lr was 0.0005, now 0.1"):
        fit(run.settings.replace(lr=0.1), resume=True)


def test_few_labels_are_noted(tmp_path: Path):
    notes = fit(tiny(tmp_path, epochs=1, per_class=11)).split["notes"]
    assert "5 classes have fewer than 11 images and give all: 0, 1, 2, 3, 4" in notes


def test_overwriting_begins_anew(tmp_path: Path):
    first = fit(tiny(tmp_path, epochs=1))
    (first.folder / "notes.txt").write_text("the user's own")
    second = fit(tiny(tmp_path, epochs=2), overwrite=True)
    assert len(second.metrics) == 2
    assert (second.folder / "notes.txt").exists()


def test_folders_that_are_no_runs(tmp_path: Path, run: Run):
    with pytest.raises(RunError, match="there is no run"):
        Run.load(tmp_path / "nothing")
    with pytest.raises(RunError, match="not the folder of a run"):
        Run.load(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("")
    with pytest.raises(RunError, match=r"is not empty and not a run \(it has thesis.tex\)"):
        fit(tiny(tmp_path), overwrite=True)
    assert (tmp_path / "run" / "thesis.tex").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        fit(tiny(tmp_path / "file"))


def hold(folder: Path, held: Path) -> None:
    """Hold the lock of a folder, with a process of one's own beside, as those that decode images are."""
    with locked(folder):
        helper = os.fork()
        if helper:
            write_text(held, str(helper))
        time.sleep(60)


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path):
    settings = tiny(tmp_path)
    process = child(hold, settings.folder, tmp_path / "held")
    while not (tmp_path / "held").exists():
        process.join(0.01)
    with pytest.raises(RunError, match="another process is training in"):
        fit(settings)
    process.kill()
    process.join()
    try:
        with locked(settings.folder):  # the lock went with the process, though its helper lives on
            pass
    finally:
        os.kill(int((tmp_path / "held").read_text()), signal.SIGKILL)


def test_mistakes_are_told_before_anything_is_written(tmp_path: Path):
    with pytest.raises(SettingsError, match="no data given"):
        fit(tiny(tmp_path, data=""))
    with pytest.raises(SettingsError, match="did you mean 'vit_tiny_patch16_224'"):
        fit(tiny(tmp_path, data="/nowhere", model="vit_tiny_patch16_244"))
    with pytest.raises(DataError, match="no data set '/nowhere'"):
        fit(tiny(tmp_path, data="/nowhere"))
    with pytest.raises(SettingsError, match="device='gpu' is not one"):
        fit(tiny(tmp_path, device="gpu"))
    with pytest.raises(SettingsError, match="float16 has no loss scaling on the CPU"):
        fit(tiny(tmp_path, precision="float16"))
    assert not list(tmp_path.iterdir())


def test_bfloat16_is_chosen_where_it_is_faster(monkeypatch: pytest.MonkeyPatch):
    import timm

    from foveal.train import precision

    wide = timm.create_model("vit_tiny_patch16_224", depth=1)
    narrow = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=64, num_heads=1)
    cpu = torch.device("cpu")
    for has, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(precision, "has_bfloat16_units", lambda has=has: has)
        assert choose("auto", cpu, wide) == expected
        assert choose("auto", cpu, narrow) == "float32"
        assert choose("float32", cpu, wide) == "float32"


def test_an_old_settings_file_names_what_it_lacks(tmp_path: Path):
    path = tmp_path / "settings.yaml"
    path.write_text(Settings(data="digits").to_yaml() + "colour: red\n")
    with pytest.raises(SettingsError, match="unknown setting 'colour'"):
        Settings.from_yaml(path)
