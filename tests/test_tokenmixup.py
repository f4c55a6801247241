"""TokenMixup on models: against Algorithm 1 in loops, exact gradients, labels, and nothing left behind."""

import copy
import itertools
import os

import pytest
import timm
import torch
import torchvision
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.overrides import _get_current_function_mode_stack

import foveal
from foveal import chance
from foveal.mix import (
    TOKEN_MIXERS,
    CutMix,
    ManifoldMixup,
    MixupCutMix,
    NoMix,
    TdAttenMix,
    TokenMixup,
    TransMix,
    label_rows,
    soft_cross_entropy,
    token_mixer,
)
from foveal.models import CompactTransformer
from foveal.transfer import GTA
from slow_tokenmixup import forward

os.environ["HF_HUB_OFFLINE"] = "1"

f64 = torch.float64
C = 5


def preferring(model, dtype=f64):
    """A fresh model looks everywhere alike: give it preferences, and no zeros where gradients end."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "qkv" in name and p.dim() == 2:
                p.mul_(8.0)
            if p.dim() == 1:
                p.add_(0.1 * torch.randn_like(p))
    return model.to(dtype).train()


def vit(cls=VisionTransformer, dtype=f64, **settings):
    torch.manual_seed(0)
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": C}
    return preferring(cls(**{**small, **settings}), dtype)


def cct(dtype=f64, **settings):
    torch.manual_seed(0)
    small = {"img_size": 12, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": C, "mlp_ratio": 1.0}
    return preferring(CompactTransformer(**{"attn_drop_rate": 0.0, "drop_path_rate": 0.0, **small, **settings}), dtype)


MODELS = {
    "class token": vit,
    "distilled": lambda: vit(VisionTransformerDistilled),
    "class token and registers": lambda: vit(reg_tokens=3, init_values=0.5, qk_norm=True),
    "no prefix": lambda: vit(class_token=False, global_pool="avg"),
    "registers only": lambda: vit(class_token=False, reg_tokens=2, global_pool="avg"),
    "oblong": lambda: vit(img_size=(12, 20)),
    "cct": cct,
}
every_model = pytest.mark.parametrize("kind", MODELS)


def batch(model, B=4):
    g = torch.Generator().manual_seed(B)
    size = tuple(model.patch_embed.img_size)
    dtype = next(model.parameters()).dtype
    return torch.randn(B, 3, *size, generator=g).to(dtype), torch.randint(C, (B,), generator=g)


def rng(seed=0):
    return chance.generator(seed, "mix", 0)


def mixer_for(model, **settings):
    """A mixer that mixes here: rho in means, and its ScoreNet made."""
    mixer = TokenMixup(**{"horizontal": 2, "rho": 0.2, "rho_unit": "mean", "score_weight": 0.5, **settings})
    learned = mixer.learned(model, C)
    if learned is not None:
        torch.manual_seed(7)
        with torch.no_grad():
            for p in learned.parameters():
                p.add_(0.3 * torch.randn_like(p))
    return mixer


def scores_of(mixer):
    return {int(block): net for block, net in mixer._scores.items()} if mixer._scores is not None else {}


def run(mixer, model, images, labels, smoothing=0.0, seed=0, backward=False):
    """Losses, the step, and gradients by name where asked for."""
    learned = mixer.learned(model, C)
    parts = {"model": model} | ({} if learned is None else {"learned": learned})
    for part in parts.values():
        part.zero_grad()
    with mixer.on(model, images, labels, rng=rng(seed), num_classes=C) as step:
        logits = model(step.images)
        losses = step.losses(logits, smoothing)
        if backward:
            torch.stack(list(losses.values())).sum().backward()
    grads = {(n, k): p.grad.clone() for n, m in parts.items() for k, p in m.named_parameters() if p.grad is not None}
    return losses, step, logits, grads


def state_of(model):
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_always_called), len(m._backward_hooks))
        for m in model.modules()
    ]
    return hooks, [m.training for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}


def assert_same_state(one, two):
    assert one[:2] == two[:2]
    assert one[2].keys() == two[2].keys()
    assert all(torch.equal(v, two[2][k]) for k, v in one[2].items())


# -- the slow twin

TWINS = {
    "horizontal": {"horizontal": 2},
    "horizontal at two blocks": {"horizontal": (1, 3)},
    "horizontal at three blocks": {"horizontal": (0, 1, 3)},
    "at the first block": {"horizontal": 0},
    "some easy": {"horizontal": 1, "tau": "median"},
    "detached": {"horizontal": 2, "score_detached": True},
    "released mask": {"horizontal": 2, "official_mask": True},
    "vertical": {"horizontal": None, "vertical": 2, "kappa": 3},
    "vertical, stopped": {"horizontal": None, "vertical": 3, "kappa": 2, "stop_gradient": True},
    "horizontal before vertical": {"horizontal": 1, "vertical": 3, "kappa": 2},
    "vertical before horizontal": {"horizontal": 3, "vertical": 2, "kappa": 2},
    "both in one block": {"horizontal": 2, "vertical": 2, "kappa": 2},
}


@every_model
@pytest.mark.parametrize("twin", TWINS)
def test_a_step_is_the_algorithm_in_loops(kind, twin):
    model, settings = MODELS[kind](), dict(TWINS[twin])
    images, labels = batch(model)
    if settings.get("tau") == "median":
        judged = run(mixer_for(model, horizontal=1, smoothing=0.1), model, images, labels)[1].exchanges[1]
        settings["tau"] = float(judged.difficulty.median())
    mixer = mixer_for(model, smoothing=0.1, **settings)
    losses, step, logits, grads = run(mixer, model, images, labels, smoothing=0.1, backward=True)

    model.zero_grad()
    nets = scores_of(mixer)
    for net in nets.values():
        net.zero_grad()
    N = model.patch_embed.num_patches
    slow, Y, score, seen = forward(
        model, images, label_rows(labels, C, 0.1).double(), horizontal=nets, vertical=settings.get("vertical"),
        rho=0.2 / N, tau=settings.get("tau", 2.0), kappa=settings.get("kappa", 1),
        detached=settings.get("score_detached", False), stop=settings.get("stop_gradient", False),
        official=settings.get("official_mask", False),
    )  # fmt: skip
    loss = soft_cross_entropy(slow, Y)
    (loss + 0.5 * score).backward()
    assert torch.allclose(logits, slow, atol=1e-10)
    assert torch.allclose(losses["task"], loss, atol=1e-7)  # label weights are kept in float32 inside Mixed
    if nets:
        assert 0 < int(step.exchanges[min(nets)].easy.sum()) <= 4 - 2 * (twin == "some easy")
        assert torch.allclose(losses["scorenet"], 0.5 * score, atol=1e-7)
        assert all(torch.equal(step.exchanges[block].replaced, seen[block]) for block in seen)
        assert any(mask.any() for mask in seen.values())
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert torch.allclose(grads["model", name], p.grad, atol=1e-7), name
    for block, net in nets.items():
        for name, p in net.named_parameters():
            key = ("learned", f"scores.{block}.{name}")
            assert torch.allclose(grads[key], p.grad, atol=1e-7), key


# -- nothing to do: bit for bit the plain step


@every_model
@pytest.mark.parametrize(
    "settings",
    [{"tau": -1.0}, {"rho": 1.0, "rho_unit": "share"}, {"horizontal": None, "vertical": 2, "kappa": 0}, {"B": 1}],
    ids=["nothing easy", "nothing gains", "no tokens kept", "alone"],
)
def test_what_mixes_nothing_changes_nothing(kind, settings):
    settings = dict(settings)
    model, B = MODELS[kind](), settings.pop("B", 3)
    images, labels = batch(model, B)
    mixer = mixer_for(model, score_detached=True, **settings)
    losses, step, logits, grads = run(mixer, model, images, labels, backward=True)
    plain = model(images)
    assert torch.equal(logits, plain)
    model.zero_grad()
    soft_cross_entropy(plain, label_rows(labels, C)).backward()
    assert all(torch.equal(grads["model", name], p.grad) for name, p in model.named_parameters() if p.grad is not None)
    assert torch.equal(step.targets(C), label_rows(labels, C))
    assert torch.equal(losses["task"], soft_cross_entropy(plain, label_rows(labels, C)))
    if mixer.horizontal is not None:
        assert losses["scorenet"] > 0
        assert not step.exchanges[2].replaced.any()


def test_constant_saliency_exchanges_nothing():
    model = vit(class_token=False, global_pool="avg")
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.zero_()
            block.attn.qkv.bias.zero_()
    step = run(mixer_for(model, rho=0.0, tau=100.0), model, *batch(model))[1]
    done = step.exchanges[2]
    assert done.easy.all()
    assert not done.any
    assert not done.replaced.any()


@every_model
@pytest.mark.parametrize("name", TOKEN_MIXERS)
def test_evaluation_is_untouched(kind, name):
    model = MODELS[kind]().eval()
    images, labels = batch(model)
    mixer = token_mixer(name)
    mixer.learned(model, C)
    before = state_of(model)
    with mixer.on(model, images, labels, num_classes=C) as step:
        logits = model(step.images)
        assert torch.equal(logits, model(images))
        assert torch.equal(step.targets(), label_rows(labels, C))
    assert_same_state(before, state_of(model))


# -- labels, order, composition


@every_model
def test_label_mass_is_kept_through_images_and_tokens(kind):
    model = MODELS[kind]()
    images, labels = batch(model, 5)
    for over in (NoMix(), MixupCutMix(), CutMix(mode="elem")):
        step = run(mixer_for(model, over=over, horizontal=(1, 2)), model, images, labels)[1]
        targets = step.targets(C)
        assert torch.allclose(targets.sum(-1), torch.ones(5), atol=1e-6)
        assert (targets >= 0).all()
        assert len(step.mixed.factors) == 3
        assert torch.equal(step.accuracy(targets), targets.amax(-1).mean())


def test_images_are_what_the_image_mixer_makes_alone():
    model = vit()
    images, labels = batch(model)
    over = MixupCutMix(mode="elem")
    with over.on(model, images, labels, rng=rng(3)) as plain:
        pass
    for name in TOKEN_MIXERS:
        mixer = token_mixer(name, over)
        mixer.learned(model, C)
        with mixer.on(model, images, labels, rng=rng(3), num_classes=C) as step:
            pass
        if name in ("horizontal", "vertical", "both"):
            assert torch.equal(step.images, plain.images)
            assert torch.equal(step.mixed.factors[0].own, plain.mixed.factors[0].own)


def test_difficulty_is_judged_with_the_labels_that_arrive():
    model = vit()
    images, labels = batch(model)
    mixer = mixer_for(model, over=MixupCutMix(), smoothing=0.1)
    step = run(mixer, model, images, labels)[1]
    arriving = step._under.mixed.targets(labels, C, 0.1)
    with foveal.read(model, layers=2, what="tokens") as seen, torch.no_grad():
        model(step.images)
    whole = seen.tokens(prefix=True)
    logits = mixer._scores["2"](whole)
    assert torch.allclose(step.exchanges[2].difficulty, -(arriving * logits.log_softmax(-1)).sum(-1))


def test_a_second_block_gets_the_labels_of_the_first():
    model = vit()
    images, labels = batch(model)
    mixer = mixer_for(model, horizontal=(1, 2))
    losses, step, *_ = run(mixer, model, images, labels)
    first, second = step.exchanges[1], step.exchanges[2]
    rows = first.weights.mix(label_rows(labels, C).double())
    logits = [run_.logits for run_ in step._runs]
    assert torch.allclose(second.difficulty, -(rows * logits[1].log_softmax(-1)).sum(-1).float().double(), atol=1e-6)
    expected = soft_cross_entropy(logits[0], label_rows(labels, C)) + soft_cross_entropy(logits[1], rows)
    assert torch.allclose(losses["scorenet"], 0.5 * expected.to(losses["scorenet"]), atol=1e-6)


@every_model
def test_permuting_the_batch_permutes_the_step(kind):
    model = MODELS[kind]()
    images, labels = batch(model, 5)
    order = torch.tensor([3, 0, 4, 1, 2])
    for settings in ({"horizontal": 1}, {"horizontal": 1, "vertical": 3}):
        mixer = mixer_for(model, **settings)
        _, one, plain, _ = run(mixer, model, images, labels)
        _, two, permuted, _ = run(mixer, model, images[order], labels[order])
        assert torch.allclose(permuted, plain[order], atol=1e-10)
        assert torch.allclose(two.targets(C), one.targets(C)[order], atol=1e-6)
        assert one.exchanges[1].replaced.any()


def test_relabelling_image_mixers_come_before_the_tokens():
    model = vit()
    images, labels = batch(model)
    over = TransMix(mode="elem")
    _, step, *_ = run(mixer_for(model, over=over), model, images, labels)
    (image,), token = step._under.mixed.factors, step.exchanges[2].weights
    expected = token.mix(image.mix(label_rows(labels, C)))
    assert not torch.equal(expected, image.mix(token.mix(label_rows(labels, C))))  # the order counts
    assert torch.equal(step.targets(C), expected)


def test_guided_image_mixers_keep_their_losses_and_measures():
    model = vit()
    images, labels = batch(model)
    mixer = mixer_for(model, over=TdAttenMix(cells=4))
    assert mixer.terms == ("consistency", "scorenet")
    assert mixer.measures == ("map_blank", "map_on_object", "token_easy", "token_replaced", "token_gain")
    losses, step, *_ = run(mixer, model, images, labels)
    assert set(losses) == {"task", *mixer.terms}
    assert set(step.measures()) == set(mixer.measures)


@pytest.mark.parametrize("trusted", [True, False])
def test_masks_and_trust_reach_the_image_mixer(trusted):
    model = vit()
    images, labels = batch(model)
    masks = torch.zeros(4, 16, 16, dtype=torch.bool)
    masks[:, :8] = True
    over = TdAttenMix(cells=4)
    with over.on(model, images, labels, rng=rng(), num_classes=C, given=masks, trusted=trusted) as alone:
        model(alone.images)
    with mixer_for(model, over=over).on(
        model, images, labels, rng=rng(), num_classes=C, given=masks, trusted=trusted
    ) as step:
        model(step.images)
    assert torch.equal(step.images, alone.images)
    told = alone.measures()
    assert bool(told["map_on_object"].isfinite()) == trusted
    assert all(torch.allclose(step.measures()[name], told[name], equal_nan=True) for name in told)


def test_a_guide_reads_the_same_forward():
    model, source = vit(), vit()
    images, labels = batch(model)
    mixer = mixer_for(model, horizontal=2, vertical=3)
    guide = GTA(source=source, layers=list(range(mixer.first_mixed_block(model))))
    with mixer.on(model, images, labels, num_classes=C) as step, guide.on(model, step.images) as g:
        logits = model(step.images)
    assert float(g.losses()["gta"].detach()) == 0.0  # before the first mixed block nothing differs
    with mixer.on(model, images, labels, num_classes=C) as step, GTA(source=source).on(model, step.images) as g:
        step.loss(model(step.images))
    assert float(g.losses()["gta"].detach()) > 0.0
    assert logits.shape == (4, C)


# -- readers, checkpointing, precision


@every_model
@pytest.mark.parametrize("rollout", [0, 1])
def test_readers_see_the_mixed_tokens_and_own_keys(kind, rollout):
    model = MODELS[kind]()
    images, labels = batch(model)
    mixer = mixer_for(model, horizontal=1, vertical=3, rollout=rollout)
    expected = run(mixer, model, images, labels)[2]
    what = ["received", "tokens"]
    with (
        foveal.attach(model),
        foveal.read(model, layers="all", what=what) as outside,
        mixer.on(model, images, labels, rng=rng()) as step,
        foveal.read(model, layers="all", what=what) as inside,
    ):
        logits = model(step.images)
    assert torch.equal(logits, expected)
    done = step.exchanges[1]
    assert torch.allclose(outside.received()[1].sum(-1).mean(), inside.received()[1].sum(-1).mean())
    tokens = outside.tokens()
    assert torch.equal(tokens[1], inside.tokens()[1])
    assert all(x.shape[-1] == model.patch_embed.num_patches for x in outside.received())
    with foveal.read(model, layers=1, what="tokens") as plain:
        model(images)
    donors = plain.tokens()[done.partner]
    assert torch.equal(tokens[1], torch.where(done.replaced[..., None], donors, plain.tokens()))


@every_model
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"horizontal": (1, 2), "score_detached": True},
        {"horizontal": None, "vertical": 3},
        {"horizontal": 1, "vertical": 3},
        {"tau": -1.0},
        {"pairs": "random", "tokens": "random", "saliency": "random"},
    ],
    ids=["horizontal", "two blocks", "vertical", "both", "nothing easy", "random"],
)
def test_checkpointed_gradients_are_exact(kind, settings):
    model = MODELS[kind]()
    images, labels = batch(model)
    mixer = mixer_for(model, **settings)
    _, _, logits, plain = run(mixer, model, images, labels, backward=True)
    model.set_grad_checkpointing(True)
    _, _, again, checkpointed = run(mixer, model, images, labels, backward=True)
    assert torch.equal(again, logits)
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[key], checkpointed[key]) for key in plain)


def test_a_backward_outside_of_the_block_is_no_silent_mistake():
    model = vit()
    model.set_grad_checkpointing(True)
    images, labels = batch(model)
    for settings in ({}, {"horizontal": None, "vertical": 2}):
        mixer = mixer_for(model, **settings)
        with mixer.on(model, images, labels, num_classes=C) as step:
            loss = step.loss(model(step.images))
        with pytest.raises(torch.utils.checkpoint.CheckpointError):
            loss.backward()


def test_reentrant_checkpointing_is_refused():
    model = vit()
    images, labels = batch(model)

    class Reentrant(type(model.blocks[2])):
        def __call__(self, x):
            return torch.utils.checkpoint.checkpoint(super().__call__, x, use_reentrant=True)

    model.blocks[2].__class__ = Reentrant
    mixer = mixer_for(model)
    with pytest.raises(foveal.ReadError, match="use_reentrant=False"), mixer.on(model, images, labels) as step:
        model(step.images)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rollout", [0, 1])
def test_autocast_trains_every_weight(dtype, rollout):
    """A weight that the peek cast without gradient must not be found in autocast's cache by the block's own run."""
    model = vit(dtype=torch.float32)
    images, labels = batch(model)
    mixer = mixer_for(model, horizontal=(1, 2), vertical=3, rollout=rollout)
    with torch.autocast("cpu", dtype):
        losses, step, *_ = run(mixer, model, images, labels)
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if p.dim() == 2)
    assert step.exchanges[1].saliency.dtype == torch.float32
    assert step.exchanges[1].weights.own.dtype == torch.float32
    assert all(v.dtype == torch.float32 and v.isfinite() for v in losses.values())


# -- nothing left behind


@pytest.mark.parametrize("name", TOKEN_MIXERS)
def test_the_model_is_given_back_and_no_chance_is_used(name):
    model = vit(dtype=torch.float32)
    images, labels = batch(model)
    settings = {"alignmix": {"block": 1, "iterations": 5}, "manifold": {}}.get(name, {"rho": 0.0})
    mixer = token_mixer(name, **settings)
    mixer.learned(model, C)
    model.eval()
    expected = model(images)
    model.train()
    before, stack = state_of(model), len(_get_current_function_mode_stack())
    torch.manual_seed(11)
    chances = torch.get_rng_state()
    for seed in range(3):
        with mixer.on(model, images, labels, rng=rng(seed), num_classes=C) as step:
            step.loss(model(step.images)).backward()
    assert torch.equal(torch.get_rng_state(), chances)
    assert_same_state(before, state_of(model))
    assert len(_get_current_function_mode_stack()) == stack
    assert torch.equal(model.eval()(images), expected)


def test_drop_path_and_dropout_draw_as_without_horizontal_mixing():
    model = vit(attn_drop_rate=0.2, proj_drop_rate=0.1, drop_path_rate=0.2)
    images, labels = batch(model)
    states = []
    for mixer in (NoMix(), mixer_for(model, horizontal=(1, 2)), mixer_for(model, rollout=1)):
        torch.manual_seed(5)
        with mixer.on(model, images, labels, num_classes=C) as step:
            model(step.images)
        states.append(torch.get_rng_state())
    assert all(torch.equal(state, states[0]) for state in states)


class Broken(nn.Module):
    def forward(self, x):
        raise RuntimeError("out of memory")


@pytest.mark.parametrize("where", ["norm1", "attn.proj", "mlp"])
@pytest.mark.parametrize("block", [0, 2, 3])
def test_an_exception_leaves_nothing_and_the_step_can_be_tried_again(where, block):
    model = vit()
    images, labels = batch(model)
    mixer = mixer_for(model, horizontal=2, vertical=3)
    expected = run(mixer, model, images, labels)[2]
    before = state_of(model)
    parent = model.blocks[block].get_submodule(where.rpartition(".")[0])
    whole = getattr(parent, where.rpartition(".")[2])
    with mixer.on(model, images, labels, rng=rng(), num_classes=C) as step:
        setattr(parent, where.rpartition(".")[2], Broken())
        with pytest.raises(RuntimeError, match="out of memory"):
            model(step.images)
        setattr(parent, where.rpartition(".")[2], whole)
        assert not _get_current_function_mode_stack()
        assert torch.equal(model(step.images), expected)
    assert_same_state(before, state_of(model))
    with pytest.raises(KeyboardInterrupt), mixer.on(model, images, labels, num_classes=C):
        raise KeyboardInterrupt
    assert_same_state(before, state_of(model))


def test_a_copy_made_during_a_step_is_free():
    model = vit()
    images, labels = batch(model)
    mixer = mixer_for(model)
    with mixer.on(model, images, labels, num_classes=C) as step:
        twin = copy.deepcopy(model)
        assert torch.equal(twin(images), vit()(images))
        model(step.images)
    assert torch.equal(twin(images), model(images))
    copied = copy.deepcopy(mixer)
    assert copied == mixer
    assert copied._examined is None


def test_the_scorenet_is_the_mixers_and_learns():
    model = vit(dtype=torch.float32)
    images, labels = batch(model)
    mixer = TokenMixup(horizontal=(1, 2), score_weight=1.0, tau=-1.0, score_detached=True)
    learned = mixer.learned(model, C)
    assert mixer.learned(model, C) is learned
    names = [name for name, _ in learned.named_parameters()]
    assert names == [f"scores.{b}.head.{k}" for b in (1, 2) for k in ("weight", "bias")]
    assert not any("scores" in name for name in model.state_dict())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimiser = torch.optim.SGD(learned.parameters(), lr=1.0)
    told = []
    for _ in range(8):
        optimiser.zero_grad()
        with mixer.on(model, images, labels, num_classes=C) as step:
            losses = step.losses(model(step.images))
        losses["scorenet"].backward()
        optimiser.step()
        told.append(float(losses["scorenet"].detach()))
    assert told[-1] < told[0]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())  # detached


@pytest.mark.parametrize("detached", [False, True])
def test_the_scorenets_gradient_enters_the_model_unless_detached(detached):
    model = vit()
    images, labels = batch(model)
    mixer = mixer_for(model, score_detached=detached, tau=-1.0)
    with mixer.on(model, images, labels, num_classes=C) as step:
        step.losses(model(step.images))["scorenet"].backward()
    below = [p.grad for name, p in model.named_parameters() if name.startswith("blocks.1")]
    assert all((g is None) == detached for g in below)
    assert all(p.grad is None for name, p in model.named_parameters() if name.startswith(("blocks.2", "head")))


# -- saliency, ablations, measures


@every_model
@pytest.mark.parametrize("rows", ["auto", "received", "class"])
def test_saliency_is_the_attention_of_the_unmixed_block(kind, rows):
    model = MODELS[kind]()
    has_class = getattr(model, "cls_token", None) is not None
    if rows == "class" and not has_class:
        with pytest.raises(ValueError, match="no class token"):
            run(mixer_for(model, rows="class"), model, *batch(model))
        return
    images, labels = batch(model)
    step = run(mixer_for(model, rows=rows), model, images, labels)[1]
    by_class = rows == "class" or (rows == "auto" and has_class)
    with torch.no_grad(), foveal.read(model, 2, ["received", *(["class_logits"] if by_class else [])]) as seen:
        model(images)
    expected = (seen.class_attention() if by_class else seen.received()).mean(1)
    assert torch.allclose(step.exchanges[2].saliency, expected, atol=1e-12)


@every_model
@pytest.mark.parametrize("steps", [1, 2])
def test_rollout_multiplies_upper_maps_from_the_left(kind, steps):
    model = MODELS[kind]()
    images, labels = batch(model)
    step = run(mixer_for(model, horizontal=1, rollout=steps), model, images, labels)[1]
    with torch.no_grad(), foveal.read(model, layers=list(range(1, 2 + steps)), what="full") as seen:
        model(images)
    product = torch.eye(seen.full()[0].shape[-1], dtype=f64)
    for map in seen.full():
        product = map.mean(1) @ product  # A_upper A_lower
    has_class, P = getattr(model, "cls_token", None) is not None, model.num_prefix_tokens
    expected = (product[:, 0] if has_class else product.mean(1))[:, P:]
    assert torch.allclose(step.exchanges[1].saliency, expected, atol=1e-10)


def test_gradient_saliency_is_the_mean_over_patches_of_the_pixels_gradient():
    model = vit()
    images, labels = batch(model)
    step = run(mixer_for(model, over=MixupCutMix(), saliency="gradient"), model, images, labels)[1]
    x = step.images.clone().requires_grad_()
    rows = step._under.mixed.targets(labels, C)
    (g,) = torch.autograd.grad(soft_cross_entropy(model.eval()(x), rows), x)
    map = torch.nn.functional.avg_pool2d(g.square().mean(1, keepdim=True).sqrt(), 4).flatten(1)
    expected = map / map.sum(-1, keepdim=True)
    assert torch.allclose(step.exchanges[2].saliency.double(), expected, atol=1e-6)
    assert all(p.grad is None for p in model.parameters())


def test_ablations():
    model = vit()
    images, labels = batch(model, 8)
    plain = run(mixer_for(model, tau=1.4), model, images, labels)[1].exchanges[2]
    assert 0 < int(plain.easy.sum()) < 8

    ungated = run(mixer_for(model, tau=1.4, gate=False), model, images, labels)
    assert ungated[1].exchanges[2].easy.all()
    assert "scorenet" in ungated[0]
    bare = mixer_for(model, gate=False, score_weight=0.0)
    assert bare.learned(model, C) is None
    assert bare.terms == ()
    assert run(bare, model, images, labels)[1].exchanges[2].difficulty is None

    random_pairs = run(mixer_for(model, tau=1.4, pairs="random"), model, images, labels)[1].exchanges[2]
    assert torch.equal(random_pairs.easy, plain.easy)
    assert len(set(random_pairs.partner[plain.easy].tolist())) == int(plain.easy.sum())
    assert torch.equal(random_pairs.partner[~plain.easy], torch.arange(8)[~plain.easy])
    assert not torch.equal(random_pairs.partner, plain.partner)
    assert random_pairs.gain.sum() <= plain.gain.sum()

    random_tokens = run(mixer_for(model, tau=1.4, tokens="random"), model, images, labels)[1].exchanges[2]
    assert torch.equal(random_tokens.partner, plain.partner)
    assert torch.equal(random_tokens.replaced.sum(-1), plain.replaced.sum(-1))
    assert not torch.equal(random_tokens.replaced, plain.replaced)

    counted = run(mixer_for(model, tau=1.4, labels="count"), model, images, labels)[1].exchanges[2]
    assert torch.equal(counted.replaced, plain.replaced)
    assert torch.equal(counted.weights.partner, plain.replaced.float().mean(-1))

    noise = [run(mixer_for(model, saliency="random"), model, images, labels, seed=s)[1].exchanges[2] for s in (0, 0, 1)]
    assert torch.equal(noise[0].saliency, noise[1].saliency)
    assert not torch.equal(noise[0].saliency, noise[2].saliency)


def test_measures():
    model = vit()
    images, labels = batch(model, 8)
    mixer = mixer_for(model, tau=1.4)
    _, step, *_ = run(mixer, model, images, labels)
    done, told = step.exchanges[2], step.measures()
    assert tuple(told) == mixer.measures
    assert told["token_easy"] == done.easy.float().mean()
    assert told["token_replaced"] == done.replaced.float().mean()
    moved = [float((done.saliency[j] - done.saliency[i])[done.replaced[i]].sum()) for i, j in enumerate(done.partner)]
    assert float(told["token_gain"]) == pytest.approx(sum(moved) / 8, abs=1e-6)
    nothing = run(mixer_for(model, tau=-1.0), model, images, labels)[1].measures()
    assert [float(v) for v in nothing.values()] == [0.0, 0.0, 0.0]


def test_rho_in_means_is_rho_over_the_number_of_tokens():
    model = vit()
    images, labels = batch(model)
    shares = run(mixer_for(model, rho=0.5 / 16, rho_unit="share"), model, images, labels)[1].exchanges[2]
    means = run(mixer_for(model, rho=0.5, rho_unit="mean"), model, images, labels)[1].exchanges[2]
    assert torch.equal(shares.replaced, means.replaced)
    assert shares.replaced.any()


# -- vertical


@every_model
def test_all_tokens_kept_is_naive_concatenation(kind):
    model = MODELS[kind]()
    images, labels = batch(model, 3)
    P, N = model.num_prefix_tokens, model.patch_embed.num_patches
    mixer = mixer_for(model, horizontal=None, vertical=2, kappa=N)
    logits = run(mixer, model, images, labels)[2]
    with foveal.read(model, layers=[0, 1], what="tokens") as seen:
        model(images)
    extra = torch.cat(seen.tokens(), 1)  # the patches of both earlier blocks, in order

    def concatenated(module, args, output):
        x = args[0]
        more = torch.cat([x, model.blocks[2].norm1(extra)], 1)
        q, k, v = (module.qkv(more).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)).unbind(0)
        q, k = module.q_norm(q)[:, :, : P + N], module.k_norm(k)
        map = (q @ k.transpose(-1, -2) * module.scale).softmax(-1)
        assert map.shape[-1] == P + 3 * N
        return module.proj((map @ v).transpose(1, 2).flatten(2))

    handle = model.blocks[2].attn.register_forward_hook(concatenated)
    naive = model(images)
    handle.remove()
    assert torch.allclose(logits, naive, atol=1e-10)


def test_vertical_mixing_changes_training_only_and_adds_no_parameter():
    model = vit()
    images, labels = batch(model)
    mixer = mixer_for(model, horizontal=None, vertical=2)
    assert mixer.learned(model, C) is None
    assert mixer.terms == mixer.measures == ()
    assert mixer.first_mixed_block(model) is None
    _, step, logits, _ = run(mixer, model, images, labels)
    assert not torch.allclose(logits, model(images))
    assert torch.equal(step.targets(C), label_rows(labels, C))


def test_more_tokens_than_there_are():
    model = vit()
    with pytest.raises(ValueError, match="kappa=17 but an image has 16 patches"):
        run(mixer_for(model, horizontal=None, vertical=2, kappa=17), model, *batch(model))


# -- other libraries


@pytest.mark.parametrize("library", ["torchvision", "transformers"])
def test_models_of_other_libraries(library):
    """Horizontal at block 1, vertical at block 2: tokens, gradients with and without checkpointing, evaluation."""
    torch.manual_seed(0)
    if library == "torchvision":
        model = torchvision.models.VisionTransformer(16, 4, 3, 2, 24, 32, num_classes=C).to(f64)
        nn.init.normal_(model.heads.head.weight)  # zeros in a fresh one
    else:
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
        config = transformers.ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=C)
        model = transformers.ViTForImageClassification(config).to(f64)
    model.eval()
    g = torch.Generator().manual_seed(0)
    images, labels = torch.randn(4, 3, 16, 16, generator=g, dtype=f64), torch.tensor([0, 1, 2, 3])
    mixer = TokenMixup(horizontal=1, vertical=2, kappa=3, rho=0.0, tau=100.0)
    learned = mixer.learned(model, C)

    def logits_of(images):
        out = model(images)
        return getattr(out, "logits", out)

    before = logits_of(images)
    model.train()
    grads = []
    for checkpointed in (False, True)[: 1 + (library == "transformers")]:
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        learned.zero_grad()
        with mixer.on(model, images, labels, num_classes=C) as step:
            logits = logits_of(step.images)
            step.loss(logits).backward()
        grads.append([p.grad.clone() for p in (*model.parameters(), *learned.parameters()) if p.grad is not None])
    done = step.exchanges[1]
    assert done.replaced.any()
    assert done.saliency.shape == (4, 16)
    assert not torch.allclose(logits, before)
    assert all(torch.equal(a, b) for a, b in zip(grads[0], grads[-1], strict=True))
    model.eval()
    assert torch.equal(logits_of(images), before)


# -- refusals


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"horizontal": None}, "both None"),
        ({"rho": -0.1}, "rho=-0.1"),
        ({"rho_unit": "means"}, "rho_unit='means'"),
        ({"pairs": "greedy"}, "use one of assigned, random"),
        ({"saliency": "edges"}, "saliency='edges'"),
        ({"smoothing": 1.0}, "share of the label"),
        ({"kappa": -1}, "kappa=-1"),
    ],
)
def test_settings_that_cannot_be_meant(settings, says):
    with pytest.raises(ValueError, match=says):
        TokenMixup(**settings)


def test_two_token_mixers_are_not_composed():
    with pytest.raises(TypeError, match="mixer of the images"):
        TokenMixup(over=ManifoldMixup())
    with pytest.raises(TypeError, match="mixer of the images"):
        TokenMixup(over="cutmix")


def test_blocks_that_are_not_there():
    model = vit()
    for settings, says in (
        ({"horizontal": 4}, r"block 4 but the model has 4 blocks; use values in \[-4, 3\]"),
        ({"horizontal": None, "vertical": 0}, "no block comes before block 0"),
        ({"horizontal": 3, "rollout": 1}, "rollout=1 from block 3"),
    ):
        with pytest.raises(ValueError, match=says):
            run(mixer_for(model, **settings), model, *batch(model))
    mixer = mixer_for(model, horizontal=(-1, 1))
    assert list(run(mixer, model, *batch(model))[1].exchanges) == [1, 3]
    assert mixer.first_mixed_block(model) == 1


def test_a_scorenet_that_nobody_asked_for_is_an_error():
    model = vit()
    images, labels = batch(model)
    with (
        pytest.raises(ValueError, match=r"mixer.learned\(model, num_classes\)"),
        TokenMixup().on(model, images, labels),
    ):
        pass


def test_a_step_without_a_forward_or_with_two_says_so():
    model = vit()
    images, labels = batch(model)
    for name in ("horizontal", "vertical", "both"):
        mixer = token_mixer(name)
        mixer.learned(model, C)
        with pytest.raises(foveal.ReadError, match="none ran"), mixer.on(model, images, labels) as step:
            step.loss(torch.zeros(4, C))
        with mixer.on(model, images, labels) as step:
            model(step.images)
            with pytest.raises(foveal.ReadError, match="ran twice"):
                model(step.images)


def test_compiled_parts():
    model = vit(dtype=torch.float32)
    images, labels = batch(model)
    mixer = mixer_for(model)
    expected = run(mixer, model, images, labels)[2]
    with pytest.raises(foveal.UnsupportedModelError, match="compile the other blocks"):
        TokenMixup().learned(torch.compile(model, backend="eager"), C)
    for i in (0, 1, 3):
        model.blocks[i].compile(backend="eager")
    other = mixer_for(model)
    assert torch.allclose(run(other, model, images, labels)[2], expected, atol=1e-6)
    model.blocks[2].compile(backend="eager")
    with pytest.raises(foveal.UnsupportedModelError, match=r"blocks.2 is compiled"):
        run(mixer_for(model), model, images, labels)


def test_token_mixers_by_name():
    mixer = token_mixer("both", CutMix(), rho=0.004, kappa=3, vertical=4)
    assert (mixer.horizontal, mixer.vertical, mixer.rho, mixer.kappa) == ((2,), 4, 0.004, 3)
    assert mixer.over == CutMix()
    assert token_mixer("horizontal", horizontal=[1, 3]).horizontal == (1, 3)
    assert token_mixer("vertical").horizontal is None
    with pytest.raises(ValueError, match="did you mean 'horizontal'"):
        token_mixer("horizontl")


def test_every_pair_of_blocks():
    """Horizontal and vertical at any two blocks of one model give finite, different losses."""
    model = vit(dtype=torch.float32)
    images, labels = batch(model)
    told = set()
    for h, v in itertools.product(range(4), range(1, 4)):
        losses = run(mixer_for(model, horizontal=h, vertical=v), model, images, labels)[0]
        told.add(round(float(losses["task"].detach()), 7))
    assert len(told) == 12
    assert timm.__version__
