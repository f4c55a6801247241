"""Head-cosine: gate and threshold by hand, a slow twin, labels as rows, and what may stand in for the rows."""

import pytest
import torch
from torch import nn

from foveal import maps
from foveal.maps.label_term import LabelTerm, permuted_vectors, random_vectors
from map_models import MODELS, batch, everything, resnet, same, vit

# -- by hand


def test_worked_example_of_gate_and_threshold():
    tokens = torch.tensor([[[2.0, 0], [1, 1], [0, 3], [-1, 1], [3, 4]]])
    cosine = maps.label_cosine(tokens, torch.tensor([[1.0, 0]]))
    assert torch.allclose(cosine, torch.tensor([[1, 0.5**0.5, 0, 0, 0.6]]))
    assert torch.allclose(maps.above(cosine), torch.tensor([[0.3, 0.5**0.5 - 0.7, 0, 0, 0]]), atol=1e-7)


def test_a_token_of_zeros_and_a_negative_cosine_give_zero():
    tokens = torch.tensor([[[0.0, 0], [-2, 0], [-1, 5e-2], [1e-20, 0]]])
    cosine = maps.label_cosine(tokens, torch.tensor([[3.0, 0]]))
    assert torch.allclose(cosine, torch.tensor([[0, 0, 0, 1e-8]]), atol=0)  # 1e-20 over the floor of norms, 1e-12
    assert cosine[0, :3].tolist() == [0, 0, 0]
    assert maps.label_cosine(tokens, torch.zeros(1, 2)).tolist() == [[0, 0, 0, 0]]


def test_cosines_stay_in_the_unit_interval_and_ignore_length():
    g = torch.Generator().manual_seed(0)
    tokens, rows = torch.randn(3, 50, 8, generator=g), torch.randn(3, 8, generator=g)
    tokens[:, 0] = rows * 7
    cosine = maps.label_cosine(tokens, rows)
    assert (cosine <= 1).all()
    assert (cosine >= 0).all()
    assert torch.allclose(cosine[:, 0], torch.ones(3))
    assert torch.allclose(maps.label_cosine(tokens * 100, rows * 0.01), cosine, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    g = torch.Generator().manual_seed(0)
    tokens, rows = torch.randn(2, 9, 64, generator=g).to(dtype), torch.randn(2, 64, generator=g).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        got = maps.label_cosine(tokens, rows)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), maps.label_cosine(tokens.double(), rows.double()), atol=1e-6)


def test_above_keeps_what_exceeds_the_level():
    map = torch.tensor([[[0.0, 1], [2, 10]], [[5, 5], [5, 5]], [[1, 2], [3, 4]]])
    assert maps.above(map)[0].tolist() == [[0, 0], [0, 3]]
    assert maps.above(map)[1].tolist() == [[0, 0], [0, 0]]
    assert torch.allclose(maps.above(map)[2], torch.tensor([[0, 0], [0, 0.9]]))
    assert torch.allclose(maps.above(map, share=0.25)[2], torch.tensor([[0, 0.25], [1.25, 2.25]]))
    assert torch.equal(maps.above(map, share=0.0), map - map.amin((1, 2), keepdim=True))


@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 3, 0.7, 1e-3, 123.4])
def test_above_of_a_constant_map_is_zero_whatever_rounds(value):
    assert (maps.above(torch.full((2, 7, 5), value)) == 0).all()


# -- the source


def slow_maps(model, images, labels, threshold):
    """Image by image, cell by cell, in plain Python on the double precision of the features."""
    with torch.no_grad():
        seen = maps.features(model.eval(), images)
    rows, out = maps.classifier(model).detach().double(), []
    for tokens, label in zip(seen.tokens.double(), labels.tolist(), strict=True):
        m = [max(0.0, min(1.0, float(t @ rows[label]) / float(t.norm() * rows[label].norm()))) for t in tokens]
        level = 0.7 * max(m) + 0.3 * min(m)
        out.append([max(v - level, 0.0) if threshold else v for v in m])
    return torch.tensor(out).unflatten(1, seen.grid)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("threshold", [True, False])
def test_the_slow_twin(name, threshold):
    build, size, _ = MODELS[name]
    model = build()
    images, labels = batch(3, size)
    got = maps.HeadCosine(model, threshold=threshold)(images, labels).map
    assert torch.allclose(got, slow_maps(model, images, labels, threshold), atol=1e-6)


def test_a_convolutional_network():
    model = resnet()
    images, labels = batch(2, (96, 64))
    got = maps.HeadCosine(model)(images, labels)
    assert got.map.shape == (2, 3, 2)
    assert torch.allclose(got.map, slow_maps(model, images, labels, True), atol=1e-6)


def test_threshold_is_on_unless_asked():
    model = vit()
    images, labels = batch(2, (32, 32))
    plain = maps.HeadCosine(model, threshold=False)(images, labels).map
    assert torch.equal(maps.HeadCosine(model)(images, labels).map, maps.above(plain))
    assert (plain > 0).float().mean() > (maps.above(plain) > 0).float().mean()


def test_the_label_decides():
    model = vit()
    images, labels = batch(4, (32, 32))
    source = maps.HeadCosine(model)
    one, other = source(images, labels), source(images, (labels + 1) % 5)
    assert not torch.equal(one.map, other.map)
    assert torch.equal(one.logits, other.logits)


def test_other_images_labels_do_not_matter():
    model = vit()
    images, labels = batch(4, (32, 32))
    source = maps.HeadCosine(model)
    changed = labels.clone()
    changed[2] = (changed[2] + 1) % 5
    same_rows = [0, 1, 3]
    assert torch.equal(source(images, labels).map[same_rows], source(images, changed).map[same_rows])


def test_labels_as_rows():
    model = vit()
    images, labels = batch(3, (32, 32))
    source = maps.HeadCosine(model, threshold=False)
    one_hot = nn.functional.one_hot(labels, 5)
    assert torch.allclose(source(images, one_hot).map, source(images, labels).map, atol=1e-6)
    weights = torch.tensor([[0.25, 0, 0, 0.75, 0]]).expand(3, -1)
    mixed = LabelTerm(model, vectors=(0.25 * model.head.weight[0] + 0.75 * model.head.weight[3]).detach()[None])
    with torch.no_grad():
        expected = mixed.cosine(maps.features(model.eval(), images).tokens, torch.zeros(3, dtype=torch.long))
    assert torch.allclose(source(images, weights).map.flatten(1), expected, atol=1e-6)


def test_rows_follow_the_training_of_the_model():
    model = vit()
    images, labels = batch(2, (32, 32))
    source = maps.HeadCosine(model)
    before = source(images, labels).map
    with torch.no_grad():
        model.head.weight.copy_(model.head.weight.roll(1, 0))
    assert torch.equal(source(images, (labels + 1) % 5).map, before)


def test_a_flat_map_is_blank():
    model = vit()
    images, labels = batch(2, (32, 32))
    with torch.no_grad():
        model.norm.weight.zero_()  # every token is the norm's bias
    found = maps.HeadCosine(model)(images, labels)
    assert found.blank.all()
    assert (found.map == 0).all()


def test_bad_labels():
    model = vit()
    images, _ = batch(2, (32, 32))
    source = maps.HeadCosine(model)
    with pytest.raises(ValueError, match=r"give labels, indices \(B,\) or rows"):
        source(images)
    with pytest.raises(ValueError, match="labels from 0 to 5 but there are 5 classes, 0 to 4"):
        source(images, torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="rows of 4 classes but there are 5"):
        source(images, torch.rand(2, 4))
    with pytest.raises(ValueError, match=r"labels of shape \(2,\), torch.float32"):
        source(images, torch.tensor([0.0, 1.0]))


# -- other vectors than the classifier's rows


def slow_means(model, images, labels, layer):
    """Token by token, from timm's own blocks."""
    with torch.no_grad():
        x = model.eval()._pos_embed(model.patch_embed(images))
        for block in model.blocks[: layer + 1]:
            x = block(x)
    means = []
    for c in range(5):
        tokens = [t for i in range(len(images)) if labels[i] == c for t in x[i, model.num_prefix_tokens :].double()]
        means.append(sum(tokens) / len(tokens))
    return torch.stack(means).float()


@pytest.mark.parametrize("name", ["8x8", "registers"])
def test_class_means_of_an_earlier_block(name):
    build, size, _ = MODELS[name]
    model = build()
    images = batch(13, size)[0]
    labels = torch.arange(13) % 5
    before = everything(model)
    batches = [(images[:4], labels[:4]), (images[4:5], labels[4:5]), (images[5:], labels[5:])]
    got = maps.class_means(model, batches, 5, layer=1)
    assert same(before, everything(model))
    assert torch.allclose(got, slow_means(model, images, labels, 1), atol=1e-5)
    source = maps.HeadCosine(model, label_vectors="class_mean", layer=1)
    source.fit(batches)
    given = maps.HeadCosine(model, vectors=got, layer=1)
    assert torch.equal(source(images, labels).map, given(images, labels).map)


def test_class_means_of_the_final_tokens():
    model = vit()
    images, labels = batch(13, (32, 32))[0], torch.arange(13) % 5
    with torch.no_grad():
        tokens = maps.features(model.eval(), images).tokens.mean(1)
    expected = torch.stack([tokens[labels == c].mean(0) for c in range(5)])
    assert torch.allclose(maps.class_means(model, [(images, labels)], 5), expected, atol=1e-6)


def test_tokens_of_an_earlier_block():
    model = vit()
    images, labels = batch(2, (32, 32))
    vectors = random_vectors(5, 32, seed=4)
    found = maps.HeadCosine(model, layer=0, vectors=vectors, threshold=False)(images, labels)
    with torch.no_grad():
        x = model.eval()._pos_embed(model.patch_embed(images))
        tokens = model.blocks[0](x)[:, 1:]
        assert torch.allclose(found.map.flatten(1), maps.label_cosine(tokens, vectors[labels]), atol=1e-6)
        assert torch.equal(found.logits, model(images))
    by_name = maps.HeadCosine(model, layer="blocks.0", vectors=vectors, threshold=False)(images, labels)
    assert torch.equal(by_name.map, found.map)


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_no_class_keeps_its_own_row(classes):
    rows = torch.arange(classes)[:, None]
    for seed in range(20):
        moved = permuted_vectors(rows, seed)
        assert sorted(moved.flatten().tolist()) == list(range(classes))
        assert (moved != rows).all()
    assert len({tuple(permuted_vectors(rows, seed).flatten().tolist()) for seed in range(50)}) > (classes > 2)


def test_permuted_rows_are_the_rows_of_other_classes():
    model = vit()
    images, _ = batch(5, (32, 32))
    labels = torch.arange(5)
    moved = permuted_vectors(torch.arange(5)[:, None], 3).flatten()
    got = maps.HeadCosine(model, label_vectors="permuted", seed=3)(images, labels).map
    assert torch.equal(got, maps.HeadCosine(model)(images, moved).map)


def test_random_vectors_are_drawn_once_from_their_seed():
    model = vit()
    images, labels = batch(2, (32, 32))
    state = torch.get_rng_state()
    sources = [maps.HeadCosine(model, label_vectors="random", seed=seed) for seed in (0, 0, 1)]
    first, again, other = (source(images, labels).map for source in sources)
    assert torch.equal(first, sources[0](images, labels).map)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_a_model_without_head_can_have_class_means_or_random_vectors():
    model = vit(num_classes=0)
    images, labels = batch(13, (32, 32))[0], torch.arange(13) % 5
    source = maps.HeadCosine(model, label_vectors="class_mean", classes=5)
    source.fit([(images, labels)])
    assert not source(images, labels).blank.any()
    assert not maps.HeadCosine(model, label_vectors="random", classes=5)(images, labels).blank.any()
    with pytest.raises(maps.MapModelError, match="missing"):
        maps.HeadCosine(model, label_vectors="random")


def test_vectors_that_do_not_fit():
    model, (images, labels) = vit(), batch(2, (32, 32))
    with pytest.raises(ValueError, match="'rows' is not known; use one of row, class_mean, permuted, random"):
        maps.HeadCosine(model, label_vectors="rows")
    with pytest.raises(ValueError, match=r"call fit\(batches of \(images, labels\)\) first"):
        maps.HeadCosine(model, label_vectors="class_mean")(images, labels)
    with pytest.raises(ValueError, match="needs no fit"):
        maps.HeadCosine(model).fit([(images, labels)])
    with pytest.raises(ValueError, match=r"no image of class \[2, 4\]"):
        maps.class_means(model, [(images, torch.tensor([0, 1])), (images[:1], torch.tensor([3]))], 5)
    with pytest.raises(ValueError, match=r"vectors of shape \(4, 32\); give one per class, \(5, D\)"):
        maps.HeadCosine(model, vectors=torch.zeros(4, 32), classes=5)
    with pytest.raises(maps.MapModelError, match="class vectors have width 16 but the tokens compared with them 32"):
        maps.HeadCosine(model, vectors=torch.ones(5, 16))(images, labels)
    with pytest.raises(ValueError, match="layers=7 but the model has 3"):
        maps.HeadCosine(model, layer=7)
    with pytest.raises(maps.MapModelError, match="tokens of a block"):
        maps.HeadCosine(resnet(), layer=0)


# -- bottom-up and label


def test_balance_by_hand():
    """Shares (.1 .2 .3 .4) and (0 0 .5 .5): at sigma 1 their mean, at 3 one part to three."""
    bottom_up, label = torch.tensor([[[1.0, 2], [3, 4]]]), torch.tensor([[[0.0, 0], [7, 7]]])
    from foveal.maps.label_biased import balanced

    assert torch.allclose(balanced(bottom_up, label, 1.0), torch.tensor([[[0.05, 0.1], [0.4, 0.45]]]))
    assert torch.allclose(balanced(bottom_up, label, 3.0), torch.tensor([[[0.025, 0.05], [0.45, 0.475]]]))
    assert torch.allclose(balanced(bottom_up, label, 0.0), bottom_up / 10)
    assert torch.allclose(balanced(bottom_up, 0 * label, 2.0), bottom_up / 10)  # nothing shows: attention alone
    assert torch.allclose(balanced(0 * bottom_up, label, 2.0), label / 14)
    assert (balanced(0 * bottom_up, 0 * label, 2.0) == 0).all()
    assert torch.allclose(balanced(bottom_up * 1e-3, label * 1e3, 1.0), balanced(bottom_up, label, 1.0))


@pytest.mark.parametrize("bottom_up", ["received", "class"])
@pytest.mark.parametrize("name", ["8x8", "registers", "distilled"])
def test_label_biased_is_made_of_the_two_sources(bottom_up, name):
    build, size, _ = MODELS[name]
    model = build()
    images, labels = batch(3, size)
    attended = {"received": maps.ReceivedAttention, "class": maps.ClassAttention}[bottom_up](model)(images).map
    cosine = maps.HeadCosine(model)(images, labels).map
    share = attended / attended.sum((1, 2), keepdim=True)
    label = cosine / cosine.sum((1, 2), keepdim=True)
    for sigma in (0.5, 1.0, 2.0):
        got = maps.LabelBiased(model, sigma=sigma, bottom_up=bottom_up)(images, labels)
        assert torch.allclose(got.map, (share + sigma * label) / (1 + sigma), atol=1e-7)
        assert torch.allclose(got.map.sum((1, 2)), torch.ones(3))


@pytest.mark.parametrize("bottom_up", ["received", "class"])
def test_label_free_at_sigma_0(bottom_up):
    model = vit(num_classes=0)  # not even a head is needed
    images, labels = batch(3, (32, 32))
    source = maps.LabelBiased(model, sigma=0, bottom_up=bottom_up)
    found = source(images)
    for other in (labels, (labels + 1) % 5, torch.tensor([99, -1, 0])):
        assert torch.equal(source(images, other).map, found.map)
    attended = {"received": maps.ReceivedAttention, "class": maps.ClassAttention}[bottom_up](model)(images).map
    assert torch.allclose(found.map, attended / attended.sum((1, 2), keepdim=True), atol=1e-7)


def test_label_biased_runs_the_model_once():
    model = vit()
    ran = []
    model.patch_embed.proj.register_forward_hook(lambda *_: ran.append(1))
    for sigma in (0.0, 1.0):
        maps.LabelBiased(model, sigma=sigma, layer=None if sigma == 0 else 1)(*batch(2, (32, 32)))
    assert len(ran) == 2


def test_label_biased_takes_the_label_vectors_too():
    model = vit()
    images, labels = batch(13, (32, 32))[0], torch.arange(13) % 5
    rows = maps.LabelBiased(model)(images, labels).map
    source = maps.LabelBiased(model, label_vectors="class_mean", layer=1)
    source.fit([(images, labels)])
    assert not torch.equal(source(images, labels).map, rows)
    for kind in ("permuted", "random"):
        assert not torch.equal(maps.LabelBiased(model, label_vectors=kind)(images, labels).map, rows)
    maps.LabelBiased(model, sigma=0, label_vectors="class_mean").fit([(images, labels)])  # nothing to do


def test_label_biased_refuses():
    model = vit()
    with pytest.raises(ValueError, match="sigma=-1"):
        maps.LabelBiased(model, sigma=-1)
    with pytest.raises(ValueError, match="sigma=nan"):
        maps.LabelBiased(model, sigma=float("nan"))
    with pytest.raises(ValueError, match="'rollout' is not known; use one of class, received"):
        maps.LabelBiased(model, bottom_up="rollout")
    with pytest.raises(ValueError, match="give labels"):
        maps.LabelBiased(model)(batch(2, (32, 32))[0])
    with pytest.raises(maps.MapModelError, match="received_attention fits models without one"):
        maps.LabelBiased(MODELS["pooled"][0](), bottom_up="class")
    with pytest.raises(maps.MapModelError, match="no attention to make a map of"):
        maps.LabelBiased(resnet())
