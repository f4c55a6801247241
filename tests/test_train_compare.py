"""Comparisons: every arm with every seed, resumed where they stopped, with the intervals of foveal.stats."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fake_runs import fake_comparison, fake_run, written
from foveal import stats
from foveal.cli.compared import table
from foveal.data import DataError
from foveal.train import (
    Comparison,
    DivergedError,
    Interrupted,
    Run,
    RunError,
    Settings,
    SettingsError,
    compare,
    comparing,
    fit,
)
from foveal.train.comparison import Agreement
from foveal.train.files import write_text
from foveal.train.measuring import Measured, class_weights, summary
from foveal.train.outcome import read_label_gaps
from foveal.train.task import Classify
from foveal.train.tidy import COLUMNS, write_csv
from training import tiny

ARMS = ("plain", "cutmix")
KINDS = ("accuracy", "balanced_accuracy", "ece", "inconsistency", "pointing")


def arms(out: Path) -> dict:
    plain = tiny(out, epochs=2, data_seed=None)
    return {"plain": plain, "cutmix": plain.replace(mix="cutmix")}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Stopped by Ctrl-C within the third run, then called again."""
    out = tmp_path_factory.mktemp("comparison")
    seen: list[tuple[str, dict]] = []

    def stop(name: str, row: dict) -> None:
        seen.append((name, row))
        if (name, row.get("epoch")) == ("plain-seed5", 1):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="run the same comparison again"):
        compare(arms(out), [3, 5], out, progress=stop)
    assert [name for name, row in seen if not row] == ["plain-seed3", "cutmix-seed3"]
    with pytest.raises(RunError, match="no finished comparison"):
        Comparison.load(out)
    first = (out / "plain-seed3" / "results.json").stat().st_mtime_ns
    again: list[str] = []
    done = compare(arms(out), [3, 5], out, progress=lambda name, row: again.append(name) if row else None)
    assert again == ["plain-seed5", "cutmix-seed5", "cutmix-seed5"]  # one epoch was left, then two
    assert (out / "plain-seed3" / "results.json").stat().st_mtime_ns == first
    return done


def test_what_is_compared(comparison: Comparison):
    found = Comparison.load(comparison.folder)
    assert (found.arms, found.seeds) == (list(ARMS), [3, 5])
    assert found.metrics == [
        *(f"{kind}/mixed_same" for kind in KINDS),
        *(f"{kind}/mixed_rand" for kind in KINDS),
        "bg_gap",
    ]
    for arm in ARMS:
        runs = found.runs(arm)
        assert [run.settings.seed for run in runs] == [3, 5]
        assert [run.settings.mix for run in runs] == [{"plain": "none"}.get(arm, arm)] * 2
        assert found.values("bg_gap", arm) == [run.results["bg_gap"] for run in runs]


def test_each_run_is_what_fit_gives_alone(comparison: Comparison, tmp_path: Path):
    alone = fit(arms(tmp_path)["cutmix"].replace(seed=5))
    mine = load_file(comparison.folder / "cutmix-seed5" / "model.safetensors")
    theirs = load_file(alone.folder / "model.safetensors")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_intervals_are_those_of_the_predictions(comparison: Comparison):
    right = {
        arm: torch.stack([run.predictions("mixed_rand").correct.double() for run in comparison.runs(arm)])
        for arm in ARMS
    }
    key = "accuracy/mixed_rand"
    assert comparison.interval(key, "plain", "images") == stats.over_images(right["plain"])
    assert comparison.interval(key, "cutmix", "images", paired=True) == stats.paired_over_images(
        right["cutmix"], right["plain"]
    )
    means = {arm: right[arm].mean(1) for arm in ARMS}
    paired = stats.paired_over_seeds(means["cutmix"], means["plain"])
    found = comparison.interval(key, "cutmix", "seeds", paired=True)
    assert found is not None
    assert (found.mean, found.low, found.over) == (
        pytest.approx(paired.mean),
        pytest.approx(paired.low, nan_ok=True),
        paired.over,
    )
    assert comparison.interval(key, "plain", paired=True) is None
    gap = comparison.interval("bg_gap", "plain", "images")
    assert gap is not None
    assert gap.mean == pytest.approx(np.mean(comparison.values("bg_gap", "plain")))


def test_balanced_accuracy_is_a_weighted_mean_over_images():
    labels = np.array([0, 0, 0, 2])  # no image of class 1
    right = np.array([1.0, 1.0, 0.0, 1.0])
    assert (class_weights(labels) * right).mean() == pytest.approx((2 / 3 + 1) / 2)


def test_the_table_says_what_its_intervals_are_over(comparison: Comparison):
    text = table(comparison, width=110)
    lines = [line.split() for line in text.splitlines()]
    row = next(line for line in lines if line[:2] == ["accuracy,", "mixed_same"])
    for arm, shown in zip(ARMS, row[2:4], strict=True):
        assert float(shown) == pytest.approx(100 * np.mean(comparison.values("accuracy/mixed_same", arm)), abs=0.051)
    assert "over images: 95 % interval of differences on 20 images" in text
    assert "BG-Gap" in text
    assert max(len(line) for line in text.split("Percent,")[0].splitlines()) <= 110


def test_several_runs_at_a_time_give_the_same(comparison: Comparison, tmp_path: Path):
    rows: list[tuple[str, dict]] = []
    only = {"plain": arms(tmp_path)["plain"]}
    done = compare(only, [3, 5], tmp_path, jobs=2, progress=lambda name, row: rows.append((name, row)))
    assert sorted(name for name, row in rows if not row) == ["plain-seed3", "plain-seed5"]
    assert sorted((name, row["epoch"]) for name, row in rows if row) == [
        (f"plain-seed{seed}", epoch) for seed in (3, 5) for epoch in (1, 2)
    ]
    for key in done.metrics:  # one thread there, perhaps more here: the last bits may differ, not what is right
        assert done.values(key, "plain") == pytest.approx(comparison.values(key, "plain"), abs=1e-4)


WILD = {"lr": 1e30, "layer_decay": 1.0}  # diverges in the first epoch


@pytest.fixture(scope="module")
def partial(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, list[tuple[str, dict]]]:
    """Of the arm mixed one run failed, of the arm wild all; the baseline lacks a seed that the others have."""
    out = tmp_path_factory.mktemp("partial")
    plain = tiny(out, epochs=1, data_seed=None)
    for arm, seed in (("plain", 0), ("mixed", 1)):
        broken = out / f"{arm}-seed{seed}"
        broken.mkdir(parents=True)
        (broken / "notes.txt").write_text("the user's own")  # so that no run can be put here
    rows: list[tuple[str, dict]] = []
    ways = {"plain": plain, "mixed": plain.replace(mix="cutmix"), "wild": plain.replace(**WILD)}
    return compare(ways, [0, 1, 2], out, progress=lambda name, row: rows.append((name, row))), rows


def test_a_run_that_fails_does_not_lose_the_others(partial):
    found, rows = partial
    assert set(found.failed) == {"plain-seed0", "mixed-seed1", "wild-seed0", "wild-seed1", "wild-seed2"}
    assert "is not empty and not a run" in found.failed["plain-seed0"]
    assert "training diverged" in found.failed["wild-seed1"]
    assert ("wild-seed1", {"failed": found.failed["wild-seed1"]}) in rows
    assert (found.arms, found.missing) == (["plain", "mixed"], ["wild"])
    assert (found.seeds_of("plain"), found.seeds_of("mixed")) == ([1, 2], [0, 2])


def test_differences_are_over_the_seeds_that_both_arms_have(partial):
    found, _ = partial
    paired = found.content["metrics"]["accuracy/mixed_rand"]["mixed"]["paired"]
    assert paired["seeds"] == [2]
    assert found.agreement("accuracy/mixed_rand", "mixed").n == 1
    mine, theirs = (
        run.predictions("mixed_rand").correct.double() for run in (found.runs("mixed")[1], found.runs("plain")[1])
    )
    assert found.interval("accuracy/mixed_rand", "mixed", paired=True).mean == pytest.approx(
        float((mine - theirs).mean())
    )
    assert len(found.values("accuracy/mixed_rand", "mixed")) == 2


def test_failures_are_told_and_tried_again(partial):
    found, _ = partial
    text = table(found)
    assert "failed: wild-seed1: training diverged" in text
    assert "left out: wild, as none of its runs finished" in text
    (found.folder / "mixed-seed1" / "notes.txt").unlink()
    ways = {arm: Settings.from_dict(values) for arm, values in found.content["settings"].items()}
    again = compare(ways, [0, 1, 2], found.folder)
    assert again.seeds_of("mixed") == [0, 1, 2]
    assert "mixed-seed1" not in again.failed
    assert "plain-seed0" in again.failed


def test_where_all_runs_fail_the_first_error_is_raised(tmp_path: Path):
    with pytest.raises(DivergedError, match=r"wild-seed4: training diverged"):
        compare({"wild": tiny(tmp_path, epochs=1, **WILD)}, [4], tmp_path)
    assert not (tmp_path / "comparison.json").exists()


def test_other_settings_in_the_folder_are_told_before_anything_is_trained(comparison: Comparison):
    ways = arms(comparison.folder)
    before = sorted(comparison.folder.rglob("*"))
    with pytest.raises(RunError, match=r"cutmix-seed3 with other settings: lr was 0\.0005, now 0\.1"):
        compare({"new": ways["plain"], "cutmix": ways["cutmix"].replace(lr=0.1)}, [3], comparison.folder)
    assert sorted(comparison.folder.rglob("*")) == before


def test_arms_can_be_added_and_pair_with_their_own_baseline(comparison: Comparison):
    ways = arms(comparison.folder)
    ways |= {
        "plain-50%": ways["plain"].replace(label_fraction=0.5),
        "cutmix-50%": ways["cutmix"].replace(label_fraction=0.5),
    }
    trained: list[str] = []
    found = compare(
        ways,
        [3],
        comparison.folder,
        progress=lambda name, row: trained.append(name) if row else None,
        baseline_of={"cutmix": "plain", "cutmix-50%": "plain-50%"},
    )
    assert set(trained) == {"plain-50%-seed3", "cutmix-50%-seed3"}
    assert found.baselines == ["plain", "plain-50%"]
    assert [found.baseline(arm) for arm in ways] == [None, "plain", None, "plain-50%"]
    for arm, base in (("cutmix", "plain"), ("cutmix-50%", "plain-50%")):
        value, theirs = (found.values("accuracy/mixed_same", name)[0] for name in (arm, base))
        assert found.interval("accuracy/mixed_same", arm, paired=True).mean == pytest.approx(value - theirs)
        assert found.interval("accuracy/mixed_same", base, paired=True) is None
    written = (comparison.folder / "comparison.json").stat().st_mtime_ns
    compare(ways, [3], comparison.folder, baseline_of={"cutmix": "plain", "cutmix-50%": "plain-50%"})
    assert (comparison.folder / "comparison.json").stat().st_mtime_ns == written  # as it was: not measured again
    compare(arms(comparison.folder), [3, 5], comparison.folder)  # the other tests' comparison


def test_every_arm_begins_with_the_same_weights_and_sees_the_same_images_in_the_same_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: dict[str, list] = {}
    step = Classify.training_step

    def noted(self, batch, i):
        name = self.settings.name
        if name not in seen:
            seen[name] = [{k: v.clone() for k, v in self.model.state_dict().items()}, [], []]
        seen[name][1].append(batch.index)
        seen[name][2].append(batch.images.clone())
        return step(self, batch, i)

    monkeypatch.setattr(Classify, "training_step", noted)
    plain = tiny(tmp_path, epochs=1, model="demo", model_args={}, init="demo", image_size=None)
    ways = {
        "none": plain,
        "transmix": plain.replace(mix="transmix"),
        "tdattenmix": plain.replace(mix="tdattenmix"),
        "gta": plain.replace(guide="gta"),
    }
    found = compare(ways, [0, 1], tmp_path)
    splits = {seed: [found.runs(arm)[seed].split for arm in ways] for seed in (0, 1)}
    for seed in (0, 1):
        weights, order, images = seen[f"none-seed{seed}"]
        for arm in ways:
            own, own_order, own_images = seen[f"{arm}-seed{seed}"]
            assert all(torch.equal(own[name], weights[name]) for name in weights)
            assert torch.equal(torch.cat(own_order), torch.cat(order))
            assert torch.equal(torch.cat(own_images), torch.cat(images))  # before mixing: the same crops
        assert all(split == splits[seed][0] for split in splits[seed])
    assert not torch.equal(torch.cat(seen["none-seed0"][1]), torch.cat(seen["none-seed1"][1]))
    heads = [seen[f"none-seed{seed}"][0]["head.weight"] for seed in (0, 1)]
    assert not torch.equal(*heads)


def test_metrics_that_some_arms_lack(tmp_path: Path):
    runs = {
        "vit": [fake_run(tmp_path / f"vit-seed{seed}", seed=seed) for seed in (0, 1)],
        "cnn": [fake_run(tmp_path / f"cnn-seed{seed}", seed=seed, skill=1.0, attention=False) for seed in (0, 1)],
        "blend": [fake_run(tmp_path / f"blend-seed{seed}", seed=seed, mix="mixup") for seed in (0, 1)],
        "cut": [
            fake_run(tmp_path / f"cut-seed{seed}", seed=seed, look=4.0, mix="cutmix", memory=2e9 + seed)
            for seed in (0, 1)
        ],
    }
    found = written(tmp_path, runs, (0, 1))
    assert found.values("pointing/mixed_rand", "cnn") == []
    assert found.interval("pointing/mixed_rand", "cnn", paired=True) is None
    assert found.interval("pointing/mixed_rand", "cut", paired=True).available
    assert found.interval("accuracy/mixed_rand", "cnn", paired=True).available
    assert found.values("inconsistency/mixed_rand", "blend") == []
    assert found.memory("vit") is None
    assert found.memory("cut") == (2e9 + 1, "process")
    text = table(found)
    assert max(len(line) for line in text.split("Percent,")[0].splitlines()) <= 100
    assert "nan" not in text


def test_labels_that_are_not_mixed_are_no_baseline_of_inconsistency(tmp_path: Path):
    runs = {
        mix: [fake_run(tmp_path / f"{mix}-seed{seed}", seed=seed, mix=mix, gap=gap) for seed in (0, 1)]
        for mix, gap in {"none": 0.0, "cutmix": 0.4, "transmix": 0.2}.items()
    }
    key = "inconsistency/mixed_same"
    found = written(tmp_path, runs, (0, 1))
    assert found.values(key, "none") == [0.0, 0.0]
    assert found.agreement(key, "cutmix") is None
    found = written(tmp_path, {arm: runs[arm] for arm in ("cutmix", "transmix")}, (0, 1))
    interval = found.interval(key, "transmix", "images", paired=True)
    gaps = [[read_label_gaps(run.folder, "mixed_same") for run in runs[arm]] for arm in ("transmix", "cutmix")]
    assert interval.mean == pytest.approx(float((torch.stack(gaps[0]) - torch.stack(gaps[1])).nanmean()))
    assert interval.high < 0
    assert "39 images" in interval.over  # of one pair nothing can be seen


def test_seeds_that_agree():
    assert [str(Agreement(*counts)) for counts in ((4, 1, 5), (1, 3, 5), (0, 0, 2), (2, 2, 4))] == [
        *("4 of 5 up", "3 of 5 down", "2 of 2 equal", "2 of 4 up"),
    ]  # fmt: skip
    own, base = (Measured((0, 1, 2, 3), np.array(values)) for values in ([0.5, 0.6, 0.7, 0.8], [0.4, 0.7, 0.7, 0.1]))
    told = summary(own, base)["paired"]
    assert (told["up"], told["down"], told["seeds"]) == (2, 1, [0, 1, 2, 3])
    assert told["values"] == pytest.approx([0.1, -0.1, 0.0, 0.7])


def test_runs_tested_on_other_images_do_not_pair_over_images(tmp_path: Path):
    runs = {arm: [fake_run(tmp_path / f"{arm}-seed0", skill=k)] for k, arm in enumerate(("a", "b"))}
    split = json.loads((runs["b"][0].folder / "split.json").read_text())
    split["sets"]["test/mixed_rand"]["images"][0] = "another"
    (runs["b"][0].folder / "split.json").write_text(json.dumps(split))
    found = written(tmp_path, {arm: [Run.load(made[0].folder)] for arm, made in runs.items()}, (0,))
    assert found.interval("accuracy/mixed_rand", "b", "images", paired=True) is None
    assert found.interval("accuracy/mixed_rand", "b", "seeds", paired=True) is not None
    assert found.interval("accuracy/mixed_same", "b", "images", paired=True).available


def test_the_csv_has_every_number(tmp_path: Path):
    compared = fake_comparison(tmp_path / "it", {"plain": {}, "guided": {"skill": 1.0}}, memory=3e9)
    write_text(compared.folder / "costs.json", json.dumps(COSTS))
    rows = list(csv.DictReader(write_csv(compared).read_text().splitlines()))
    assert list(rows[0]) == list(COLUMNS)
    (row,) = [row for row in rows if (row["arm"], row["metric"]) == ("guided", "accuracy/mixed_rand")]
    found = compared.interval("accuracy/mixed_rand", "guided", "images", paired=True)
    assert float(row["difference_low_over_images"]) == found.low
    assert float(row["mean"]) == np.mean(compared.values("accuracy/mixed_rand", "guided"))
    assert (row["better"], row["unit"], row["n"], row["baseline"]) == ("higher", "share", "2", "plain")
    assert int(row["seeds_up"]) + int(row["seeds_down"]) <= int(row["seeds_compared"]) == 2
    by_key = {(row["arm"], row["metric"]): row for row in rows}
    assert by_key["plain", "ece/mixed_rand"]["better"] == "lower"
    assert by_key["plain", "accuracy/mixed_rand"]["difference"] == ""
    ratio = by_key["guided", "step_ratio"]
    assert [float(ratio[name]) for name in ("mean", "low_quartile", "high_quartile")] == [1.25, 1.2, 1.3]
    assert float(by_key["plain", "peak_memory"]["mean"]) == 3e9
    assert len(by_key) == len(rows)


COSTS = {
    "arms": {
        "plain": {"seconds": 0.01, "ratio": None, "low": None, "high": None},
        "guided": {"seconds": 0.0125, "ratio": 1.25, "low": 1.2, "high": 1.3},
    },
    "conditions": {"device": "cpu", "threads": 1, "precision": "float32", "batch_size": 8, "steps": 8, "rounds": 5},
    "failed": {},
}


def test_many_arms_are_rows_that_fit_the_screen(tmp_path: Path):
    ways = {f"way-{'x' * (k % 5) * 6}{k}": {"skill": k / 10, "memory": 1e9} for k in range(15)}
    compared = fake_comparison(tmp_path / "it", ways)
    costs = COSTS | {"arms": dict.fromkeys(ways, COSTS["arms"]["guided"])}
    write_text(compared.folder / "costs.json", json.dumps(costs))
    for width in (80, 100):
        text = table(compared, width=width)
        numbers = text.split("Percent,")[0].splitlines()
        assert max(len(line.rstrip()) for line in numbers) <= width
        assert all(sum(line.startswith(f"{arm} ") for line in numbers) >= 2 for arm in ways)
    assert "x 1.25" in text
    assert "1.00 GB" in text
    assert "baseline" in next(line for line in numbers if line.startswith("way-0 "))
    assert "one leaves out zero by chance; here are 14" in " ".join(text.split())
    assert "less is better" in text
    for arm in list(ways)[1:]:
        line = next(line for line in numbers if line.startswith(f"{arm} "))
        assert f"{100 * compared.interval('accuracy/mixed_rand', arm, paired=True).mean:+.1f}" in line.split()
        assert str(compared.agreement("accuracy/mixed_rand", arm)) in line


def test_comparisons_of_older_versions_can_be_read(tmp_path: Path):
    compared = fake_comparison(tmp_path / "it", {"plain": {}, "guided": {}})
    told = json.loads((compared.folder / "comparison.json").read_text())
    for name in ("baseline_of", "failed", "memory", "format", "finished", "version"):
        told.pop(name)
    for by_arm in told["metrics"].values():
        for metric in by_arm.values():
            for name in ("up", "down", "seeds", "values"):
                metric.get("paired", {}).pop(name, None)
    write_text(compared.folder / "comparison.json", json.dumps(told))
    old = Comparison.load(compared.folder)
    assert (old.baseline("guided"), old.baselines, dict(old.failed)) == ("plain", ["plain"], {})
    assert old.agreement("accuracy/mixed_rand", "guided") is None
    assert "accuracy, mixed_rand" in table(old)


def test_what_cannot_be_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = tiny(tmp_path)
    for wrong, message in (
        (({}, [0]), "no arms"),
        (({"a b": settings}, [0]), "cannot name a folder"),
        (({"a": settings}, []), "one or more"),
        (({"a": settings}, [1, 1]), "each once"),
    ):
        with pytest.raises(SettingsError, match=message):
            compare(*wrong, tmp_path)
    with pytest.raises(SettingsError, match="jobs=0"):
        compare({"a": settings}, [0], tmp_path, jobs=0)
    with pytest.raises(SettingsError, match="memory=0 must be above 0"):
        compare({"a": settings}, [0], tmp_path, jobs=1, memory=0)
    with pytest.raises(SettingsError, match="unknown model 'vit_tny_patch16_224'"):
        compare({"a": settings, "b": settings.replace(model="vit_tny_patch16_224")}, [0], tmp_path)
    with pytest.raises(SettingsError, match="no data given"):
        compare({"a": settings.replace(data="")}, [0], tmp_path)
    with pytest.raises(SettingsError, match="devices must be 1"):
        compare({"a": settings.replace(devices=2)}, [0], tmp_path, jobs=2)
    with pytest.raises(SettingsError, match="baseline_of has 'c' for 'a'"):
        compare({"a": settings, "b": settings}, [0], tmp_path, baseline_of={"a": "c"})
    with pytest.raises(DataError, match="there is no data set"):
        compare({"a": settings.replace(data="./nothing")}, [0], tmp_path, jobs=2)
    monkeypatch.setattr(comparing, "can_be_read", lambda: False)
    with pytest.raises(SettingsError, match="that takes Linux, or the package psutil"):
        compare({"a": settings}, [0], tmp_path, jobs=2, memory=4)
    assert not list(tmp_path.iterdir())
