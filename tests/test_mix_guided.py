"""Mixers that follow a map: what is always true of them, and how they ask for maps in a step."""

import copy
import pickle
from dataclasses import fields, replace

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import foveal
from foveal import chance
from foveal.maps import MapWarning
from foveal.mix import MIXERS, MapMixer, label_rows, soft_cross_entropy
from foveal.mix.guided import CellMixer
from sources import Fixed

GUIDED = [name for name, kind in MIXERS.items() if issubclass(kind, MapMixer)]
every = pytest.mark.parametrize("name", GUIDED)
ON_CELLS = [name for name in GUIDED if issubclass(MIXERS[name], CellMixer)]
MOVING = ("tdattenmix", "smmix", "puzzlemix")  # show pixels of the partner at other places
WAITING = ("puzzlemix",)  # asks the device
SIZES = {(32, 32): (8, 8), (28, 20): (7, 5), (56, 56): (14, 14)}


def made(name, **settings):
    """The mixer, in steps that follow the map."""
    known = {one.name for one in fields(MIXERS[name])}
    always = {"switch_prob": 1.0} if "switch_prob" in known else {}
    return MIXERS[name](**{k: v for k, v in (always | settings).items() if k in known})


def rng(seed=0):
    return chance.generator(seed, "mix", 0)


def batch(B, size=(32, 32), dtype=torch.float32, channels=3):
    return torch.randn(B, channels, *size, generator=torch.Generator().manual_seed(B)).to(dtype)


def maps(B, grid=(8, 8), seed=0):
    return torch.rand(B, *grid, generator=torch.Generator().manual_seed(seed))


def given(B, grid):
    """Maps of every kind: none, random, constant, zero, thresholded, one of them blank."""
    random = maps(B, grid)
    some = random.clone()
    some[B // 2] = 0.0
    return {
        "none": None,
        "random": random,
        "constant": torch.full((B, *grid), 0.3),
        "zero": torch.zeros(B, *grid),
        "thresholded": (random - 0.7).clamp_min(0),
        "one blank": some,
    }


KINDS_OF_MAP = list(given(1, (1, 1)))


# -- always true


@every
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("B", [1, 2, 5])
def test_labels_follow_what_can_be_seen(name, size, B):
    images, labels = batch(B, size, torch.float64), torch.arange(B) // 2  # some partners of one class
    for settings in ({}, {"mode": "pair"}, {"mode": "elem"}):
        mixer = made(name, **settings)
        for kind, map in given(B, SIZES[size]).items():
            for seed in range(3):
                draw = mixer.draw(B, size, SIZES[size], rng=rng(seed))
                mixed = mixer.apply(images, draw, map)
                keep, (weights,) = mixed.keep, mixed.factors
                for mask in (keep, mixed.visible_own, mixed.visible_partner):
                    assert mask.shape == (B, 1, *size)
                    assert ((mask >= 0) & (mask <= 1)).all()
                if name not in MOVING:
                    assert torch.equal(mixed.images, torch.where(keep == 1, images, images[mixed.perm]))
                by_area = name in ("smmix", "saliencymix", "attentivemix") or kind in ("none", "zero", "constant")
                if by_area and name != "puzzlemix":
                    assert torch.allclose(weights.own, keep.mean((1, 2, 3)), atol=1e-6)
                assert weights.own.dtype == torch.float32
                targets = mixed.targets(labels, B)
                assert (targets >= 0).all()
                assert torch.allclose(targets.sum(-1), torch.ones(B))


@every
def test_a_single_image_and_the_middle_of_an_odd_batch_stay(name):
    mixer = made(name)
    for B, alone in ((1, 0), (5, 2)):
        images = batch(B)
        for seed, map in enumerate(given(B, (8, 8)).values()):
            mixed = mixer.apply(images, mixer.draw(B, (32, 32), (8, 8), rng=rng(seed)), map)
            assert torch.equal(mixed.images[alone], images[alone])
            assert mixed.keep[alone].min() == mixed.factors[0].own[alone] == 1.0
            assert torch.equal(mixed.targets(torch.arange(B), B)[alone], torch.eye(B)[alone])


@every
def test_the_partner_is_the_batch_backwards(name):
    assert made(name).draw(5, (32, 32), (8, 8), rng=rng()).perm.tolist() == [4, 3, 2, 1, 0]


@every
def test_images_and_maps_are_not_touched_and_no_chance_is_taken(name):
    mixer, images, map, g = made(name), batch(4), maps(4), rng()
    before, state = copy.deepcopy((images, map)), torch.get_rng_state()
    draw = mixer.draw(4, (32, 32), (8, 8), rng=g)
    drawn = g.get_state()
    one, other = (mixer.apply(images, draw, map) for _ in range(2))
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.factors[0].own, other.factors[0].own)
    assert torch.equal(images, before[0])
    assert torch.equal(map, before[1])
    assert images._version == map._version == 0
    assert torch.equal(g.get_state(), drawn)
    assert torch.equal(torch.get_rng_state(), state)


@every
def test_the_same_key_draws_the_same_and_another_does_not(name):
    mixer, images = made(name), batch(4)
    same = [mixer.apply(images, mixer.draw(4, (32, 32), (8, 8), rng=rng(seed)), maps(4)) for seed in (0, 0)]
    assert torch.equal(same[0].images, same[1].images)
    seen = [mixer.apply(images, mixer.draw(4, (32, 32), (8, 8), rng=rng(seed)), maps(4)).images for seed in range(6)]
    assert any(not torch.equal(seen[0], one) for one in seen[1:])


@every
def test_the_map_decides(name):
    mixer, images = made(name), batch(4)
    draws = [mixer.draw(4, (32, 32), (8, 8), rng=rng(seed)) for seed in range(6)]
    one, other = ([mixer.apply(images, draw, map) for draw in draws] for map in (maps(4), maps(4, seed=1)))
    assert any(
        not torch.equal(a.targets(torch.arange(4), 4), b.targets(torch.arange(4), 4))
        or not torch.equal(a.images, b.images)
        for a, b in zip(one, other, strict=True)
    )


@every
def test_only_its_own_and_its_partners_map_count(name):
    """A pair is mixed as if the other pairs were not there: other labels and images leave it what it was."""
    mixer, images, changed = made(name), batch(6), batch(6)
    map, other = maps(6), maps(6)
    changed[[1, 4]], other[[1, 4]] = batch(2), maps(2, seed=7)
    rest = [0, 2, 3, 5]
    for seed in range(4):
        draw = mixer.draw(6, (32, 32), (8, 8), rng=rng(seed))
        a, b = mixer.apply(images, draw, map), mixer.apply(changed, draw, other)
        assert torch.equal(a.images[rest], b.images[rest])
        assert torch.allclose(a.factors[0].own[rest], b.factors[0].own[rest], atol=1e-6)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_keep_their_type_and_sums_are_float32(name, dtype):
    mixer, images = made(name), batch(4, dtype=dtype)
    draw = mixer.draw(4, (32, 32), (8, 8), rng=rng())
    mixed = mixer.apply(images, draw, maps(4).to(dtype))
    assert mixed.images.dtype == dtype
    assert mixed.keep.dtype == mixed.factors[0].own.dtype == torch.float32


@every
@pytest.mark.parametrize("channels", [1, 4])
def test_any_number_of_channels(name, channels):
    mixer = made(name) if name != "puzzlemix" else replace(made(name), std=(0.5,) * channels)
    images = batch(4, channels=channels)
    draw = mixer.draw(4, (32, 32), (8, 8), rng=rng())
    assert mixer.apply(images, draw, maps(4)).images.shape == images.shape


@every
def test_no_gradient_flows_through_maps_masks_and_weights(name):
    mixer, images = made(name), batch(4).requires_grad_()
    mixed = mixer.apply(images, mixer.draw(4, (32, 32), (8, 8), rng=rng()), maps(4).requires_grad_())
    assert not mixed.keep.requires_grad
    assert not mixed.factors[0].own.requires_grad
    assert not mixed.factors[0].partner.requires_grad


@every
def test_probability_zero_never_mixes_and_asks_no_map(name):
    mixer, images = made(name, prob=0.0), batch(4)
    for seed in range(4):
        draw = mixer.draw(4, (32, 32), (8, 8), rng=rng(seed))
        mixed = mixer.apply(images, draw, maps(4))
        assert not mixer.follows(draw)
        assert torch.equal(mixed.images, images)
        assert torch.equal(mixed.factors[0].own, torch.ones(4))


@pytest.mark.parametrize("name", [name for name in GUIDED if name not in WAITING])
@pytest.mark.parametrize("size", SIZES)
def test_nothing_waits_for_the_device(name, size):
    """On the meta device there are no values: whatever asks for one raises. Maps of the grid, of pixels, and none."""
    mixer, images = made(name), torch.empty(5, 3, *size, device="meta")
    draw = mixer.draw(5, size, SIZES[size], rng=rng())
    for map in (None, torch.empty(5, *SIZES[size], device="meta")):
        assert mixer.apply(images, draw, map).images.shape == images.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every
def test_the_same_draw_gives_the_same_on_a_gpu(name):
    mixer, images, map = made(name), batch(6), maps(6)
    for seed in range(4):
        draw = mixer.draw(6, (32, 32), (8, 8), rng=rng(seed))
        here, there = mixer.apply(images, draw, map), mixer.apply(images.cuda(), draw, map.cuda())
        assert torch.equal(here.keep, there.keep.cpu())
        assert torch.allclose(here.factors[0].own, there.factors[0].own.cpu(), atol=1e-6)
        assert torch.allclose(here.images, there.images.cpu(), atol=1e-6)  # a fused multiply-add rounds once


@every
def test_byte_images_are_refused(name):
    mixer = made(name)
    with pytest.raises(TypeError, match="uint8 cannot be blended"):
        mixer.apply(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), mixer.draw(4, (32, 32), (8, 8), rng=rng()), maps(4))


@every
def test_a_draw_for_other_images_is_refused(name):
    mixer = made(name)
    with pytest.raises(ValueError, match="draw for 4 images given 3"):
        mixer.apply(batch(3), mixer.draw(4, (32, 32), (8, 8), rng=rng()), maps(3))


# -- the step


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5))


def vit(**settings):
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    return VisionTransformer(**small | settings).train()


def labelled(B=4):
    return batch(B), torch.randint(5, (B,), generator=torch.Generator().manual_seed(B))


def with_map(name, map, **settings):
    mixer = made(name, cells=8, consistency=0.0, **settings)
    return replace(mixer, map=map if hasattr(map, "asked") else Fixed(map))


@every
@pytest.mark.parametrize("B", [2, 5])
def test_the_step_is_draw_map_apply_and_soft_cross_entropy(name, B):
    """Any module can be trained once the map is given from outside."""
    model, (images, labels), source = net(), labelled(B), Fixed(maps(B))
    mixer = with_map(name, source)
    expected = mixer.apply(images, mixer.draw(B, (32, 32), (8, 8), rng=rng(7)), maps(B))
    masks = maps(B, (32, 32), seed=3) > 0.5
    with mixer.on(model, images, labels, rng=rng(7), num_classes=5, given=masks) as step:
        logits = model(step.images)
    ((asked, with_labels, passed),) = source.asked
    assert asked is images
    assert with_labels is labels
    assert passed is masks
    assert torch.equal(step.images, expected.images)
    assert torch.equal(step.targets(), expected.targets(labels, 5))
    wanted = soft_cross_entropy(logits, expected.mix_labels(label_rows(labels, 5, 0.1)))
    assert torch.isclose(step.loss(logits, smoothing=0.1), wanted)
    assert torch.equal(step.accuracy(logits), expected.accuracy(logits, labels))


@every
def test_an_untrusted_map_is_not_asked_and_every_place_counts_alike(name):
    model, (images, labels), source = net(), labelled(), Fixed(maps(4))
    mixer = with_map(name, source)
    expected = mixer.apply(images, mixer.draw(4, (32, 32), (8, 8), rng=rng()), None)
    with mixer.on(model, images, labels, rng=rng(), trusted=False) as step:
        assert torch.equal(step.images, expected.images)
        assert torch.equal(step.targets(5), expected.targets(labels, 5))
    assert not source.asked
    assert all(value.isnan() for value in step.measures().values())


@every
def test_what_is_measured(name):
    model, (images, labels) = net(), labelled()
    map = maps(4)
    map[1] = 2.0  # prefers no place
    masks = torch.zeros(4, 32, 32, dtype=torch.bool)
    masks[:, :16] = True
    mixer = with_map(name, map)
    with (
        pytest.warns(MapWarning, match="prefer no place"),
        mixer.on(model, images, labels, rng=rng(), given=masks) as step,
    ):
        measured = step.measures()
    assert tuple(measured) == mixer.measures == ("map_blank", "map_on_object")
    assert measured["map_blank"] == 0.25
    held = [float(map[i, :4].sum() / map[i].sum()) for i in (0, 2, 3)]  # the upper half
    assert torch.isclose(measured["map_on_object"], torch.tensor(sum(held) / 3))
    with with_map(name, map).on(model, images, labels, rng=rng()) as step:
        assert step.measures()["map_on_object"].isnan()


@every
def test_gradients_reach_the_model_and_nothing_is_changed(name):
    model, (images, labels) = net(), labelled()
    before = copy.deepcopy((model.state_dict(), images, labels))
    with with_map(name, maps(4)).on(model, images, labels) as step:
        step.loss(model(step.images)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert torch.equal(images, before[1])
    assert torch.equal(labels, before[2])
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), model.state_dict().values(), strict=True))


@every
def test_rows_of_labels_and_indices_agree(name):
    model, (images, labels) = net(), labelled()
    losses = []
    for given_labels in (labels, torch.eye(5)[labels]):
        with with_map(name, maps(4)).on(model, images, given_labels, rng=rng()) as step:
            losses.append(step.loss(model(step.images), 0.1))
    assert torch.isclose(*losses)


@every
def test_the_default_map_on_a_vision_transformer(name):
    """By its name, made for the model and kept; two steps, the second with another model."""
    mixer, (images, labels) = made(name), labelled()
    for model in (vit(), vit()):
        for _ in range(2):
            with mixer.on(model, images, labels) as step:
                step.loss(model(step.images)).backward()
            assert mixer.source(model) is mixer.source(model)
        assert mixer.source(model).model in (model, None)
        assert model.head.weight.grad.isfinite().all()
        assert (step.measures()["map_blank"] <= 1).all()


@pytest.mark.parametrize("name", [name for name in GUIDED if name != "smmix"])
def test_a_map_that_fits_convolutional_networks(name):
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=5).train()
    source = foveal.maps.HeadCosine(model, threshold=False)
    images, labels = batch(4, (128, 96)), torch.arange(4)
    with replace(made(name), map=source).on(model, images, labels) as step:
        step.loss(model(step.images)).backward()
    assert 0 < step.mixed.keep.mean() < 1


def test_a_model_without_attention_is_refused_with_the_way_out():
    model = timm.create_model("resnet10t", num_classes=5)
    images, labels = batch(4, (64, 64)), torch.arange(4)
    for name in ("smmix", "attentivemix", "tokenmix"):
        with (
            pytest.raises(foveal.maps.MapModelError, match="head_cosine"),
            made(name, prob=0.0).on(model, images, labels),
        ):
            pass


def test_an_unknown_map_names_the_closest():
    with (
        pytest.raises(ValueError, match="did you mean 'head_cosine'"),
        MIXERS["tdattenmix"](map="head_cosin").on(vit(), *labelled()),
    ):
        pass


@every
def test_a_copy_of_a_mixer_holds_no_copy_of_a_model(name):
    mixer, model = made(name), vit()
    with mixer.on(model, *labelled()):
        pass
    assert mixer._made is not None
    for twin in (copy.deepcopy(mixer), copy.copy(mixer), pickle.loads(pickle.dumps(mixer))):
        assert twin == mixer
        assert twin._made is None
    assert mixer._made is not None


@pytest.mark.parametrize("name", ON_CELLS)
def test_cells_are_the_models_or_those_asked_for(name):
    model = vit(img_size=(28, 20))
    assert made(name).grid(model, (28, 20)) == (7, 5)
    assert made(name, cells=(14, 10)).grid(model, (28, 20)) == (14, 10)
    assert made(name, cells=[14, 10]) == made(name, cells=(14, 10))
    assert made(name, cells=4).grid(model, (28, 20)) == (4, 4)
    images, labels = batch(4, (28, 20)), torch.arange(4)
    with made(name, cells=(14, 10)).on(model, images, labels) as step:
        cells = step.mixed.keep[:, 0].unfold(1, 2, 2).unfold(2, 2, 2).flatten(-2)
        assert (cells == cells[..., :1]).all()


@pytest.mark.parametrize("name", ON_CELLS)
def test_cells_that_do_not_fit_are_named(name):
    with pytest.raises(ValueError, match=r"28 x 20 pixels do not split into 8 x 8 cells.*cells=\(7, 10\)"):
        made(name).draw(4, (28, 20), (8, 8), rng=rng())
    with pytest.raises(ValueError, match=r"draw with grid=\(h, w\), or set cells"):
        made(name).draw(4, (28, 20), rng=rng())
    with pytest.raises(ValueError, match="at least one cell"):
        made(name, cells=(0, 4))


@pytest.mark.parametrize("name", ["tdattenmix", "tokenmix", "saliencymix"])
@pytest.mark.parametrize(
    "map",
    [
        "head_cosine",
        "label_biased",
        "class_attention",
        "received_attention",
        "centre_surround",
        "spectral_residual",
        "input_gradient",
        "given",
    ],
)
def test_any_map_by_its_name(name, map):
    """With masks given, for the map `given`; others do not look at them."""
    model, (images, labels) = vit(), labelled(5)
    masks = torch.zeros(5, 32, 32)
    masks[:, 4:20, 8:16] = 1.0
    mixer = made(name, map=map)
    with mixer.on(model, images, labels, rng=rng(), given=masks) as step:
        losses = step.losses(model(step.images))
        torch.stack(list(losses.values())).sum().backward()
    assert (step.mixed.keep < 1).any()
    assert step.measures()["map_on_object"].isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_compiled_model_compiles_once_for_each_kind_of_step():
    """Steps that read the training forward and steps that do not take one graph each; the extra forward takes none."""
    model, twin, (images, labels), graphs = vit(), vit(), labelled(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    one, other = (MIXERS["tdattenmix"](region=1.0) for _ in range(2))
    with foveal.attach(model):
        compiled = torch.compile(model, backend=backend)
        one.learned(compiled, 5)
        other.learned(twin, 5)
        for seed in range(6):
            losses = []
            for net, mixer in ((compiled, one), (twin, other)):
                with mixer.on(net, images, labels, rng=rng(seed)) as step:
                    losses.append(torch.stack(list(step.losses(net(step.images)).values())))
            assert torch.allclose(*losses, atol=1e-5)
    assert len(graphs) == 2
