"""Comparisons: every arm with every seed, resumed where they stopped, with the intervals of foveal.stats."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from foveal import stats
from foveal.cli.compared import table
from foveal.train import Comparison, DivergedError, Interrupted, RunError, SettingsError, compare, fit
from foveal.train.measuring import class_weights
from training import tiny

ARMS = ("plain", "cutmix")


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
        *("accuracy/mixed_same", "balanced_accuracy/mixed_same", "pointing/mixed_same"),
        *("accuracy/mixed_rand", "balanced_accuracy/mixed_rand", "pointing/mixed_rand"),
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
    with pytest.raises(DivergedError, match=r"wild-seed[01]: training diverged"):
        compare({"wild": only["plain"].replace(lr=1e30, layer_decay=1.0)}, [0, 1], tmp_path, jobs=2)


def test_what_cannot_be_compared(tmp_path: Path):
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
