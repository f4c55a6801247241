"""TokenMixup in training steps: labels that arrive mixed, accumulated gradients, what is kept and let go of."""

import os
import weakref

import pytest
import torch
import torchvision

import foveal
from foveal.mix import MixupCutMix, TokenMixup, TransMix, label_rows, soft_cross_entropy, vertical
from foveal.mix.horizontal import chosen
from foveal.mix.scorenet import difficulty
from foveal.mix.vertical import Memory
from slow_tokenmixup import forward
from test_attention_families import GLOBAL, build, images_of
from test_tokenmixup import MODELS, C, batch, cct, every_model, mixer_for, rng, run, scores_of, vit

os.environ["HF_HUB_OFFLINE"] = "1"

f64 = torch.float64


@pytest.mark.parametrize("make", [vit, cct])
@pytest.mark.parametrize("over", [{"cutmix_alpha": 0.0}, {"mixup_alpha": 0.0}, {"mode": "elem"}])
def test_labels_that_arrive_mixed(make, over):
    """Difficulty, its loss and the final labels of images mixed beforehand, against the loops."""
    model = make()
    images, labels = batch(model, 5)
    mixer = mixer_for(model, over=MixupCutMix(**over), horizontal=(1, 2), vertical=3, kappa=2, smoothing=0.1, tau=2.5)
    losses, step, logits, _ = run(mixer, model, images, labels, smoothing=0.1)
    arriving = step._under.mixed.targets(labels, C, 0.1).double()
    assert not torch.allclose(arriving.amax(-1), arriving.amax())  # mixed differently, or this says little
    slow, Y, score, seen = forward(
        model, step.images, arriving, horizontal=scores_of(mixer), vertical=3, kappa=2, tau=2.5,
        rho=0.2 / model.patch_embed.num_patches,
    )  # fmt: skip
    assert torch.allclose(logits, slow, atol=1e-10)
    assert torch.allclose(losses["task"], soft_cross_entropy(slow, Y), atol=1e-6)  # label weights are float32
    assert torch.allclose(losses["scorenet"], 0.5 * score, atol=1e-6)
    assert any(mask.any() for mask in seen.values())


def test_difficulty_by_provisional_labels_and_its_loss_by_final_ones():
    """What weighs labels by the forward is not known when difficulty is judged, but is for the loss."""
    model = vit()
    images, labels = batch(model)
    mixer = mixer_for(model, over=TransMix(mode="elem"), smoothing=0.1)
    with mixer.on(model, images, labels, rng=rng(), num_classes=C) as step:
        provisional = step._under.mixed.targets(labels, C, 0.1)
        losses = step.losses(model(step.images), smoothing=0.1)
    final = step.mixed.factors[0].mix(label_rows(labels, C, 0.1))
    assert not torch.allclose(provisional, final, atol=1e-3)
    logits = step._runs[0].logits
    assert torch.allclose(step.exchanges[2].difficulty, difficulty(logits, provisional), atol=1e-6)
    assert torch.allclose(losses["scorenet"], 0.5 * difficulty(logits, final).mean(), atol=1e-6)


def test_an_increase_of_exactly_rho_is_not_enough():
    S = torch.tensor([[0.5, 0.25, 0.25], [0.75, 0.125, 0.125]])
    everybody = torch.ones(2, dtype=torch.bool)
    assert not chosen(S, torch.tensor([1, 0]), everybody, 0.25).any()
    assert chosen(S, torch.tensor([1, 0]), everybody, 0.2499).tolist() == [[True, False, False], [False] * 3]
    assert not chosen(S, torch.tensor([0, 1]), everybody, 0.0).any()  # nor does an image exchange with itself


def test_an_image_as_hard_as_tau_is_easy():
    model = vit()
    images, labels = batch(model)
    judged = run(mixer_for(model), model, images, labels)[1].exchanges[2].difficulty
    easy = run(mixer_for(model, tau=float(judged[1])), model, images, labels)[1].exchanges[2].easy
    assert torch.equal(easy, judged <= judged[1])
    assert easy[1]


@pytest.mark.parametrize(("classes", "floor"), [(10, 1.083), (100, 1.395), (1000, 1.638)])
def test_the_least_difficulty_of_two_images_in_equal_parts(classes, floor):
    label = torch.full((1, classes), 0.1 / classes, dtype=f64)
    label[0, :2] += 0.45
    assert abs(float(difficulty(label.log(), label)) - floor) < 6e-4


def test_difficulty_of_half_precision_is_float32():
    logits, rows = torch.randn(4, 300).half(), torch.rand(4, 300).softmax(-1)
    exact = difficulty(logits.double(), rows.double())
    assert difficulty(logits, rows).dtype == torch.float32
    assert torch.allclose(difficulty(logits, rows).double(), exact, rtol=1e-6)


@every_model
def test_accumulated_gradients_are_those_of_the_steps(kind):
    """No state goes from one step to the next."""
    model = MODELS[kind]()
    mixer = mixer_for(model, horizontal=1, vertical=3, kappa=2)
    learned = mixer.learned(model, C)
    batches = [batch(model, B) for B in (4, 3)]
    alone = [run(mixer, model, *one, seed=i, backward=True)[3] for i, one in enumerate(batches)]
    model.zero_grad()
    learned.zero_grad()
    for i, (images, labels) in enumerate(batches):
        with mixer.on(model, images, labels, rng=rng(i), num_classes=C) as step:
            step.loss(model(step.images)).backward()
    for part, module in (("model", model), ("learned", learned)):
        for name, p in module.named_parameters():
            if p.grad is not None:
                assert torch.allclose(p.grad, alone[0][part, name] + alone[1][part, name], rtol=1e-10, atol=1e-12)


def test_the_order_of_kept_tokens_does_not_matter(monkeypatch):
    model = vit(reg_tokens=2)
    images, labels = batch(model)
    mixer = mixer_for(model, horizontal=1, vertical=3, kappa=4)
    expected = run(mixer, model, images, labels)[2]
    places = vertical.most_salient
    monkeypatch.setattr(vertical, "most_salient", lambda *args: places(*args).flip(-1))
    assert torch.allclose(run(mixer, model, images, labels)[2], expected, atol=1e-12)


def test_kept_tokens_are_let_go_of_with_the_step(monkeypatch):
    model, kept, keep = vit(), [], Memory.keep

    def watched(self, block, tokens, attended):
        kept.append(weakref.ref(tokens))
        keep(self, block, tokens, attended)

    monkeypatch.setattr(Memory, "keep", watched)
    images, labels = batch(model)
    mixer = mixer_for(model, horizontal=None, vertical=3)
    with mixer.on(model, images, labels, rng=rng(), num_classes=C) as step:
        step.loss(model(step.images)).backward()
    assert len(kept) == 3
    assert step.images is images  # the step is still there
    assert all(ref() is None for ref in kept)


@pytest.mark.parametrize("library", ["torchvision", "transformers"])
@pytest.mark.parametrize("saliency", ["attention", "gradient", "random"])
def test_sources_of_saliency_on_models_of_other_libraries(library, saliency):
    torch.manual_seed(0)
    if library == "torchvision":
        model = torchvision.models.VisionTransformer(16, 4, 3, 2, 24, 32, num_classes=C)
        torch.nn.init.normal_(model.heads.head.weight)
    else:
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
        model = transformers.ViTForImageClassification(
            transformers.ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=C)
        )
    model.train()
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    mixer = TokenMixup(horizontal=1, rho=0.0, tau=100.0, saliency=saliency)
    mixer.learned(model, C)
    with mixer.on(model, images, labels, num_classes=C) as step:
        out = model(step.images)
        step.loss(getattr(out, "logits", out)).backward()
    done = step.exchanges[1]
    assert done.saliency.shape == (4, 16)
    assert done.replaced.any()
    assert (done.saliency.sum(-1) <= 1 + 1e-5).all()


def test_two_blocks_draw_for_themselves():
    model = vit(dtype=torch.float32)
    images, labels = batch(model)
    step = run(mixer_for(model, horizontal=(1, 2), saliency="random"), model, images, labels)[1]
    assert not torch.equal(step.exchanges[1].saliency, step.exchanges[2].saliency)


@pytest.mark.parametrize(
    ("name", "why"), [("vit_small_patch16_dinov3", "rotary"), ("beit_base_patch16_224", "relative position bias")]
)
def test_models_with_relative_positions_mix_horizontally_only(name, why):
    sizes, size = GLOBAL[name]
    model = build(name, dtype=torch.float32, **{**sizes, "num_classes": C}).train()
    images, labels = images_of(size, torch.float32, 4), torch.tensor([0, 1, 2, 3])
    step = run(mixer_for(model, horizontal=1, tau=100.0, rho=0.0), model, images, labels, backward=True)[1]
    assert step.exchanges[1].replaced.any()
    with pytest.raises(ValueError, match=f"rollout=1.*{why}.*use 0"):
        run(mixer_for(model, horizontal=0, rollout=1), model, images, labels)
    with pytest.raises(foveal.UnsupportedModelError, match=f"{why}.*horizontal mixing works here"):
        run(mixer_for(model, horizontal=None, vertical=1), model, images, labels)


@pytest.mark.parametrize("settings", [{}, {"saliency": "random"}, {"horizontal": None, "vertical": 2}])
def test_rows_that_are_not_there_are_refused_before_the_forward(settings):
    model = cct()
    images, labels = batch(model)
    mixer = mixer_for(model, rows="class", **settings)
    with pytest.raises(ValueError, match="no class token"), mixer.on(model, images, labels, num_classes=C):
        pass
