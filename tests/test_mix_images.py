"""Mixers without a map: what is always true. Mixup, CutMix and their joint policy: by hand, torchvision, statistics."""

import copy
import math

import pytest
import torch
from scipy import stats
from torchvision.transforms import v2

from foveal import chance
from foveal.mix import (
    MIXERS,
    BlendBoxDraw,
    BoxDraw,
    CutMix,
    FMix,
    GridMix,
    MapMixer,
    Mixup,
    MixupCutMix,
    MixupDraw,
    NoMix,
    ResizeMix,
    SmoothMix,
    TransMix,
)
from foveal.mix.cutmix import box_share, cut_boxes, inside

MODES = ("batch", "pair", "elem")
KINDS = {
    "none": lambda mode: NoMix(),
    "mixup": lambda mode: Mixup(mode=mode),
    "cutmix": lambda mode: CutMix(mode=mode),
    "mixup+cutmix": lambda mode: MixupCutMix(mode=mode),
    "transmix": lambda mode: TransMix(mixup_alpha=0.8, mode=mode),
    "fmix": lambda mode: FMix(mode=mode),
    "gridmix": lambda mode: GridMix(mode=mode),
    "resizemix": lambda mode: ResizeMix(mode=mode),
    "smoothmix": lambda mode: SmoothMix(mode=mode),
}


def rng(seed=0):
    return chance.generator(seed, "mix", 0)


def batch(B, size=(32, 32), dtype=torch.float32, channels=3):
    return torch.randn(B, channels, *size, generator=torch.Generator().manual_seed(B)).to(dtype)


def draws(mixer, B, size=(32, 32), count=8):
    return [mixer.draw(batch=B, image_size=size, grid=(8, 8), rng=rng(seed)) for seed in range(count)]


every = pytest.mark.parametrize("kind", KINDS)
each_mode = pytest.mark.parametrize("mode", MODES)


# -- always true


def test_every_name_of_the_dictionary_is_tested_here():
    assert set(KINDS) == {name for name, kind in MIXERS.items() if not issubclass(kind, MapMixer)}
    assert all(type(KINDS[name]("batch")) is MIXERS[name] for name in KINDS)


@every
@each_mode
@pytest.mark.parametrize(("B", "size"), [(1, (32, 32)), (2, (28, 20)), (5, (32, 32)), (8, (7, 50)), (2, (224, 224))])
def test_pixels_and_labels_follow_the_mask(kind, mode, B, size):
    mixer, images = KINDS[kind](mode), batch(B, size, torch.float64)
    labels = torch.arange(B)
    for draw in draws(mixer, B, size):
        mixed = mixer.apply(images, draw)
        keep, (weights,) = mixed.keep.double(), mixed.factors
        assert mixed.keep.shape == (B, 1, *size)
        if kind != "resizemix":  # pixels that move: see test_resizemix.py
            # float32 shares of a smooth mask, else exact
            expected = keep * images + (1 - keep) * images[mixed.perm]
            assert torch.allclose(mixed.images, expected, atol=1e-6 if kind == "smoothmix" else 1e-12)
        pixel = 1 / (size[0] * size[1]) if kind == "fmix" else 0.0  # its label is the weight that was drawn
        assert torch.allclose(weights.own.double(), keep.mean((1, 2, 3)), atol=1e-6 + pixel)  # float32 shares
        assert torch.equal(weights.perm, mixed.perm)
        targets = mixed.targets(labels, B)
        assert torch.allclose(targets.sum(-1), torch.ones(B))
        assert (targets >= 0).all()


@every
@each_mode
def test_a_single_image_and_the_middle_of_an_odd_batch_stay(kind, mode):
    mixer = KINDS[kind](mode)
    for B, alone in ((1, 0), (5, 2)):
        images = batch(B)
        for draw in draws(mixer, B):
            mixed = mixer.apply(images, draw)
            assert torch.equal(mixed.images[alone], images[alone])
            assert mixed.keep[alone].min() == mixed.factors[0].own[alone] == 1.0
            assert torch.equal(mixed.targets(torch.arange(B), B)[alone], torch.eye(B)[alone])


@every
def test_the_partner_is_the_batch_backwards(kind):
    (draw,) = draws(KINDS[kind]("batch"), 5, count=1)
    assert draw.perm.tolist() == ([0, 1, 2, 3, 4] if kind == "none" else [4, 3, 2, 1, 0])


@every
@each_mode
def test_the_given_images_are_not_touched(kind, mode):
    mixer, images = KINDS[kind](mode), batch(4)
    before = images.clone()
    for draw in draws(mixer, 4):
        mixer.apply(images, draw)
    assert torch.equal(images, before)
    assert images._version == 0


@every
@each_mode
def test_the_same_key_draws_the_same_and_another_does_not(kind, mode):
    mixer, images = KINDS[kind](mode), batch(4)
    one, same, other = (mixer.draw(4, (32, 32), rng=rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(mixer.apply(images, one).images, mixer.apply(images, same).images)
    assert torch.equal(mixer.apply(images, one).images, mixer.apply(images, one).images)
    if kind != "none":
        assert not torch.equal(mixer.apply(images, one).images, mixer.apply(images, other).images)


@every
def test_the_global_generator_is_not_used(kind):
    mixer, state = KINDS[kind]("elem"), torch.get_rng_state()
    mixer.apply(batch(4), mixer.draw(4, (32, 32), rng=rng()))
    assert torch.equal(torch.get_rng_state(), state)


@every
def test_applying_takes_no_chance_at_all(kind):
    mixer, g = KINDS[kind]("elem"), rng()
    draw = mixer.draw(4, (32, 32), rng=g)
    state = g.get_state()
    mixer.apply(batch(4), draw)
    assert torch.equal(g.get_state(), state)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_keep_their_type_and_are_computed_in_float32(kind, dtype):
    mixer, images = KINDS[kind]("elem"), batch(4, dtype=dtype)
    for draw in draws(mixer, 4):
        mixed = mixer.apply(images, draw)
        assert mixed.images.dtype == dtype
        assert mixed.keep.dtype == mixed.factors[0].own.dtype == torch.float32
        if dtype != torch.float64:
            assert torch.equal(mixed.images, mixer.apply(images.float(), draw).images.to(dtype))


@every
@pytest.mark.parametrize("channels", [1, 4])
def test_any_number_of_channels(kind, channels):
    mixer, images = KINDS[kind]("elem"), batch(4, channels=channels)
    assert mixer.apply(images, mixer.draw(4, (32, 32), rng=rng())).images.shape == images.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every
@each_mode
def test_the_same_draw_gives_the_same_on_a_gpu(kind, mode):
    mixer, images = KINDS[kind](mode), batch(6)
    for draw in draws(mixer, 6):
        here, there = mixer.apply(images, draw), mixer.apply(images.cuda(), draw)
        assert torch.equal(here.keep, there.keep.cpu())
        assert torch.equal(here.factors[0].own, there.factors[0].own.cpu())
        assert torch.allclose(here.images, there.images.cpu(), atol=1e-6)  # a fused multiply-add rounds once


# -- who shares a draw


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
def test_masks_are_shared_as_the_mode_says(kind):
    B, others = 7, [0, 1, 2, 4, 5, 6]

    def masks(mode, count=8):
        return [KINDS[kind](mode).apply(batch(B), draw).keep for draw in draws(KINDS[kind](mode), B, count=count)]

    assert all(torch.equal(keep[i], keep[0]) for keep in masks("batch") for i in others)
    assert all(torch.equal(keep[i], keep[B - 1 - i]) for keep in masks("pair") for i in others)
    assert any(not torch.equal(keep[0], keep[1]) for keep in masks("pair"))
    assert any(not torch.equal(keep[0], keep[B - 1]) for keep in masks("elem"))


def rows_of(draw):
    return [tuple(x.tolist()) for x in (torch.stack([draw.lam] * 4, 1) if isinstance(draw, MixupDraw) else draw.box)]


@pytest.mark.parametrize("kind", ["mixup", "cutmix", "mixup+cutmix"])
def test_batch_pair_and_elem_share_draws(kind):
    for B in (6, 7):
        others = [i for i in range(B) if i != B - 1 - i]
        for draw in draws(KINDS[kind]("batch"), B):
            assert len({rows_of(draw)[i] for i in others}) == 1
        for draw in draws(KINDS[kind]("pair"), B):
            assert all(rows_of(draw)[i] == rows_of(draw)[B - 1 - i] for i in others)
        assert any(len({rows_of(draw)[i] for i in others}) > 1 for draw in draws(KINDS[kind]("pair"), B))
        assert any(rows_of(draw)[0] != rows_of(draw)[B - 1] for draw in draws(KINDS[kind]("elem"), B))


def test_a_pair_exchanges_roles():
    """In pair mode image i shows its partner's box and the partner shows image i's: together nothing is lost."""
    mixer, images = CutMix(mode="pair"), batch(6)
    mixed = mixer.apply(images, mixer.draw(6, (32, 32), rng=rng()))
    assert torch.allclose(mixed.images + mixed.images.flip(0), images + images.flip(0))


def test_a_joint_draw_blends_or_pastes_never_both():
    seen = set()
    for draw in draws(MixupCutMix(mode="elem"), 64):
        blends, pastes = draw.lam < 1, draw.box.any(-1)
        assert not (blends & pastes).any()
        seen |= {"blend"} if blends.any() else set()
        seen |= {"paste"} if pastes.any() else set()
    assert seen == {"blend", "paste"}


@each_mode
def test_without_mixup_the_policy_draws_what_cutmix_draws(mode):
    for other in (MixupCutMix(mixup_alpha=0, mode=mode, prob=0.6), TransMix(mode=mode, prob=0.6)):
        for a, b in zip(draws(CutMix(mode=mode, prob=0.6), 7), draws(other, 7), strict=True):
            assert torch.equal(a.box, b.box)
            assert torch.equal(b.lam, torch.ones(7))
            assert torch.equal(CutMix().apply(batch(7), a).images, other.apply(batch(7), b).images)


@each_mode
def test_without_cutmix_the_policy_draws_what_mixup_draws(mode):
    joint = MixupCutMix(mixup_alpha=0.3, cutmix_alpha=0, mode=mode)
    for a, b in zip(draws(Mixup(mixup_alpha=0.3, mode=mode), 7), draws(joint, 7), strict=True):
        assert torch.equal(a.lam, b.lam)
        assert not b.box.any()


@pytest.mark.parametrize("kind", [Mixup, CutMix, MixupCutMix, TransMix, FMix, GridMix, ResizeMix, SmoothMix])
@each_mode
def test_probability_zero_never_mixes(kind, mode):
    mixer, images = kind(prob=0.0, mode=mode), batch(4)
    for draw in draws(mixer, 4):
        mixed = mixer.apply(images, draw)
        assert torch.equal(mixed.images, images)
        assert torch.equal(mixed.factors[0].own, torch.ones(4))


# -- by hand


def test_mixup_by_hand():
    images = torch.tensor([0.0, 8.0]).reshape(2, 1, 1, 1)
    mixed = Mixup().apply(images, MixupDraw(torch.tensor([1, 0]), torch.tensor([0.25, 0.75])))
    assert mixed.images.flatten().tolist() == [6.0, 6.0]
    assert mixed.targets(torch.tensor([0, 1]), 2).tolist() == [[0.25, 0.75], [0.25, 0.75]]


def test_lam_one_and_lam_zero_are_bitwise():
    images, perm = batch(4, dtype=torch.bfloat16), torch.tensor([3, 2, 1, 0])
    same = Mixup().apply(images, MixupDraw(perm, torch.ones(4)))
    assert torch.equal(same.images, images)
    swapped = Mixup().apply(images, MixupDraw(perm, torch.zeros(4)))
    assert torch.equal(swapped.images, images.flip(0))
    assert torch.equal(swapped.targets(torch.arange(4), 4), torch.eye(4).flip(0))


def test_an_odd_cut_keeps_all_its_pixels():
    """H = W = 10, lam .5, centre (5, 5): a cut of 7 covers rows and columns 2 to 8, so .51 of the image stays."""
    box = cut_boxes(torch.tensor([0.5]), torch.tensor([[5, 5]]), (10, 10))
    assert box.tolist() == [[2, 2, 9, 9]]
    mixed = CutMix().apply(batch(2, (10, 10)), BoxDraw(torch.tensor([1, 0]), box.expand(2, 4)))
    assert mixed.keep[0, 0, 5].tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0, 1]
    assert torch.allclose(mixed.factors[0].own, torch.tensor(0.51))


def test_a_box_over_the_whole_image_gives_the_partner():
    images, whole = batch(2, (10, 8)), torch.tensor([[0, 0, 10, 8]]).expand(2, 4)
    mixed = CutMix().apply(images, BoxDraw(torch.tensor([1, 0]), whole))
    assert torch.equal(mixed.images, images.flip(0))
    assert torch.equal(mixed.factors[0].own, torch.zeros(2))


def test_boxes_against_one_at_a_time():
    g = torch.Generator().manual_seed(0)
    H, W, B = 23, 40, 2000
    lam = torch.rand(B, generator=g, dtype=torch.float64)
    lam[:2] = torch.tensor([0.0, 1.0])
    centre = torch.stack([torch.randint(H, (B,), generator=g), torch.randint(W, (B,), generator=g)], -1)
    boxes = cut_boxes(lam, centre, (H, W))
    share, masks = box_share(boxes, (H, W)), inside(boxes, (H, W))
    for i in range(B):
        r = math.sqrt(1 - lam[i])
        cut_h, cut_w = int(H * r), int(W * r)
        cy, cx = centre[i].tolist()
        top, bottom = max(cy - cut_h // 2, 0), min(cy + math.ceil(cut_h / 2), H)
        left, right = max(cx - cut_w // 2, 0), min(cx + math.ceil(cut_w / 2), W)
        pixels = max(bottom - top, 0) * max(right - left, 0)
        assert boxes[i].tolist() == ([top, left, bottom, right] if pixels else [0, 0, 0, 0])
        mask = torch.zeros(H, W, dtype=torch.bool)
        mask[top:bottom, left:right] = True
        assert torch.equal(masks[i, 0], mask)
        assert math.isclose(float(share[i]), pixels / (H * W), rel_tol=1e-6)


# -- torchvision, given its box, partner and lambda


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("B", [1, 2, 5])
def test_agrees_with_torchvisions_mixup(seed, B):
    images, labels = batch(B, (12, 9), torch.float64), torch.arange(B) % 3
    peer = v2.MixUp(num_classes=3)
    with chance.seeded(seed, "peer"):
        lam = torch.tensor([peer.make_params([images])["lam"]])
    with chance.seeded(seed, "peer"):
        expected, targets = peer(images, labels)
    mixed = Mixup().apply(images, MixupDraw(torch.arange(B).roll(1), lam.expand(B)))
    assert torch.allclose(mixed.images, expected, atol=1e-12)
    assert torch.allclose(mixed.targets(labels, 3), targets.float(), atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("B", [1, 2, 5])
def test_agrees_with_torchvisions_cutmix(seed, B):
    images, labels = batch(B, (12, 9)), torch.arange(B) % 3
    peer = v2.CutMix(num_classes=3)
    with chance.seeded(seed, "peer"):
        left, top, right, bottom = peer.make_params([images])["box"]
    with chance.seeded(seed, "peer"):
        expected, targets = peer(images, labels)
    box = torch.tensor([[top, left, bottom, right]]).expand(B, 4)
    mixed = CutMix().apply(images, BoxDraw(torch.arange(B).roll(1), box))
    assert torch.equal(mixed.images, expected)
    assert torch.allclose(mixed.targets(labels, 3), targets, atol=1e-6)


# -- statistics over 10,000 draws

N = 10_000


def test_cutmix_keeps_more_than_half_because_boxes_are_clipped():
    """A side r of the image keeps r - r^2/4 on average over centres; with alpha 1, r^2 is uniform, so the mean area is
    E[(r - r^2/4)^2] = 1/2 - 1/5 + 1/48, not 1/2."""
    size = (4096, 4096)
    own = 1 - box_share(CutMix(mode="elem").draw(N, size, rng=rng()).box, size)
    expected = 1 - (1 / 2 - 1 / 5 + 1 / 48)
    assert abs(own.mean() - expected) < 5 * own.std() / math.sqrt(N) + 2 / 4096  # sides are whole pixels
    assert own.mean() > 0.5


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 5.0])
def test_weights_are_beta_distributed(alpha):
    lam = Mixup(mixup_alpha=alpha, mode="elem").draw(N, (8, 8), rng=rng()).lam.double().numpy()
    assert stats.kstest(lam, stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    assert 0.0 <= lam.min() <= lam.max() <= 1.0


def test_box_centres_are_uniform_over_pixels():
    """A box of 1 to 2 pixels a side: its place is its centre's."""
    draw = CutMix(cutmix_alpha=200.0, mode="elem").draw(N, (3, 3), rng=rng())  # cut = floor(3 sqrt(.5)) = 2
    tops = torch.bincount((draw.box[:, 0] + draw.box[:, 2]), minlength=6)
    # centre row 0: rows 0..0, sum 1; 1: rows 0..1, sum 2; 2: rows 1..2, sum 4
    for place in (1, 2, 4):
        assert abs(tops[place] / N - 1 / 3) < 5 * math.sqrt(2 / 9 / N)


def test_probability_and_switch_hold_on_average():
    draw = MixupCutMix(prob=0.7, switch_prob=0.2, mode="elem").draw(N, (64, 64), rng=rng())
    blends, pastes = (draw.lam < 1).double().mean(), draw.box.any(-1).double().mean()
    assert abs(blends - 0.56) < 5 * math.sqrt(0.56 * 0.44 / N)
    # a Beta(1, 1) draw leaves floor(64 sqrt(1 - lam)) = 0 with probability 1/4096
    assert abs(pastes - 0.14) < 5 * math.sqrt(0.14 * 0.86 / N) + 0.14 / 4096


# -- bad inputs


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Mixup(mixup_alpha=0), "mixup_alpha=0 never mixes"),
        (lambda: CutMix(cutmix_alpha=-1), "positive"),
        (lambda: CutMix(cutmix_alpha=float("nan")), "positive"),
        (lambda: MixupCutMix(mixup_alpha=0, cutmix_alpha=0), "never mix"),
        (lambda: MixupCutMix(switch_prob=1.5), "switch_prob=1.5 is a probability"),
        (lambda: Mixup(prob=-0.1), "prob=-0.1 is a probability"),
        (lambda: CutMix(mode="elm"), "did you mean 'elem'"),
        (lambda: TransMix(cutmix_alpha=0, mixup_alpha=0.8), "pastes no box"),
        (lambda: TransMix(attention="rollout"), "'class' or 'received'"),
        (lambda: Mixup().draw(0, (8, 8), rng=rng()), "batch of 0"),
        (lambda: Mixup().apply(batch(3), Mixup().draw(4, (32, 32), rng=rng())), "draw for 4 images given 3"),
        (lambda: CutMix().apply(batch(4)[0], CutMix().draw(4, (32, 32), rng=rng())), r"\(B, channels, H, W\)"),
    ],
)
def test_bad_settings_and_inputs_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@every
def test_byte_images_are_refused(kind):
    mixer, pixels = KINDS[kind]("batch"), torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(TypeError, match="uint8 cannot be blended"):
        mixer.apply(pixels, mixer.draw(4, (32, 32), rng=rng()))


def test_a_mixer_says_its_settings_and_can_be_copied():
    mixer = CutMix(cutmix_alpha=0.5, mode="pair", seed=3)
    assert repr(mixer) == "CutMix(seed=3, cutmix_alpha=0.5, prob=1.0, mode='pair')"
    assert copy.deepcopy(mixer) == mixer


def test_a_draw_moves_as_a_whole():
    draw = BlendBoxDraw(torch.tensor([1, 0]), torch.zeros(2, 4, dtype=torch.int64), torch.ones(2))
    moved = draw.to(torch.device("meta"))
    assert type(moved) is BlendBoxDraw
    assert {x.device.type for x in (moved.perm, moved.box, moved.lam)} == {"meta"}
