"""Training with maps: which map, of which network; what is written down of it; what is refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from foveal import maps
from foveal.data.config import ImageConfig
from foveal.train import Run, SettingsError, fit, memory
from foveal.train.fitting import load_data
from foveal.train.mapping import Beside, refitted, source_of
from foveal.train.models import build
from foveal.train.optimise import Average
from training import tiny


def source(out: Path, **changes: Any):
    """The source of a run, its model, its running average."""
    settings = tiny(out, mix="tdattenmix", **changes)
    data = load_data(settings)
    built = build(settings, len(data.classes))
    average = Average(built.model, settings.ema) if settings.ema else None
    return source_of(settings, built, data, average), built.model, average


def looks(source: Any, size: int = 32) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    return source(torch.randn(4, 3, size, size, generator=g), torch.tensor([0, 1, 2, 0])).map


def move(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))


def test_the_map_of_the_model_itself_moves_with_it(tmp_path: Path):
    own, model, _ = source(tmp_path)
    assert own.model is model
    before = looks(own)
    move(model)
    assert not torch.equal(looks(own), before)


def test_a_frozen_map_stays_that_of_the_initial_weights(tmp_path: Path):
    frozen, model, _ = source(tmp_path, map_model="frozen")
    before = looks(frozen)
    assert torch.equal(before, looks(source(tmp_path)[0]))  # same seed, same initial weights
    move(model)
    assert torch.equal(looks(frozen), before)


def test_an_averaged_map_is_that_of_the_running_average(tmp_path: Path):
    averaged, model, average = source(tmp_path, map_model="ema", ema=0.5)
    assert average is not None
    start = looks(averaged)
    move(model)
    assert torch.equal(looks(averaged), start)  # the average has not heard of it yet
    average.update(model)
    after = looks(averaged)
    twin, other, _ = source(tmp_path)
    other.load_state_dict(average.weights)
    assert torch.equal(after, looks(twin))
    assert not torch.equal(after, start)
    average.restore({"updates": 0, "weights": {k: v.clone() for k, v in model.state_dict().items()}})
    assert torch.equal(looks(averaged), looks(source_like(model, averaged)))


def source_like(model: torch.nn.Module, like: Any) -> Any:
    return maps.HeadCosine(model, threshold=like.source.threshold)


def test_a_run_can_be_the_map_of_another(tmp_path: Path):
    guide = fit(tiny(tmp_path, epochs=1, name="guide"))
    run = fit(tiny(tmp_path, epochs=1, mix="tdattenmix", mix_args={"switch_prob": 1.0}, map_model=str(guide.folder)))
    assert run.settings.map_model == str(guide.folder)
    assert run.metrics[0]["train_consistency"] >= 0


def test_a_run_on_other_classes_is_refused_as_a_map_of_labels(tmp_path: Path):
    data = "scenes:train=50,val=20,test=20,classes=5-9"
    guide = fit(tiny(tmp_path, epochs=1, name="guide", data=data))
    with pytest.raises(ValueError, match="knows other classes"):
        source(tmp_path, map_model=str(guide.folder))
    received, _, _ = source(tmp_path, map="received_attention", map_model=str(guide.folder))
    assert looks(received).shape == (4, 4, 4)  # asks no label: any network will do


def test_a_map_model_that_is_nothing_is_told_so(tmp_path: Path):
    with pytest.raises(SettingsError, match="map_model=nosuch: unknown model 'nosuch', and there is no such run"):
        source(tmp_path, map_model="nosuch")


def test_what_the_mixer_measures_is_written_down(tmp_path: Path):
    run = fit(tiny(tmp_path, epochs=2, mix="tdattenmix", mix_args={"switch_prob": 1.0}))
    for row in (*run.metrics, *run.steps):
        prefix = "train_" if "train_loss" in row else ""
        assert 0.0 <= row[f"{prefix}map_blank"] <= 1.0
        assert 0.0 <= row[f"{prefix}map_on_object"] <= 1.0
        assert row[f"{prefix}consistency"] >= 0.0
    assert all(row["loss"] > row["consistency"] for row in run.steps)


def test_a_step_without_a_map_measures_nothing(tmp_path: Path):
    run = fit(tiny(tmp_path, epochs=1, mix="tdattenmix", mix_args={"switch_prob": 0.0}))
    assert all(row["map_blank"] is None and row["map_on_object"] is None for row in run.steps)
    assert run.metrics[0]["train_map_blank"] is None
    assert all(row["consistency"] == 0.0 for row in run.steps)


def test_the_map_is_not_asked_before_it_is_trusted(tmp_path: Path):
    run = fit(tiny(tmp_path, epochs=3, mix="tdattenmix", mix_args={"switch_prob": 1.0}, map_warmup=2))
    assert [row["train_map_blank"] is None for row in run.metrics] == [True, True, False]


def test_an_epoch_is_the_mean_over_the_steps_that_measured(tmp_path: Path):
    run = fit(tiny(tmp_path, epochs=1, mix="tdattenmix", mix_args={"switch_prob": 0.5}, batch_size=5))
    measured = [row["map_on_object"] for row in run.steps if row["map_on_object"] is not None]
    assert 0 < len(measured) < len(run.steps)
    assert run.metrics[0]["train_map_on_object"] == pytest.approx(sum(measured) / len(measured), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mix": "cutmix", "map": "head_cosine"}, "mix=cutmix follows no map; those that do: .*tdattenmix"),
        ({"mix": "none", "map_warmup": 1}, "mix=none follows no map"),
        ({"map": "head_cosin"}, "unknown map 'head_cosin': did you mean 'head_cosine'"),
        ({"map_args": {"sigmas": 1}, "map": "label_biased"}, "sigma"),
        ({"map": "centre_surround", "map_model": "frozen"}, "asks no network"),
        ({"map_model": "ema"}, "ema=0 keeps none"),
        ({"map_warmup": 3}, "must be below epochs=3"),
        ({"map": "topdown"}, "needs a network with feedback decoders"),
    ],
)
def test_settings_of_maps_that_cannot_be_meant(tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(SettingsError, match=message):
        tiny(tmp_path, **({"mix": "tdattenmix"} | changes))


def test_images_are_given_to_another_model_as_it_wants_them():
    own = ImageConfig((8, 8), (0.5, 0.4, 0.3), (0.2, 0.25, 0.5), "bilinear", 1.0)
    other = ImageConfig((8, 8), (0.0, 0.5, 1.0), (1.0, 0.5, 0.25), "bilinear", 1.0)
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def normalised(config: ImageConfig) -> torch.Tensor:
        mean, std = (pixels.new_tensor(v)[:, None, None] for v in (config.mean, config.std))
        return (pixels - mean) / std

    assert refitted(normalised(own), own, own) is not None
    torch.testing.assert_close(refitted(normalised(own), own, other), normalised(other), rtol=1e-12, atol=1e-12)
    larger = ImageConfig((16, 12), own.mean, own.std, "bilinear", 1.0)
    assert refitted(normalised(own), own, larger).shape == (2, 3, 16, 12)


def test_class_means_need_a_map_model_that_stays(tmp_path: Path):
    means = {"label_vectors": "class_mean", "layer": 0}
    with pytest.raises(SettingsError, match="map_model that stays"):
        source(tmp_path, map_args=means)
    frozen, model, _ = source(tmp_path, map_args=means, map_model="frozen")
    assert isinstance(frozen, Beside)
    before = looks(frozen)
    move(model)
    assert torch.equal(looks(frozen), before)


def test_labels_are_judged_on_pairs_that_cover_something():
    from foveal.mix import MIXERS
    from foveal.train.outcome import covering

    for name in ("mixup+cutmix", "transmix", "tdattenmix", "smmix"):
        mixer = covering(MIXERS[name](mixup_alpha=0.8))
        assert mixer.mixup_alpha == 0.0
        assert not mixer.terms
    for name in ("none", "mixup", "cutmix", "saliencymix"):
        mixer = MIXERS[name]()
        assert covering(mixer) is mixer
    blends = MIXERS["mixup+cutmix"](cutmix_alpha=0.0)
    assert covering(blends) is blends


def test_sgd_moves_as_torch_does_it(tmp_path: Path):
    from foveal.mix import NoMix
    from foveal.train.task import Classify

    settings = tiny(tmp_path, optimizer="sgd", lr=0.1, weight_decay=1e-4, layer_decay=1.0)
    built = build(settings, 5)
    task = Classify(built.model, settings, classes=5, sizes=[8], parts=1, mixer=NoMix(), guide=None)
    made = task.configure_optimizers()
    assert type(made) is torch.optim.SGD
    assert all(g["momentum"] == 0.9 and g["nesterov"] for g in made.param_groups)
    assert {g["weight_decay"] for g in made.param_groups} == {0.0, 1e-4}


def test_peak_memory_counts_what_was_held(tmp_path: Path):
    memory.begin(torch.device("cpu"))
    before = memory.peak(torch.device("cpu"))
    if before is None:
        pytest.skip("this system does not tell a process's peak memory")
    held = torch.ones(64 * 2**20, dtype=torch.uint8)
    after = memory.peak(torch.device("cpu"))
    assert after is not None
    assert after["of"] == "process"
    assert after["bytes"] - before["bytes"] > 0.9 * len(held)


def test_resuming_gives_the_same_run_with_an_averaged_map(tmp_path: Path):
    changes = {"mix": "tdattenmix", "map_model": "ema", "ema": 0.9, "epochs": 4}

    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    whole = fit(tiny(tmp_path, **changes, name="whole"))
    with pytest.raises(KeyboardInterrupt):
        fit(tiny(tmp_path, **changes), progress=stop)
    resumed = fit(tiny(tmp_path, **changes), resume=True)
    assert resumed.steps == whole.steps
    assert isinstance(resumed, Run)
    ours, theirs = resumed.model().state_dict(), whole.model().state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not any(math.isnan(row["loss"]) for row in whole.steps)
