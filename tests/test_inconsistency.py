"""Image-label inconsistency: worked example, slow twins, blends, empty truths, divergences, relations, whole sets."""

import math
import warnings
from dataclasses import replace

import pytest
import timm
import torch
from scipy import stats

from foveal import chance
from foveal.data import ImageConfig, Images
from foveal.evaluate import (
    Relation,
    inconsistency,
    label_gaps,
    own_weight,
    relation,
    share_divergence,
)
from foveal.maps import Given, box_mask
from foveal.mix import MIXERS, CutMix, LabelWeights, Mixed, Mixup, MixupCutMix, MixupDraw, NoMix, TdAttenMix, TransMix

NAN = math.nan


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def two(own_visible, partner_visible, own=0.75):
    """A pair whose first image shows `own_visible` and its partner `partner_visible`, each in its own frame."""
    visible = torch.stack([own_visible, partner_visible])[:, None].float()
    weights = LabelWeights(torch.full((2,), own), torch.tensor([1, 0]), torch.full((2,), 1 - own))
    H, W = own_visible.shape
    return Mixed(torch.zeros(2, 3, H, W), torch.tensor([1, 0]), visible, (weights,), visible, visible.flip(0))


# -- the gap


def test_worked_example():
    """Gaze on a 2 x 2 grid, first quarter covered by the partner's first quarter: .9 / (.9 + .7)."""
    truth = torch.tensor([[[0.1, 0.2], [0.3, 0.4]], [[0.7, 0.1], [0.1, 0.1]]])
    keep = torch.tensor([[0.0, 1], [1, 1]])
    weights = LabelWeights(torch.tensor([0.75, 0.75]), torch.tensor([1, 0]), torch.tensor([0.25, 0.25]))
    mixed = Mixed(torch.zeros(2, 3, 2, 2), torch.tensor([1, 0]), keep.expand(2, 1, 2, 2), (weights,))
    found = inconsistency(own_weight(mixed), mixed, truth)
    assert found.truth_share[0] == pytest.approx(0.5625, abs=1e-6)
    assert found.gap[0] == pytest.approx(0.1875, abs=1e-6)
    assert found.truth_share[1] == pytest.approx(0.3 / (0.3 + 0.1), abs=1e-6)  # and the other way round
    assert found.mean == pytest.approx((0.1875 + 0.0) / 2, abs=1e-6)
    assert (found.n, found.skipped) == (2, 0)


def test_cut_pixels_are_counted_in_the_partners_own_frame():
    """Cut from the partner's last column, pasted onto the first: TdAttenMix, where pixels move."""
    own = torch.tensor([[0, 1, 1, 1]]).expand(4, 4)
    partner = torch.tensor([[0, 0, 0, 1]]).expand(4, 4)
    truth = torch.zeros(2, 4, 4)
    truth[0, :, :2] = 1  # half of the first object is covered
    truth[1, :, 3] = 1  # all of the second is cut out
    found = inconsistency(torch.tensor([0.75, 0.75]), two(own, partner), truth)
    assert found.truth_share[0] == pytest.approx(0.5 / 1.5)
    assert found.gap[0] == pytest.approx(0.75 - 1 / 3)


@pytest.mark.parametrize("kind", ["mask", "gaze", "box"])
def test_gap_is_its_slow_twin(kind):
    B, size = 5, (12, 9)
    images = uniform(B, 3, *size)
    box = torch.tensor([[1, 1, 9, 5]]).repeat(B, 1) + torch.arange(B)[:, None]
    truth = {"mask": uniform(B, *size) > 0.7, "gaze": uniform(B, *size) ** 4, "box": box_mask(box, size)}[kind]
    mixer = CutMix(mode="elem")
    mixed = mixer.apply(images, mixer.draw(B, size, rng=chance.generator(3, "mix", 0)))
    found = inconsistency(own_weight(mixed), mixed, truth)
    for i in range(B):
        p = int(mixed.perm[i])
        if p == i:
            assert found.gap[i] == 0
            continue
        own = partner = 0.0
        for r in range(size[0]):
            for c in range(size[1]):
                if mixed.keep[i, 0, r, c]:
                    own += float(truth[i, r, c]) / float(truth[i].sum())
                else:
                    partner += float(truth[p, r, c]) / float(truth[p].sum())
        area = float(mixed.keep[i].mean())
        assert found.truth_share[i] == pytest.approx(own / (own + partner), abs=1e-6)
        assert found.gap[i] == pytest.approx(abs(area - own / (own + partner)), abs=1e-6)
    assert found.gap.max() > 0.01


def test_uniform_truth_agrees_with_area_labels():
    mixer, images = CutMix(mode="elem"), uniform(6, 3, 10, 14)
    mixed = mixer.apply(images, mixer.draw(6, (10, 14), rng=chance.generator(0, "mix", 0)))
    found = inconsistency(own_weight(mixed), mixed, torch.ones(6, 10, 14))
    assert torch.allclose(found.gap, torch.zeros(6), atol=1e-6)


def test_scale_and_size_of_the_truth_do_not_matter():
    mixer, images = CutMix(), uniform(4, 3, 12, 12)
    mixed = mixer.apply(images, mixer.draw(4, (12, 12), rng=chance.generator(0, "mix", 0)))
    coarse = uniform(4, 3, 4)
    fine = coarse.repeat_interleave(4, 1).repeat_interleave(3, 2)
    found = inconsistency(own_weight(mixed), mixed, coarse)
    assert torch.allclose(inconsistency(own_weight(mixed), mixed, 1000 * fine).gap, found.gap, atol=1e-6)


def test_moving_the_truth_under_the_box_lowers_its_share():
    own = torch.tensor([[0, 1], [1, 1]])
    partner = 1 - own
    truth = torch.full((2, 2, 2), 0.25)
    seen = [0.25, 0.5, 0.75]
    shares = []
    for under in seen:
        truth[0] = torch.tensor([[under, (1 - under) / 3], [(1 - under) / 3, (1 - under) / 3]])
        shares.append(float(inconsistency(torch.ones(2), two(own, partner), truth).truth_share[0]))
    assert shares == sorted(shares, reverse=True)
    assert shares == pytest.approx([(1 - s) / (1 - s + 0.25) for s in seen])


def test_empty_truth_and_hidden_objects_are_skipped_and_counted():
    keep = torch.tensor([[0.0, 1], [1, 1]]).expand(2, 1, 2, 2)
    weights = LabelWeights(torch.tensor([0.75, 0.75]), torch.tensor([1, 0]), torch.tensor([0.25, 0.25]))
    mixed = Mixed(torch.zeros(2, 3, 2, 2), torch.tensor([1, 0]), keep, (weights,))
    under = torch.tensor([[1.0, 0], [0, 0]])  # covered in the one image, cut out of it for the other
    beside = torch.tensor([[0.0, 0], [0, 1]])
    found = inconsistency(own_weight(mixed), mixed, torch.stack([under, beside]))
    assert found.gap.isnan().tolist() == [True, False]  # 0 / 0, and 1 / (1 + 1)
    assert found.truth_share[1] == 0.5
    assert (found.n, found.skipped, found.mean) == (1, 1, 0.25)
    found = inconsistency(own_weight(mixed), mixed, torch.stack([beside, torch.zeros(2, 2)]))
    assert found.gap.isnan().all()
    assert found.truth_share.isnan().all()
    assert found.skipped == 2
    assert math.isnan(found.mean)


@pytest.mark.parametrize("lam", [0.2, 0.5, 0.9])
def test_a_blend_covers_nothing_and_is_kept_apart(lam):
    mixed = Mixup().apply(uniform(2, 3, 4, 4), MixupDraw(torch.tensor([1, 0]), torch.full((2,), lam)))
    found = inconsistency(own_weight(mixed), mixed, uniform(2, 4, 4))
    assert found.blended.all()
    assert found.truth_share.tolist() == [0.5, 0.5]
    assert found.gap.isnan().all()
    assert (found.n, found.skipped) == (0, 0)
    empty = inconsistency(own_weight(mixed), mixed, torch.zeros(2, 4, 4))
    assert empty.truth_share.isnan().all()


def test_an_image_that_meets_itself_shows_itself():
    mixed = NoMix().apply(uniform(3, 3, 4, 4), NoMix().draw(3, (4, 4), rng=chance.generator(0, "mix")))
    found = inconsistency(own_weight(mixed), mixed, uniform(3, 4, 4))
    assert found.gap.tolist() == [0, 0, 0]
    assert not found.blended.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    mixer, images = CutMix(), uniform(4, 3, 30, 30)
    mixed = mixer.apply(images, mixer.draw(4, (30, 30), rng=chance.generator(0, "mix", 0)))
    truth = uniform(4, 30, 30).to(dtype)
    found = inconsistency(own_weight(mixed), mixed, truth)
    assert torch.equal(found.gap, inconsistency(own_weight(mixed), mixed, truth.float()).gap)


@pytest.mark.parametrize(
    ("own", "truth", "message"),
    [
        (torch.ones(3), torch.ones(2, 2, 2), "for 2 images"),
        (torch.ones(2), torch.ones(3, 2, 2), "for 2 images"),
        (torch.ones(2), torch.ones(2, 4), "for 2 images"),
        (torch.ones(2), -torch.ones(2, 2, 2), "not negative"),
        (torch.ones(2), torch.full((2, 2, 2), NAN), "finite"),
    ],
)
def test_truths_that_do_not_fit(own, truth, message):
    visible = torch.tensor([[0, 1], [1, 1]])
    with pytest.raises(ValueError, match=message):
        inconsistency(own, two(visible, 1 - visible), truth)


# -- whose label


def test_own_weight_is_the_first_images_share_of_the_pair():
    perm = torch.tensor([3, 2, 1, 0])
    weights = LabelWeights(torch.tensor([0.7, 0.2, 0.0, 0.3]), perm, torch.tensor([0.3, 0.6, 0.0, 0.0]))
    mixed = Mixed(torch.zeros(4, 3, 2, 2), perm, torch.ones(4, 1, 2, 2), (weights,))
    found = own_weight(mixed)
    assert found[:2].tolist() == pytest.approx([0.7, 0.25])  # TokenMix gives away less than all
    assert found[2].isnan()
    assert found[3] == 1.0


def test_own_weight_of_two_factors_and_of_an_image_with_itself():
    perm = torch.tensor([2, 1, 0])
    first = LabelWeights(torch.tensor([0.8, 0.4, 0.6]), perm, torch.tensor([0.2, 0.6, 0.4]))
    second = LabelWeights(torch.tensor([0.5, 0.5, 1.0]), perm, torch.tensor([0.5, 0.5, 0.0]))
    mixed = Mixed(torch.zeros(3, 3, 2, 2), perm, torch.ones(3, 1, 2, 2), (first, second))
    assert own_weight(mixed).tolist() == pytest.approx([0.5 * 0.8 + 0.5 * 0.4, 1.0, 0.6])


# -- divergence


def test_divergence_by_hand():
    p = torch.tensor([[0.5, 0.5], [3.0, 1.0], [0.25, 0.75], [0.0, 1.0]])
    found = share_divergence(p, torch.tensor([1.0, 0.75, 0.75, 0.5]))
    assert found[0] == pytest.approx(math.log(2))
    assert found[1] == pytest.approx(0.0, abs=1e-7)
    assert found[2] == pytest.approx(0.75 * math.log(3) - 0.25 * math.log(3))
    assert found[3] == pytest.approx(-0.5 * math.log(1e-6) - math.log(2), rel=1e-5)


def test_divergence_is_scipys_and_never_negative():
    p, share = uniform(50, 2) + 0.01, uniform(50, seed=1)
    found = share_divergence(p, share)
    twin = [stats.entropy([s, 1 - s], row) for s, row in zip(share.tolist(), p.tolist(), strict=True)]
    assert torch.allclose(found.double(), torch.tensor(twin), atol=1e-6)  # float32
    assert (found >= 0).all()


def test_divergence_knows_nothing_of_nothing():
    found = share_divergence(torch.tensor([[0.0, 0.0], [0.5, 0.5], [NAN, 1.0]]), torch.tensor([0.5, NAN, 0.5]))
    assert found.isnan().all()
    with pytest.raises(ValueError, match=r"\(B, 2\)"):
        share_divergence(torch.ones(2, 3), torch.ones(2))


# -- relation


def test_relation_is_scipys():
    x = uniform(40)
    y = x**3 + 0.2 * uniform(40, seed=1)
    found = relation(x, y)
    assert found.pearson == pytest.approx(stats.pearsonr(x.double(), y.double())[0])
    assert found.spearman == pytest.approx(stats.spearmanr(x, y)[0])
    assert found.n == 40
    assert relation(x, torch.exp(x)).spearman == pytest.approx(1.0)


def test_relation_leaves_out_what_is_not_there():
    x, y = [0.1, NAN, 0.2, 0.4, 0.3], [1.0, 2.0, NAN, 4.0, 3.0]
    assert relation(x, y) == Relation(pytest.approx(1.0), pytest.approx(1.0), 3)


@pytest.mark.parametrize("share", [[0.3, 0.3, 0.3], [0.1 + 0.2, 0.3, 0.3], [1.0], [NAN, NAN]])
def test_nothing_that_varies_has_no_relation_and_no_warning(share):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = relation(share, torch.arange(len(share)))
        assert math.isnan(found.pearson)
        assert math.isnan(found.spearman)
        assert math.isnan(relation(torch.arange(len(share)), share).pearson)


def test_relation_of_what_is_not_paired():
    with pytest.raises(ValueError, match="equal lengths"):
        relation([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match=r"\(n,\)"):
        relation(torch.ones(2, 2), torch.ones(2, 2))


# -- whole sets

CONFIG = ImageConfig((16, 16))


def vit(**options):
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.models.VisionTransformer(**(sizes | options))


def scenes(n=11, masks=True):
    x = torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    marked = box_mask(torch.tensor([[2, 3, 9, 12]]).repeat(n, 1) + (torch.arange(n) % 5)[:, None], (16, 16))
    return Images(torch.arange(n) % 3, ("a", "b", "c"), x, masks=marked if masks else None)


def test_set_is_its_batches_by_hand():
    model, images, mixer = vit().eval(), scenes(), CutMix(mode="elem")
    found = label_gaps(model, mixer, images, CONFIG, batch_size=4, seed=5)
    for number, first in enumerate(range(0, 11, 4)):
        at = slice(first, first + 4)
        x, labels, truth = CONFIG.normalise(images.pixels[at]), images.labels[at], images.masks[at]
        mixed = mixer.apply(x, mixer.draw(len(x), (16, 16), rng=chance.generator(5, "mix", 0, number)))
        by_hand = inconsistency(own_weight(mixed), mixed, truth)
        assert torch.equal(found.gap[at].nan_to_num(-1), by_hand.gap.nan_to_num(-1))
        assert torch.equal(found.own[at], own_weight(mixed))
        assert torch.equal(found.partner[at], mixed.perm + first)
        p = model(mixed.images).softmax(-1)
        pair = torch.stack([p.gather(1, y[:, None])[:, 0] for y in (labels, labels[mixed.perm])], 1)
        kl = share_divergence(pair, by_hand.truth_share).masked_fill(labels == labels[mixed.perm], NAN)
        assert torch.allclose(found.prediction_kl[at], kl, atol=1e-5, equal_nan=True)
        kl = share_divergence(torch.stack([found.own[at], 1 - found.own[at]], 1), by_hand.truth_share)
        assert torch.allclose(found.label_kl[at], kl, atol=1e-6, equal_nan=True)
    assert len(found) == 11
    assert found.n + found.skipped == 11
    assert found.mean == pytest.approx(float(found.gap[~found.gap.isnan()].mean()))
    assert found.mean > 0.01


def test_mixers_meet_the_same_pairs_and_the_same_boxes():
    model, images = vit(), scenes()
    sets = [label_gaps(model, mixer, images, CONFIG, batch_size=4) for mixer in (CutMix(), CutMix(seed=9), TransMix())]
    assert torch.equal(sets[0].gap.nan_to_num(-1), sets[1].gap.nan_to_num(-1))  # not the mixer's own seed
    assert torch.equal(sets[0].partner, sets[2].partner)
    assert torch.equal(sets[0].truth.nan_to_num(-1), sets[2].truth.nan_to_num(-1))
    assert not torch.equal(sets[0].own, sets[2].own)
    blend = label_gaps(model, Mixup(), images, CONFIG, batch_size=4)
    assert torch.equal(sets[0].partner, blend.partner)
    assert label_gaps(model, CutMix(), images, CONFIG, batch_size=4, seed=1).mean != sets[0].mean


def test_labels_by_attention_read_the_mixed_forward():
    model, images = vit(), scenes(8)
    area, attention = (label_gaps(model, mixer, images, CONFIG) for mixer in (CutMix(), TransMix()))
    assert (area.own - attention.own).abs().max() > 1e-4
    assert torch.allclose(area.own, attention.own, atol=0.25)


def test_labels_by_the_truth_itself_are_right():
    """TdAttenMix that follows the masks: its windows are whole cells, so what it labels by is what can be seen."""
    mixer = TdAttenMix(map=Given(), beta=0.0, normalise=True, switch_prob=1.0)
    found = label_gaps(vit(), mixer, scenes(8), CONFIG, batch_size=8)
    assert found.gap.max() < 1e-5
    assert found.own.std() > 0.01
    area = label_gaps(vit(), replace(mixer, beta=1.0), scenes(8), CONFIG, batch_size=8)
    assert torch.equal(found.truth, area.truth)
    assert area.mean > 0.05


def test_blends_have_no_gap_and_do_not_count():
    policy = MixupCutMix(mixup_alpha=0.8, cutmix_alpha=1.0, switch_prob=0.5, mode="elem")
    found = label_gaps(vit(), policy, scenes(10), CONFIG, batch_size=10)
    assert found.blended.any()
    assert not found.blended.all()
    assert found.gap[found.blended].isnan().all()
    assert found.label_kl[found.blended].isnan().all()
    assert found.prediction_kl[found.blended].isnan().all()
    assert (found.truth[found.blended] == 0.5).all()
    assert found.n + found.skipped + int(found.blended.sum()) == 10


def test_without_mixing_labels_are_right():
    found = label_gaps(vit(), NoMix(), scenes(5), CONFIG)
    assert found.gap.tolist() == [0.0] * 5
    assert found.label_kl.max() < 1e-5


def test_images_of_one_class_and_models_without_head():
    """Gaze without classes: every pair is of one class, so there is nothing to predict between."""
    images = scenes(6, masks=False)
    images = Images(torch.zeros(6, dtype=torch.int64), ("scene",), images.pixels)
    found = label_gaps(vit(num_classes=0), CutMix(), images, CONFIG, truth=uniform(6, 30, 40))
    assert found.prediction_kl.isnan().all()
    assert found.gap.isfinite().all()
    assert found.label_kl.isfinite().all()


def test_model_is_left_alone():
    model = vit(proj_drop_rate=0.5).train()
    model.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    state, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    first = label_gaps(model, TransMix(), scenes(), CONFIG)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(first.own, label_gaps(model, TransMix(), scenes(), CONFIG).own)
    assert all(p.grad is None for p in model.parameters())


def test_sets_without_objects():
    with pytest.raises(ValueError, match="where the objects are"):
        label_gaps(vit(), CutMix(), scenes(masks=False), CONFIG)
    with pytest.raises(ValueError, match="for 11 images"):
        label_gaps(vit(), CutMix(), scenes(), CONFIG, truth=torch.ones(3, 4, 4))


@pytest.mark.parametrize("name", sorted(set(MIXERS) - {"none"}))
def test_every_mixer_can_be_asked_on_the_same_pairs(name):
    found = label_gaps(vit(), MIXERS[name](), scenes(7), CONFIG, batch_size=4)
    assert found.partner.tolist() == [3, 2, 1, 0, 6, 5, 4]
    assert found.gap[5] == 0  # alone in the middle of its batch
    known = ~found.gap.isnan()
    assert torch.allclose(found.gap[known], (found.own - found.truth).abs()[known])
    assert known.sum() + found.skipped + found.blended.sum() == 7
    assert ((found.own >= 0) & (found.own <= 1)).all()
