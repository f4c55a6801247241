"""foveal evaluate: what it measures, prints, keeps, and what it refuses."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from foveal import evaluate
from foveal.cli import main
from foveal.data import load
from foveal.train import Run, fit
from foveal.train.pretrain_settings import PretrainSettings
from foveal.train.pretraining import pretrain
from training import TINY, tiny

SCENES = "scenes:train=50,val=20,test=20,shortcut=0.8,classes=0-4"
MODEL = [
    *("vit_tiny_patch16_224", SCENES, "--init", "none", "--image-size", "32", "--device", "cpu"),
    *("--model-args", "patch_size=8,embed_dim=32,depth=2,num_heads=2"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fit(tiny(tmp_path_factory.mktemp("evaluate"), epochs=1))


def kept(folder: Path) -> list[dict]:
    return json.loads((folder / "evaluation.json").read_text())["evaluations"]


def test_a_run_on_its_own_data(run: Run, capsys: pytest.CaptureFixture[str]):
    words = ["evaluate", str(run.folder), "--knn", "--logistic", "--linear", "--epochs", "2", "--base-lr", "1", "10"]
    assert main([*words, "--k", "5", "10", "--temperature", "0.07", "0.5", "--device", "cpu"]) == 0
    told = capsys.readouterr()
    definition = "block 1 of 0-1, class token, after the final norm"
    assert told.out.count(definition) == 3
    assert "5 classes; 50 train, 20 val; 20 mixed_same, 20 mixed_rand" in told.err
    assert "frame     32 x 32 pixels" in told.err
    assert re.search(r"k=5 T=0\.5 .* \d+\.\d \[\d+\.\d, \d+\.\d\]", told.out)
    assert "base lr" in told.out
    assert "the same, last epoch" in told.out
    assert told.out.count("chosen on val") == 3
    assert f"written   {run.folder / 'evaluation.json'}" in told.out
    found = kept(run.folder)
    assert [one["protocol"] for one in found] == ["k-NN", "logistic regression on cached features", "linear probe"]
    for one in found:
        assert one["features"] == definition
        assert (one["train_images"], one["label_fraction"], one["data"]) == (50, 1.0, "scenes")
        assert set(one["sets"]) == {"mixed_same", "mixed_rand"}
        assert one["sets"]["mixed_same"]["n"] == 20
    # the library gives the same numbers
    data = load(run.settings.data, seed=0, image_size=32)
    taken = [
        evaluate.features(run.model(), images, run.config) for images in (data.train, data.val, *data.tests.values())
    ]
    by_hand = evaluate.knn(taken[0], taken[2], (5, 10), (0.07, 0.5))
    for tried in found[0]["tried"]:
        setting = (tried["k"], tried["temperature"])
        assert tried["sets"]["mixed_same"]["accuracy"] == by_hand.accuracy[setting]
        assert tried["sets"]["mixed_same"]["top5"] == by_hand.top5[setting]
    chosen = evaluate.knn(taken[0], taken[1], (5, 10), (0.07, 0.5)).best
    assert (found[0]["chosen"]["k"], found[0]["chosen"]["temperature"]) == chosen
    assert found[0]["sets"]["mixed_same"]["accuracy"] == by_hand.accuracy[chosen]
    logistic = evaluate.logistic_probe(taken[0], taken[2], val=taken[1])
    assert found[1]["sets"]["mixed_same"]["accuracy"] == logistic.tests["test"].accuracy


def test_a_pretrained_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    settings = PretrainSettings(
        data=SCENES, model="vit_tiny_patch16_224", model_args=TINY, image_size=32, epochs=1, batch_size=16,
        decoder_width=16, decoder_depth=1, decoder_heads=2, device="cpu", precision="float32", out=str(tmp_path),
        name="mae",
    )  # fmt: skip
    done = pretrain(settings)
    assert done.model().num_classes == 0
    assert main(["evaluate", str(done.folder), "--knn", "--before-norm", "--tokens", "both", "--device", "cpu"]) == 0
    assert "class token beside the mean of the patch tokens, before the final norm" in capsys.readouterr().out
    assert kept(done.folder)[0]["chosen"]["on"] == "val"


def test_the_same_measurement_replaces_and_others_stay(tmp_path: Path):
    words = ["evaluate", *MODEL, "--out", str(tmp_path / "new" / "folder")]
    for more in (["--knn"], ["--logistic"], ["--knn", "--before-norm"], ["--knn"]):
        assert main([*words, *more]) == 0
    found = kept(tmp_path / "new" / "folder")
    assert [(one["protocol"][:4], one["features"][-14:]) for one in found] == [
        ("logi", "the final norm"),
        ("k-NN", "the final norm"),
        ("k-NN", "the final norm"),
    ]
    assert len({(one["protocol"], one["features"]) for one in found}) == 3


def test_label_fractions_are_nested_subsets_of_the_training_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["evaluate", *MODEL, "--knn", "--linear", "--cached", "--epochs", "2", "--label-fraction", "0.2", "1"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "10 training images (20 % of the labels)" in told
    assert "note: k=20 is more than the 10 images of the database: all of them vote" in told
    assert [one["train_images"] for one in kept(tmp_path)] == [10, 10, 50, 50]
    assert {one["protocol"] for one in kept(tmp_path)} == {"k-NN", "linear probe on cached features"}


def test_a_model_by_name_is_kept_only_where_told(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *MODEL, "--knn", "--block", "0", "-1"]) == 0
    told = capsys.readouterr().out
    assert "blocks 0, 1 side by side of 0-1" in told
    assert "not kept: give --out FOLDER" in told
    assert not list(tmp_path.iterdir())


def test_weights_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=32, **TINY)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    words = [word if word != "none" else str(tmp_path / "weights.safetensors") for word in MODEL]
    assert main(["evaluate", *words, "--knn", "--k", "3", "--out", str(tmp_path)]) == 0
    assert "weights.safetensors" in capsys.readouterr().err
    data = load(SCENES, seed=0, image_size=32)
    config = evaluate_config(model)
    train, test = (evaluate.features(model, images, config) for images in (data.train, data.tests["mixed_rand"]))
    assert kept(tmp_path)[0]["sets"]["mixed_rand"]["accuracy"] == evaluate.knn(train, test, (3,)).accuracy[3, 0.07]


def evaluate_config(model):
    from foveal.data import image_config

    return image_config(model)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs/nothing", SCENES, "--knn"], "foveal: there is no run runs/nothing"),
        (["vit_tinny_patch16_224", SCENES, "--knn"], "there is no run vit_tinny_patch16_224, and unknown model"),
        ([*MODEL], "nothing asked: give --knn, --linear or --logistic"),
        ([MODEL[0], "--knn", *MODEL[2:]], "no data given: foveal evaluate MODEL DATA"),
        ([MODEL[0], "./nowhere", *MODEL[2:], "--knn"], "there is no data set './nowhere'"),
        ([*MODEL, "--knn", "--tokens", "distillation"], "this model has no distillation token"),
        ([*MODEL, "--knn", "--tokens", "clas"], "tokens='clas' is not known; use auto, class"),
        ([*MODEL, "--knn", "--block", "7"], "block=7 but the model has 2 blocks"),
        ([*MODEL, "--knn", "--k", "0"], "k=(0,): give one or several numbers of neighbours"),
        ([*MODEL, "--knn", "--temperature", "0"], "temperature=(0.0,): give one or several above 0"),
        ([*MODEL, "--linear", "--base-lr", "-1"], "base_lr=(-1.0,): give one or several above 0"),
        ([*MODEL, "--logistic", "--penalty", "0"], "penalties=(0.0,): give one or several above 0"),
        ([*MODEL, "--knn", "--label-fraction", "15"], "must be in (0, 1]: 1 % is 0.01"),
        ([*MODEL, "--knn", "--cached"], "--cached is for --linear"),
        ([*MODEL, "--knn", "--lineal"], "there is no flag --lineal: did you mean --linear?"),
        (["resnet18", SCENES, "--init", "none", "--knn", "--device", "cpu"], "is not a model that foveal can read"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["evaluate", *words]) == 2
    told = capsys.readouterr()
    assert message in told.err.splitlines()[-1]
    assert told.out == ""


def test_wrong_folders_and_one_class(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from PIL import Image

    assert main(["evaluate", str(tmp_path), "--knn"]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err
    assert main(["evaluate", str(run.folder), "--knn", "--init", "none"]) == 2
    assert "--init is for timm models" in capsys.readouterr().err
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    for i in range(9):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "photos" / "cat" / f"{i}.png")
    assert main(["evaluate", str(run.folder), str(tmp_path / "photos"), "--knn"]) == 2
    assert "class" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "evaluation.json").write_text("[]")
    assert main(["evaluate", str(run.folder), "--knn", "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "is not what foveal evaluate writes" in capsys.readouterr().err
    assert (tmp_path / "evaluation.json").read_text() == "[]"
