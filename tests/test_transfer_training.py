"""Guidance, what is tuned and how the head starts, in whole trainings: schedules, drift, ratios, sweeps, exports."""

import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import foveal
from foveal.chance import generator
from foveal.data import DataError
from foveal.data.batches import Batches
from foveal.train import Interrupted, Run, RunError, Settings, SettingsError, fit
from foveal.train.drift import Drift, SourceQuality, readable, total_variation
from foveal.train.fitting import load_data, mixer_of
from foveal.train.guiding import default_weight, guide_of, options_of, weight_of
from foveal.train.models import build, create
from foveal.train.optimise import Average
from foveal.train.sweeping import Sweep, chosen, sweep, usual_weights
from foveal.train.task import Classify, gradient_ratio, relaxed
from foveal.transfer import GUIDES, L2SP
from training import TINY, tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    """A file of weights to start from."""
    path = tmp_path_factory.mktemp("source") / "source.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **TINY).state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Run:
    """A finished run on other classes, which has a classifier."""
    return fit(tiny(tmp_path_factory.mktemp("classifier"), epochs=1, data="scenes:train=20,val=10,test=10,classes=5-9"))


def task_of(settings: Settings) -> tuple[Classify, Batches]:
    """A task and its training batches, nothing trained."""
    data = load_data(settings)
    built = build(settings, len(data.classes))
    mixer = mixer_of(settings, built, data)
    guide = guide_of(settings, built, data, mixer)
    task = Classify(built.model, settings, classes=len(data.classes), sizes=[8] * 7, parts=1, mixer=mixer, guide=guide)
    return task, Batches(data.train, built.image, settings.batch_size, train=True, seed=settings.seed, flip=data.flip)


# -- every guide


@pytest.mark.parametrize("name", [name for name in GUIDES if name not in ("none", "co_tuning")])
def test_every_guide_trains(name, source, tmp_path: Path):
    run = fit(tiny(tmp_path, epochs=2, init=source, guide=name, lr=0.01))
    terms = [row[name] for row in run.steps]
    assert all(
        term is not None and term >= -1e-6 for term in terms
    )  # a divergence of equals rounds to either side of 0
    assert max(terms) > 0
    assert run.metrics[-1]["gradient_ratio"] > 0
    assert run.results["drift"] == run.metrics[run.results["best_epoch"] - 1]["drift"]
    timm.create_model(run.card["architecture"], **run.card["arguments"]).load_state_dict(
        load_file(run.folder / "model.safetensors")
    )


@pytest.mark.parametrize("table", ["direct", "learned"])
def test_co_tuning_trains_a_source_head_that_is_not_exported(table, classifier, tmp_path: Path):
    settings = tiny(tmp_path, epochs=1, init=str(classifier.folder), guide="co_tuning", guide_args={"table": table})
    task, _ = task_of(settings)
    assert task.guiding.out_features == 5
    names = [group["name"] for group in task.configure_optimizers().param_groups if "name" in group]
    assert "guiding" in names
    run = fit(settings)
    assert run.steps[0]["co_tuning"] > 0
    assert not any("guiding" in name for name in load_file(run.folder / "model.safetensors"))


def test_co_tuning_needs_a_source_with_classes(source, tmp_path: Path):
    torch.manual_seed(0)
    encoder = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **TINY)
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors")
    with pytest.raises((SettingsError, RunError), match="class"):
        fit(tiny(tmp_path, init=str(tmp_path / "encoder.safetensors"), guide="co_tuning"))
    with pytest.raises(SettingsError, match="one class each"):
        tiny(tmp_path, init=source, guide="co_tuning", mix="cutmix")


# -- strength


def test_the_weight_is_the_methods_own_unless_it_is_said(source, tmp_path: Path):
    assert {name: default_weight(name) for name in ("none", "gta", "l2_sp", "bss", "co_tuning")} == {
        "none": 0.0,
        "gta": 1.0,
        "l2_sp": 0.01,
        "bss": 0.001,
        "co_tuning": 2.3,
    }
    assert weight_of(tiny(tmp_path, init=source, guide="gta")) == 1.0
    assert weight_of(tiny(tmp_path, init=source, guide="gta", guide_weight=0.0)) == 0.0
    assert {"match", "layers", "query", "reduction"} <= set(options_of("gta"))
    assert "source" not in options_of("gta")
    assert options_of("co_tuning") == ["table"]
    assert "head" in options_of("l2_sp")
    assert options_of("none") == []


def test_schedules_of_the_weight():
    assert [relaxed("constant", k, 4) for k in range(4)] == [1.0] * 4
    assert [relaxed("linear", k, 4) for k in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert [relaxed("cosine", k, 4) for k in range(4)] == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466])


def test_a_schedule_scales_the_term_of_each_step(source, tmp_path: Path):
    task, batches = task_of(tiny(tmp_path, init=source, guide="l2_sp", guide_schedule="linear"))
    with torch.no_grad():
        task.model.blocks[0].mlp.fc1.weight.add_(0.5)
    batch = next(iter(batches))
    whole, _ = task.forward_loss(batch, generator(0, "mix", 0, 0))
    half, _ = task.forward_loss(batch, generator(0, "mix", 0, 0), 0.5)
    assert whole["l2_sp"].item() > 0
    assert half["l2_sp"].item() == pytest.approx(whole["l2_sp"].item() / 2)
    assert task.relax(0) == 1.0
    assert task.relax(3 * 7 - 1) == pytest.approx(1 / 21)


def test_a_penalty_replaces_the_weight_decay(source, tmp_path: Path):
    plain, _ = task_of(tiny(tmp_path, init=source, guide="gta"))
    assert {group["weight_decay"] for group in plain.configure_optimizers().param_groups} == {0.0, 0.05}
    kept, _ = task_of(tiny(tmp_path, init=source, guide="l2_sp"))
    assert {group["weight_decay"] for group in kept.configure_optimizers().param_groups} == {0.0}


def test_a_decoupled_penalty_pulls_after_each_step(source, tmp_path: Path):
    strong = {"init": source, "guide": "l2_sp", "epochs": 2, "lr": 0.02}

    def moved(**options):
        run = fit(tiny(tmp_path, **strong, **options), overwrite=True)
        start = load_file(source)
        now = load_file(run.folder / "model.safetensors")
        return sum((now[name] - start[name]).square().sum() for name in start if name in now)

    free = moved(guide_weight=1e-9, guide_args={"decoupled": True})
    held = moved(guide_weight=20.0, guide_args={"decoupled": True})
    assert held < 0.7 * free


def test_what_follows_a_step_has_its_share_and_comes_before_the_average(source, tmp_path: Path, monkeypatch):
    shares, steps = [], []

    def after_step(self, model, optimizer, relax=1.0):
        shares.append(relax)
        with torch.no_grad():
            model.head.bias.fill_(len(shares))

    update = Average.update

    def watched(self, model):
        steps.append(float(model.head.bias[0].detach()))
        update(self, model)

    monkeypatch.setattr(L2SP, "after_step", after_step)
    monkeypatch.setattr(Average, "update", watched)
    fit(tiny(tmp_path, init=source, guide="l2_sp", guide_schedule="linear", epochs=2, accumulate=2, ema=0.5))
    assert shares == [1 - step / 8 for step in range(8)]  # 50 images in steps of 2 x 8: 4 an epoch
    assert steps == list(range(1, 9))


def test_gradient_ratio_is_that_of_two_backwards():
    model = torch.nn.Linear(3, 2).double()
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = model(x)
    losses = {"task": out.square().mean(), "gta": 7 * out.mean(), "more": out.abs().mean()}
    ratio = gradient_ratio(losses, "gta", model)
    assert all(p.grad is None for p in model.parameters())
    norms = []
    for loss in (losses["gta"], losses["task"] + losses["more"]):
        grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        norms.append(torch.cat([g.flatten() for g in grads]).norm())
    assert ratio.item() == pytest.approx((norms[0] / norms[1]).item(), rel=1e-6)  # float32
    assert gradient_ratio({"task": losses["task"]}, "gta", model).isnan()


def test_gradient_ratio_does_not_vanish_in_float16():
    rng = torch.Generator().manual_seed(0)
    model, x = torch.nn.Linear(3, 2), torch.randn(4, 3, generator=rng)
    with torch.autocast("cpu", torch.float16):
        out = model(x).float()
    assert torch.autograd.grad(1e-8 * out.mean(), model.weight, retain_graph=True)[0].norm() == 0
    losses = {"task": out.mean(), "gta": 1e-8 * out.mean()}
    assert gradient_ratio(losses, "gta", model).item() == pytest.approx(1e-8, rel=0.05)


def test_the_ratio_of_a_run_is_that_of_its_last_step(source, tmp_path: Path):
    settings = tiny(tmp_path, init=source, guide="bss", guide_weight=1.0, epochs=1, lr=1e-12)  # weights stay
    task, batches = task_of(settings)
    task.model.train()
    expected = []
    for batch in batches:
        losses, _ = task.forward_loss(batch, generator(0, "mix", 0, batch.micro))
        expected.append(gradient_ratio(losses, "bss", task.model).item())
    assert len({round(one, 9) for one in expected}) == len(expected) == 7
    assert fit(settings).metrics[0]["gradient_ratio"] == pytest.approx(expected[-1], rel=1e-4)


def test_the_ratio_is_seen_from_the_first_epoch(source, tmp_path: Path):
    run = fit(tiny(tmp_path, init=source, guide="gta", epochs=1))  # at the first step model and source are equal
    assert run.metrics[0]["gradient_ratio"] > 0


# -- drift


def test_total_variation_by_hand():
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.0, 0.5, 0.5])
    assert total_variation(p, q).item() == 0.5
    assert total_variation(p, p).item() == 0.0
    assert total_variation(torch.tensor([1.0, 0]), torch.tensor([0.0, 1])).item() == 1.0


def test_drift_is_logged_in_plain_runs_and_equals_two_reads(source, tmp_path: Path):
    run = fit(tiny(tmp_path, init=source, epochs=1, lr=0.01))
    data = load_data(run.settings)
    first, last = build(run.settings, 5).model.eval(), run.model()
    rows = []
    for model in (first, last):
        found = []
        for batch in Batches(data.val, run.config, 8, train=False):
            with torch.no_grad(), foveal.read(model, "all") as seen:
                model(batch.images)
            found.append(torch.stack(seen.class_logits()).softmax(-1))
        rows.append(torch.cat(found, 1))
    expected = 0.5 * (rows[0] - rows[1]).abs().sum(-1).mean()
    assert run.metrics[0]["drift"] == pytest.approx(expected.item(), rel=1e-4)
    assert run.results["drift"] == run.metrics[0]["drift"]
    assert 0 < expected < 1


def test_drift_is_that_of_the_averaged_weights_where_they_are_validated(source, tmp_path: Path):
    rows = [fit(tiny(tmp_path, init=source, epochs=1, lr=0.01, ema=ema, name=f"e{ema}")) for ema in (0.0, 0.999)]
    assert rows[1].results["drift"] != rows[0].results["drift"]


def test_random_weights_have_no_source_to_drift_from(tmp_path: Path):
    run = fit(tiny(tmp_path, epochs=1))
    assert "drift" not in run.metrics[0]
    assert (run.results["drift"], run.results["source"]) == (None, None)


def test_the_source_of_a_random_model_is_looked_at_too(source, tmp_path: Path):
    run = fit(tiny(tmp_path, init="none", guide="gta", guide_source=source, epochs=1))
    assert 0 < run.results["drift"] < 1
    assert run.results["source"]["n"] == 20


@pytest.mark.parametrize(
    ("other", "changes"),
    [
        ({"depth": 3}, {"guide": "gta", "guide_args": {"layers": [0, 1]}}),
        ({"num_heads": 4}, {"guide": "gta", "guide_args": {"what": "block_out"}}),
        ({"num_heads": 4}, {"guide": "delta"}),
    ],
)
def test_a_source_of_another_shape_gives_no_drift(other, changes, source, tmp_path: Path):
    teacher = fit(tiny(tmp_path, model_args=TINY | other, epochs=1, name="teacher"))
    run = fit(tiny(tmp_path, init=source, guide_source=str(teacher.folder), epochs=1, **changes))
    assert run.metrics[0]["drift"] is None
    assert run.results["drift"] is None
    assert run.results["source"]["pointing"] > 0


def test_models_that_cannot_be_read_are_trained_without(tmp_path: Path):
    assert readable(timm.create_model("resnet10t", num_classes=2)) is None
    without = timm.models.VisionTransformer(
        img_size=32, embed_dim=32, depth=1, num_heads=2, class_token=False, global_pool="avg"
    )
    assert readable(without) == "mean_query"


def test_the_limit_bounds_the_images_that_are_compared(source, tmp_path: Path):
    settings = tiny(tmp_path, init=source)
    data = load_data(settings)
    built = build(settings, 5)
    drift = Drift.of(built.model, Batches(data.val, built.image, 8, train=False), limit=9)
    assert (len(drift.rows), drift.quality.images) == (2, 16)
    assert drift.covers(1)
    assert not drift.covers(2)


def test_how_well_the_source_looks_is_told_and_warned_of(source, tmp_path: Path):
    told = fit(tiny(tmp_path, init=source, epochs=1)).results["source"]
    assert told["n"] == 20
    assert 0 < told["even"] < 1
    assert 0 < told["pointing"] < 1
    assert SourceQuality(0.4, 0.2, 9).warning == ""
    assert "no more than a map that is the same everywhere" in SourceQuality(0.1, 0.2, 9).warning
    assert SourceQuality(None, None, 9).warning == ""


# -- sources


def test_another_source_may_be_named_and_random_ones_are_a_control(source, classifier, tmp_path: Path):
    plain = fit(tiny(tmp_path, init=source, guide="gta", epochs=1, name="own"))
    for which in ("none", str(classifier.folder)):
        run = fit(tiny(tmp_path, init=source, guide="gta", guide_source=which, epochs=1, name=Path(which).name))
        assert run.steps[0]["gta"] > 0 == plain.steps[0]["gta"]
    assert fit(tiny(tmp_path, guide="gta", guide_source=source, epochs=1, name="fresh")).steps[0]["gta"] > 0


def test_a_guide_needs_a_source(tmp_path: Path):
    with pytest.raises(SettingsError, match="init=none is random"):
        tiny(tmp_path, guide="gta")
    tiny(tmp_path, guide="bss")  # has none


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guide": "gtaa"}, "unknown guide 'gtaa': did you mean 'gta'"),
        ({"guide": "gta", "guide_args": {"mach": "raw"}}, "did you mean 'match'"),
        ({"guide_args": {"match": "raw"}}, "unknown setting of guide none"),
        ({"guide_weight": 10.0}, "guide_weight=10.0 has no guide to act on: name one, such as guide=gta"),
        ({"guide_schedule": "cosine"}, "guide_schedule=cosine has no guide to act on"),
        ({"guide_source": "none"}, "guide_source=none has no guide to act on"),
        ({"guide": "gta", "guide_schedule": "cosin"}, "did you mean 'cosine'"),
        ({"tune": "heads"}, "did you mean 'head'"),
        ({"tune": "last-0"}, "unknown tune"),
        ({"tune_args": {"rank": 4}}, "setting of tune=all"),
        ({"tune": "lora", "tune_args": {"rnk": 4}}, "did you mean 'rank'"),
        ({"tune": "head", "head_start": "probe"}, "done that already"),
        ({"tune": "head", "guide": "gta"}, "classifier alone, which guide=gta does not move"),
        ({"tune": "lora", "guide": "l2_sp"}, "nothing to hold"),
        ({"held_out": 0.9}, "held_out"),
        ({"train_list": "a", "per_class": 3}, "give one"),
    ],
)
def test_settings_that_cannot_be_meant(changes, message, source, tmp_path: Path):
    with pytest.raises(SettingsError, match=message):
        tiny(tmp_path, **{"init": source, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guide": "attn_distill"}, "compares the last block"),
        ({"guide": "gta", "guide_args": {"layers": "all"}}, "is to compare blocks.1"),
        ({"guide": "delta", "guide_args": {"layers": -1}}, "is to compare blocks.1"),
        ({"guide": "attention_transfer", "guide_args": {"skip_last": 1}}, "not by skip_last"),
    ],
)
def test_blocks_behind_mixed_tokens_are_not_compared(changes, message, source, tmp_path: Path):
    tokens = {"token_mix": "manifold", "token_mix_args": {"deepest": 1}}  # block 1 of 2 has tokens of two images
    with pytest.raises(SettingsError, match=message):
        task_of(tiny(tmp_path, init=source, **tokens, **changes))
    task, _ = task_of(tiny(tmp_path, init=source, guide="gta", guide_args={"layers": [0]}, **tokens))
    assert task.guide.layers == [0]
    task, _ = task_of(tiny(tmp_path, init=source, guide="gta", **tokens))
    assert list(task.guide.layers) == [0]


def test_an_option_that_does_not_fit_is_told_by_its_guide(source, tmp_path: Path):
    with pytest.raises(SettingsError, match=r"guide=gta: match='cosine' is not known"):
        fit(tiny(tmp_path, init=source, guide="gta", guide_args={"match": "cosine"}))
    assert not (tmp_path / "run" / "settings.yaml").exists()


# -- what is tuned


def test_a_linear_probe_leaves_the_body_alone(source, tmp_path: Path):
    run = fit(tiny(tmp_path, init=source, tune="head", epochs=1, lr=0.1))
    before, after = load_file(source), load_file(run.folder / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert run.results["drift"] == 0.0
    assert run.results["trained"] == sum(after[name].numel() for name in ("head.weight", "head.bias"))


def test_lora_leaves_a_plain_model_that_predicts_the_same(source, tmp_path: Path):
    settings = tiny(tmp_path, init=source, tune="lora", tune_args={"rank": 2}, guide="gta", epochs=2, lr=0.02)
    run = fit(settings)
    model = create(run.card["architecture"], run.card["arguments"])
    model.load_state_dict(load_file(run.folder / "model.safetensors"))
    data = load_data(settings)
    batch = next(iter(Batches(data.tests["mixed_rand"], run.config, 20, train=False)))
    with torch.no_grad():
        logits = model.eval()(batch.images)
    assert torch.allclose(logits, run.predictions("mixed_rand").logits, atol=1e-5)
    before = load_file(source)
    changed = {name for name, tensor in before.items() if not torch.equal(run.model().state_dict()[name], tensor)}
    assert changed == {"blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight"}
    assert run.steps[0]["gta"] == 0.0
    assert run.steps[-1]["gta"] > 0.0


@pytest.mark.parametrize(
    "changes",
    [
        {"tune": "lora", "guide": "gta", "guide_schedule": "cosine", "ema": 0.5},
        {"guide": "delta", "head_start": "probe"},
        {"guide": "l2_sp", "guide_args": {"decoupled": True}, "tune": "attention"},
    ],
)
def test_a_resumed_run_ends_bit_for_bit_the_same(changes, source, tmp_path: Path, monkeypatch):
    settings = tiny(tmp_path, init=source, epochs=3, **changes)
    whole = fit(settings.replace(name="whole"))

    class Stop(Exception):
        pass

    def stop(row):
        if row["epoch"] == 2:
            raise Stop

    with pytest.raises(Stop):
        fit(settings, progress=stop)
    resumed = fit(settings, resume=True)
    a, b = (load_file(run.folder / "model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)
    for x, y in zip(whole.metrics, resumed.metrics, strict=True):
        assert {k: v for k, v in x.items() if "second" not in k} == {k: v for k, v in y.items() if "second" not in k}


def test_the_head_may_start_as_a_probe(source, tmp_path: Path):
    fresh = fit(tiny(tmp_path, init=source, epochs=1, lr=1e-7, name="fresh"))
    probed = fit(tiny(tmp_path, init=source, epochs=1, lr=1e-7, head_start="probe", name="probed"))
    assert probed.metrics[0]["train_loss"] < fresh.metrics[0]["train_loss"]
    batch = next(iter(Batches(load_data(probed.settings).train, probed.config, 50, train=False)))
    with torch.no_grad():
        accuracy = (probed.model()(batch.images).argmax(-1) == batch.labels).float().mean()
    assert accuracy > 0.5  # of five classes; a random head has a fifth


# -- labels


def test_what_is_held_out_comes_from_the_share_alone(source, tmp_path: Path):
    allowed = load_data(tiny(tmp_path, label_fraction=0.5))
    nested = load_data(tiny(tmp_path, label_fraction=0.5, held_out=0.2))
    assert sorted([*nested.train.names, *nested.val.names]) == sorted(allowed.train.names)
    assert len(nested.val) == 5
    assert list(nested.tests) == list(allowed.tests)


def test_a_saved_list_gives_the_same_images_again(tmp_path: Path):
    images = load_data(tiny(tmp_path, label_fraction=0.3)).train
    (tmp_path / "list.txt").write_text("\n".join(images.names) + "\n")
    again = load_data(tiny(tmp_path, train_list=str(tmp_path / "list.txt"))).train
    assert again.names == images.names
    with pytest.raises(SettingsError, match="cannot read train_list"):
        load_data(tiny(tmp_path, train_list=str(tmp_path / "other.txt")))
    (tmp_path / "list.txt").write_text("no such image\n")
    with pytest.raises(DataError, match="of none of the"):
        load_data(tiny(tmp_path, train_list=str(tmp_path / "list.txt")))


# -- sweep


def test_the_best_weight_is_that_of_the_best_mean_accuracy():
    assert chosen((0.0, 1.0, 10.0), ((0.5, 0.5), (0.4, 0.8), (0.5, 0.6)), ((1, 1), (1, 1), (1, 1))) == 1.0
    assert chosen((0.0, 1.0), ((0.5,), (0.5,)), ((1.0,), (0.9,))) == 1.0
    assert chosen((1.0, 0.0), ((0.5,), (0.5,)), ((1.0,), (1.0,))) == 0.0


def test_a_sweep_never_sees_the_tests_and_goes_on(source, tmp_path: Path):
    settings = tiny(tmp_path, init=source, guide="gta", epochs=1, label_fraction=0.6)
    told = []
    found = sweep(settings, (0.0, 5.0), seeds=2, progress=lambda name, row: told.append(name))
    assert told == [f"weight-{w}-seed{k}" for w in (0, 5) for k in (0, 1)]
    assert isinstance(found, Sweep)
    assert (found.weights, found.best in found.weights) == ((0.0, 5.0), True)
    assert (found.trained_on, found.held_out) == (25, 5)
    folder = tmp_path / "sweep-run"
    assert json.loads((folder / "sweep.json").read_text())["best"] == found.best
    run = Run.load(folder / "weight-5-seed1")
    assert list(run.results["sets"]) == ["val"]
    assert run.results["val"]["accuracy"] == found.accuracy[1][1]
    allowed = set(load_data(settings).train.names)
    for part in ("train", "val"):
        assert set(run.split["sets"][part]["images"]) <= allowed
    told.clear()
    assert sweep(settings, (0.0, 5.0), seeds=2, progress=lambda name, row: told.append(name)) == found
    assert told == []


def test_a_sweep_that_is_stopped_says_how_to_go_on_and_keeps_its_settings(source, tmp_path: Path):
    settings = tiny(tmp_path, init=source, guide="gta", epochs=2)

    def stop(name, row):
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="run the same sweep again"):
        sweep(settings, (0.0, 5.0), progress=stop)
    assert sweep(settings, (0.0, 5.0)).held_out == 10
    with pytest.raises(RunError, match="other settings: lr was"):
        sweep(settings.replace(lr=0.1), (0.0, 5.0))


def test_usual_weights_and_sweeps_that_make_no_sense(source, tmp_path: Path):
    assert usual_weights("gta") == (0.0, 0.1, 1.0, 10.0, 100.0)
    assert usual_weights("bss") == pytest.approx((0.0, 1e-4, 1e-3, 1e-2))
    with pytest.raises(SettingsError, match="give one, such as guide=gta"):
        sweep(tiny(tmp_path, init=source))
    guided = tiny(tmp_path, init=source, guide="gta")
    for weights in ((1.0,), (1.0, 1.0), (-1.0, 1.0), (0.0, float("nan")), (0.0, float("inf"))):
        with pytest.raises(SettingsError, match="two or more different numbers"):
            sweep(guided, weights)


def test_validation_loss_is_untouched_by_reading(source, tmp_path: Path):
    settings = tiny(tmp_path, init=source, epochs=1)
    run = fit(settings)
    logits, labels = [], []
    for batch in Batches(load_data(settings).val, run.config, 8, train=False):
        with torch.no_grad():
            logits.append(run.model()(batch.images))
        labels.append(batch.labels)
    expected = F.cross_entropy(torch.cat(logits), torch.cat(labels))
    assert run.metrics[0]["val_loss"] == pytest.approx(expected.item(), rel=1e-5)
