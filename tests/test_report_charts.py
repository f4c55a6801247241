"""Charts and sentences of the report: places by hand, words that do not overstate."""

import math
import re

import pytest

from foveal.report import axes, chart
from foveal.report.words import BG_GAP, accuracy_of, between, evidence, judgement, verdict
from foveal.stats import Interval


def interval(mean: float, low: float, high: float, over: str = "differences on 9 images") -> Interval:
    return Interval(mean, low, high, 0.95, over)


GOOD, BAD, OPEN = interval(0.091, 0.04, 0.142), interval(-0.05, -0.08, -0.02), interval(-0.004, -0.02, 0.012)
UNKNOWN = interval(0.3, math.nan, math.nan, "not available: one seed")


@pytest.mark.parametrize(
    ("value", "digits", "sign", "text"),
    [
        (9.14, 1, True, "+9.1"),
        (-3.26, 1, False, "−3.3"),
        (-0.04, 1, True, "0.0"),
        (0, 0, False, "0"),
        (12, 0, False, "12"),
    ],
)
def test_numbers_as_one_reads_them(value, digits, sign, text):
    assert axes.number(value, digits, sign=sign) == text


@pytest.mark.parametrize("values", [[0.2, 0.9], [-13.2, 41.0], [5.0], [1e-4, 3e-4], [0.0, 0.0], [99.0, 100.0]])
def test_a_scale_holds_its_values_with_round_ticks(values):
    scale = axes.scale(values, 4)
    assert all(0 <= scale.at(value) <= 1 for value in values)
    assert scale.at(scale.low) == 0
    assert scale.at(scale.high) == 1
    steps = [round(b - a, 12) for a, b in zip(scale.ticks[:-1], scale.ticks[1:], strict=True)]
    assert len(set(steps)) == 1
    assert re.fullmatch(r"[125]e[+-]\d+", f"{steps[0]:.0e}")


def test_a_scale_stays_within_what_makes_sense():
    scale = axes.scale([97.0, 99.5], 4, within=(0, 100))
    assert scale.high == 100
    assert max(scale.ticks) <= 100
    assert axes.scale([0.5, 100.0], 4, within=(0, 100)).ticks[0] == 0


def test_a_dot_and_its_whisker_are_where_the_numbers_say():
    axis = axes.Scale(-10, 30, (-10, 0, 10, 20, 30))
    drawn = str(chart.strip([chart.Span(10, 0, 20, outer=(-10, 30))], axis, label="it", zero=True))
    assert 'cx="50.00%"' in drawn
    assert 'class="whisker inner arm" x1="25.00%" x2="75.00%"' in drawn
    assert 'class="whisker outer arm" x1="0.00%" x2="100.00%"' in drawn
    assert 'class="zero" x1="25.00%"' in drawn
    assert "hollow" not in drawn
    assert "hollow" in chart.strip([chart.Span(1, -1, 3, clear=False)], axis, label="it")


def test_a_curve_goes_through_its_points_and_leaves_gaps():
    line = chart.Line("arm", [1, 2, 3, 4], [0.0, 100.0, math.nan, 50.0])
    drawn = str(chart.curves([line], label="it", unit="%", height=200))
    assert 'points="0.00,200.00 33.33,0.00"' in drawn
    assert 'points="100.00,100.00"' in drawn
    assert "nan" not in drawn


def test_a_single_epoch_is_no_error():
    assert "polyline" in chart.curves([chart.Line("arm", [1], [40.0])], label="it", unit="%")


def test_a_histogram_keeps_its_shares():
    drawn = str(
        chart.histograms(
            [chart.Histogram("arm", [0.25, 0.75], 60.0)], edges=[0, 50, 100], label="it", even=None, height=112
        )
    )
    top = 0.75 * 1.12
    assert f"0.00,{112 * (1 - 0.25 / top):.2f} 50.00,{112 * (1 - 0.25 / top):.2f}" in drawn
    assert 'class="mark arm" x1="60.00%"' in drawn
    assert "even" not in drawn


def test_labels_that_would_overlap_are_moved_apart():
    places = chart._apart([50.0, 51.0, 120.0], 18)
    assert places[1] - places[0] == pytest.approx(18, abs=0.1)
    assert places[2] == 120.0
    assert (places[0] + places[1]) / 2 == pytest.approx(50.5, abs=0.1)


def test_names_in_charts_are_escaped():
    arms = [chart.Slope("arm", "<b>&", (50.0, 40.0))]
    drawn = str(chart.slopes(arms, ("a", "<i>"), label='"><script>'))
    assert "<b>" not in drawn
    assert "<i>" not in drawn
    assert "<script>" not in drawn


@pytest.mark.parametrize(
    ("images", "seeds", "said"),
    [
        (GOOD, GOOD, "guided</span> beat plain by 9.1 points on the test images."),
        (GOOD, OPEN, "guided</span> beat plain by 9.1 points on the test images, in these runs."),
        (GOOD, UNKNOWN, "guided</span> beat plain by 9.1 points on the test images, in these runs."),
        (BAD, BAD, "guided</span> lost to plain by 5.0 points on the test images."),
        (OPEN, GOOD, "guided</span> against plain: no difference can be claimed on the test images."),
        (UNKNOWN, None, "guided</span> against plain: no difference can be claimed on the test images."),
    ],
)
def test_verdicts(images, seeds, said):
    assert verdict("guided", "plain", "test", images, seeds).endswith(said)


def test_evidence_names_both_intervals():
    assert evidence(GOOD, UNKNOWN) == (
        "+9.1 points, 95 % interval [+4.0, +14.2], paired differences on 9 images."
        " With other seeds: interval not available: one seed."
    )
    assert "[−2.0, +1.2], which holds zero" in evidence(OPEN, None)


def test_judgements_know_which_way_is_better():
    accuracy = accuracy_of("test")
    assert judgement(accuracy, GOOD, GOOD) == "better"
    assert judgement(accuracy, BAD, BAD) == "worse"
    assert judgement(BG_GAP, BAD, BAD) == "better"
    assert judgement(BG_GAP, GOOD, OPEN) == "worse in these runs"
    assert judgement(accuracy, OPEN, GOOD) == "no difference can be claimed"
    assert judgement(accuracy, UNKNOWN, None) == "no difference can be claimed"


def test_an_interval_that_is_not_there_is_not_a_pair_of_nans():
    assert between(UNKNOWN) == "(no interval)"
