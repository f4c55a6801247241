"""The page of a run or a comparison: whole, self-contained, safe, and saying what the results say."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fake_runs import SPEC, fake_comparison, fake_run
from foveal.data import load
from foveal.report import comparison_page, run_page
from foveal.report.axes import number
from foveal.report.classes import confusion, recalls
from foveal.report.gather import even_gaze, of_comparison, of_run
from foveal.report.tiles import groups, spread
from foveal.train.comparing import Comparison
from foveal.train.run import Run

VOID = {"meta", "img", "br"}
INLINE = {"span", "b", "small", "strong", "dfn"}
SHAPES = {"line", "circle", "polyline", "polygon"}  # closed in place, as SVG allows


class Page(HTMLParser):
    """Reads a page strictly: every element that opens must close, in order; collects what the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.words.append("" if tag in INLINE else " ")
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "data", "poster")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        assert tag in SHAPES
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Comparison:
    arms = {"plain": {"skill": -0.5}, "guided": {"skill": 1.0, "look": 6.0, "mix": "transmix"}}
    return fake_comparison(tmp_path_factory.mktemp("two") / "it", arms)


@pytest.fixture(scope="module")
def page(compared) -> str:
    return comparison_page(compared).read_text("utf-8")


@pytest.fixture(scope="module")
def alone(compared) -> tuple[Run, str]:
    run = compared.runs("guided")[1]
    return run, run_page(run).read_text("utf-8")


def pages(page, alone) -> list[str]:
    return [page, alone[1]]


def test_elements_are_closed_in_order(page, alone):
    for text in pages(page, alone):
        assert text.startswith("<!doctype html>")
        assert Page(text).tags[:3] == ["html", "head", "meta"]


def test_nothing_is_fetched_from_elsewhere(page, alone):
    for text in pages(page, alone):
        read = Page(text)
        assert read.addresses
        assert all(address.startswith("data:image/jpeg;base64,") for address in read.addresses)
        assert "http:" not in text
        assert "https:" not in text
        assert "@import" not in text
        assert "url(" not in text
        assert not {"script", "link", "iframe", "object", "embed", "base"} & set(read.tags)


def test_pages_are_small_and_written_whole(compared, page, alone):
    assert all(len(text.encode()) < 3_000_000 for text in pages(page, alone))
    assert sorted(path.name for path in compared.folder.iterdir() if path.is_file()) == [
        "comparison.json",
        "report.html",
    ]


def test_the_table_holds_the_numbers_of_the_results(compared, page):
    rows = {row[0]: row[1:] for row in Page(page).rows if row}
    content = json.loads((compared.folder / "comparison.json").read_text())["metrics"]
    names = {
        "accuracy/mixed_same": "accuracy, mixed_same",
        "accuracy/mixed_rand": "accuracy, mixed_rand",
        "bg_gap": "BG-Gap (less is better)",
        "pointing/mixed_rand": "attention on the object, mixed_rand",
    }
    for key, name in names.items():
        cells = [" ".join(cell.split()) for cell in rows[name]]
        for cell, arm in zip(cells, ("plain", "guided"), strict=False):
            told = content[key][arm]
            images, seeds = told["over_images"], told["over_seeds"]
            values = " ".join(number(100 * value) for value in told["values"])
            assert cell == " ".join([
                number(100 * images["mean"]),
                f"[{number(100 * images['low'])}, {number(100 * images['high'])}]"
                f"[{number(100 * seeds['low'])}, {number(100 * seeds['high'])}] · {values}",
            ])  # fmt: skip
        paired = content[key]["guided"]["paired"]["over_images"]
        low, high = (number(100 * paired[end], sign=True) for end in ("low", "high"))
        assert cells[2].startswith(f"{number(100 * paired['mean'], sign=True)} [{low}, {high}]")


def test_a_run_tells_its_results(alone):
    run, text = alone
    rows = {row[0]: row[1] for row in Page(text).rows if len(row) == 2}
    for name, scores in run.results["sets"].items():
        assert rows[f"accuracy, {name}"].startswith(number(100 * scores["accuracy"]) + " [")
        assert rows[f"attention on the object, {name}"].startswith(number(100 * scores["pointing"]) + " [")
    assert rows["BG-Gap (less is better)"].startswith(number(100 * run.results["bg_gap"]) + " [")
    assert rows["batch_size"] == "64"
    assert rows["parameters"] == "1,234,567"
    assert run.results["command"] in Page(text).text


def test_the_verdict_and_what_it_rests_on(compared, page):
    text = Page(page).text
    found = compared.interval("accuracy/mixed_rand", "guided", "images", paired=True)
    assert found.low > 0
    assert f"guided beat plain by {number(100 * found.mean)} points on backgrounds that say nothing" in text
    assert found.over in text
    assert compared.interval("accuracy/mixed_rand", "guided", "seeds", paired=True).over in text


def test_equal_arms_claim_nothing(tmp_path):
    compared = fake_comparison(tmp_path / "it", {"plain": {}, "again": {}})
    text = Page(comparison_page(compared).read_text("utf-8")).text
    assert "again against plain: no difference can be claimed" in text
    assert " beat " not in text
    assert " lost to " not in text


HOSTILE = ('<img src=x onerror="alert(1)">', "</style><script>alert(2)</script>", "\"'`><b>&amp;", "{{ 7*7 }}")


def test_names_cannot_become_markup(tmp_path):
    arms = {"plain": {}, "<script>alert(3)</script>".replace("/", "+"): {"mix": "cutmix"}}
    compared = fake_comparison(tmp_path / "a <b>&", arms, classes=HOSTILE)
    for path in (comparison_page(compared), run_page(compared.runs("plain")[0])):
        read = Page(path.read_text("utf-8"))
        assert "script" not in read.tags
        assert read.handlers == []
        assert all(address.startswith("data:image/jpeg") for address in read.addresses)
        assert all(" ".join(name.split()) in read.text for name in HOSTILE)


def test_without_masks_there_is_no_pointing_and_a_sentence(tmp_path):
    compared = fake_comparison(tmp_path / "it", {"plain": {}, "guided": {}}, masks=False)
    text = comparison_page(compared).read_text("utf-8")
    assert "How much of the gaze" not in text
    assert "attention on the object, " not in text
    assert "Attention on the object is left out: it needs object masks" in text
    assert "<img" in text


def test_without_attention_there_are_no_overlays_and_a_sentence(tmp_path):
    run = fake_run(tmp_path / "it", attention=False)
    text = run_page(run).read_text("utf-8")
    assert "Where it looks" not in text
    assert "Pictures of mixed_rand are left out: the attention of the model cannot be read." in text


def test_without_samples_and_epochs(tmp_path):
    run = fake_run(tmp_path / "it", epochs=1)
    (run.folder / "samples.npz").unlink()
    header = (run.folder / "metrics.csv").read_text().splitlines()[0]
    (run.folder / "metrics.csv").write_text(header + "\n")
    text = Page(run_page(run).read_text("utf-8")).text
    assert "Learning, epoch by epoch" not in text
    assert "Learning curves are left out" in text
    assert "learnt from" not in text
    assert "Training images are left out" in text


def test_images_that_are_gone_or_others_are_not_shown(tmp_path):
    run = fake_run(tmp_path / "it")
    split = json.loads((run.folder / "split.json").read_text())
    split["sets"]["test/mixed_rand"]["images"][3] = "another"
    (run.folder / "split.json").write_text(json.dumps(split))
    text = run_page(Run.load(run.folder)).read_text("utf-8")
    assert "The pictures are left out: the images of mixed_rand are no longer those that were tested." in text
    assert "Where it looks" not in text
    recipe = (run.folder / "settings.yaml").read_text().replace(SPEC, "gone/photos")
    (run.folder / "settings.yaml").write_text(recipe)
    text = run_page(Run.load(run.folder)).read_text("utf-8")
    assert "The pictures are left out, as the data set cannot be read now" in text
    assert "gone/photos" in text


def test_a_data_set_of_its_own_has_no_bg_gap(tmp_path):
    run = fake_run(tmp_path / "it", spec="digits", epochs=2)
    text = Page(run_page(run).read_text("utf-8")).text
    assert f"is right on {number(100 * run.results['sets']['test']['accuracy'])} % of the test images" in text
    assert "BG-Gap" not in text
    assert "mixed_rand" not in text


def test_many_arms_and_one_seed(tmp_path):
    arms = {"none": {}, "cutmix": {"skill": 0.5}, "transmix": {"skill": 1.5}}
    compared = fake_comparison(tmp_path / "it", arms, seeds=(3,))
    read = Page(comparison_page(compared).read_text("utf-8"))
    assert "3 ways to train vit_tiny_patch16_224, compared on scenes" in read.text
    assert "in these runs." in read.text  # one seed tells nothing about others
    header = next(row for row in read.rows if row[:2] == ["class", "images"])
    assert header[2:] == ["none", "cutmix", "transmix"]
    assert "nan" not in re.sub(r"data:image[^\"]*", "", read.text.lower())


def test_pictures_show_the_same_images_in_every_arm(compared):
    subject = of_comparison(compared)
    images = load(SPEC).tests["mixed_rand"]
    found = groups(subject.arms, "mixed_rand", images)
    assert sum(group.count for group in found) == len(images)
    first, second = (compared.runs(arm)[0].predictions("mixed_rand").correct.numpy() for arm in compared.arms)
    assert [group.count for group in found] == [
        (second & ~first).sum(), (first & ~second).sum(), (first & second).sum(), (~first & ~second).sum(),
    ]  # fmt: skip
    for group, rights in zip(found, [(False, True), (True, False), (True, True), (False, False)], strict=True):
        assert len(group.cards) == min(3, group.count)
        for scene, *looks in group.cards:
            assert scene.kind == "scene"
            assert [look.kind for look in looks] == ["base", "arm"]
            assert tuple(look.right for look in looks) == rights


def test_pictures_are_spread_over_the_set():
    assert spread(np.arange(10), 3) == [1, 5, 8]
    assert spread(np.array([4, 9]), 3) == [4, 9]
    assert spread(np.array([], np.int64), 3) == []


def test_recalls_and_confusion_by_counting(compared):
    run = compared.runs("plain")[0]
    predictions = run.predictions("mixed_same")
    answers = predictions.logits.argmax(1).tolist()
    matrix, shares = confusion(run, "mixed_same"), recalls(run, "mixed_same")
    for i in range(4):
        own = [a for a, label in zip(answers, predictions.labels.tolist(), strict=True) if label == i]
        assert [cell.count for cell in matrix[i][1]] == [own.count(j) for j in range(4)]
        assert matrix[i][1][i].share == pytest.approx(100 * shares[i])
        assert shares[i] == own.count(i) / len(own)


def test_an_even_gaze_scores_the_objects_share_of_the_area():
    images = load(SPEC).tests["mixed_same"]
    assert even_gaze(images) == pytest.approx(float(np.mean([mask.float().mean() for mask in images.masks])))
    assert even_gaze(load("digits").train) is None


def test_a_single_run_has_intervals_over_its_images_only(alone):
    run, _ = alone
    subject = of_run(run)
    (measured,) = subject.numbers["accuracy/mixed_rand"].values()
    assert measured.over_images.available
    assert measured.over_images.mean == pytest.approx(run.results["sets"]["mixed_rand"]["accuracy"])
    assert not measured.over_seeds.available
    assert measured.difference is None


def test_settings_that_differ_come_first(page):
    rows = Page(page).rows
    header = rows.index(["setting", "plain", "guided"])
    assert ["mix", "none", "transmix"] in rows[header : header + 3]
    assert ["seed", "0, 1"] in rows


def test_a_command_for_all_replaces_those_of_the_runs(compared, page):
    assert "--seed 0" in page
    text = comparison_page(compared, command="foveal demo --seeds 2").read_text("utf-8")
    assert "foveal demo --seeds 2" in text
    assert "--seed 0" not in text


def test_a_failed_page_leaves_the_old_one(tmp_path, monkeypatch):
    run = fake_run(tmp_path / "it", epochs=1)
    old = run_page(run).read_bytes()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        run_page(run)
    assert Path(run.folder / "report.html").read_bytes() == old
    assert not list(run.folder.glob(".*"))
    assert not list(run.folder.glob("*.partial*"))
