"""What holds for every source that asks a model: no trace, no gradient, the model's own logits, any grid and batch."""

import contextlib
import copy
import inspect

import pytest
import torch
from torch import nn

import foveal
from foveal import maps
from map_models import MODELS, batch, everything, resnet, same, vit

SOURCES = {
    "head_cosine": lambda m: maps.HeadCosine(m),
    "head_cosine of an earlier block": lambda m: maps.HeadCosine(m, layer=0),
    "topdown": lambda m: maps.TopDown.fresh(m),
    "label_biased": lambda m: maps.LabelBiased(m),
    "label_biased at 0": lambda m: maps.LabelBiased(m, sigma=0.0),
    "class_attention": lambda m: maps.ClassAttention(m),
    "received_attention": lambda m: maps.ReceivedAttention(m),
    "input_gradient": lambda m: maps.InputGradient(m),
    "grad_cam": lambda m: maps.GradCAM(m),
}
OF_ANY_MODEL = ("head_cosine", "input_gradient")


@pytest.fixture(params=SOURCES)
def source_of(request):
    return SOURCES[request.param]


def test_every_name_is_tested_here():
    of_models = {name for name, kind in maps.MAPS.items() if "model" in inspect.signature(kind).parameters}
    discovered = {"tokencut", "maskcut", "lost", "dino"}  # test_discover_sources.py
    assert of_models - discovered == {name.partition(" ")[0] for name in SOURCES}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("B", [1, 2, 3])
def test_maps_are_not_negative_and_on_the_models_grid(source_of, name, B):
    build, size, grid = MODELS[name]
    model = build()
    if name == "pooled" and source_of is SOURCES["class_attention"]:
        pytest.skip("has no class token")
    images, labels = batch(B, size)
    source = source_of(model)
    found = source(images, labels)
    assert source.model is model
    assert found.map.shape == (B, *(size if isinstance(source, maps.InputGradient) else grid))
    assert found.map.dtype == torch.float32
    assert (found.map >= 0).all()
    assert not found.blank.any()
    assert (found.map.flatten(1).amax(1) > found.map.flatten(1).amin(1)).all()
    with torch.no_grad():
        assert torch.equal(found.logits, model.eval()(images))


def test_images_do_not_see_their_neighbours(source_of):
    model = vit(img_size=(28, 20))
    images, labels = batch(3, (28, 20))
    source = source_of(model)
    together = source(images, labels).map
    for i in range(3):
        alone = source(images[i : i + 1], labels[i : i + 1]).map[0]
        alone = alone / 3 if isinstance(source, maps.InputGradient) else alone  # gradient of the batch's mean loss
        assert torch.allclose(together[i], alone, atol=1e-5)


def test_no_trace(source_of):
    model = vit(drop_rate=0.1, drop_path_rate=0.2, attn_drop_rate=0.1)
    model.blocks[1].eval()  # modes that differ within the model
    images, labels = batch(3, (32, 32))
    model(images).sum().backward()
    model.blocks[0].requires_grad_(False)
    before, kept = everything(model), (images.clone(), labels.clone())
    found = source_of(model)(images, labels)
    assert same(before, everything(model))
    assert same(list(kept), [images, labels])
    assert not found.map.requires_grad
    assert not found.logits.requires_grad
    assert images.grad is None
    assert torch.is_grad_enabled()


class Stop(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_no_trace_when_the_forward_raises(source_of, error):
    model = vit()
    model.blocks[2].mlp.fc2 = Stop(error)
    model.blocks[1].eval()
    images, labels = batch(2, (32, 32))
    source = source_of(model)
    before = everything(model)
    with pytest.raises(type(error)):
        source(images, labels)
    assert same(before, everything(model))


def test_no_trace_when_the_label_is_refused():
    model = vit()
    images, _ = batch(2, (32, 32))
    for name in ("head_cosine", "topdown", "label_biased", "input_gradient"):
        source = SOURCES[name](model)
        before = everything(model)
        for labels in (torch.tensor([0, 5]), torch.tensor([-1, 0]), torch.zeros(2, 4), torch.zeros(2)):
            with pytest.raises((ValueError, RuntimeError)):
                source(images, labels)
        assert same(before, everything(model))


@pytest.mark.parametrize("name", OF_ANY_MODEL)
def test_statistics_of_batch_norm_do_not_move(name):
    model = resnet()
    images, labels = batch(2, (64, 64))
    before = everything(model)
    found = SOURCES[name](model)(images, labels)
    assert same(before, everything(model))
    with torch.no_grad():
        assert torch.equal(found.logits, model.eval()(images))


def test_readers_outside_see_nothing_of_it(source_of):
    model = vit()
    images, labels = batch(2, (32, 32))
    source = source_of(model)
    with foveal.attach(model), torch.no_grad(), foveal.read(model, layers="all") as seen:
        source(images, labels)
        model(images + 1)
        source(images, labels)
    assert len(seen.calls) == 1
    with torch.no_grad(), foveal.read(model.eval(), layers="all") as alone:
        model(images + 1)
    model.train()
    with torch.no_grad(), foveal.read(model.eval(), layers="all") as seen:
        source(images, labels)
        model(images + 1)
    assert all(torch.equal(a, b) for a, b in zip(seen.class_logits(), alone.class_logits(), strict=True))


def test_the_training_forward_in_the_same_autocast_block_still_has_gradients(source_of):
    """A weight that was cast without gradient must not come back from autocast's cache."""
    images, labels = batch(3, (32, 32))

    def gradients(ask):
        model = vit()
        source = source_of(model)
        with torch.autocast("cpu", torch.bfloat16):
            if ask:
                source(images, labels)
            loss = nn.functional.cross_entropy(model(images).float(), labels)
        loss.backward()
        return [p.grad for p in model.parameters()]

    for plain, asked in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, asked)


def test_autocasts_cache_is_off_inside_only():
    """Newer torch keeps gradients apart in its cache, so the test above says nothing there."""
    from foveal.maps.asking import asking

    model = vit()
    with torch.autocast("cpu", torch.bfloat16):
        with asking(model):
            assert torch.is_autocast_enabled("cpu")
            assert torch.get_autocast_dtype("cpu") == torch.bfloat16
            assert not torch.is_autocast_cache_enabled()
        assert torch.is_autocast_cache_enabled()
    with asking(model):
        assert not torch.is_autocast_enabled("cpu")


def test_autocast_inside_counts():
    model = vit()
    images, labels = batch(3, (32, 32))
    for name, make in SOURCES.items():
        source = make(model)
        exact = source(images, labels)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = source(images, labels)
        assert rounded.map.dtype == rounded.logits.dtype == torch.float32, name
        assert not torch.equal(rounded.logits, exact.logits), name
        # eight bits through three blocks: the two maps still point at the same places
        assert torch.nn.functional.cosine_similarity(exact.map.flatten(1), rounded.map.flatten(1)).min() > 0.9, name


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_any_grad_mode_outside(source_of, context):
    model = vit()
    images, labels = batch(2, (32, 32))
    source = source_of(model)
    expected = source(images, labels)
    with context():
        got = source(images.clone(), labels.clone())
    assert torch.equal(got.map, expected.map)
    assert not got.map.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_in_other_float_types(source_of, dtype):
    model = vit(dtype=dtype)
    images, labels = batch(2, (32, 32))
    found = source_of(model)(images, labels)
    assert found.map.dtype == found.logits.dtype == torch.float32
    assert found.map.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images(source_of, dtype):
    model = vit()
    images, labels = batch(2, (32, 32))
    images = images.to(dtype)
    source = source_of(model)
    assert torch.equal(source(images, labels).map, source(images.float(), labels).map)


def test_a_checkpointed_model(source_of):
    model = vit()
    images, labels = batch(2, (32, 32))
    source = source_of(model)
    expected = source(images, labels).map
    model.set_grad_checkpointing(True)
    assert torch.allclose(source(images, labels).map, expected, atol=1e-7)


def test_a_copied_model_has_its_own_source(source_of):
    model = vit()
    images, labels = batch(2, (32, 32))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    torch.manual_seed(3)
    assert not source_of(twin)(images, labels).blank.any()


def ask_without_data(source, monkeypatch):
    """On the device without data every question fails, and so does a tensor that was left on the CPU."""
    source.model.to("meta")
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # knows no such device
    images, labels = torch.empty(3, 3, 32, 32, device="meta"), torch.empty(3, dtype=torch.long, device="meta")
    found = source(images, labels)
    assert found.map.device.type == found.logits.device.type == found.blank.device.type == "meta"
    assert len(source(images, labels.expand(5, 3).T.float()).map) == 3  # rows


def test_nothing_is_asked_of_the_device(source_of, monkeypatch):
    ask_without_data(source_of(vit()), monkeypatch)


@pytest.mark.parametrize("kind", [maps.HeadCosine, maps.LabelBiased])
@pytest.mark.parametrize(
    "options", [{"label_vectors": "permuted"}, {"label_vectors": "random"}, {"vectors": torch.ones(5, 32)}]
)
def test_nothing_is_asked_of_the_device_for_other_vectors(kind, options, monkeypatch):
    ask_without_data(kind(vit(), **options), monkeypatch)


# -- by name


def test_sources_by_name():
    model = vit()
    images, labels = batch(2, (32, 32))
    for name in ("head_cosine", "label_biased", "class_attention", "received_attention", "input_gradient"):
        source = maps.make(name, model)
        assert type(source) is maps.MAPS[name]
        assert torch.equal(source(images, labels).map, maps.MAPS[name](model)(images, labels).map)
    assert maps.make("label_biased", model, sigma=0.25, bottom_up="class").sigma == 0.25


def test_pixel_sources_are_told_the_normalisation():
    from foveal.data.config import ImageConfig

    model = vit()
    images, _ = batch(2, (32, 32))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    for name in ("centre_surround", "spectral_residual"):
        told = maps.make(name, model, config=ImageConfig((32, 32), mean, std))
        expected = maps.MAPS[name](mean=mean, std=std)
        assert torch.equal(told(images).map, expected(images).map)
        by_default = maps.make(name, model)
        assert by_default.model is None
        usual = maps.MAPS[name](mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
        assert torch.equal(by_default(images).map, usual(images).map)
    assert maps.make("given", model).model is None


def test_names_and_options_that_are_not_known():
    model = vit()
    with pytest.raises(ValueError, match=r"did you mean 'head_cosine'.*there are head_cosine, topdown"):
        maps.make("headcosine", model)
    with pytest.raises(TypeError, match="'head_cosine' has no option 'treshold'; did you mean 'threshold'"):
        maps.make("head_cosine", model, treshold=False)
    with pytest.raises(TypeError, match="'given' has no option 'sigma'"):
        maps.make("given", model, sigma=1.0)
