"""Masked pre-training on disk: what a run leaves, what the map does to it, kills, processes, and what is refused."""

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import foveal
from foveal.cli import main
from foveal.data import DataError
from foveal.explain import discover, explain
from foveal.maps import MapStore, MapStoreError
from foveal.train import PretrainSettings, Run, RunError, Settings, SettingsError, fit, pretrain
from foveal.train.labelling import label
from test_train_processes import free_port
from training import TINY, child, die, exit_code, tiny

SCENES = "scenes:train=50,val=20,test=20,shortcut=0.8,classes=0-4"


def small(out: Path, **changes) -> PretrainSettings:
    values = {
        "data": SCENES,
        "model": "vit_tiny_patch16_224",
        "model_args": TINY,
        "image_size": 32,
        "decoder_width": 16,
        "decoder_depth": 1,
        "decoder_heads": 2,
        "mask_ratio": 0.5,
        "epochs": 3,
        "batch_size": 8,
        "base_lr": 1e-2,
        "device": "cpu",
        "precision": "float32",
        "out": str(out),
        "name": "run",
    }
    return PretrainSettings.from_dict(values | changes)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Run:
    return pretrain(small(tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module")
def guided(tmp_path_factory) -> Run:
    return pretrain(small(tmp_path_factory.mktemp("guided"), map="given"))


def test_a_pretrained_encoder_is_explained_but_labels_nothing(plain: Run, tmp_path: Path):
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(photo)
    names = [path.name for path in (*explain(plain, [photo], tmp_path), *discover(plain, [photo], tmp_path))]
    assert names[:2] == ["photo-overlay.png", "photo-heads.png"]
    assert len(names) > 2
    with pytest.raises(RunError, match="knows no classes: fine-tune it first"):
        label(plain, [photo])


def test_an_unfinished_pretraining_names_its_own_command(plain: Run, tmp_path: Path):
    shutil.copy(plain.folder / "settings.yaml", tmp_path)
    with pytest.raises(RunError, match="foveal pretrain --resume"):
        Run.load(tmp_path)


def test_what_a_run_leaves_behind(plain: Run):
    encoder = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **TINY)
    encoder.load_state_dict(load_file(plain.folder / "model.safetensors"))  # strictly, with timm alone
    assert [row["epoch"] for row in plain.metrics] == [1, 2, 3]
    assert plain.metrics[-1]["val_loss"] < plain.metrics[0]["val_loss"]
    assert plain.results["val"]["loss"] == plain.metrics[-1]["val_loss"]
    assert plain.results["images"] == 50
    assert plain.results["maps"] is None
    assert plain.settings == small(plain.folder.parent)
    assert plain.model()(torch.zeros(1, 3, 32, 32)).shape == (1, 32)
    assert not any("encoder" in name for name in load_file(plain.folder / "decoder.safetensors"))
    with Image.open(plain.folder / "reconstructions.png") as picture:
        assert picture.width > 3 * 160
    assert not list(plain.folder.rglob("*partial*"))


def test_the_weights_are_those_of_the_last_epoch(plain: Run):
    last = torch.load(plain.folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, tensor in load_file(plain.folder / "model.safetensors").items():
        assert torch.equal(last[f"model.encoder.{name}"], tensor)


def test_a_guided_run_logs_both_losses(guided: Run, plain: Run):
    for row in guided.steps:
        assert row["loss"] > row["plain"] > 0  # weights are 1 or more
        assert row["map_missing"] == row["map_blank"] == 0
    assert guided.steps[0]["plain"] == plain.steps[0]["plain"]  # the same first weights, crops and hidden patches
    assert guided.steps[-1]["plain"] != plain.steps[-1]["plain"]
    assert guided.results["maps"]["found"] == 50
    assert all(row["loss"] == row["plain"] for row in plain.steps)


def test_maps_are_made_once_and_shared(tmp_path: Path):
    one = pretrain(small(tmp_path, map="given", epochs=1, name="one"))
    (folder,) = (tmp_path / "maps").iterdir()
    times = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    two = pretrain(small(tmp_path, map="given", epochs=1, name="two", temperature=2.0))
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == times
    assert one.results["maps"]["folder"] == two.results["maps"]["folder"] == str(folder)
    named = pretrain(small(tmp_path, maps=str(folder), epochs=1, name="three"))
    assert [row["loss"] for row in named.steps] == [row["loss"] for row in one.steps]
    with pytest.raises(MapStoreError, match="other settings"):
        pretrain(small(tmp_path, map="lost", maps=str(folder), name="four"))


def test_the_map_follows_the_crops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What the store gives a step is the mask that the same crop cuts out, up to the store's resolution."""
    from foveal.train import pretrain_task

    seen = []
    step = pretrain_task.Pretrain.training_step

    def looking(self, batch, i):
        seen.append((batch, self.store.sample(batch.index, batch.view.boxes, batch.view.flip, (4, 4))[0]))
        return step(self, batch, i)

    monkeypatch.setattr(pretrain_task.Pretrain, "training_step", looking)
    run = pretrain(small(tmp_path, map="given", epochs=1))
    data = foveal.data.load(SCENES, image_size=32)
    masked = foveal.data.Batches(
        data.train, run.config, 8, train=True, seed=0, flip=data.flip, crop_scale=run.settings.crop_scale
    )
    for batch, (other, maps) in zip(masked, seen, strict=True):
        assert torch.equal(batch.images, other.images)
        cells = foveal.maps.on_grid(batch.masks.float(), (4, 4))
        # the batch's mask is rounded to whole pixels, the map to 30 x 30 cells; a crop that is wrong is 0.3 off
        assert (cells - maps).abs().mean() < 0.04


def test_hiding_what_the_map_says(tmp_path: Path, guided: Run):
    control = pretrain(small(tmp_path, map="given", guide="mask"))
    assert all(row["loss"] == row["plain"] for row in control.steps)
    assert control.steps[0]["plain"] != guided.steps[0]["plain"]


def test_temperature_that_moves(tmp_path: Path, guided: Run):
    settings = small(tmp_path, map="given", temperature_end=100.0)
    moved = pretrain(settings)
    first, last = moved.steps[0], moved.steps[-1]
    assert first["loss"] == guided.steps[0]["loss"]  # tau begins where it stays for the other
    assert last["loss"] / last["plain"] < 1.1 < guided.steps[-1]["loss"] / guided.steps[-1]["plain"]


def test_tokencut_of_a_run(tmp_path: Path, plain: Run):
    run = pretrain(small(tmp_path, map="tokencut", map_model=str(plain.folder), epochs=1))
    maps = run.results["maps"]
    assert maps["settings"]["map"] == "tokencut"
    assert maps["settings"]["model"] == str(plain.folder)
    assert maps["found"] == 50


def test_fine_tuning_starts_from_it(tmp_path: Path, plain: Run):
    run = fit(tiny(tmp_path, init=str(plain.folder), epochs=1))
    assert "tensors from" in run.card["init"]
    assert "new: head.weight, head.bias" in run.card["init"]


def train(settings: PretrainSettings, kill: str = "", count: int = 0) -> None:
    from foveal import whole
    from foveal.train import checkpoints, pretrain, pretrain_task, pretraining, record

    if kill:
        places = {
            "a step begins": (pretrain_task.Pretrain, "training_step"),
            "the epoch ends": (record.Record, "on_train_epoch_end"),
            "the checkpoint is being written": (checkpoints._Remembering, "write"),
            "a file is to take its place": (whole.os, "replace"),
            "results are to be written": (pretraining, "write_text"),
        }
        where, name = places[kill]
        original, left = getattr(where, name), [count]

        def counted(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                die()
            return original(*args, **kwargs)

        setattr(where, name, counted)
    pretrain(settings, resume=True)


def assert_same(a: Run, b: Run) -> None:
    for name in ("model.safetensors", "decoder.safetensors"):
        mine, theirs = load_file(a.folder / name), load_file(b.folder / name)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert a.steps == b.steps
    assert a.results["val"] == b.results["val"]


def test_killed_everywhere(tmp_path: Path, guided: Run):
    settings = small(tmp_path, map="given")
    kills = [
        ("a file is to take its place", 2),
        ("a step begins", 3),
        ("the checkpoint is being written", 20),
        ("a step begins", 10),
        ("the epoch ends", 2),
        ("a file is to take its place", 5),
        ("results are to be written", 1),
    ]
    for kill, count in kills:
        assert exit_code(train, settings, kill, count) == -signal.SIGKILL, (kill, count)
        with pytest.raises(RunError, match=r"has not finished|is not the folder of a run|there is no run"):
            Run.load(settings.folder)
    assert exit_code(train, settings) == 0
    assert_same(Run.load(settings.folder), guided)


def as_torchrun(settings: PretrainSettings, rank: int, world: int, port: int) -> None:
    told = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in told.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"})
    train(settings)


def test_two_processes_are_two_accumulation_steps(tmp_path: Path):
    common = {"data": SCENES.replace("train=50", "train=51"), "map": "given", "batch_size": 6, "epochs": 2}
    one = small(tmp_path / "one", **common, accumulate=2)
    two = small(tmp_path / "two", **common, devices=2)
    alone, port = child(train, one), free_port()
    processes = [child(as_torchrun, two, rank, 2, port) for rank in range(2)]
    for process in (alone, *processes):
        process.join(120)
        assert process.exitcode == 0
    a, b = Run.load(one.folder), Run.load(two.folder)
    assert b.results["processes"] == 2
    assert a.steps == b.steps
    mine, theirs = (load_file(run.folder / "model.safetensors") for run in (a, b))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert a.results["val"]["loss"] == pytest.approx(b.results["val"]["loss"], rel=1e-6)


def test_photographs_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for i in range(9):
        (tmp_path / "photos" / "sub").mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / ("sub" if i % 2 else ".") / f"{i}.jpg")
    words = (
        f"pretrain {tmp_path}/photos --model vit_tiny_patch16_224 --image-size 32 --epochs 1 --workers 0 --device cpu"
    )
    words += " --model-args patch_size=8,embed_dim=32,depth=2,num_heads=2 --decoder-width 16 --decoder-depth 1"
    words += (
        f" --decoder-heads 2 --batch-size 4 --device cpu --map tokencut --map-model demo --out {tmp_path}/runs --name a"
    )
    assert main(words.split()) == 0
    told = capsys.readouterr()
    assert "maps   of 8 of 8 images" in told.out
    assert "masked autoencoder, errors weighted by tokencut (tau 0.75), 1 epochs" in told.err
    assert main([*words.split(), "--resume"]) == 0
    store = MapStore.open(Run.load(tmp_path / "runs" / "a").results["maps"]["folder"])
    assert len(store) == 8


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"map": "tokencat"}, "did you mean 'tokencut'"),
        ({"map": "tokencut", "map_args": {"thau": 1}}, "did you mean 'tau'"),
        ({"map_args": {"tau": 1}}, "need a map"),
        ({"guide": "mask"}, "needs a map"),
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"temperature": 0.0}, "temperature"),
        ({"warmup_epochs": 3}, "warmup_epochs"),
        ({"mix": "cutmix"}, "unknown setting|mix"),
    ],
)
def test_settings_that_cannot_be_meant(tmp_path: Path, changes, told):
    with pytest.raises(SettingsError, match=told):
        small(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"mask_ratio": 0.99}, SettingsError, "keeps none of 16 patches"),
        ({"decoder_width": 18}, SettingsError, "18"),
        ({"data": "digits", "map": "given"}, SettingsError, "has no masks"),
        ({"map": "tokencut", "map_model": "vit_nothing"}, SettingsError, "vit_nothing"),
        ({"map": "tokencut", "map_model": "vit_small_patch16_224.dino"}, RunError, "map_model=vit_small"),
        ({"maps": "nowhere"}, MapStoreError, "nowhere"),
        ({"model": "swin_tiny_patch4_window7_224", "model_args": {}}, foveal.UnsupportedModelError, "windows"),
        ({"data": "nowhere/at/all"}, DataError, "there is no data set"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path: Path, changes, error, told):
    with pytest.raises(error, match=told):
        pretrain(small(tmp_path, **changes))


def test_a_folder_of_another_command(tmp_path: Path, plain: Run):
    settings = tiny(plain.folder.parent)
    with pytest.raises(RunError, match="holds a run of foveal pretrain"):
        fit(settings, resume=True)
    with pytest.raises(RunError, match="a finished run"):
        pretrain(replace(plain.settings, epochs=4))
    assert isinstance(settings, Settings)
