"""CCT by name through the training room: fit, load, explain, report, command line."""

import pytest
import torch
from PIL import Image

from foveal.cli import main
from foveal.explain import explain
from foveal.report import run_page
from foveal.train import Run, Settings, SettingsError, fit
from foveal.train.models import build

CCT = {
    "data": "scenes:train=40,val=10,test=10,shortcut=0.8,classes=0-4",
    "model": "cct_2_3x2_32",
    "model_args": {"embed_dim": 32},
    "init": "none",
    "epochs": 1,
    "batch_size": 8,
    "drop_path": 0.1,
    "device": "cpu",
    "precision": "float32",
    "name": "run",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return fit(Settings.from_dict(CCT | {"out": str(tmp_path_factory.mktemp("cct")), "mix": "mixup+cutmix"}))


def test_a_run_gives_its_model_again(run):
    model = Run.load(run.folder).model()
    assert type(model).__name__ == "CompactTransformer"
    assert run.card["architecture"] == "cct_2_3x2_32"
    assert run.config.size == (32, 32)
    assert run.config.mean == (0.4914, 0.4822, 0.4465)
    predictions = run.predictions("mixed_same")
    assert predictions.attention_kind == "received"
    assert predictions.attention.shape[1:] == (8, 8)
    assert predictions.pointing is not None
    assert run.results["parameters"] == sum(p.numel() for p in model.parameters())


def test_pictures_and_report_of_such_a_run(run, tmp_path):
    pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.numpy()).save(tmp_path / "a.png")
    written = explain(run, [tmp_path / "a.png"], tmp_path / "out")
    assert [file.name for file in written] == ["a-overlay.png", "a-heads.png"]
    page = run_page(run).read_text(encoding="utf-8")
    assert "the attention that each patch receives from all others" in page


def test_a_run_at_another_size_starts_from_it(run, tmp_path):
    settings = Settings.from_dict(CCT | {"image_size": 48, "init": str(run.folder), "out": str(tmp_path)})
    built = build(settings, classes=5)
    assert built.model.patch_embed.grid_size == (12, 12)
    assert built.arguments["img_size"] == 48
    assert "resized: pos_embed" in built.origin
    assert torch.equal(built.model.norm.weight, run.model().norm.weight)


def test_another_mean_and_deviation():
    """How a recipe trains on CIFAR-100 with its own statistics."""
    overlay = {"mean": [0.5071, 0.4867, 0.4408], "std": [0.2675, 0.2565, 0.2761]}
    settings = Settings.from_dict(CCT | {"model_args": {"pretrained_cfg_overlay": overlay}})
    built = build(settings, classes=100)
    assert list(built.image.mean) == overlay["mean"]
    assert list(built.image.std) == overlay["std"]
    assert built.model.num_classes == 100


def test_wrong_names_and_arguments_are_told():
    with pytest.raises(SettingsError, match="cct_7_3x1_32"):
        build(Settings.from_dict(CCT | {"model": "cct_7_3x1_23"}), classes=5)
    with pytest.raises(SettingsError, match=r"pos_embed='sin'.*learnable"):
        build(Settings.from_dict(CCT | {"model_args": {"pos_embed": "sin"}}), classes=5)
    with pytest.raises(SettingsError, match="cannot be built"):
        build(Settings.from_dict(CCT | {"model_args": {"width": 32}}), classes=5)


def test_command_line_knows_them(capsys):
    assert main(["supported", "cct_7_3x1_32"]) == 0
    assert "seq_pool" in capsys.readouterr().out
