"""Costs of a step: in turns, with the same draws, ratios within rounds; nothing is left changed."""

import json
from pathlib import Path

import pytest
import torch

from foveal.mix import MIXERS
from foveal.train import costs as module
from foveal.train.costs import STEPS, Cost, Costs, costs, costs_of, interleaved, measure_costs, read_costs
from training import tiny


def test_ratios_are_taken_within_rounds():
    times = {"plain": [1.0, 2.0, 1.0, 4.0], "dear": [1.5, 3.4, 1.6, 6.4]}
    found = costs_of(times, {"dear": "plain"})
    assert found["plain"] == Cost(1.5)  # a baseline has no ratio
    dear = found["dear"]  # 1.5, 1.7, 1.6, 1.6
    assert dear.seconds == pytest.approx(2.5)
    assert dear.ratio == pytest.approx(1.6)
    assert (dear.low, dear.high) == (pytest.approx(1.525), pytest.approx(1.675))


def test_too_few_rounds_have_no_quartiles_and_a_lost_baseline_no_ratio():
    assert costs_of({"plain": [1.0], "dear": [3.0]}, {"dear": "plain"})["dear"] == Cost(3.0, 3.0)
    assert costs_of({"dear": [3.0]}, {"dear": "plain"})["dear"] == Cost(3.0)


def test_arms_take_turns_with_the_same_numbers():
    asked: list[tuple[str, int, int]] = []
    now = [0.0]

    def step(name: str, seconds: float):
        def run(number: int, size: int) -> None:
            asked.append((name, number, size))
            now[0] += seconds * (1 + number % 2)  # something dear every other step

        return run

    def clock(run) -> float:
        begun = now[0]
        run()
        return now[0] - begun

    times = interleaved({"a": step("a", 1.0), "b": step("b", 2.0)}, 5, 3, clock, until=float("inf"))
    assert [name for name, _, _ in asked] == ["a", "b"] * (3 * STEPS)
    assert [number for name, number, _ in asked if name == "a"] == list(range(3 * STEPS))
    assert [number for name, number, _ in asked if name == "b"] == list(range(3 * STEPS))
    assert {size for _, _, size in asked} == {5}
    assert times == {"a": [1.5] * 3, "b": [3.0] * 3}  # averaged over the dear steps


def test_the_first_round_is_always_finished():
    times = interleaved({"a": lambda number, size: None}, 1, 5, lambda run: 1.0, until=float("-inf"))
    assert times == {"a": [1.0]}


def arms(out: Path) -> dict:
    plain = tiny(out, data="scenes:train=30,val=10,test=10,classes=0-3", init="demo", model="demo", model_args={})
    plain = plain.replace(image_size=None)
    return {
        "none": plain,
        "tdattenmix": plain.replace(mix="tdattenmix", map_warmup=2),
        "tokens": plain.replace(token_mix="horizontal"),
        "none+gta": plain.replace(guide="gta"),
        "none+gta-50%": plain.replace(guide="gta", label_fraction=0.5),
    }


def test_a_step_of_every_arm_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trusted: list[bool] = []
    on = MIXERS["tdattenmix"].on

    def noted(self, *args, **options):
        trusted.append(options["trusted"])
        return on(self, *args, **options)

    monkeypatch.setattr(MIXERS["tdattenmix"], "on", noted)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    found = measure_costs(arms(tmp_path), {"tdattenmix": "none", "none+gta": "none"}, seconds=1.0)
    assert set(found.arms) == set(arms(tmp_path))
    assert found.failed == {}
    assert all(cost.seconds > 0 for cost in found.arms.values())
    assert found.arms["none"].ratio is None
    assert found.arms["tdattenmix"].ratio is not None
    assert found.arms["none+gta-50%"].seconds == found.arms["none+gta"].seconds  # measured once
    assert found.conditions["steps"] == STEPS
    assert found.conditions["rounds"] >= 1
    assert 4 <= found.conditions["batch_size"] <= 8
    assert found.conditions["threads"] == 1
    assert "batch " in found.told()
    assert set(trusted) == {True}  # not what the warm-up costs
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_an_arm_whose_step_cannot_be_made_is_left_out(tmp_path: Path):
    ways = arms(tmp_path)
    ways["lost"] = ways["tdattenmix"].replace(map_model="nowhere")
    ways = {"none": ways["none"], "lost": ways["lost"]}
    found = measure_costs(ways, {"lost": "none"}, seconds=0.1)
    assert set(found.arms) == {"none"}
    assert "nowhere" in found.failed["lost"]


def test_costs_are_kept_for_the_same_arms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[list[str]] = []

    def measured(arms, baseline_of, seconds):
        asked.append(list(arms))
        return Costs({arm: Cost(1.0, 2.0, 1.5, 2.5) for arm in arms}, {"rounds": 3}, {})

    monkeypatch.setattr(module, "measure_costs", measured)
    assert read_costs(tmp_path) is None
    ways = arms(tmp_path)
    first = costs(tmp_path, ways, {"tdattenmix": "none"})
    longer = {arm: settings.replace(epochs=99) for arm, settings in ways.items()}  # does not change a step
    assert costs(tmp_path, longer, {"tdattenmix": "none"}) == first == read_costs(tmp_path)
    assert len(asked) == 1
    costs(tmp_path, {arm: settings.replace(batch_size=2) for arm, settings in ways.items()}, {"tdattenmix": "none"})
    costs(tmp_path, dict(list(ways.items())[:2]), {"tdattenmix": "none"})
    assert len(asked) == 3
    (tmp_path / "costs.json").write_text(json.dumps({"of": 1}))
    assert read_costs(tmp_path) is None
