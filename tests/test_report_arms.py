"""The page of many arms: readable with fifteen, honest about failures, every mixer on the same pairs."""

import json
from pathlib import Path

import numpy as np
import pytest

from fake_runs import fake_comparison, fake_run, written
from foveal.report import comparison_page
from foveal.report.axes import number
from foveal.report.chosen import chosen
from foveal.report.gather import of_comparison
from foveal.report.matrix import matrix
from foveal.train.comparison import Comparison
from foveal.train.costs import Cost, Costs
from test_report import Page

MIXES = ("none", "mixup", "cutmix", "mixup+cutmix", "transmix")


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Comparison:
    """Fifteen arms: five mixers, three skills of each, better and worse than the baseline."""
    folder = tmp_path_factory.mktemp("wide") / "it"
    arms = {
        f"{mix}{'+' * k}": {
            "skill": (7 * (3 * i + k) % 15 / 8 or 0.9) - 0.9,
            "look": 2.0 + i,
            "mix": mix,
            "memory": 1e9 + i,
        }
        for i, mix in enumerate(MIXES)
        for k in range(3)
    }
    found = fake_comparison(folder, arms, seeds=(0, 1, 2), epochs=2)
    costs = Costs({arm: Cost(0.02, None if arm == "none" else 1.25, 1.2, 1.3) for arm in arms}, {"rounds": 5}, {})
    (folder / "costs.json").write_text(
        json.dumps({"arms": {k: vars(v) for k, v in costs.arms.items()}, "conditions": {"rounds": 5}, "failed": {}})
    )
    return Comparison.load(found.folder)


@pytest.fixture(scope="module")
def page(wide) -> str:
    return comparison_page(wide, command="foveal compare scenes --mix ...").read_text("utf-8")


def test_the_page_is_small_closed_and_alone(page):
    assert len(page.encode()) < 5_000_000
    read = Page(page)
    assert all(address.startswith("data:image/jpeg;base64,") for address in read.addresses)
    assert not {"script", "link", "iframe"} & set(read.tags)
    assert "nan" not in read.text.lower().replace("nano", "")


def test_the_verdicts_group_the_arms_by_what_their_intervals_say(wide, page):
    text = Page(page).text.split("What changed against")[0]
    groups = {"beat": set(), "lost to": set(), "against": set()}
    for arm in wide.arms[1:]:
        images = wide.interval("accuracy/mixed_rand", arm, "images", paired=True)
        clear = images.low > 0 or images.high < 0
        groups["against" if not clear else "beat" if images.mean > 0 else "lost to"].add(arm)
    assert all(groups.values())  # or this says nothing
    for verb, arms in groups.items():
        said = " ".join(part for part in text.split(". ") if f" {verb} none" in part)
        words = said.replace(",", " ").split()
        assert arms <= set(words)
        assert not (set(wide.arms[1:]) - arms) & set(words)
    assert "There are 14 differences here, each with a 95 % interval" in text


def test_a_beaten_baseline_needs_both_intervals(wide, page):
    text = Page(page).text.split("What changed against")[0]
    sure = {
        arm
        for arm in wide.arms[1:]
        if all(wide.interval("accuracy/mixed_rand", arm, over, paired=True).low > 0 for over in ("images", "seeds"))
    }
    parts = [part for part in text.split("class.") if " beat none" in part]
    both = [part for part in text.split(". ") if "beat none" in part and "in these runs" not in part]
    assert parts
    assert sure == {word for part in both for word in part.replace(",", " ").split() if word in wide.arms[1:]}


def test_a_forest_per_measure_with_a_row_for_each_arm(wide, page):
    read = Page(page)
    assert page.count('<details class="forest"') == len(
        [key for key in wide.metrics if wide.agreement(key, "cutmix") and not key.startswith("balanced")]
    )
    assert page.count('<details class="forest" open>') == 1
    first = page.split('<details class="forest" open>')[1].split("</details>")[0]
    assert first.count('class="dot arm') == 14
    assert first.count("× 1.25") == 14
    assert "accuracy, mixed_rand" in first
    assert "calibration error, mixed_rand less is better" in read.text
    found = wide.interval("accuracy/mixed_rand", "transmix", "images", paired=True)
    assert number(100 * found.mean, sign=True) in first
    assert str(wide.agreement("accuracy/mixed_rand", "transmix")) in first


def test_all_arms_at_a_glance(wide, page):
    rows: dict[str, list[str]] = {}
    for row in Page(page).rows:
        if row:
            rows.setdefault(row[0].removesuffix(" baseline"), row[1:])  # the first table with this row
    heads = next(row for row in Page(page).rows if any("calibration" in cell for cell in row))
    ece = next(i for i, head in enumerate(heads) if "calibration" in head) - 1
    for arm in wide.arms:
        assert rows[arm][ece].split()[0] == number(100 * np.mean(wide.values("ece/mixed_rand", arm)))
    assert rows["cutmix"][-2:] == ["× 1.25", "1.00 GB"]
    assert rows["none"][-2] == "20 ms"
    assert "less is better" in heads[ece + 1]
    pointing = next(i for i, head in enumerate(heads) if "attention" in head) - 1
    found = wide.interval("pointing/mixed_rand", "transmix", "seeds", paired=True)
    assert rows["transmix"][pointing].endswith("*") == (found.low > 0 or found.high < 0)


def test_a_handful_is_shown_and_why(wide):
    subject = of_comparison(wide)
    shown = chosen(subject)
    accuracy = {arm: np.mean(wide.values("accuracy/mixed_rand", arm)) for arm in wide.arms[1:]}
    pointing = {arm: np.mean(wide.values("pointing/mixed_rand", arm)) for arm in wide.arms[1:]}
    expected = {
        "none",
        max(accuracy, key=accuracy.get),
        min(accuracy, key=accuracy.get),
        max(pointing, key=pointing.get),
    }
    assert {arm.name for arm in shown.arms} == expected
    assert all(name in shown.why for name in expected)
    assert "the highest accuracy on mixed_rand" in shown.why
    few = of_comparison(Comparison.load(wide.folder))
    assert chosen(few).arms[0].name == "none"


def test_every_mixer_on_the_same_pairs(wide, page):
    found = matrix(of_comparison(wide))
    assert [row.name for row in found.rows] == list(MIXES)  # each way once, although three arms have it
    assert all(len(row.samples) == len(found.pairs) == 8 for row in found.rows)
    for row in found.rows[1:]:
        for (own, other), sample in zip(found.pairs, row.samples, strict=True):
            assert sample.labels[0][0] == own
            assert {name for name, _ in sample.labels} <= {own, other}
    table = page.split('<table class="matrix">')[1].split("</table>")[0]
    assert table.count("<img") == 8 * len(MIXES)


def test_a_seed_in_which_mixers_cut_is_shown(tmp_path):
    arms = {"none": {}, "turns": {"mix": "mixup+cutmix", "blend_in": 0}, "cutmix": {"mix": "cutmix"}}
    found = matrix(of_comparison(fake_comparison(tmp_path / "it", arms)))
    assert "with seed 1," in found.note
    assert "In no seed before it did as many mixers cut" in found.note
    runs = {arm: [fake_run(tmp_path / "two" / f"{arm}-seed0", **options)] for arm, options in arms.items()}
    found = matrix(of_comparison(written(tmp_path / "two", runs, (0,))))
    assert "with seed 0," in found.note
    assert "In this batch mixup+cutmix had the turn of Mixup." in found.note


def test_pairs_that_differ_are_not_shown_as_the_same(tmp_path):
    compared = fake_comparison(tmp_path / "it", {"none": {}, "cutmix": {"mix": "cutmix"}}, seeds=(0,))
    file = compared.folder / "cutmix-seed0" / "samples.npz"
    with np.load(file) as held:
        arrays = dict(held)
    np.savez(file, **arrays | {"labels": (arrays["labels"] + 1) % 4})
    assert matrix(of_comparison(compared)) is None
    text = Page(comparison_page(compared).read_text("utf-8")).text
    assert "Every mixer on the same pairs" not in text
    assert "learnt from" in text  # each by itself


def test_what_failed_is_on_the_page(tmp_path):
    runs = {arm: [fake_run(tmp_path / f"{arm}-seed{s}", seed=s, skill=k) for s in (0, 1)] for k, arm in enumerate("ab")}
    runs["b"] = runs["b"][1:]
    failed = {"b-seed0": "training diverged <at once>", "lost-seed0": "no memory", "lost-seed1": "no memory"}
    compared = written(tmp_path, runs | {"lost": []}, (0, 1), failed=failed)
    text = Page(comparison_page(compared).read_text("utf-8")).text
    assert "3 runs did not finish" in text
    assert "b-seed0: training diverged <at once>" in text
    assert "Without any finished run: lost." in text
    assert "1 to 2 seeds each" in text


def test_without_its_baseline_an_arm_is_compared_with_nothing(tmp_path):
    runs = {"base": [], **{arm: [fake_run(tmp_path / f"{arm}-seed{s}", seed=s) for s in (0, 1)] for arm in ("a", "b")}}
    compared = written(tmp_path, runs, (0, 1), failed={"base-seed0": "killed", "base-seed1": "killed"})
    text = Page(comparison_page(compared).read_text("utf-8")).text
    assert "2 ways to train" in text
    assert "What changed against" not in text
    assert " beat " not in text
    assert "Without any finished run: base." in text


def test_a_baseline_for_each_share_of_the_labels(tmp_path):
    names = ("none-15%", "cutmix-15%", "none", "cutmix")
    runs = {
        arm: [fake_run(tmp_path / f"{arm}-seed{s}", seed=s, skill=k / 2, mix=arm.partition("-")[0]) for s in (0, 1)]
        for k, arm in enumerate(names)
    }
    compared = written(tmp_path, runs, (0, 1), {"cutmix-15%": "none-15%", "cutmix": "none"})
    subject = of_comparison(compared)
    assert subject.bases == ["none-15%", "none"]
    assert [arm.kind for arm in subject.arms] == ["base", "arm", "base", "arm"]
    text = Page(comparison_page(compared).read_text("utf-8")).text
    assert "What changed against none-15%, none" in text
    assert "cutmix-15% − none-15%" in text
    assert "cutmix − none" in text
    assert "none − " not in text


def test_two_shares_of_the_labels_alone(tmp_path):
    runs = {arm: [fake_run(tmp_path / f"{arm}-seed{s}", seed=s) for s in (0, 1)] for arm in ("none-15%", "none")}
    text = Page(comparison_page(written(tmp_path, runs, (0, 1), {})).read_text("utf-8")).text
    assert "2 ways to train" in text
    assert "What changed" not in text


def test_an_arm_whose_attention_cannot_be_read(tmp_path):
    runs = {
        "vit": [fake_run(tmp_path / f"vit-seed{s}", seed=s) for s in (0, 1)],
        "cnn": [fake_run(tmp_path / f"cnn-seed{s}", seed=s, attention=False, skill=1.0) for s in (0, 1)],
    }
    read = Page(comparison_page(written(tmp_path, runs, (0, 1))).read_text("utf-8"))
    assert "Pictures of mixed_rand are without cnn, whose attention cannot be read." in read.text
    row = next(row for row in read.rows if row and row[0] == "attention on the object, mixed_rand")
    assert row[2:] == ["—", "—"]


def test_the_cost_of_two_arms_is_a_sentence(tmp_path):
    compared = fake_comparison(tmp_path / "it", {"plain": {}, "guided": {}}, epochs=1)
    costs = {"plain": vars(Cost(0.01)), "guided": vars(Cost(0.015, 1.5, 1.4, 1.6))}
    said = {"device": "cpu", "threads": 1, "precision": "float32", "batch_size": 8, "steps": 8, "rounds": 5}
    (compared.folder / "costs.json").write_text(json.dumps({"arms": costs, "conditions": said, "failed": {}}))
    text = Page(comparison_page(Comparison.load(compared.folder)).read_text("utf-8")).text
    assert "A training step of guided takes 1.50 times as long as one of plain (quartiles 1.40 to 1.60)." in text
    assert "median of 5 rounds of 8 steps in turns, batch 8, float32 on cpu, 1 thread" in text


def test_token_mixing_is_told(tmp_path):
    compared = fake_comparison(tmp_path / "it", {"plain": {}, "tokens": {"token_mix": "horizontal"}}, epochs=1)
    text = Page(comparison_page(compared).read_text("utf-8")).text
    assert (
        "tokens learns from mixed images and labels: inside the model tokens of images that are easy make way" in text
    )


def test_names_of_arms_are_escaped_everywhere(tmp_path):
    name = "<b>cut&mix"
    runs = {
        arm: [fake_run(Path(tmp_path) / f"run{k}", skill=k / 4, mix="cutmix" if k else "none")]
        for k, arm in enumerate(("none", name, "c", "d", "e"))
    }
    compared = written(tmp_path, runs, (0,), failed={"<i>x": "<script>"})
    read = Page(comparison_page(compared).read_text("utf-8"))
    assert name in read.text
    assert "<script>" in read.text
    assert "script" not in read.tags
