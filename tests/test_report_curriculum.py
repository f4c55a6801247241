"""The curriculum of token mixing in reports: who has one, where its lines run, and what is said of it."""

import re

import numpy as np
import pytest

from fake_runs import fake_comparison, fake_run
from foveal.report import comparison_page, run_page
from foveal.report.curriculum import curricula, reading
from foveal.report.gather import of_comparison, of_run
from test_report import Page

EASY, REPLACED, GAIN = "train_token_easy", "train_token_replaced", "train_token_gain"
TITLE = "Which images gave way, epoch by epoch"


def shares(easy, replaced, gain=None):
    return {"curriculum": {EASY: easy, REPLACED: replaced, GAIN: gain or [0.0] * len(easy)}, "epochs": len(easy)}


def spoken(text: str) -> str:
    return text.replace("\u00a0", " ")


def lines(drawn: str, kind: str) -> list[list[tuple[float, float]]]:
    """Points of the lines of a kind, as shares of width and height (from below)."""
    found = re.findall(rf'<polyline class="line {kind}" points="([^"]*)"', drawn)
    return [
        [(float(x) / 100, 1 - float(y) / 190) for x, y in (pair.split(",") for pair in line.split())] for line in found
    ]


def test_lines_run_through_the_shares(tmp_path):
    run = fake_run(tmp_path / "it", **shares([0.0, 0.2, 0.4], [0.0, 0.1, 0.3]))
    (found,) = curricula(of_run(run))
    (easy,), (replaced,) = lines(str(found.chart), "base"), lines(str(found.chart), "arm")
    assert np.allclose(easy, [(0, 0), (0.5, 0.5), (1, 1)])  # the axis is 0 to 40 %
    assert np.allclose(replaced, [(0, 0), (0.5, 0.25), (1, 0.75)], atol=1e-4)
    assert ">40 %<" in str(found.chart)


def test_arms_share_an_axis_and_the_mean_of_their_seeds_is_drawn(tmp_path):
    arms = {
        "none": {"epochs": 2},
        "low": shares([0.1, 0.2], [0.0, 0.01]),
        "high": shares([0.3, 0.8], [0.1, 0.6]),
    }
    compared = fake_comparison(tmp_path / "it", arms)
    table = compared.folder / "low-seed1" / "metrics.csv"
    table.write_text(table.read_text().replace(",0.2,", ",0.4,"))
    low, high = curricula(of_comparison(compared))
    assert [low.arm.name, high.arm.name] == ["low", "high"]  # of no arm without token mixing
    assert ">80 %<" in str(low.chart)
    assert [len(lines(str(low.chart), kind)) for kind in ("base", "base thin", "arm", "arm thin")] == [1, 2, 1, 2]
    assert lines(str(low.chart), "base")[0][1][1] == pytest.approx(0.3 / 0.8)  # the mean of 20 and 40 %
    assert lines(str(high.chart), "base")[0][1][1] == pytest.approx(1.0)
    text = spoken(Page(comparison_page(compared).read_text("utf-8")).text)
    assert TITLE in text
    assert "the axes are the same" in text
    assert "Easy were 10.0 % of the images in the first epoch and 30.0 % in the last" in text
    assert "Easy were 30.0 % of the images in the first epoch and 80.0 % in the last" in text


def test_the_page_of_a_run_has_its_own(tmp_path):
    run = fake_run(tmp_path / "it", **shares([0.01, 0.3], [0.0, 0.05], [0.0, 0.12]))
    text = spoken(Page(run_page(run).read_text("utf-8")).text)
    assert TITLE in text
    assert "5.0 % of the tokens were replaced, which won 12.0 % of all attention for the average image" in text
    assert "before epoch 2 next to none were." in text


def test_without_the_columns_there_is_no_section(tmp_path):
    for name, further in (("plain", {}), ("vertical", {"token_mix": "vertical"})):
        run = fake_run(tmp_path / name, epochs=1, **further)
        assert TITLE not in run_page(run).read_text("utf-8")
        assert curricula(of_run(run)) == []


def test_columns_that_are_empty_make_no_section(tmp_path):
    run = fake_run(tmp_path / "it", **shares(["", ""], ["", ""], ["", ""]))
    assert curricula(of_run(run)) == []


def test_an_inert_run_is_called_so():
    said = spoken(reading([20.0, 60.0], [0.0, 0.02]))
    assert said.startswith("Inert: in no epoch was more than 0.10 % of the tokens replaced (at most 0.02 %")
    assert "lower rho" in said
    said = spoken(reading([0.0, 0.5], [0.0, 0.0]))
    assert said.startswith("Inert")
    assert "not one token" in said
    assert "raise tau" in said
    assert "Inert" not in reading([20.0, 60.0], [0.0, 0.11])


def test_a_single_epoch_is_no_course():
    said = spoken(reading([25.0], [3.0], [8.0]))
    assert said == (
        "In the only epoch 25.0 % of the images were easy and 3.0 % of the tokens were replaced, which won 8.0 % of all"
        " attention for the average image."
    )


def test_names_are_escaped(tmp_path):
    compared = fake_comparison(tmp_path / "it", {"none": {"epochs": 1}, "<b>&": shares([0.1], [0.05])}, seeds=(0,))
    assert "<b>&" in Page(comparison_page(compared).read_text("utf-8")).text  # read strictly: <b> would not close
