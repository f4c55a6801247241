"""The door leaves no trace: hooks, modes, outputs, gradients, random numbers; and says so when it cannot see."""

import copy
import pickle
import subprocess
import sys
import threading

import pytest
import timm
import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

import foveal


def vit(**kwargs):
    torch.manual_seed(0)
    settings = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 3,
        "num_heads": 2,
        "num_classes": 5,
        **kwargs,
    }
    return timm.models.VisionTransformer(**settings).eval()


def batch(B=3, dtype=torch.float32):
    return torch.randn(B, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


def hooks(model):
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_hooks_always_called) for m in model.modules()
    )


@pytest.fixture(autouse=True)
def no_trace():
    """No mode left on the stack by any test."""
    before = len(_get_current_function_mode_stack())
    yield
    assert len(_get_current_function_mode_stack()) == before


def test_the_model_is_left_alone():
    model, images = vit(), batch()
    weights, keys = copy.deepcopy(model.state_dict()), set(model.__dict__)
    state = torch.get_rng_state()
    with torch.no_grad(), foveal.read(model, layers="all", what=foveal.attention.anatomy.WHAT):
        model(images)
    assert torch.equal(torch.get_rng_state(), state)
    assert hooks(model) == 0
    assert set(model.__dict__) == keys
    assert all(torch.equal(a, b) for a, b in zip(weights.values(), model.state_dict().values(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_training_with_dropout_is_bitwise_the_same():
    model, images = vit(drop_path_rate=0.3, attn_drop_rate=0.2, proj_drop_rate=0.1).train(), batch()

    def run(reading):
        torch.manual_seed(3)
        model.zero_grad()
        if reading:
            with foveal.read(model, layers="all", what=["class_logits", "received"]) as seen:
                out = model(images)
            seen.class_logits()
        else:
            out = model(images)
        out.sum().backward()
        return [out, *(p.grad.clone() for p in model.parameters())]

    for a, b in zip(run(False), run(True), strict=True):
        assert torch.equal(a, b)


def unfused(model, images):
    """Class rows and received attention from plain operations on the block's own weights, with their graph."""
    x = model._pos_embed(model.patch_embed(images))
    rows, received = [], []
    for block in model.blocks:
        qkv = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1))
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-1, -2) * block.attn.scale
        rows.append(logits[:, :, 0, 1:])
        received.append(logits.softmax(-1).mean(-2)[..., 1:])
        x = block(x)
    return rows, received


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_gradients_are_those_of_the_unfused_model(checkpointed, inside):
    model, images = vit().double().train(), batch(dtype=torch.float64)
    weights = [torch.randn(3, 2, 16, dtype=torch.float64) for _ in range(6)]
    rows, received = unfused(model, images)
    sum((a * w).sum() for a, w in zip([*rows, *received], weights, strict=True)).backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing(checkpointed)
    with foveal.read(model, layers="all", what=["class_logits", "received"]) as seen:
        model(images)
        values = [*seen.class_logits(), *seen.received()]
        loss = sum((a * w).sum() for a, w in zip(values, weights, strict=True))
        if inside:
            loss.backward()
            assert len(seen.calls) == 1
    if not inside:
        loss.backward()
    for name, p in model.named_parameters():
        if expected[name] is None:
            assert p.grad is None or p.grad.abs().max() == 0
        else:
            assert torch.allclose(p.grad, expected[name], atol=1e-11), name
    assert hooks(model) == 0


def test_the_task_gradient_is_untouched_by_checkpointing_and_reading():
    model, images = vit().double().train(), batch(dtype=torch.float64)
    model(images).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing(True)
    with foveal.read(model, layers="all") as seen:
        out = model(images)
    (out.square().sum() + 0.0 * sum(r.sum() for r in seen.class_logits())).backward()
    for p, e in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(p.grad, e, atol=1e-12)


def test_reentrant_checkpointing_is_refused():
    model, images = vit().train(), batch()

    class Reentrant(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            x = model._pos_embed(model.patch_embed(x)).requires_grad_()
            for block in model.blocks:
                x = checkpoint(block, x, use_reentrant=True)
            return x

    with pytest.raises(foveal.ReadError, match="use_reentrant=False"), foveal.read(wrapped := Reentrant()):
        wrapped(images)
    with torch.no_grad(), foveal.read(wrapped) as seen:  # without gradient there is nothing to lose
        wrapped(images)
    assert seen.class_logits().shape == (3, 2, 16)


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_gives_float32_rows(grad):
    model, images = vit(), batch()
    with torch.set_grad_enabled(grad):
        with torch.no_grad(), foveal.read(model, what=["class_logits", "received"]) as exact:
            model(images)
        with torch.autocast("cpu", torch.bfloat16), foveal.read(model, what=["class_logits", "received"]) as seen:
            model(images)
    for got, expected in ((seen.class_logits(), exact.class_logits()), (seen.received(), exact.received())):
        assert got.dtype == torch.float32
        assert (got - expected).abs().max() < 0.02 * expected.abs().max().clamp_min(1.0)
        assert got.requires_grad == grad


def test_unfused_models_are_read_too(monkeypatch):
    fused, images = vit(), batch()
    with torch.no_grad(), foveal.read(fused, layers="all", what=["class_logits", "received", "keys", "values"]) as a:
        fused(images)
    monkeypatch.setenv("TIMM_FUSED_ATTN", "0")
    timm.layers.set_fused_attn(False)
    try:
        model = vit()
    finally:
        timm.layers.set_fused_attn(True)
    assert not model.blocks[0].attn.fused_attn
    with torch.no_grad(), foveal.read(model, layers="all", what=["class_logits", "received", "keys", "values"]) as b:
        model(images)
    for name in ("class_logits", "received", "keys", "values"):
        for x, y in zip(getattr(a, name)(), getattr(b, name)(), strict=True):
            assert torch.allclose(x, y, atol=1e-5)


# -- compiled models


@pytest.fixture
def counter():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


@pytest.mark.parametrize("in_place", [False, True])
def test_attached_before_compiling_it_compiles_once(counter, in_place):
    model, images = vit().train(), batch()
    with torch.no_grad(), foveal.read(model, layers="all") as plain:
        model(images)
    with foveal.attach(model):
        if in_place:
            model.compile(backend=counter)
            compiled = model
        else:
            compiled = torch.compile(model, backend=counter)
        for _ in range(12):
            with foveal.read(compiled, layers="all") as seen:
                out = compiled(images)
            (out.sum() + sum(r.sum() for r in seen.class_logits())).backward()
        assert counter.frame_count == 1
        for a, b in zip(plain.class_logits(), seen.class_logits(), strict=True):
            assert torch.allclose(a, b, atol=1e-5)
        for _ in range(3):
            compiled(images)
            with foveal.read(compiled, layers="all"):
                compiled(images)
        assert counter.frame_count == 2  # one more for the forward that nobody reads
    assert hooks(model) == 0


def test_paused_forwards_of_a_compiled_model_are_not_seen(counter):
    model, images = vit().train(), batch()
    with foveal.attach(model) as door:
        compiled = torch.compile(model, backend=counter)
        for step in range(4):
            with foveal.read(compiled, layers="all") as seen:
                with door.paused():
                    compiled(images + 1)
                    with foveal.read(compiled, layers="all") as inner:
                        compiled(images + 2)
                out = compiled(images)
            assert len(seen.calls) == len(inner.calls) == 1
            (out.sum() + sum(r.sum() for r in seen.class_logits())).backward()
            if step == 0:
                compiled_after_one_step = counter.frame_count
        assert counter.frame_count == compiled_after_one_step
    assert hooks(model) == 0


def test_compiled_too_early_is_an_error(counter):
    images = batch()
    compiled = torch.compile(vit(), backend=counter)
    with pytest.raises(foveal.UnsupportedModelError, match="compiled already"):
        foveal.read(compiled)
    in_place = vit()
    in_place.compile(backend=counter)
    with pytest.raises(foveal.UnsupportedModelError, match="compiled already"):
        foveal.attach(in_place)
    child = vit()
    child.blocks[1] = torch.compile(child.blocks[1], backend=counter)
    with pytest.raises(foveal.UnsupportedModelError, match=r"its part 'blocks\.1' is compiled"):
        foveal.attach(child)
    assert not foveal.supported(compiled)
    model = vit()
    around = torch.compile(lambda x: model(x), backend=counter)
    with torch.no_grad():
        around(images)
        with pytest.raises(foveal.ReadError, match="saw no forward"), foveal.read(model):
            around(images)


# -- copies, exceptions, interrupts


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_never_write_into_the_original(clone):
    model, images = vit(), batch()
    with torch.no_grad(), foveal.read(model) as seen:
        other = clone(model)
        other(images + 1)
        assert seen.calls == []
        model(images)
        other(images + 1)
    with torch.no_grad(), foveal.read(vit()) as again:
        again._model(images)
    assert torch.equal(seen.class_logits(), again.class_logits())
    with torch.no_grad(), foveal.read(other) as own:
        other(images)
    assert torch.equal(own.class_logits(), seen.class_logits())


def test_a_model_saved_while_attached_loads_without_foveal(tmp_path):
    model = vit()
    with foveal.attach(model):
        torch.save(model, tmp_path / "model.pt")
    script = (
        "import sys, torch\n"
        "sys.modules['foveal'] = None\n"
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "print(*model(torch.ones(1, 3, 32, 32)).shape)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model.pt")], capture_output=True, text=True, check=False
    )
    assert ran.stdout.split() == ["1", "5"], ran.stderr
    loaded, images = torch.load(tmp_path / "model.pt", weights_only=False), batch()
    with torch.no_grad(), foveal.read(loaded) as seen, foveal.read(model) as original:
        assert torch.equal(loaded(images), model(images))
    assert torch.equal(seen.class_logits(), original.class_logits())


class Stop(torch.nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), SystemExit()])
@pytest.mark.parametrize("attached", [False, True])
def test_an_interrupt_inside_attention_leaves_nothing(error, attached):
    model, images = vit(), batch()
    door = foveal.attach(model) if attached else None
    proj = model.blocks[1].attn.proj
    model.blocks[1].attn.proj = Stop(error)
    with pytest.raises(type(error)), torch.no_grad(), foveal.read(model, layers="all"):
        model(images)
    assert _get_current_function_mode_stack() == []
    model.blocks[1].attn.proj = proj
    with torch.no_grad(), foveal.read(model, layers="all") as seen:
        model(images)
    assert len(seen.class_logits()) == 3
    if door is not None:
        door.remove()
    assert hooks(model) == 0


def test_interrupts_caught_inside_the_block_leave_nothing():
    model, images = vit(), batch()
    proj = model.blocks[1].attn.proj
    with torch.no_grad(), foveal.read(model) as seen:
        model.blocks[1].attn.proj = Stop(KeyboardInterrupt())
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                model(images)
        model.blocks[1].attn.proj = proj
        model(images)
    assert _get_current_function_mode_stack() == []
    assert seen.class_logits().shape == (3, 2, 16)


@pytest.mark.parametrize("step", range(1, 40, 3))
@pytest.mark.parametrize("method", ["register_forward_hook", "register_forward_pre_hook"])
def test_an_interrupt_while_hooks_are_installed_leaves_none(monkeypatch, step, method):
    model, images, count = vit(), batch(), 0
    register = getattr(torch.nn.Module, method)

    def interrupted(*args, **kwargs):
        nonlocal count
        count += 1
        if count == step:
            raise KeyboardInterrupt
        return register(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, method, interrupted)
        try:
            foveal.attach(model).remove()
        except KeyboardInterrupt:
            assert count == step
    assert hooks(model) == 0
    with torch.no_grad(), foveal.read(model, layers="all") as seen:
        model(images)
    assert len(seen.class_logits()) == 3


@pytest.mark.parametrize("step", range(1, 21, 3))
def test_an_interrupt_while_hooks_are_removed_leaves_none(monkeypatch, step):
    from torch.utils.hooks import RemovableHandle

    model, count, remove = vit(), 0, RemovableHandle.remove

    def interrupted(handle):
        nonlocal count
        count += 1
        if count == step:
            raise KeyboardInterrupt
        remove(handle)

    with monkeypatch.context() as patch:
        patch.setattr(RemovableHandle, "remove", interrupted)
        with pytest.raises(KeyboardInterrupt), torch.no_grad(), foveal.read(model):
            model(batch())
    assert hooks(model) == 0


def test_a_failed_forward_does_not_count():
    model, images = vit(), batch()
    with torch.no_grad(), foveal.read(model) as seen:
        with pytest.raises(AssertionError):
            model(torch.zeros(1, 3, 40, 40))
        model(images)
    assert seen.class_logits().shape == (3, 2, 16)


# -- several readers, forwards, models, threads


def test_nested_readers_share_one_computation():
    model, images = vit(), batch()
    with torch.no_grad(), foveal.read(model, layers="all") as outer, foveal.read(model, what="received") as inner:
        model(images)
    with torch.no_grad(), foveal.read(model, layers=-1) as a, foveal.read(model, layers=[0, -1]) as b:
        model(images)
    assert a.class_logits(prefix=True).data_ptr() == b.class_logits(prefix=True)[1].data_ptr()
    assert torch.equal(outer.class_logits()[-1], a.class_logits())
    assert inner.received().shape == (3, 2, 16)
    with pytest.raises(foveal.ReadError, match="was not asked"):
        inner.class_logits()


def test_an_inner_reader_sees_its_own_forwards_only():
    model, images = vit(), batch()
    with torch.no_grad(), foveal.read(model) as outer:
        model(images)
        with foveal.read(model) as inner:
            model(images + 1)
        model(images)
    assert len(outer.calls) == 3
    assert len(inner.calls) == 1
    assert torch.equal(outer.calls[1].class_logits(), inner.class_logits())


def test_reading_needs_exactly_one_forward():
    model, images = vit(), batch()
    with pytest.raises(foveal.ReadError, match="saw no forward"), foveal.read(model):
        pass
    with torch.no_grad(), foveal.read(model) as seen:
        with pytest.raises(foveal.ReadError, match="saw no forward"):
            seen.class_logits()
        model(images)
        model(images[:1])
    with pytest.raises(foveal.ReadError, match=r"2 forwards.*seen\.calls\[k\]"):
        seen.class_logits()
    assert [look.class_attention().shape[0] for look in seen.calls] == [3, 1]


def test_a_part_of_the_forward_is_not_called_whole():
    model, images = vit(), batch()
    with torch.no_grad(), foveal.read(model, layers="all") as seen:
        model.forward_features(images)  # not the model's own call: still one forward
    assert len(seen.class_logits()) == 3
    with torch.no_grad(), foveal.read(model, layers="all") as seen:
        x = model._pos_embed(model.patch_embed(images))
        model.blocks[0](x)
    with pytest.raises(foveal.ReadError, match=r"did not run blocks\.1"):
        seen.class_logits()


class Twice(torch.nn.Module):
    """Two crops through one encoder."""

    def __init__(self):
        super().__init__()
        self.encoder = vit()

    def forward(self, first, second):
        return self.encoder(first) + self.encoder(second)


def test_several_runs_within_one_forward_are_not_overwritten():
    model, images = Twice(), batch()
    with torch.no_grad(), foveal.read(model) as outside, foveal.read(model.encoder) as inside:
        model(images, images[:1])
    with pytest.raises(foveal.ReadError, match=r"blocks\.2 attended several times within one forward"):
        outside.class_logits()
    assert [look.class_logits().shape[0] for look in inside.calls] == [3, 1]
    shared = vit()
    shared.blocks[1] = shared.blocks[0]
    with torch.no_grad(), foveal.read(shared, layers=[0, -1]) as seen:
        shared(images)
    with pytest.raises(foveal.ReadError, match=r"blocks\.0 attended several times"):
        seen.class_logits()


def test_an_attention_that_attends_twice_is_not_guessed():
    class Two(timm.models.vision_transformer.Attention):
        def forward(self, x, *args, **kwargs):
            return super().forward(super().forward(x))

    model = vit()
    model.blocks[1].attn = Two(32, num_heads=2)
    with torch.no_grad(), foveal.read(model, layers=[0, 1]) as seen:
        model(batch())
    with pytest.raises(foveal.ReadError, match=r"blocks\.1 attended several times"):
        seen.class_logits()


def test_a_model_that_calls_itself_has_two_whole_forwards():
    model, images = vit(), batch()
    with torch.no_grad(), foveal.read(model, layers="all") as plain:
        model(images)

    def call_again(module, args, output):
        handle.remove()
        model(images + 1)

    handle = model.blocks[1].register_forward_hook(call_again)
    with torch.no_grad(), foveal.read(model, layers="all") as seen:
        model(images)
    outer, inner = seen.calls
    for a, b in zip(outer.class_logits(), plain.class_logits(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(inner.class_logits()[2], plain.class_logits()[2])


def test_paused_forwards_are_not_seen():
    model, images = vit(), batch()
    with foveal.attach(model) as door, torch.no_grad(), foveal.read(model) as seen:
        with door.paused():
            model(images + 1)
        model(images)
        with door.paused():
            model(images + 2)
    assert len(seen.calls) == 1


def test_a_reader_opened_while_paused_sees_what_runs_there():
    model, images = vit(), batch()
    with torch.no_grad(), foveal.read(model) as alone:
        model(images + 1)
    with foveal.attach(model) as door, torch.no_grad(), foveal.read(model, layers="all") as outer:
        model(images)
        with door.paused():
            with foveal.read(model, what="class_logits") as inner:
                model(images + 1)
            assert len(outer.class_logits()) == 3  # the outer one can be asked meanwhile
        with door.paused(), door.paused(), foveal.read(model) as deeper:
            model(images + 1)
    assert len(outer.calls) == len(inner.calls) == 1
    assert torch.equal(inner.class_logits(), alone.class_logits())
    assert torch.equal(deeper.class_logits(), alone.class_logits())


@pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt()])
def test_a_forward_that_raises_while_paused_leaves_the_outer_reader_whole(error):
    model, images = vit(), batch()
    with torch.no_grad(), foveal.read(model, layers="all") as outer:
        model(images)
        proj = model.blocks[1].attn.proj
        model.blocks[1].attn.proj = Stop(error)
        with pytest.raises(type(error)), foveal.attention.unseen(model), foveal.read(model, layers="all"):
            model(images + 1)
        model.blocks[1].attn.proj = proj
    assert len(outer.class_logits()) == 3
    assert hooks(model) == 0


def test_unseen_hides_a_part_from_readers_of_the_whole_and_the_whole_from_readers_of_a_part():
    model, images = Twice(), batch()
    with torch.no_grad(), foveal.read(model.encoder) as inside, foveal.read(model) as outside:
        with foveal.attention.unseen(model):
            model(images, images)
        with foveal.attention.unseen(model.encoder), foveal.read(model.encoder, what="received") as own:
            model.encoder(images)
        model.encoder(images[:1])
    assert [look.class_logits().shape[0] for look in inside.calls] == [1]
    assert [look.class_logits().shape[0] for look in outside.calls] == [1]
    assert own.received().shape == (3, 2, 16)


def test_unseen_fits_a_model_that_cannot_be_read():
    model = torch.nn.Linear(2, 2)
    with foveal.attention.unseen(model):
        assert model(torch.zeros(1, 2)).shape == (1, 2)


def test_paused_forwards_of_one_thread_are_seen_in_another():
    model, images, got = vit(), batch(), {}
    paused, done = threading.Event(), threading.Event()

    def other():
        paused.wait(10)
        with torch.no_grad(), foveal.read(model) as mine:
            model(images + 2)
        got["other"] = mine.class_logits()
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with foveal.attach(model) as door, torch.no_grad(), foveal.read(model) as seen:
        with door.paused():
            model(images + 1)
            paused.set()
            done.wait(10)
        model(images)
    thread.join()
    assert got["other"].shape == (3, 2, 16)
    assert len(seen.calls) == 1


def test_two_models_at_once():
    a, b, images = vit(), vit(num_classes=7), batch()
    with torch.no_grad(), foveal.read(a) as first, foveal.read(b, layers=0) as second:
        b(images)
        a(images)
    assert first.layers == ["blocks.2"]
    assert second.layers == ["blocks.0"]
    assert first.class_logits().shape == second.class_logits().shape


def test_forwards_of_other_threads_are_not_seen():
    model, images, got = vit(), batch(), {}
    started, go = threading.Event(), threading.Event()

    def other():
        with torch.no_grad():
            model(images + 1)  # unread
            with foveal.read(model) as mine:
                started.set()
                go.wait(10)
                model(images + 2)
            got["other"] = mine.class_logits()

    with torch.no_grad(), foveal.read(model) as seen:
        thread = threading.Thread(target=other)
        thread.start()
        started.wait(10)
        model(images)
        go.set()
        thread.join()
    assert len(seen.calls) == 1
    with torch.no_grad(), foveal.read(model) as alone:
        model(images + 2)
    assert torch.equal(got["other"], alone.class_logits())
    assert hooks(model) == 0


def test_attach_twice_is_one_door():
    model = vit()
    first = foveal.attach(model)
    count = hooks(model)
    second = foveal.attach(model)
    assert first is second
    assert hooks(model) == count
    second.remove()
    assert hooks(model) == count
    first.remove()
    assert hooks(model) == 0


def test_hooks_hold_no_tensor_after_the_step():
    import gc
    import weakref

    model, images = vit().train(), batch()
    with foveal.attach(model):
        with foveal.read(model, layers="all") as seen:
            model(images).sum().backward()
        ref = weakref.ref(seen.class_logits()[0])
        del seen
        gc.collect()
        assert ref() is None


def test_patch_dropout_has_rows_but_no_grid():
    model, images = vit(patch_drop_rate=0.5).train(), batch()
    with foveal.read(model) as seen:
        model(images)
    assert seen.class_logits().shape == (3, 2, 8)
    with pytest.raises(ValueError, match="patch dropout"):
        seen.to_grid(seen.class_attention())


def test_batch_of_one_and_named_head_reductions():
    model = vit()
    with torch.no_grad(), foveal.read(model) as seen:
        model(batch(1))
    attn = seen.class_attention()
    assert torch.equal(seen.to_grid(attn, heads="max"), attn.amax(1).reshape(1, 4, 4))
    assert torch.equal(seen.to_grid(attn, heads="min"), attn.amin(1).reshape(1, 4, 4))
    assert seen.to_grid(attn, heads=None).shape == (1, 2, 4, 4)
    with pytest.raises(ValueError, match="use one of mean, max, min"):
        seen.to_grid(attn, heads="median")


def test_not_a_model():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        foveal.read("vit_small_patch16_224")
