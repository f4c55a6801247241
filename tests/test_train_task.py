"""What a training step computes: the loss that is written down, accumulation, divergence, what checkpoints hold."""

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from foveal.chance import generator
from foveal.data.batches import Batches
from foveal.mix import TransMix
from foveal.train import DivergedError, Run, RunError, Settings, fit
from foveal.train.fitting import load_data
from foveal.train.models import build
from training import TINY, tiny


def first_batch(settings: Settings):
    data = load_data(settings)
    built = build(settings, len(data.classes))
    batches = Batches(data.train, built.image, settings.batch_size, train=True, seed=settings.seed, flip=data.flip)
    return built.model, next(iter(batches))


def test_the_first_loss_is_that_of_the_initial_model_on_the_first_batch(tmp_path: Path):
    settings = tiny(tmp_path, epochs=1, smoothing=0.2)
    row = fit(settings).steps[0]
    model, batch = first_batch(settings)
    logits = model(batch.images)
    expected = F.cross_entropy(logits, batch.labels, label_smoothing=0.2)
    assert row["loss"] == pytest.approx(expected.item(), rel=1e-5)  # float32, summed in another order
    assert row["accuracy"] == pytest.approx(float((logits.argmax(-1) == batch.labels).float().mean()))


def test_mixing_and_guidance_are_composed_on_the_same_images(tmp_path: Path):
    torch.manual_seed(0)
    source = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **TINY)
    save_file(source.state_dict(), tmp_path / "source.safetensors")
    init = {"init": str(tmp_path / "source.safetensors"), "mix": "transmix", "epochs": 1, "lr": 0.01}
    run = fit(tiny(tmp_path, guide="gta", guide_weight=3.0, **init))
    model, batch = first_batch(run.settings)
    mixer = TransMix()
    rng = generator(0, "mix", 0, 0)
    with mixer.on(model, batch.images, batch.labels, rng=rng, num_classes=5) as step:
        logits = model(step.images)
        loss, accuracy = step.loss(logits), step.accuracy(logits)
    first, second = run.steps[:2]
    assert first["gta"] == 0.0  # the model still is its source
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert first["accuracy"] == pytest.approx(float(accuracy), rel=1e-5)
    assert second["gta"] > 0.0
    assert run.metrics[0]["train_gta"] > 0.0
    plain = fit(tiny(tmp_path, **init).replace(name="plain"))
    assert "gta" not in plain.steps[0]
    assert plain.steps[1]["loss"] != second["loss"]


def test_the_source_is_in_no_checkpoint(tmp_path: Path):
    torch.manual_seed(0)
    source = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5, **TINY)
    save_file(source.state_dict(), tmp_path / "source.safetensors")
    run = fit(tiny(tmp_path, epochs=1, init=str(tmp_path / "source.safetensors"), guide="gta", ema=0.9))
    checkpoint = torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == {f"model.{name}" for name in source.state_dict()}
    assert checkpoint["foveal"]["average"]["weights"].keys() == source.state_dict().keys()


def test_three_accumulated_forwards_are_one_large_one(tmp_path: Path):
    together = fit(tiny(tmp_path / "a", batch_size=21, epochs=2))
    apart = fit(tiny(tmp_path / "b", batch_size=7, accumulate=3, epochs=2))
    assert len(together.steps) == len(apart.steps) == 6  # 50 images: 21, 21 and 8
    for one, other in zip(together.steps, apart.steps, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)  # the same sums in another order, 6 steps on
        assert one["accuracy"] == pytest.approx(other["accuracy"], abs=1e-6)


def test_the_epoch_row_is_the_mean_over_images(tmp_path: Path):
    run = fit(tiny(tmp_path, epochs=1, batch_size=20))
    sizes = torch.tensor([20.0, 20.0, 10.0], dtype=torch.float64)
    losses = torch.tensor([row["loss"] for row in run.steps], dtype=torch.float64)
    assert run.metrics[0]["train_loss"] == pytest.approx(float((losses * sizes).sum() / 50), rel=1e-12)


def test_a_diverging_run_ends_early_and_says_why(tmp_path: Path):
    settings = tiny(tmp_path, lr=1e30, layer_decay=1.0)
    with pytest.raises(DivergedError, match=r"not finite at epoch 1, step \d of 7\. Try a lower lr \(now 1e\+30\)"):
        fit(settings)
    with pytest.raises(RunError, match="has not finished"):
        Run.load(settings.folder)


def test_averaged_weights_are_validated_and_saved(tmp_path: Path):
    run = fit(tiny(tmp_path, epochs=1, ema=0.5))
    checkpoint = torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True)
    saved, average = load_file(run.folder / "model.safetensors"), checkpoint["foveal"]["average"]
    assert average["updates"] == 7
    assert all(torch.equal(saved[name], average["weights"][name]) for name in saved)
    assert not torch.equal(saved["head.weight"], checkpoint["state_dict"]["model.head.weight"])
    data = load_data(run.settings)
    images = next(iter(Batches(data.val, run.config, 64, train=False))).images
    with torch.no_grad():
        accuracy = (run.model()(images).argmax(-1) == data.val.labels).double().mean()
    assert run.metrics[0]["val_accuracy"] == pytest.approx(float(accuracy))


def test_bfloat16_trains_near_float32(tmp_path: Path):
    exact, near = fit(tiny(tmp_path / "a", epochs=1)), fit(tiny(tmp_path / "b", epochs=1, precision="bfloat16"))
    assert near.results["precision"] == "bfloat16"
    first, other = exact.steps[0]["loss"], near.steps[0]["loss"]
    assert first != other
    assert first == pytest.approx(other, rel=0.02)  # bfloat16 has 8 bits


def test_batches_of_one(tmp_path: Path):
    run = fit(tiny(tmp_path, data="scenes:train=5,val=3,test=3,classes=0-1", batch_size=1, epochs=1, mix="transmix"))
    assert len(run.steps) == 5
