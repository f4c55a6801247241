"""Reports of transfer: whether guidance was followed, what labels and lambda matter, and where the source looks."""

import math
import re

import numpy as np
import pytest

from fake_runs import fake_comparison, fake_run, written
from foveal.cli.compared import table
from foveal.report import axes, chart, comparison_page, run_page
from foveal.report.drift import Plain, judge, judged, panels
from foveal.report.gather import of_comparison, of_run
from foveal.report.ladder import Band, Ladder, Rung, ladders
from foveal.report.lambdas import lambda_curves
from foveal.report.sections import pairs_of
from foveal.report.shares import growth, learning_curves
from foveal.report.told import arms_told, source_told
from foveal.report.ways import is_guided, plain_of, share_of, way_of, weight_of
from foveal.report.words import GUIDES, RULES, TUNES, guided_by, tuned
from foveal.transfer import GUIDES as KNOWN
from test_report import Page

NAN = math.nan
KEPT, LABELS, WEIGHTS = "Attention kept or left", "How much the labels matter", "How much weight gta takes"
SOURCE = {"pointing": 0.412, "even": 0.221, "n": 200, "warning": ""}
INIT = {"init": "pretrained", "epochs": 4}


def columns(drift, ratio=None):
    return {"curriculum": {"drift": drift} | ({} if ratio is None else {"gradient_ratio": ratio})}


def text_of(path) -> str:
    return Page(path.read_text("utf-8")).text


def lines(drawn, kind: str) -> list[list[tuple[float, float]]]:
    found = re.findall(rf'<polyline class="line {kind}" points="([^"]*)"', str(drawn))
    return [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in found]


# ---- judging guidance


PLAIN = Plain("none", 0.3, 0.7)


def said(ratio, drift, accuracy=0.7, plain=PLAIN, attentive=True):
    return judge([np.array(ratio)], drift, accuracy, plain, attentive)[0]


@pytest.mark.parametrize(
    ("ratio", "drift", "accuracy", "plain", "word"),
    [
        ([0.3] * 4, 0.12, 0.7, PLAIN, "followed"),
        ([0.009] * 4, 0.12, 0.7, PLAIN, "ignored"),  # by its gradient
        ([0.01] * 4, 0.12, 0.7, PLAIN, "followed"),
        ([0.3] * 4, 0.286, 0.7, PLAIN, "ignored"),  # 4.7 % below plain's drift
        ([0.3] * 4, 0.284, 0.7, PLAIN, "followed"),  # 5.3 %
        ([0.3] * 4, 0.5, 0.7, PLAIN, "ignored"),  # attention went further than without guidance
        ([2.0] * 4, 0.029, 0.7, PLAIN, "rigid"),
        ([2.0] * 4, 0.031, 0.7, PLAIN, "followed"),  # it moved a tenth of what plain did
        ([2.0] * 4, 0.029, 0.71, PLAIN, "followed"),  # it moved little, and that was better
        ([2.0, 2.0, 0.9, 0.9], 0.029, 0.7, PLAIN, "followed"),  # the task leads in the second half
        ([0.1, 0.1, 2.0, 2.0], 0.029, 0.7, PLAIN, "rigid"),
        ([2.0, 2.0, NAN, NAN], 0.029, 0.7, PLAIN, "followed"),  # guidance was off in the second half
        ([2.0] * 4, 0.009, 0.7, None, "rigid"),
        ([2.0] * 4, 0.011, 0.7, None, "followed"),
        ([0.009] * 4, 0.5, 0.7, None, "ignored"),
        ([NAN] * 4, 0.12, 0.7, PLAIN, "followed"),  # by drift alone
        ([NAN] * 4, 0.12, 0.7, None, ""),
        ([], NAN, 0.7, PLAIN, ""),
        ([0.3] * 4, NAN, 0.7, PLAIN, "followed"),
    ],
)
def test_guidance_is_judged_by_the_stated_rules(ratio, drift, accuracy, plain, word):
    assert said(ratio, drift, accuracy, plain) == word


def test_where_plain_training_moves_nothing_guidance_does_nothing():
    assert said([0.3] * 4, 0.0, plain=Plain("none", 0.0, 0.7)) == "ignored"


def test_drift_alone_makes_no_other_guide_ignored():
    assert said([0.3] * 4, 0.3, attentive=False) == "followed"
    assert said([0.001] * 4, 0.3, attentive=False) == "ignored"
    assert said([NAN] * 4, 0.3, attentive=False) == ""


def test_the_sentence_has_the_numbers():
    _, why = judge([np.array([NAN, 0.2, 0.4]), np.array([0.1, 0.3, 0.5])], 0.123, 0.71, PLAIN)
    assert why == (
        "Median gradient ratio 0.3, 0.35 in the second half; 12.3 % of the attention ended elsewhere than in the "
        "source, with none 30.0 %; validation accuracy 71.0 %, with none 70.0 %."
    )
    assert "no plain arm" in judge([np.array([0.2])], 0.1, 0.7, None)[1]
    assert "drift was not measured" in judge([np.array([0.2])], NAN, 0.7, None)[1]


def test_the_rules_on_the_page_are_those_in_use():
    for number in ("below 0.01", "5 % below", "above 1,", "below 0.1 of", "below 1 %"):
        assert number in RULES


# ---- the section on drift


@pytest.fixture(scope="module")
def guided(tmp_path_factory):
    arms = {
        "none": columns([0.1, 0.2, 0.3, 0.4]),
        "gta": columns([0.05, 0.1, 0.1, 0.1], [NAN, 0.1, 1.0, 0.1]) | {"guide": "gta", "source": SOURCE, "val": 0.74},
    }
    return fake_comparison(tmp_path_factory.mktemp("drift") / "it", arms, **INIT)


def test_drift_is_drawn_in_percent_and_the_ratio_by_its_logarithm(guided):
    subject = of_comparison(guided)
    (found,) = panels(subject, pairs_of(subject.arms))
    assert [len(lines(found.drift, kind)) for kind in ("base", "base thin", "arm", "arm thin")] == [1, 2, 1, 2]
    assert np.allclose(
        lines(found.drift, "base")[0], [(100 * k / 3, 190 * (1 - (k + 1) / 4)) for k in range(4)], atol=0.02
    )
    # 0.01 to 1 and no value in the first epoch: a gap, then the middle, the top, the middle
    assert np.allclose(lines(found.ratio, "arm")[0], [(33.33, 95), (66.67, 0), (100, 95)])
    assert lines(found.ratio, "base") == []
    assert 'y1="190.0" y2="190.0"/>' in found.ratio
    assert "none 10.0 % at first, 40.0 % at last; gta 5.0 % at first, 10.0 % at last" in found.drift
    assert "gta 0.100 at first, 0.100 at last" in found.ratio


def test_the_page_of_a_comparison_says_whether_guidance_was_followed(guided):
    text = text_of(comparison_page(guided))
    assert KEPT in text
    assert "gta: followed. Median gradient ratio 0.1" in text
    assert "10.0 % of the attention ended elsewhere than in the source, with none 40.0 %" in text
    assert "validation accuracy 74.0 %, with none 70.0 %" in text
    assert RULES in text
    assert (
        "The source of the guidance puts 41 % of its attention on the objects, an even map 22 % (200 images)." in text
    )


def test_the_page_of_a_run_has_its_own(guided):
    text = text_of(run_page(guided.runs("gta")[0]))
    assert "Followed. Median gradient ratio 0.1" in text
    assert "there is no plain arm with the same settings and seeds" in text
    assert "an even map 22 %" in text
    plain = text_of(run_page(guided.runs("none")[0]))
    assert KEPT in plain  # drift is of interest without guidance too
    assert "The source of the guidance" not in plain
    assert RULES not in plain


def test_without_the_columns_there_is_no_section(tmp_path):
    for name, further in (("plain", {}), ("empty", columns([""] * 4))):
        run = fake_run(tmp_path / name, epochs=4, **further)
        subject = of_run(run)
        assert panels(subject, pairs_of(subject.arms)) == []
        assert KEPT not in text_of(run_page(run))


def test_a_run_that_is_compared_on_the_seeds_that_both_have(tmp_path):
    runs = {
        "none": [fake_run(tmp_path / "none0", seed=0, **columns([0.1] * 4), **INIT)],
        "gta": [
            fake_run(tmp_path / f"gta{s}", seed=s, guide="gta", **columns([end] * 4, [0.1] * 4), **INIT)
            for s, end in ((0, 0.05), (1, 0.9))
        ],
    }
    (found,) = judged(of_comparison(written(tmp_path, runs, (0, 1))))
    assert found.word == "followed"
    assert "5.0 % of the attention" in found.why
    assert found.cells == ("0.1", "0.1", "5.0", "10.0", "70.0", "70.0")


def test_an_arm_that_differs_in_more_is_no_control(tmp_path):
    arms = {
        "none": {"mix": "cutmix"} | columns([0.1] * 4),
        "other share": {"label_fraction": 0.5} | columns([0.1] * 4),
        "gta": {"guide": "gta"} | columns([0.1] * 4, [0.1] * 4),
        "off": {"guide": "gta", "guide_weight": 0.0} | columns([0.2] * 4),
    }
    subject = of_comparison(fake_comparison(tmp_path / "it", arms, seeds=(0,), **INIT))
    assert plain_of(subject, subject.arm("gta")).name == "off"  # lambda 0 is no guidance
    assert not is_guided(subject.arm("off"))
    assert [one.name for one in judged(subject)] == ["gta"]


def test_drift_at_the_terminal(guided):
    text = table(guided)
    row = next(line.split() for line in text.splitlines() if line.startswith("drift "))
    assert row[1:4] == ["40.0", "10.0", "-30.0"]
    assert "neither way is better" in text


def test_no_drift_at_the_terminal_without_any(tmp_path):
    assert "drift" not in table(fake_comparison(tmp_path / "it", {"a": {}, "b": {}}, seeds=(0,)))


# ---- the source


def test_a_warning_is_told_near_the_top(tmp_path):
    warning = "the source puts 20 % of its attention on the objects, no more than an even map (22 %)"
    bad = {"pointing": 0.2, "even": 0.22, "n": 64, "warning": warning}
    run = fake_run(tmp_path / "it", guide="gta", source=bad, **INIT)
    assert source_told(of_run(run)) == [f"Warning: {warning} (64 images)."]
    text = text_of(run_page(run))
    assert text.index("Warning") < text.index("How much of the gaze")
    other = bad | {"warning": "look at it."}
    run = fake_run(tmp_path / "other", guide="gta", source=other, **INIT)
    assert source_told(of_run(run))[0].endswith("an even map 22 % (64 images). Warning: look at it.")


def test_a_source_that_was_not_measured(tmp_path):
    run = fake_run(tmp_path / "it", guide="gta", source={"pointing": None, "even": None, "n": 0, "warning": ""}, **INIT)
    assert "was not measured" in source_told(of_run(run))[0]
    assert source_told(of_run(fake_run(tmp_path / "none", guide="gta", **INIT))) == []


def test_arms_with_other_sources_are_told_apart(tmp_path):
    arms = {
        "none": {},
        "a": {"guide": "gta", "source": SOURCE},
        "b": {"guide": "gta", "source": SOURCE | {"pointing": 0.6}, "guide_weight": 2.0},
    }
    first, second = source_told(of_comparison(fake_comparison(tmp_path / "it", arms, seeds=(0,), **INIT)))
    assert first.startswith("a: the source of the guidance puts 41 %")
    assert second.startswith("b: the source of the guidance puts 60 %")


# ---- shares of labels


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two ways and two weights at three shares, three seeds; accuracy as in VALUES."""
    folder = tmp_path_factory.mktemp("shares")
    runs, base = {}, {}
    for fraction in (None, 0.5, 0.2):  # not in order
        tail = "" if fraction is None else f"-{100 * fraction:g}%"
        for way, more in {
            "none": {},
            "gta": {"guide": "gta"},
            "gta-weight=10": {"guide": "gta", "guide_weight": 10.0},
        }.items():
            arm = way + tail
            skill = {"none": 0.0, "gta": 0.8, "gta-weight=10": -0.5}[way]
            runs[arm] = [
                fake_run(
                    folder / f"{arm}-seed{s}", seed=s, skill=skill * (2.2 - 2 * (fraction or 1.0)),
                    label_fraction=fraction,
                    **columns([0.1] * 4, [0.1] * 4 if more else None), **INIT, **more,
                )
                for s in (0, 1, 2)
            ]  # fmt: skip
            if way != "none":
                base[arm] = "none" + tail
    return written(folder, runs, (0, 1, 2), base)


def test_a_learning_curve_for_each_way_against_the_baselines(study):
    subject = of_comparison(study)
    curves = learning_curves(subject)
    assert [(curve.name, curve.base) for curve in curves] == [("gta", "none"), ("gta-weight=10", "none")]
    curve = curves[0]
    names = re.findall(r'text-anchor="middle">(\d+ %|\d+)<', str(curve.chart))
    assert names == ["20 %", "50 %", "100 %", "4", "10", "20"]  # fewest labels first, images below
    assert len(lines(curve.chart, "base thin")[0]) == len(lines(curve.chart, "arm thin")[0]) == 3
    values = {arm: np.mean(study.values("accuracy/mixed_rand", arm)) for arm in study.arms}
    for arm, place in (("gta-20%", "20 %"), ("none", "100 %")):
        assert f"{place}: {axes.number(100 * values[arm])} %" in curve.chart
    gain = study.interval("accuracy/mixed_rand", "gta-20%", "seeds", paired=True)
    assert f"20 %: {axes.number(100 * gain.mean, sign=True)} points" in curve.gain
    assert str(curve.gain).count("whisker inner arm") >= 1


def test_growth_is_the_difference_of_the_paired_gains(study):
    subject = of_comparison(study)
    key = "accuracy/mixed_rand"
    told = learning_curves(subject)[0].says
    values = {arm: np.array(study.values(key, arm)) for arm in ("gta-20%", "none-20%", "gta", "none")}
    change = (values["gta-20%"] - values["none-20%"]) - (values["gta"] - values["none"])
    assert f"{axes.number(100 * change.mean(), sign=True)} points" in told
    spread = 4.302653 * change.std(ddof=1) / math.sqrt(3)  # Student's t with two degrees of freedom
    assert ("the gain grows" in told) == (change.mean() - spread > 0)
    assert "over seeds" in told
    arms = {share_of(arm): arm for arm in subject.arms if way_of(arm) == "gta"}
    assert growth(subject, key, arms, {}) == ""


def test_the_page_has_both_curves(study):
    page = Page(comparison_page(study).read_text("utf-8"))
    assert LABELS in page.text
    assert WEIGHTS in page.text
    assert "guidance was" in page.text  # many arms: verdicts are a table
    row = next(row for row in page.rows if row[0] == "gta-20%" and len(row) == 8)
    assert row[1:] == ["ignored", "0.1", "0.1", "10.0", "10.0", "70.0", "70.0"]


def test_one_share_is_no_curve(guided):
    assert learning_curves(of_comparison(guided)) == []
    assert lambda_curves(of_comparison(guided)) == []
    text = text_of(comparison_page(guided))
    assert LABELS not in text
    assert "How much weight" not in text


def test_a_single_way_at_two_shares(tmp_path):
    arms = {"few": {"label_fraction": 0.5}, "all": {}}
    runs = {a: [fake_run(tmp_path / f"{a}-seed{s}", seed=s, **more) for s in (0, 1)] for a, more in arms.items()}
    (curve,) = learning_curves(of_comparison(written(tmp_path, runs, (0, 1), {})))
    assert (curve.name, curve.base, curve.gain, curve.says) == ("all", "", None, "")


def test_shares_have_names(tmp_path):
    for more, name in (({"label_fraction": 0.15}, "15 %"), ({}, "100 %"), ({"per_class": 5}, "5 per class")):
        arm = of_run(fake_run(tmp_path / name, **more)).base
        assert share_of(arm).name == name


# ---- lambda


def test_lambda_has_a_panel_for_each_share_and_measure(study):
    (curve,) = lambda_curves(of_comparison(study))
    assert curve.name == "gta"
    assert [panel.title for panel in curve.panels][:2] == [
        "accuracy, mixed_rand, 20 % of the labels",
        "BG-Gap, 20 % of the labels",
    ]
    assert len(curve.panels) == 6
    panel = curve.panels[0]
    assert panel.base == "none-20%"
    assert [point.weight for point in panel.points] == ["1", "10"]  # none given: GTA's own
    found = study.interval("accuracy/mixed_rand", "gta-20%", "seeds", paired=True)
    assert panel.points[0].difference == axes.number(100 * found.mean, sign=True)
    assert f"none-20% {axes.number(100 * np.mean(study.values('accuracy/mixed_rand', 'none-20%')))}" in panel.chart
    (x1, _), (x2, _) = lines(panel.chart, "arm thin")[0]
    assert (x1, x2) == (6.0, 94.0)


def test_places_of_lambda_are_by_its_logarithm(tmp_path):
    arms = {f"w{w:g}": {"guide": "gta", "guide_weight": w} for w in (0.1, 1.0, 100.0)}
    (curve,) = lambda_curves(of_comparison(fake_comparison(tmp_path / "it", arms, seeds=(0, 1), **INIT)))
    places = [x for x, _ in lines(curve.panels[0].chart, "arm thin")[0]]
    assert np.allclose(places, [6, 6 + 88 / 3, 94], atol=0.01)
    assert curve.panels[0].base == ""  # and no band


def test_weights_of_different_guides_are_no_curve(tmp_path):
    arms = {"none": {}, "a": {"guide": "gta"}, "b": {"guide": "gta", "guide_weight": 2.0, "mix": "cutmix"}}
    assert lambda_curves(of_comparison(fake_comparison(tmp_path / "it", arms, seeds=(0,), **INIT))) == []


def test_a_dots_line_leaves_out_the_level_where_the_difference_is_clear():
    up = axes.Scale(0, 100, (0, 50, 100))
    drawn = str(
        ladders(
            [Ladder("arm", [Rung(0.0, 60, 50, 70), Rung(1.0, 40, clear=False)])],
            [(0.0, "1", ""), (1.0, "10", "")],
            label="it", unit="%", up=up, band=Band(50, 40, 60), height=200,
        )
    )  # fmt: skip
    assert 'points="0,120.00 100,120.00 100,80.00 0,80.00"' in drawn  # the band
    assert 'class="mark base" x1="0%" x2="100%" y1="100.0"' in drawn
    assert 'class="whisker inner arm" x1="0.00%" x2="0.00%" y1="100.0" y2="60.0"' in drawn
    assert 'class="dot arm" cx="0.00%" cy="80.0"' in drawn
    assert 'class="dot arm hollow" cx="100.00%" cy="120.0"' in drawn
    assert "nan" not in drawn


def test_names_below_an_axis_do_not_overlap():
    steps = [(0.0, "one", ""), (0.05, "two", ""), (0.1, "three", ""), (1.0, "four", "")]
    drawn = str(ladders([Ladder("arm", [Rung(0.0, 1.0)])], steps, label="it", unit=""))
    assert [name for name in ("one", "two", "three", "four") if f">{name}<" in drawn] == ["one", "three", "four"]


# ---- axes, words, names


def test_a_logarithmic_axis_holds_its_values_in_whole_decades():
    scale = axes.log_scale([0.02, 3.0, 0.0, NAN])
    assert (scale.low, scale.high, scale.ticks) == (0.01, 10.0, (0.01, 0.1, 1.0, 10.0))
    assert scale.at(0.1) == pytest.approx(1 / 3)
    assert [scale.label(tick) for tick in scale.ticks] == ["0.01", "0.1", "1", "10"]
    assert scale.at(0.0) == -math.inf
    assert math.isnan(scale.at(NAN))
    wide = axes.log_scale([1e-9, 1e9], 5)
    assert len(wide.ticks) <= 6
    assert wide.label(1e-9) == "1e-9"
    assert axes.log_scale([1.0]).at(1.0) == 0.5
    assert axes.log_scale([]).at(1.0) == 0.5


def test_a_value_between_gaps_is_seen():
    drawn = str(chart.curves([chart.Line("arm", [1, 2, 3], [NAN, 5.0, NAN])], label="it", unit="%"))
    assert 'class="dot arm" cx="50.00%"' in drawn


def test_every_guide_and_every_way_to_tune_has_words():
    assert set(KNOWN) - {"none"} <= set(GUIDES)
    assert {"gta", "attention_transfer", "attn_distill", "l2_sp", "delta", "bss", "co_tuning"} <= set(GUIDES)
    assert guided_by("soon") == "a loss beside that of the task"
    assert tuned("all") == ""
    assert tuned("last-1") == "Only the last block and the classifier are trained."
    assert tuned("last-3") == "Only the last 3 blocks and the classifier are trained."
    assert all(tuned(name) == TUNES[name] for name in ("head", "attention", "bias", "lora"))
    assert "soon" in tuned("soon")


def test_how_a_run_was_guided_and_tuned_is_told(tmp_path):
    run = fake_run(tmp_path / "it", guide="gta", guide_schedule="linear", tune="attention", head_start="probe", **INIT)
    text = " ".join(arms_told(of_run(run)))
    assert "gta with weight 1, falling linearly to zero, a second loss that holds" in text
    assert "Only the attention layers" in text
    assert "linear probing" in text
    arms = {"none": {}} | {f"last-{k}": {"tune": f"last-{k}", "guide": "gta"} for k in (1, 2, 3, 4)}
    wide = arms_told(of_comparison(fake_comparison(tmp_path / "wide", arms, seeds=(0,), **INIT)))
    assert "In some arms: only the last 4 blocks and the classifier are trained." in wide


def test_a_guide_of_another_version_is_no_error(tmp_path, monkeypatch):
    run = fake_run(tmp_path / "it", guide="gta", **columns([0.1] * 4, [0.1] * 4), **INIT)
    monkeypatch.setattr("foveal.transfer.GUIDES", {"none": None})
    assert weight_of(run.settings) is None
    assert "gta, a second loss" in " ".join(arms_told(of_run(run)))
    assert judged(of_run(run))[0].word == "followed"
    assert lambda_curves(of_run(run)) == []


def test_names_are_escaped(tmp_path):
    arms = {
        f"<b>&{w:g}": {"guide": "gta", "guide_weight": w, "label_fraction": f} | columns([0.1] * 4, [0.1] * 4)
        for w in (1.0, 2.0)
        for f in (0.5,)
    }
    arms = {"<i>none": columns([0.2] * 4) | {"label_fraction": 0.5}, "<i>all": columns([0.2] * 4)} | arms
    runs = {
        arm: [fake_run(tmp_path / f"{k}", source=SOURCE, **more, **INIT)] for k, (arm, more) in enumerate(arms.items())
    }
    text = text_of(comparison_page(written(tmp_path, runs, (0,))))  # read strictly: <b> would not close
    assert "<b>&1" in text
    assert KEPT in text
    assert LABELS in text
    assert WEIGHTS in text
