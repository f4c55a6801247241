"""Occlusion: which patches go, what is left, and accuracy without them."""

import pytest
import timm
import torch
from torch import nn

from foveal.chance import generator
from foveal.data import ImageConfig, Images
from foveal.evaluate import occlude, occlusion
from foveal.evaluate.occlusion import ORDERS, SHARES, dropped
from foveal.evaluate.predict import predict
from foveal.maps import ClassAttention, Found
from foveal.stats import over_images

CONFIG = ImageConfig((16, 16))


def rng(seed=0):
    return generator(seed, "occlusion", 0)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def vit(**options):
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.models.VisionTransformer(**(sizes | options))


def images(n=9):
    x = torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Images(torch.arange(n) % 3, ("a", "b", "c"), x, masks=x[:, 0] > 200)


# -- which patches


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid", [(4, 4), (7, 5), (1, 1), (8, 8)])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_the_rounded_share_of_patches_goes(order, grid, share):
    gone = dropped(uniform(3, *grid), share, order, grid, batch=3, rng=rng())
    assert gone.shape == (3, *grid)
    assert gone.sum((1, 2)).tolist() == [int(share * grid[0] * grid[1] + 0.5)] * 3


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("ties", [False, True])
def test_salient_and_the_rest_of_the_non_salient_are_all(share, ties):
    map = uniform(4, 7, 6)
    map = (map > 0.5).float() if ties else map
    first = dropped(map, share, "salient", (7, 6), batch=4, rng=rng())
    rest = dropped(map, 1 - share, "non_salient", (7, 6), batch=4, rng=rng())
    assert torch.equal(first, ~rest)


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_gone_stays_gone(order):
    map = (uniform(4, 5, 7) * 4).floor()
    before = torch.zeros(4, 5, 7, dtype=torch.bool)
    for share in (*SHARES, 1.0):
        gone = dropped(map, share, order, (5, 7), batch=4, rng=rng())
        assert (gone | ~before).all()
        before = gone
    assert before.all()


def test_salient_patches_by_hand():
    map = torch.tensor([[[4.0, 1], [2, 3]]])
    find = {order: dropped(map, 0.5, order, (2, 2), batch=1, rng=rng())[0].tolist() for order in ORDERS[1:]}
    assert find["salient"] == [[True, False], [False, True]]
    assert find["non_salient"] == [[False, True], [True, False]]


def test_ties_are_broken_by_chance_and_random_needs_no_map():
    map = torch.ones(200, 2, 2)
    gone = dropped(map, 0.25, "salient", (2, 2), batch=200, rng=rng())
    assert gone.float().mean(0).min() > 0.1  # a quarter each, less five standard deviations
    assert torch.equal(gone, dropped(None, 0.25, "random", (2, 2), batch=200, rng=rng()))
    assert not torch.equal(gone, dropped(map, 0.25, "salient", (2, 2), batch=200, rng=rng(1)))


def test_maps_of_another_grid_are_averaged():
    fine = uniform(3, 8, 12)
    coarse = fine.view(3, 4, 2, 4, 3).mean((2, 4))
    kept = [dropped(map, 0.4, "salient", (4, 4), batch=3, rng=rng()) for map in (fine, coarse)]
    assert torch.equal(*kept)


def test_what_cannot_be_dropped():
    with pytest.raises(ValueError, match=r"share=1\.5"):
        dropped(None, 1.5, "random", (2, 2), batch=1, rng=rng())
    with pytest.raises(ValueError, match="not known; use one of random, salient, non_salient"):
        dropped(None, 0.5, "rando", (2, 2), batch=1, rng=rng())
    with pytest.raises(ValueError, match="needs a map"):
        dropped(None, 0.5, "salient", (2, 2), batch=1, rng=rng())


# -- images


@pytest.mark.parametrize(("size", "grid"), [((16, 16), (4, 4)), ((10, 7), (3, 2)), ((5, 5), (5, 5))])
def test_patches_that_go_are_zero_and_others_untouched(size, grid):
    x = uniform(3, 3, *size) + 1
    before = x.clone()
    out = occlude(x, uniform(3, *grid), 0.5, "salient", grid=grid, rng=rng())
    gone = dropped(uniform(3, *grid), 0.5, "salient", grid, batch=3, rng=rng())
    for b in range(3):
        for r in range(size[0]):
            for c in range(size[1]):
                left = not gone[b, r * grid[0] // size[0], c * grid[1] // size[1]]
                assert torch.equal(out[b, :, r, c], x[b, :, r, c] * left)
    assert torch.equal(x, before)


@pytest.mark.parametrize("order", ORDERS)
def test_nothing_and_everything(order):
    x, map = uniform(2, 3, 8, 8), uniform(2, 4, 4)
    assert torch.equal(occlude(x, map, 0.0, order, grid=(4, 4), rng=rng()), x)
    assert not occlude(x, map, 1.0, order, grid=(4, 4), rng=rng()).any()
    assert occlude(x.half(), map, 0.3, order, grid=(4, 4), rng=rng()).dtype == torch.float16


# -- accuracy


class Bright(nn.Module):
    """Right as long as any of the class's own rows of pixels is left."""

    def forward(self, x):
        return torch.stack([x[:, 0, 4 * k : 4 * k + 4].abs().sum((1, 2)) for k in range(3)], 1)


class Rows:
    """Salient where the label's rows are."""

    model = None

    def __call__(self, images, labels=None, given=None):
        map = torch.zeros(len(images), 4, 4)
        map[torch.arange(len(images)), labels] = 1.0
        return Found(map, torch.zeros(len(images), dtype=torch.bool))


def test_salient_patches_matter_and_others_do_not():
    labels = torch.arange(9) % 3
    pixels = torch.zeros(9, 3, 16, 16, dtype=torch.uint8)
    for i, label in enumerate(labels.tolist()):
        pixels[i, :, 4 * label : 4 * label + 4] = 255
    shown = Images(labels, ("a", "b", "c"), pixels)
    config = ImageConfig((16, 16), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    found = occlusion(Bright(), shown, config, Rows(), shares=(0, 0.25, 0.75), grid=(4, 4), batch_size=4)
    assert found.accuracy["salient"] == pytest.approx((1, 1 / 3, 1 / 3))  # nothing left: always the first class
    assert found.accuracy["non_salient"] == (1, 1, 1)
    assert found.accuracy["random"][1] == 1


def test_nothing_taken_away_is_plain_accuracy():
    model, given = vit(), images()
    found = occlusion(model, given, CONFIG, ClassAttention(model), shares=(0.0, 0.5), batch_size=4)
    plain = predict(model, given, CONFIG, batch_size=4)
    for order in ORDERS:
        assert torch.equal(found.correct[order][0], plain.correct)
        assert found.accuracy[order][0] == plain.accuracy
        assert found.correct[order].shape == (2, 9)
    assert over_images(found.correct["random"][:1].double()).mean == pytest.approx(plain.accuracy)


def test_set_is_its_batches_by_hand():
    model, given = vit().eval(), images()
    source = ClassAttention(model)
    found = occlusion(model, given, CONFIG, source, shares=(0.3,), seed=4, batch_size=4)
    for number, first in enumerate((0, 4, 8)):
        x = CONFIG.normalise(given.pixels[first : first + 4])
        map = source(x).map
        for order in ORDERS:
            left = occlude(x, map, 0.3, order, grid=(4, 4), rng=generator(4, "occlusion", number))
            right = model(left).argmax(1) == given.labels[first : first + 4]
            assert torch.equal(found.correct[order][0, first : first + 4], right)


def test_random_needs_no_source_and_defaults_are_tenths():
    found = occlusion(vit(), images(), CONFIG, orders=("random",))
    assert found.shares == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    assert list(found.accuracy) == ["random"]
    with pytest.raises(ValueError, match="give a source"):
        occlusion(vit(), images(), CONFIG)


def test_grid_is_the_models_own():
    found = occlusion(vit(img_size=(16, 40)), images(), ImageConfig((16, 40)), orders=("random",), shares=(1.0,))
    assert found.correct["random"].shape == (1, 9)


def test_model_is_left_alone():
    model = vit(proj_drop_rate=0.5).train()
    model.blocks[0].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    found = occlusion(model, images(), CONFIG, ClassAttention(model), shares=(0.5,))
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    again = occlusion(model, images(), CONFIG, ClassAttention(model), shares=(0.5,))
    assert all(torch.equal(found.correct[order], again.correct[order]) for order in ORDERS)
