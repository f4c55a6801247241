"""Peeks and edits on every family: a peek sees what the block's own run sees, edits change nothing else."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import torchvision
from torch.overrides import _get_current_function_mode_stack

os.environ["HF_HUB_OFFLINE"] = "1"

import foveal
import foveal.models
from foveal.attention.blocks import Blocks
from foveal.attention.edit import edit
from test_attention_families import GLOBAL, build, images_of
from test_models import tiny

TRANSFORMERS = ("vit classifier", "deit", "dinov2", "dinov2 registers", "dinov3", "clip", "siglip", "beit")
RELATIVE = ("dinov3", "eva02", "beit", "pe_core", "pe_spatial")


def torchvision_vit(dtype=torch.float64):
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 48, num_classes=5).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def case(name):
    """A model in training but for its parts, which draw nothing then; and images."""
    if name == "torchvision":
        model, images = torchvision_vit().eval(), images_of((32, 32))
    elif name == "cct":
        model = tiny()
        images = images_of(model.patch_embed.img_size)
    elif name in TRANSFORMERS:
        pytest.importorskip("transformers")
        from test_attention_transformers import build as build_transformers

        model, images = build_transformers(name), images_of((64, 64))
    else:
        kwargs, size = GLOBAL[name]
        model, images = build(name, **kwargs), images_of(size)
    model.training = True
    return model, images


FAMILIES = ["torchvision", "cct", *TRANSFORMERS, *(name for name in GLOBAL if "naflex" not in name)]
every_family = pytest.mark.parametrize("name", FAMILIES)


def out_of(model, images):
    out = model(images)
    return out if isinstance(out, torch.Tensor) else out[0]


def kept(tokens):
    """An edit that remembers the tokens and leaves them."""

    def change(visit):
        tokens.append(visit)
        return visit.tokens

    return change


@every_family
def test_a_peek_sees_what_the_block_sees(name):
    model, images = case(name)
    blocks, found = Blocks(model), []

    def look(visit):
        found.extend(visit.peek())
        if has_class:
            found.extend(visit.peek(by_class=True))
        return visit.tokens

    has_class = blocks.layout.class_index is not None
    what = ["received", "full", "tokens", *(["class_logits"] if has_class else [])]
    with torch.no_grad():
        before = out_of(model, images)
        with foveal.read(model, layers=1, what=what) as seen, edit(blocks, change={1: look}):
            assert torch.equal(out_of(model, images), before)
    assert len(seen.calls) == 1
    assert torch.allclose(found[0].received(), seen.received(prefix=True).mean(1), atol=1e-10)
    weight = torch.rand(found[0].received().shape, dtype=torch.float64)
    expected = torch.einsum("bi,bit->bt", weight, seen.full().mean(1))
    assert torch.allclose(found[0].carried(weight), expected, atol=1e-10)
    if has_class:
        for one in found:  # the whole map, and the way that is made for the row
            assert torch.allclose(one.class_row(), seen.class_attention(prefix=True).mean(1), atol=1e-10)
    else:
        with pytest.raises(ValueError, match="no class token"):
            found[0].class_row()
    assert blocks.width == seen.tokens().shape[-1]
    assert blocks.layout == seen.layout


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "beit_base_patch16_224"])
def test_an_unfused_peek_sees_the_same(name):
    model, images = case(name)
    found = []

    def look(visit):
        found.append(visit.peek(steps=1) if "beit" not in name else visit.peek())
        return visit.tokens

    with torch.no_grad():
        for fused in (True, False):
            for module in model.modules():
                if hasattr(module, "fused_attn"):
                    module.fused_attn = fused
            with edit(Blocks(model), change={0: look}):
                out_of(model, images)
    weight = torch.rand(found[0][0].received().shape, dtype=torch.float64)
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one.received(), other.received(), atol=1e-10)
        assert torch.allclose(one.class_row(), other.class_row(), atol=1e-10)
        assert torch.allclose(one.carried(weight), other.carried(weight), atol=1e-10)


@every_family
def test_the_block_runs_on_the_changed_tokens(name):
    model, images = case(name)
    blocks, new = Blocks(model), []

    def change(visit):
        new.append(visit.tokens.flip(0))
        return new[-1]

    with torch.no_grad():
        plain = out_of(model, images)
        with edit(blocks, change={1: change}) as edits, foveal.read(model, layers=1, what="tokens") as seen:
            changed = out_of(model, images)
    assert edits.ran
    assert torch.equal(seen.tokens(prefix=True), new[0])
    # blocks and heads treat images one by one, so flipping the batch before a block flips the output
    assert torch.allclose(changed, plain.flip(0), atol=1e-9)


@every_family
def test_added_tokens_are_a_longer_sequence_whose_end_is_cut_off(name):
    """The twin runs the whole block on tokens and added tokens; only attention mixes tokens of different places."""
    model, images = case(name)
    blocks, visits = Blocks(model), []
    relative = any(part in name for part in RELATIVE)
    if relative or "xp" in name:
        why = "rotary|relative position bias" if relative else "no attention module of its own"
        with pytest.raises(foveal.UnsupportedModelError, match=why):
            edit(blocks, extend={1: lambda: None})
        return
    with torch.no_grad(), edit(blocks, change={0: kept(visits), 1: kept(visits)}):
        out_of(model, images)
    extra = torch.cat([visits[0].tokens[:, 2:5], visits[1].tokens.flip(0)[:, 1:2]], 1).requires_grad_()
    T, block = visits[1].tokens.shape[1], blocks.layers[1].block

    with foveal.read(model, layers=1, what="full") as seen, edit(blocks, extend={1: lambda: extra}):
        got = out_of(model, images)
    (gradient,) = torch.autograd.grad(got.square().sum(), extra)
    longer = block.register_forward_pre_hook(lambda m, args: (torch.cat([args[0], extra], 1), *args[1:]))
    cut = block.register_forward_hook(lambda m, args, out: out[:, :T] if torch.is_tensor(out) else (out[0][:, :T],))
    twin = out_of(model, images)
    longer.remove()
    cut.remove()
    assert torch.allclose(got, twin, atol=1e-9)
    assert torch.allclose(gradient, torch.autograd.grad(twin.square().sum(), extra)[0], atol=1e-8)
    assert not torch.allclose(got, out_of(model, images))
    assert seen.full().shape[-2:] == (T, T)  # readers see attention to the block's own tokens


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "torchvision", "cct"])
def test_watching_tells_what_the_blocks_own_run_sees(name):
    model, images = case(name)
    told = {}

    def watch(i):
        return lambda tokens, attended: told.update({i: (tokens, attended.received())})

    edits = edit(Blocks(model), change={0: lambda visit: visit.tokens.flip(0)}, watch={0: watch(0), 1: watch(1)})
    with foveal.read(model, layers=[0, 1], what=["received", "tokens"]) as seen, edits:
        out_of(model, images).sum().backward()
    for i in (0, 1):
        assert torch.equal(told[i][0], seen.tokens(prefix=True)[i])
        assert torch.allclose(told[i][1], seen.received(prefix=True)[i].mean(1), atol=1e-10)
        assert not told[i][1].requires_grad


def test_transformers_checkpointing():
    pytest.importorskip("transformers")
    model, images = case("vit classifier")
    model.train()  # dropout is 0 by default
    extra = torch.randn(3, 4, 32, dtype=torch.float64)
    grads = []
    for checkpointed in (False, True):
        model.zero_grad()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        replays = []

        def change(visit, replays=replays):
            replays.append(visit.replay)
            return visit.tokens.flip(0)

        with edit(Blocks(model), change={0: change}, extend={1: lambda: extra}):
            out_of(model, images).square().sum().backward()
        assert replays[0] is False  # transformers 5 checkpoints inside the block: its input is then not replayed
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_peek_leaves_modes_chance_and_stack():
    model, images = case("vit_tiny_patch16_224")
    model.train()  # nothing is dropped in it
    model.blocks[1].norm1.eval()
    modes, chances = [m.training for m in model.modules()], torch.get_rng_state()

    def look(visit):
        visit.peek()
        visit.peek(steps=1 - visit.block)
        assert [m.training for m in model.modules()] == modes
        return visit.tokens

    assert {True, False} <= set(modes)
    with edit(Blocks(model), change={0: look, 1: look}):
        out_of(model, images)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), chances)
    assert not _get_current_function_mode_stack()


def test_evaluation_and_unseen_forwards_run_untouched():
    model, images = case("vit_tiny_patch16_224")
    plain = model(images)
    with edit(Blocks(model), change={1: lambda visit: visit.tokens * 0}) as edits:
        with foveal.attention.unseen(model):
            assert torch.equal(model(images), plain)
        model.eval()
        assert torch.equal(model(images), plain)
        model.train()
        assert not edits.ran
        assert not torch.equal(model(images), plain)
        assert edits.ran


def test_forwards_of_other_threads_run_untouched():
    model, images = case("vit_tiny_patch16_224")
    with torch.no_grad(), ThreadPoolExecutor(1) as other:
        plain = model(images)
        with edit(Blocks(model), change={1: lambda visit: visit.tokens * 0}) as edits:
            assert torch.equal(other.submit(torch.no_grad()(model), images).result(), plain)
            assert not edits.ran
            assert not torch.equal(model(images), plain)


def test_unfused_attention_takes_no_further_tokens():
    model, images = case("vit_tiny_patch16_224")
    model.blocks[1].attn.fused_attn = False
    edits = edit(Blocks(model), extend={1: lambda: torch.zeros(3, 2, 192, dtype=torch.float64)})
    with pytest.raises(foveal.UnsupportedModelError, match="TIMM_FUSED_ATTN"), edits:
        model(images)
    assert not _get_current_function_mode_stack()


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda: timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)), "windows"),
        (lambda: build("naflexvit_base_patch16_gap", **GLOBAL["naflexvit_base_patch16_gap"][0]), "NaFlex"),
        (lambda: timm.create_model("resnet10t"), "not a model that foveal can read"),
        (lambda: timm.create_model("vit_tiny_patch16_224", depth=1, patch_drop_rate=0.3), "patch_drop_rate=0"),
        (lambda: timm.create_model("cait_xxs24_224", depth=1), "no self-attention block"),
    ],
)
def test_models_whose_tokens_are_not_mixed(model, says):
    with pytest.raises(foveal.UnsupportedModelError, match=says):
        Blocks(model())


def test_branches_of_a_block_are_not_edited():
    model = timm.create_model("vit_small_patch16_18x2_224", depth=2, embed_dim=48, num_heads=2)
    with pytest.raises(foveal.UnsupportedModelError, match="one of several branches"):
        edit(Blocks(model), change={0: lambda visit: visit.tokens})
