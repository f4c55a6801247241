"""The command line: what it prints, and the exit codes."""

import csv
import io
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from skimage import data as pictures

from foveal import __version__
from foveal.cli import COMMANDS, demo, main
from foveal.train import Run, fit
from training import exit_code, tiny

FLAGS = [
    *("--model", "vit_tiny_patch16_224", "--model-args", "patch_size=8,embed_dim=32,depth=2,num_heads=2"),
    *("--image-size", "32", "--init", "none", "--epochs", "2", "--batch-size", "16", "--device", "cpu"),
]
SCENES = "scenes:train=40,val=20,test=20,classes=0-3"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fit(tiny(tmp_path_factory.mktemp("cli"), epochs=1))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "inner").mkdir(parents=True)
    Image.fromarray(pictures.cat()).save(folder / "cat.jpg")
    Image.fromarray(pictures.camera()).save(folder / "inner" / "grey.png")
    (folder / "broken.jpg").write_bytes((folder / "cat.jpg").read_bytes()[:5000])
    (folder / "notes.txt").write_text("no image")
    return folder


def test_help_names_the_commands_and_loads_nothing_heavy():
    program = "import sys; from foveal.cli import main; main(['--help']); print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    help_text, loaded = said.rsplit("\n", 2)[0], said.split("\n")[-2].split()
    assert all(command in help_text for command in COMMANDS)
    assert not {"torch", "timm", "lightning", "sklearn", "matplotlib", "tensorboard"} & set(loaded)


def test_version(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"foveal {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]):
    assert main([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: foveal {command}")
    assert len(said.splitlines()) > 5


def test_nothing_asked(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 0
    assert "commands:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "foveal: there is no command 'trian': did you mean train? (see foveal --help)"),
        (["train", "x", "--lable-fraction", "1"], "there is no flag --lable-fraction: did you mean --label-fraction?"),
        (["train", "x", "--guide=gta", "--intt", "a"], "there is no flag --intt: did you mean --init?"),
        (["train", "x", "--crop-scale", "0.5"], "argument --crop-scale: expected 2 arguments"),
        (["train"], "foveal: no data given: foveal train DATA"),
        (["train", "digits", "--mix", "transmx"], "unknown mixer 'transmx': did you mean 'transmix'?"),
        (["train", "digits", "--epochs", "many"], "epochs='many' does not fit: expected a whole number"),
        (["train", "digits", "--model-args", "depth"], "--model-args 'depth' does not fit: write key=value"),
        (["train", "digits", "--config", "none.yaml"], "cannot read the recipe none.yaml"),
        (["train", "./nothing", "--init", "none"], "foveal: there is no data set './nothing'"),
        (["predict", "runs/none", "a.jpg"], "foveal: there is no run runs/none"),
        (["explain", "runs/none"], "the following arguments are required: IMAGES"),
        (["supported", "vit_smal_patch16_224"], "unknown model 'vit_smal_patch16_224': did you mean"),
        (["demo", "--seeds", "0"], "--seeds 0 must be 1 or more"),
    ],
)
def test_a_mistake_is_one_clear_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err
    assert said.err.startswith("foveal: ")
    assert len(said.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_bug_says_how_to_see_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    from foveal.cli import supported

    def broken(values: object) -> int:
        raise KeyError("lost")

    monkeypatch.setattr(supported, "run", broken)
    monkeypatch.delenv("FOVEAL_TRACEBACK", raising=False)
    assert main(["supported", "x"]) == 1
    assert capsys.readouterr().err == "foveal: KeyError: 'lost' (a bug? FOVEAL_TRACEBACK=1 shows where)\n"
    monkeypatch.setenv("FOVEAL_TRACEBACK", "1")
    assert main(["supported", "x"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_train_writes_a_run_and_a_report(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    place = ["--out", str(tmp_path), "--name", "mine"]
    assert main(["train", SCENES, *FLAGS, "--mix", "cutmix", "--mix-args", "prob=0.5", *place]) == 0
    said = capsys.readouterr()
    done = Run.load(tmp_path / "mine")
    assert done.settings.mix_args == {"prob": 0.5}
    assert f"report {tmp_path / 'mine' / 'report.html'}" in said.out
    assert (tmp_path / "mine" / "report.html").stat().st_size > 1000
    same = 100 * done.results["sets"]["mixed_same"]["accuracy"]
    assert f"mixed_same: accuracy {same:.1f} %" in said.out
    assert "epoch 2/2" in said.err
    assert main(["train", SCENES, *FLAGS, *place]) == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert main(["train", "--resume", str(tmp_path / "mine"), "--no-report"]) == 0
    assert "report" not in capsys.readouterr().out


def press_ctrl_c(out: Path) -> None:
    from foveal.train.task import Classify

    step = Classify.training_step

    def pressed(self, batch, i):
        if self.current_epoch == 1:
            signal.raise_signal(signal.SIGINT)
        return step(self, batch, i)

    Classify.training_step = pressed
    sys.stderr = open(out / "said", "w")  # noqa: SIM115
    code = main(["train", SCENES, *FLAGS, "--out", str(out), "--name", "mine"])
    sys.stderr.flush()
    sys.exit(code)


def test_ctrl_c_and_the_command_it_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert exit_code(press_ctrl_c, tmp_path) == 130
    last = (tmp_path / "said").read_text().splitlines()[-1]
    assert last == f"stopped; continue with: foveal train --resume {tmp_path / 'mine'}"
    assert main([*last.split("foveal ")[1].split(), "--no-report"]) == 0
    assert len(Run.load(tmp_path / "mine").metrics) == 2


def test_predict_gives_a_table(run: Run, photos: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main(["predict", str(run.folder), str(photos), "--top", "2"]) == 0
    said = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(said.out)))
    assert [Path(row["path"]).name for row in rows] == ["cat.jpg", "grey.png"]
    for row in rows:
        assert {row["label"], row["label_2"]} <= set(run.classes)
        assert 1 > float(row["probability"]) >= float(row["probability_2"]) > 0
    assert "left out" in said.err
    assert "broken.jpg" in said.err
    table = tmp_path / "labels.csv"
    assert main(["predict", str(run.folder), str(photos / "cat.jpg"), "--output", str(table)]) == 0
    assert table.read_text().splitlines()[0] == "path,label,probability"
    assert table.read_text().splitlines()[1].startswith(f"{photos / 'cat.jpg'},{rows[0]['label']},0.")
    assert main(["predict", str(run.folder), str(photos / "broken.jpg")]) == 2
    assert main(["predict", str(run.folder), str(tmp_path / "none")]) == 2


def test_explain_draws_pictures(run: Run, photos: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main(["explain", str(run.folder), str(photos / "cat.jpg"), "--output", str(tmp_path / "seen")]) == 0
    drawn = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in drawn] == ["cat-overlay.png", "cat-heads.png"]
    assert all(Image.open(path).size[0] > 100 for path in drawn)


def test_supported_tells_what_can_be_read(capsys: pytest.CaptureFixture[str]):
    assert main(["supported", "vit_tiny_patch16_224"]) == 0
    assert "12 layers (blocks.0 ... blocks.11)" in capsys.readouterr().out
    assert main(["supported", "resnet18"]) == 2
    assert "cannot be read" in capsys.readouterr().out


def test_the_demo_ends_with_its_report(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    small = tiny(tmp_path, epochs=1)
    monkeypatch.setattr(demo, "arms", lambda: {"plain": small, "guided": small.replace(mix="cutmix")})
    asked = ["demo", "--seeds", "2", "--jobs", "1", "--out", str(tmp_path / "demo")]
    assert main(asked) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == f"report {tmp_path / 'demo' / 'report.html'}"
    assert (tmp_path / "demo" / "report.html").is_file()
    assert "over seeds" in said.out
    assert main(asked) == 0
    again = capsys.readouterr()
    assert again.out == said.out
    assert "finished before; --again trains them anew" in again.err
    (tmp_path / "demo" / "mine").mkdir()
    (tmp_path / "demo" / "mine" / "settings.yaml").write_text("the user's own")
    assert main([*asked, "--again"]) == 0
    assert "guided-seed1 done" in capsys.readouterr().err
    # another version of foveal has another demo: its runs replace the old ones
    monkeypatch.setattr(demo, "arms", lambda: {"plain": small.replace(lr=1e-3), "guided": small})
    assert main(asked) == 0
    assert "lr: 0.001" in (tmp_path / "demo" / "plain-seed0" / "settings.yaml").read_text()
    assert (tmp_path / "demo" / "mine" / "settings.yaml").read_text() == "the user's own"
