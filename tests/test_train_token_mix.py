"""Training with token mixing: what is written down and exported; how it goes with mixing, guidance and resuming."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from foveal.train import Run, SettingsError, fit
from foveal.train.arms import arms_of
from foveal.train.fitting import load_data, mixer_of
from foveal.train.guiding import guide_of
from foveal.train.models import build
from test_train_processes import together, train
from training import TINY, child, tiny

EASY = {"horizontal": 1, "tau": 100.0, "rho": 0.0}  # every image is easy, every gain counts


def test_score_and_statistics_are_written_down_and_stay_out_of_the_model(tmp_path: Path):
    run = fit(tiny(tmp_path, epochs=1, mix="mixup+cutmix", token_mix="horizontal", token_mix_args=EASY))
    row = run.metrics[0]
    assert row["train_token_easy"] == 1.0
    assert row["train_token_replaced"] > 0.0
    assert row["train_scorenet"] > 0.0
    plain = fit(tiny(tmp_path, epochs=1, name="plain"))
    assert load_file(run.folder / "model.safetensors").keys() == load_file(plain.folder / "model.safetensors").keys()
    kept = torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=False)
    assert any(name.startswith("mixing.") for name in kept["state_dict"])  # what resuming needs


def test_score_net_learns(tmp_path: Path):
    changes: dict[str, Any] = {"token_mix": "horizontal", "token_mix_args": EASY | {"score_weight": 1.0}, "lr": 0.01}
    run = fit(tiny(tmp_path, epochs=4, **changes))
    assert run.metrics[-1]["train_scorenet"] < run.metrics[0]["train_scorenet"]


def test_resuming_gives_the_same_run(tmp_path: Path):
    changes: dict[str, Any] = {"token_mix": "both", "token_mix_args": EASY | {"vertical": 1, "kappa": 2}, "epochs": 3}

    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == 1:
            raise KeyboardInterrupt

    whole = fit(tiny(tmp_path, **changes, name="whole"))
    with pytest.raises(KeyboardInterrupt):
        fit(tiny(tmp_path, **changes), progress=stop)
    resumed = fit(tiny(tmp_path, **changes), resume=True)
    assert resumed.steps == whole.steps
    ours, theirs = resumed.model().state_dict(), whole.model().state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_processes_mix_as_two_accumulation_steps(tmp_path: Path):
    """Each process pairs the images of its own micro-batch, as each forward of an accumulated step does."""
    common: dict[str, Any] = {"token_mix": "both", "token_mix_args": EASY | {"vertical": 1, "kappa": 2}, "epochs": 2}
    common |= {"mix": "mixup+cutmix", "batch_size": 6, "drop_path": 0.1}
    one, two = tiny(tmp_path / "one", **common, accumulate=2), tiny(tmp_path / "two", **common, devices=2)
    alone = child(train, one)
    assert together(two) == [0, 0]
    alone.join()
    a, b = Run.load(one.folder), Run.load(two.folder)
    assert a.steps == b.steps
    assert a.steps[0]["token_replaced"] > 0.0
    assert a.steps[-1]["token_replaced"] == 0.0  # 50 images leave two, which are each alone in theirs
    mine, theirs = load_file(a.folder / "model.safetensors"), load_file(b.folder / "model.safetensors")
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    score = [torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"] for run in (a, b)]
    assert all(torch.equal(score[0][name], score[1][name]) for name in score[0] if name.startswith("mixing."))


def test_a_guide_keeps_to_the_blocks_before(tmp_path: Path):
    source = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **TINY)
    save_file(source.state_dict(), tmp_path / "source.safetensors")
    guided = {"init": str(tmp_path / "source.safetensors"), "guide": "gta", "token_mix": "horizontal"}

    def guide(**changes: Any) -> Any:
        settings = tiny(tmp_path, **(guided | changes))
        data = load_data(settings)
        built = build(settings, len(data.classes))
        return guide_of(settings, built, data, mixer_of(settings, built, data))

    assert list(guide(token_mix_args=EASY).layers) == [0]
    assert guide(token_mix="none").layers == "all"
    with pytest.raises(SettingsError, match="has nothing to compare"):
        guide(token_mix_args=EASY | {"horizontal": 0})
    run = fit(tiny(tmp_path, epochs=1, token_mix_args=EASY, **guided))
    assert run.steps[0]["gta"] == 0.0  # before the first mixed block the model is its source
    assert run.steps[-1]["gta"] > 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_mix": "horizntal"}, "did you mean 'horizontal'"),
        ({"token_mix_args": {"rho": 0.1}}, "unknown token mixer 'none'"),
        ({"token_mix": "horizontal", "token_mix_args": {"rh": 1}}, "setting of horizontal"),
        ({"token_mix": "horizontal", "token_mix_args": {"smoothing": 0.1}}, "setting of horizontal"),
        ({"token_mix": "horizontal", "token_mix_args": {"rho": -1.0}}, "token_mix=horizontal: rho"),
    ],
)
def test_settings_that_cannot_be_meant(tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(SettingsError, match=message):
        tiny(tmp_path, **changes)


def test_an_arm_can_mix_tokens_too():
    arms = arms_of(
        {"data": "scenes"}, ["none", "cutmix:prob=0.5,token_mix=horizontal,token.rho=0.01"], ["none"], [None]
    ).settings
    name = "cutmix-prob=0.5-horizontal-rho=0.01"
    assert list(arms) == ["none", name]
    assert arms[name].token_mix == "horizontal"
    assert arms[name].token_mix_args == {"rho": 0.01}
    assert arms[name].mix_args == {"prob": 0.5}
    assert arms["none"].token_mix == "none"
