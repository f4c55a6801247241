"""foveal compare: from words to a table, a CSV and a page; what it says when something is wrong; going on."""

import csv
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from foveal.cli import main
from foveal.cli.compare import _say
from foveal.cli.compared import Watch
from foveal.train import Comparison, comparing, crew
from foveal.train.arms import arms_of
from foveal.train.costs import Cost, Costs

SCENES = "scenes:train=40,val=20,test=20,classes=0-3"
SMALL = [
    *("--model", "vit_tiny_patch16_224", "--model-args", "patch_size=8,embed_dim=32,depth=2,num_heads=2"),
    *("--image-size", "32", "--init", "none", "--batch-size", "16", "--device", "cpu", "--epochs", "1"),
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, where runs are trained in this process: no other has to start."""

    def here_and_now(runs, jobs, tell, limit=None):
        asked.append((jobs, limit))
        return dict(comparing._one_by_one(runs, tell))

    asked: list[tuple] = []
    monkeypatch.setattr(crew, "train_all", here_and_now)
    monkeypatch.setattr("foveal.train.costs.measure_costs", measured)
    monkeypatch.chdir(tmp_path)
    here_and_now.asked = asked
    return tmp_path


def measured(arms, baseline_of, seconds):
    costs = {arm: Cost(0.01, None if arm not in baseline_of else 1.25, None, None) for arm in arms}
    conditions = {"device": "cpu", "threads": 1, "precision": "float32", "batch_size": 8, "steps": 8, "rounds": 5}
    return Costs(costs, conditions, {})


def test_a_comparison_from_words_to_page(here: Path, capsys: pytest.CaptureFixture[str]):
    asked = [
        "compare",
        SCENES,
        *SMALL,
        "--mix",
        "none",
        "cutmix:prob=0.5",
        "--label-fraction",
        "0.5",
        "1",
        "--seeds",
        "2",
    ]
    assert main([*asked, "--jobs", "2", "--memory", "6"]) == 0
    said = capsys.readouterr()
    folder = here / "runs" / "compare-scenes_train=40_val=20_test=20_classes=0-3"
    assert "4 arms x 2 seeds" in said.err
    assert "baseline: none-50%, none (the first combination listed)" in said.err
    assert "cutmix-prob=0.5-seed1 done" in said.err
    found = Comparison.load(folder)
    assert found.arms == ["none-50%", "cutmix-prob=0.5-50%", "none", "cutmix-prob=0.5"]
    assert found.baseline("cutmix-prob=0.5-50%") == "none-50%"
    run = found.runs("cutmix-prob=0.5-50%")[1]
    assert (run.settings.mix_args, run.settings.seed, run.results["images"]) == ({"prob": 0.5}, 1, 20)
    out = said.out.splitlines()
    assert out[-1] == f"report {folder / 'report.html'}"
    assert out[-2] == f"table  {folder / 'comparison.csv'}"
    assert all((folder / name).is_file() for name in ("report.html", "comparison.csv", "costs.json"))
    row = next(line.split() for line in out if line.startswith("cutmix-prob=0.5 "))
    key = "accuracy/mixed_rand"
    assert row[1] == f"{50 * sum(found.values(key, 'cutmix-prob=0.5')):.1f}"
    assert "x 1.25" in said.out
    rows = list(csv.DictReader((folder / "comparison.csv").read_text().splitlines()))
    assert {row["arm"] for row in rows} == set(found.arms)
    page = (folder / "report.html").read_text()
    assert "foveal compare" in page
    assert "--mix none cutmix:prob=0.5 --label-fraction 0.5 1 --seeds 2" in re.sub(r"&#\d+;", "", page)

    assert main([*asked, "--jobs", "2", "--memory", "6"]) == 0  # all is done: the table at once
    again = capsys.readouterr()
    assert again.out == said.out
    assert "done" not in again.err
    assert main([*asked[:-2], "--mix", "none", "cutmix:prob=0.5", "mixup", "--seeds", "1", "--no-costs"]) == 0
    more = capsys.readouterr()
    assert [line for line in more.err.splitlines() if line.endswith("done")] == [
        "mixup-50%-seed0 done",
        "mixup-seed0 done",
    ]


def test_what_fails_is_told_and_the_exit_code_is_2(here: Path, capsys: pytest.CaptureFixture[str]):
    lost = "tdattenmix:map_model=./nowhere"
    asked = ["compare", SCENES, *SMALL, "--mix", "none", "cutmix", lost, "--seeds", "1", "--out", "it"]
    assert main(asked) == 2
    said = capsys.readouterr()
    assert "tdattenmix-map_model=._nowhere-seed0 failed: " in said.err
    assert "failed: tdattenmix-map_model=._nowhere-seed0: " in said.out
    assert "left out: tdattenmix-map_model=._nowhere, as none of its runs finished" in said.out
    assert "What failed" in (here / "it" / "report.html").read_text()
    assert Comparison.load(here / "it").arms == ["none", "cutmix"]


def test_a_recipe_with_other_mixers_beside_its_own(here: Path, capsys: pytest.CaptureFixture[str]):
    recipe = here / "recipe.yaml"
    lines = ["model: vit_tiny_patch16_224", "model_args: {patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}"]
    lines += [
        "image_size: 32",
        "init: none",
        "epochs: 1",
        "device: cpu",
        "mix: cutmix",
        "mix_args: {prob: 0.25}",
        "seed: 7",
    ]
    recipe.write_text("\n".join(lines))
    asked = [
        "compare",
        SCENES,
        "--config",
        str(recipe),
        "--batch-size",
        "20",
        "--seeds",
        "1",
        "--out",
        "it",
        "--no-costs",
    ]
    assert main([*asked, "--mix", "none", "cutmix"]) == 0
    found = Comparison.load(here / "it")
    (run,) = found.runs("cutmix")
    assert (run.settings.mix_args, run.settings.batch_size, run.settings.seed) == ({"prob": 0.25}, 20, 0)
    assert found.runs("none")[0].settings.mix_args == {}
    assert "cost" not in capsys.readouterr().out
    assert not (here / "it" / "costs.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no data given: foveal compare DATA"),
        (["digits", "--mix", "none", "transmx"], "unknown mixer 'transmx': did you mean 'transmix'?"),
        (["digits", "--mix", "cutmix:prb=1"], "unknown setting of cutmix 'prb': did you mean 'prob'?"),
        (["digits", "--mix", "cutmix:prob=often"], "mix=cutmix:"),
        (["digits", "--guide", "gtaa"], "unknown guide 'gtaa': did you mean 'gta'?"),
        (
            ["digits", "--label-fraction", "many"],
            "--label-fraction 'many' does not fit: expected shares such as 0.15 1",
        ),
        (["digits", "--label-fraction", "2"], "label_fraction=2.0 does not fit: label_fraction must be in (0, 1]"),
        (["digits", "--mixx", "none"], "there is no flag --mixx: did you mean --mix?"),
        (["digits", "--mix-args", "prob=1"], "there is no flag --mix-args: did you mean --"),
        (["digits", "--seed", "1"], "there is no flag --seed: did you mean --seeds?"),
        (["digits", "--seeds", "0"], "--seeds 0 must be 1 or more"),
        (["digits", "--init", "none", "--jobs", "0"], "jobs=0 must be 1 or more"),
        (["digits", "--init", "none", "--memory", "-1"], "memory=-1.0 must be above 0"),
        (["digits", "--init", "none", "--model", "vit_smal_patch16_224"], "unknown model 'vit_smal_patch16_224'"),
        (
            ["digits", "--init", "none", "--map", "head_cosine"],
            "map is given, but no arm has a mixer that follows a map",
        ),
        (["digits", "--config", "none.yaml"], "cannot read the recipe none.yaml"),
        (["./nothing", "--init", "none"], "foveal: there is no data set './nothing'"),
    ],
)
def test_a_mistake_is_one_clear_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(crew, "train_all", lambda *_: pytest.fail("something was trained"))
    assert main(["compare", *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    lines = [line for line in said.err.splitlines() if line.startswith("foveal: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert said.err.splitlines()[-1] == lines[0]
    assert not list(tmp_path.iterdir())


def test_ctrl_c_and_the_same_command_goes_on(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    asked = ["compare", SCENES, *SMALL, "--mix", "none", "cutmix", "--seeds", "1", "--out", "it", "--no-costs"]
    call = Watch.__call__

    def pressed(self, name, row):
        call(self, name, row)
        if name == "none-seed0" and row == {}:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Watch, "__call__", pressed)
        assert main(asked) == 130
    assert "stopped; run the same comparison again to go on where it was" in capsys.readouterr().err
    assert not (here / "it" / "comparison.json").exists()
    assert main(asked) == 0
    assert "cutmix-seed0 done" in capsys.readouterr().err


def test_workers_train_the_same_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The one test here with a process of its own, killed by nobody."""
    out = ["--out", str(tmp_path / "it"), "--seeds", "1", "--no-costs", "--memory", "100"]
    assert main(["compare", SCENES, *SMALL, "--mix", "none", "cutmix", *out]) == 0
    assert "cutmix-seed0 done" in capsys.readouterr().err
    assert Comparison.load(tmp_path / "it").failed == {}


def test_a_warning_of_many_runs_is_shown_once():
    text = io.StringIO()
    watch = Watch(Console(file=text, width=60), {"a": 2, "b": 2})
    for name in ("a", "b"):
        watch(name, {"said": "MapWarning: some maps prefer no place"})
        watch(name, {"said": "DataWarning: 3 images left out"})
        watch(name, {"epoch": 1})
        watch(name, {})
    watch("b", {"failed": "lost [here]"})
    assert text.getvalue().splitlines() == [
        *("a: MapWarning: some maps prefer no place", "a done", "b done", "b failed: lost [here]"),
    ]  # fmt: skip
    assert (watch.trained, sum(watch.reached.values())) == (2, 4)


def test_that_all_classifiers_read_the_class_token_is_told(tmp_path: Path):
    text = io.StringIO()
    common = {"data": "digits", "init": "none", "model": "eva02_tiny_patch14_224", "model_args": {"depth": 1}}
    _say(Console(file=text), arms_of(common, ["none"], ["none", "gta:source=none"], [None]), 1, tmp_path)
    assert "in every arm the classifier reads the class token (global_pool=token" in " ".join(text.getvalue().split())
    text.truncate(0)
    _say(Console(file=text), arms_of(common, ["none"], ["none", "bss"], [None]), 1, tmp_path)
    assert "in every arm" not in text.getvalue()
