"""Every family against the same model computed unfused, its logits written down by a plain twin of the fused kernel."""

import inspect

import pytest
import timm
import torch
import torchvision
from timm.models import vision_transformer
from torch.nn import functional as F

import foveal
from plain import plain_attention

TINY = {"depth": 2, "num_classes": 5}
NARROW = {**TINY, "embed_dim": 64, "num_heads": 4}
# name: (arguments, image size).  Non-square where the family takes it.
GLOBAL = {
    "vit_tiny_patch16_224": ({**TINY, "img_size": (64, 48)}, (64, 48)),
    "deit_tiny_distilled_patch16_224": ({**TINY, "img_size": (64, 48)}, (64, 48)),
    "deit3_small_patch16_224": ({**TINY, "img_size": 64}, (64, 64)),
    "vit_small_patch14_dinov2": ({**TINY, "img_size": (56, 42), "init_values": 1.0}, (56, 42)),
    "vit_small_patch14_reg4_dinov2": ({**TINY, "img_size": 56, "dynamic_img_size": True}, (70, 42)),
    "vit_small_patch16_dinov3": ({**TINY, "img_size": 64}, (64, 48)),
    "vit_small_patch16_dinov3_qkvb": ({**TINY, "img_size": 64}, (64, 64)),
    "eva02_tiny_patch14_224": ({**TINY, "img_size": 56}, (56, 56)),
    "eva02_base_patch14_224": ({**NARROW, "img_size": 56}, (56, 56)),
    "beit_base_patch16_224": ({**NARROW, "img_size": 64}, (64, 64)),
    "beitv2_base_patch16_224": ({**NARROW, "img_size": 64}, (64, 64)),
    "vit_base_patch16_clip_224": ({**NARROW, "img_size": 64}, (64, 64)),
    "vit_base_patch16_siglip_224": ({**NARROW, "img_size": 64}, (64, 64)),
    "flexivit_small": ({**TINY, "img_size": 64}, (64, 64)),
    "vit_pe_core_tiny_patch16_384": ({**TINY, "img_size": 64}, (64, 64)),
    "vit_pe_spatial_tiny_patch16_512": ({**TINY, "img_size": 64}, (64, 64)),
    "vit_wee_patch16_reg1_gap_256": ({**TINY, "img_size": 64}, (64, 64)),
    "vit_base_patch16_xp_224": ({**NARROW, "img_size": 64}, (64, 64)),
    "naflexvit_base_patch16_gap": ({**NARROW}, (64, 48)),
}


def build(name, dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():  # random position biases and gains too: a bias that is zero hides a missing bias
            p.add_(0.2 * torch.randn_like(p))
    return model


def images_of(size, dtype=torch.float64, B=3):
    return torch.randn(B, 3, *size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def logits_of(model, images):
    with plain_attention() as seen:
        out = model(images)
    return out, seen


def close(got, expected, dtype):
    """1e-10 in float64; in float32 1e-5 relative to the largest logit."""
    limit = 1e-10 if dtype == torch.float64 else 1e-5 * max(1.0, expected.abs().max().item())
    return (got - expected).abs().max().item() <= limit


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", GLOBAL)
def test_rows_match_the_unfused_model(name, dtype):
    kwargs, size = GLOBAL[name]
    model, images = build(name, dtype, **kwargs), images_of(size, dtype)
    with torch.no_grad():
        before = model(images)
        has_class = (
            "class_logits" in foveal.supported(model).what["blocks.0" if "18x2" not in name else "blocks.0.attns.0"]
        )
        what = ["received", "patch_received", "mean_query", "full", *(["class_logits"] if has_class else [])]
        with foveal.read(model, layers="all", what=what) as seen:
            after = model(images)
        _, logits = logits_of(model, images)
    assert torch.equal(before, after)
    P = seen.layout.prefix
    logits = [x for x in logits if x.shape[-2] == x.shape[-1]]  # self-attention, not the pooling head
    assert len(logits) == len(seen.layers) == 2
    for i, expected in enumerate(logits):
        attn = expected.softmax(-1)
        assert close(seen.received()[i], attn.mean(-2)[..., P:], dtype)
        assert close(seen.patch_received()[i], attn[:, :, P:].mean(-2)[..., P:], dtype)
        assert close(seen.patch_received(prefix=True)[i].sum(-1), torch.ones_like(attn[:, :, 0, 0]), dtype)
        assert close(seen.mean_query()[i], expected[:, :, P:].mean(-2)[..., P:], dtype)
        assert close(seen.full()[i], attn, dtype)
        if has_class:
            assert close(seen.class_logits()[i], expected[:, :, 0, P:], dtype)
            assert close(seen.class_logits(prefix=True)[i], expected[:, :, 0], dtype)
            assert close(seen.class_attention()[i], attn[:, :, 0, P:], dtype)
    h, w = seen.grid[0]
    picture = seen.to_grid(seen.received())[0]
    assert picture.shape == (3, h, w)
    assert torch.equal(picture.flatten(1), seen.received()[0].mean(1))


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "eva02_base_patch14_224", "beit_base_patch16_224"]
)
def test_rows_match_timms_own_unfused_form(name):
    kwargs, size = GLOBAL[name]
    model, images = build(name, **kwargs), images_of(size)
    with torch.no_grad(), foveal.read(model, layers="all") as seen:
        model(images)
    maps = []
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
            module.attn_drop.register_forward_hook(lambda m, args, out: maps.append(args[0]))
    with torch.no_grad(), foveal.read(model, layers="all", what=["class_logits", "patch_received"]) as unfused:
        model(images)
    P = seen.layout.prefix
    for i, attn in enumerate(maps):
        assert close(seen.class_attention()[i], attn[:, :, 0, P:], torch.float64)
        assert close(unfused.class_logits()[i], seen.class_logits()[i], torch.float64)
        assert close(unfused.patch_received()[i], attn[:, :, P:].mean(-2)[..., P:], torch.float64)


def test_ignoring_rotation_would_be_seen():
    """The guard of the RoPE families: rows of unrotated keys are far from the truth."""
    kwargs, size = GLOBAL["vit_small_patch16_dinov3"]
    model, images = build("vit_small_patch16_dinov3", **kwargs), images_of(size)
    with torch.no_grad(), foveal.read(model, layers=-1, what=["class_logits", "queries", "keys"]) as seen:
        model(images)
    q, k = seen.queries(prefix=True), seen.keys(prefix=True)
    naive = (q[:, :, :1] @ k.transpose(-1, -2)).squeeze(-2) * q.shape[-1] ** -0.5
    rows = seen.class_logits(prefix=True)
    P = seen.layout.prefix
    assert torch.allclose(naive[..., :P], rows[..., :P])  # prefix tokens are not rotated
    assert (naive - rows)[..., P:].abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "prefix", "class_index", "distillation", "registers"),
    [
        ("vit_tiny_patch16_224", 1, 0, None, ()),
        ("deit_tiny_distilled_patch16_224", 2, 0, 1, ()),
        ("vit_small_patch14_reg4_dinov2", 5, 0, None, (1, 2, 3, 4)),
        ("vit_base_patch16_siglip_224", 0, None, None, ()),
        ("vit_wee_patch16_reg1_gap_256", 1, None, None, (0,)),
    ],
)
def test_layout_is_asked_from_the_model(name, prefix, class_index, distillation, registers):
    layout = foveal.supported(build(name, **GLOBAL[name][0])).layout
    assert layout == foveal.TokenLayout(prefix, class_index, distillation, registers)


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224", "vit_wee_patch16_reg1_gap_256"])
def test_no_class_token_is_an_error_that_names_the_way_out(name):
    model = build(name, **GLOBAL[name][0])
    with pytest.raises(ValueError, match=r"no class token.*received.*mean_query"):
        foveal.read(model, layers=-1)


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224", "vit_pe_core_tiny_patch16_384"])
def test_pooling_query_is_read_by_name(name):
    kwargs, size = GLOBAL[name]
    model, images = build(name, **kwargs), images_of(size)
    with torch.no_grad():
        with foveal.read(model, layers="attn_pool") as seen:
            model(images)
        _, logits = logits_of(model, images)
    P = logits[-1].shape[-1] - seen.grid[0] * seen.grid[1]
    assert close(seen.class_logits(), logits[-1][:, :, 0, P:], torch.float64)
    assert seen.to_grid(seen.class_attention()).shape == (3, 4, 4)


def test_projections_and_tokens():
    model, images = build("vit_tiny_patch16_224", **GLOBAL["vit_tiny_patch16_224"][0]), images_of((64, 48))
    what = ["queries", "keys", "values", "tokens", "attn_out", "block_out", "class_logits"]
    with torch.no_grad(), foveal.read(model, layers=[0, 1], what=what) as seen:
        model(images)
    attention = model.blocks[1].attn
    x = model.blocks[1].norm1(seen.tokens(prefix=True)[1])
    q, k, v = attention.qkv(x).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
    assert torch.equal(seen.tokens(prefix=True)[1], seen.block_out(prefix=True)[0])
    for got, expected in ((seen.queries(), q), (seen.keys(), k), (seen.values(), v)):
        assert torch.allclose(got[1], expected[:, :, 1:])
    mixed = (q @ k.transpose(-1, -2) * attention.scale).softmax(-1) @ v
    out = attention.proj(mixed.transpose(1, 2).flatten(2))
    assert torch.allclose(seen.attn_out(prefix=True)[1], out)
    assert seen.attn_out()[1].shape == (3, 12, 192)


def test_cait_class_blocks_are_read_and_talking_heads_refused():
    model, images = build("cait_xxs24_224", **TINY, img_size=64), images_of((64, 64))
    with torch.no_grad():
        with foveal.read(model, layers=["blocks_token_only.0", "blocks_token_only.1"]) as seen:
            model(images)
        _, logits = logits_of(model, images)
    for got, expected in zip(seen.class_logits(prefix=True), logits, strict=True):
        assert close(got, expected[:, :, 0], torch.float64)
    with pytest.raises(foveal.UnsupportedModelError, match="talking heads"):
        foveal.read(model, layers=-1)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("swin_tiny_patch4_window7_224", (56, 84)),
        ("swin_tiny_patch4_window7_224", (48, 48)),  # 12 x 12: windows of 7 are padded
        ("swinv2_tiny_window8_256", (64, 64)),
    ],
)
def test_swin_windows_return_to_the_grid(name, size):
    """Twin: scatter each window's map to absolute positions computed by moving pixel numbers through the block."""
    kwargs = {"img_size": size, "depths": (2, 2), "embed_dim": 24, "num_heads": (2, 4), "num_classes": 5}
    model, images = build(name, **kwargs), images_of(size, B=2)
    probabilities = []
    for module in model.modules():
        if type(module).__name__ == "WindowAttention":
            module.softmax.register_forward_hook(lambda m, args, out: probabilities.append(out))
            module.fused_attn = False
    with torch.no_grad():
        before = model(images)
        probabilities.clear()
        with foveal.read(model, layers="all", what=["received", "patch_received"]) as seen:
            assert torch.equal(model(images), before)
    assert all(torch.equal(a, b) for a, b in zip(seen.received(), seen.patch_received(), strict=True))  # no prefix
    blocks = [block for stage in model.layers for block in stage.blocks]
    for block, attn, got, (h, w) in zip(blocks, probabilities, seen.received(), seen.grid, strict=True):
        wh, ww = block.window_size
        number = torch.arange(h * w, dtype=torch.float64).reshape(h, w)
        sh, sw = block.shift_size
        number = number.roll((-sh, -sw), (0, 1))
        number = F.pad(number, (0, -w % ww, 0, -h % wh), value=-1)
        windows = number.unfold(0, wh, wh).unfold(1, ww, ww).reshape(-1, wh * ww)  # (windows, area) pixel numbers
        expected = torch.zeros(2, attn.shape[1], h * w, dtype=torch.float64)
        for b in range(2):
            for n, pixels in enumerate(windows):
                mean = attn[b * len(windows) + n].mean(-2) / len(windows)
                for slot, pixel in enumerate(pixels.long().tolist()):
                    if pixel >= 0:
                        expected[b, :, pixel] += mean[:, slot]
        assert close(got, expected, torch.float64)
        if h % wh == 0 and w % ww == 0:
            assert torch.allclose(got.sum(-1), torch.ones(2, attn.shape[1], dtype=torch.float64))
    with pytest.raises(ValueError, match="offers received"):
        foveal.read(model, layers=-1)


def test_fused_swin_equals_unfused_swin():
    kwargs = {"img_size": 56, "depths": (2,), "embed_dim": 24, "num_heads": (2,), "num_classes": 5}
    model, images = build("swin_tiny_patch4_window7_224", **kwargs), images_of((56, 56))
    maps = []
    for fused in (False, True):
        for block in model.layers[0].blocks:
            block.attn.fused_attn = fused
        with torch.no_grad(), foveal.read(model, layers="all", what="received") as seen:
            model(images)
        maps.append(seen.received())
    for a, b in zip(*maps, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_hiera_order_is_undone():
    """Twin: carry row-major numbers through Hiera's own unroll, then look where each key came from."""
    model = build(
        "hiera_tiny_224", num_classes=5, img_size=(128, 64), embed_dim=16, num_heads=1, abs_win_pos_embed=False
    )
    images = images_of((128, 64), B=2)
    with torch.no_grad():
        with foveal.read(model, layers="all", what=["received", "patch_received", "mean_query"]) as seen:
            model(images)
        assert all(torch.equal(a, b) for a, b in zip(seen.received(), seen.patch_received(), strict=True))  # no prefix
        _, logits = logits_of(model, images)
    logits = [x.flatten(1, -3) for x in logits if x.dim() == 4 or x.shape[2] == 1]  # global blocks
    assert len(logits) == len(seen.layers)
    for name, expected, got, mean, (h, w) in zip(
        seen.layers, logits, seen.received(), seen.mean_query(), seen.grid, strict=True
    ):
        index = int(name.rpartition(".")[2])
        side = [model.unroll.size[0], model.unroll.size[1]]
        number = torch.arange(side[0] * side[1], dtype=torch.float64).reshape(1, -1, 1)
        order = model.unroll(number)  # at full resolution
        pooled = order
        for stage_end in model.stage_ends:
            if stage_end < index - 1 and stage_end in model.stage_ends[: model.q_pool]:
                pooled = pooled.reshape(1, 4, -1, 1).amin(1)  # the top-left pixel names the pooled cell
        factor = round((side[0] * side[1] / pooled.shape[1]) ** 0.5)
        rows, columns = pooled.flatten() // side[1] // factor, pooled.flatten() % side[1] // factor
        place = (rows * w + columns).long()
        assert h * w == len(place) == len(set(place.tolist()))
        attn = torch.zeros_like(got)
        attn[..., place] = expected.softmax(-1).mean(-2)
        assert close(got, attn, torch.float64)
        row = torch.zeros_like(mean)
        row[..., place] = expected.mean(-2)
        assert close(mean, row, torch.float64)


@pytest.mark.parametrize("grad", [False, True])
def test_torchvision_vit(grad):
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(64, 16, 2, 4, 32, 64, num_classes=5).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    images, maps = images_of((64, 64)), []
    with torch.set_grad_enabled(grad):
        before = model(images)
        what = [
            "class_logits", "received", "patch_received", "mean_query", "full", "queries", "keys", "values", "tokens"
        ]  # fmt: skip
        with foveal.read(model, layers="all", what=what) as seen:
            assert torch.equal(model(images), before)
    for i, layer in enumerate(model.encoder.layers):
        attention, x = layer.self_attention, layer.ln_1(seen.tokens(prefix=True)[i])
        values = F.linear(x, attention.in_proj_weight[64:], attention.in_proj_bias[64:])
        assert close(seen.values(prefix=True)[i].transpose(1, 2).flatten(2), values, torch.float64)
    for layer in model.encoder.layers:
        layer.self_attention.register_forward_pre_hook(
            lambda m, args, kw: (args, {**kw, "need_weights": True, "average_attn_weights": False}), with_kwargs=True
        )
        layer.self_attention.register_forward_hook(lambda m, args, out: maps.append(out[1]))
    model(images)
    for i, attn in enumerate(maps):
        assert close(seen.class_attention(prefix=True)[i], attn[:, :, 0], torch.float64)
        assert close(seen.received()[i], attn.mean(-2)[..., 1:], torch.float64)
        assert close(seen.patch_received()[i], attn[:, :, 1:].mean(-2)[..., 1:], torch.float64)
        assert close(seen.full()[i], attn, torch.float64)
        q, k = seen.queries(prefix=True)[i], seen.keys(prefix=True)[i]
        assert close(seen.class_logits(prefix=True)[i], (q[:, :, 0:1] @ k.mT).squeeze(-2) / 8**0.5, torch.float64)
    assert seen.grid == [(4, 4), (4, 4)]


def test_torchvision_rows_are_not_computed_from_later_weights():
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=3).train()
    with foveal.read(model, what=["class_logits", "received"]) as seen:
        model(images_of((32, 32), torch.float32))
    before = seen.class_logits()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert torch.equal(seen.class_logits(), before)  # asked in time
    with pytest.raises(foveal.ReadError, match=r"read before optimizer\.step"):
        seen.received()


def test_torchvision_rows_follow_hooks_that_come_later():
    torch.manual_seed(0)
    model, images = torchvision.models.VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=3).double().eval(), (32, 32)
    attention = model.encoder.layers[0].self_attention

    def double(module, args, kwargs):
        return tuple(2 * x for x in args), kwargs

    with torch.no_grad(), foveal.attach(model):
        attention.register_forward_pre_hook(double, with_kwargs=True)
        with foveal.read(model, layers=0) as attached_first:
            model(images_of(images))
    with torch.no_grad(), foveal.read(model, layers=0) as hooked_first:
        model(images_of(images))
    assert torch.equal(attached_first.class_logits(), hooked_first.class_logits())


def test_grouped_queries_have_a_key_per_head():
    settings = {"embed_dim": 32, "num_heads": 4, "num_kv_heads": 2, "qkv_fused": False, "use_rot_pos_emb": True}
    if "num_kv_heads" not in inspect.signature(timm.models.Eva).parameters:
        pytest.skip("this timm has no grouped queries")
    torch.manual_seed(0)
    model = timm.models.Eva(img_size=32, patch_size=8, depth=1, attn_type="rope", **settings).double().eval()
    with torch.no_grad(), foveal.read(model, what=["queries", "keys", "values", "class_logits"]) as seen:
        model(images_of((32, 32)))
    q, k = seen.queries(prefix=True), seen.keys(prefix=True)
    assert q.shape == k.shape == seen.values(prefix=True).shape == (3, 4, 17, 8)
    unrotated = q[:, :, 0] * k[:, :, 0]  # the class token is not rotated
    assert torch.allclose(unrotated.sum(-1) * 8**-0.5, seen.class_logits(prefix=True)[..., 0])


def naflex_batch(P=16, dtype=torch.float64):
    """Two images with their own grids, 2 x 5 and 3 x 2, padded to 10 patches."""
    grids, N = [(2, 5), (3, 2)], 10
    g = torch.Generator().manual_seed(2)
    patches = torch.randn(2, N, P * P * 3, dtype=dtype, generator=g)
    coord, valid = torch.zeros(2, N, 2, dtype=torch.long), torch.zeros(2, N, dtype=torch.bool)
    for b, (h, w) in enumerate(grids):
        coord[b, : h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w))
        valid[b, : h * w] = True
    return {"patches": patches, "patch_coord": coord, "patch_valid": valid}, grids


def test_naflex_padding_is_left_out():
    model = build("naflexvit_base_patch16_gap", **NARROW)
    batch, grids = naflex_batch()
    with (
        torch.no_grad(),
        foveal.read(model, layers=-1, what=["received", "patch_received", "mean_query", "full"]) as seen,
    ):
        model(batch)
    assert seen.grid == grids
    alone = {k: v[1:, :6] for k, v in batch.items()}
    with torch.no_grad(), foveal.read(model, layers=-1, what=["received", "patch_received", "mean_query"]) as single:
        model(alone)
    assert torch.allclose(seen.received()[1:, :, :6], single.received())
    assert (seen.received()[1, :, 6:] == 0).all()
    P = seen.layout.prefix
    assert torch.allclose(seen.patch_received()[1:, :, :6], single.patch_received())
    assert torch.allclose(single.patch_received(), seen.full()[1:, :, P : P + 6, P : P + 6].mean(-2))
    assert torch.allclose(seen.mean_query()[1:, :, :6], single.mean_query())
    assert (seen.mean_query()[1, :, 6:] == float("-inf")).all()
    pictures = seen.to_grid(seen.received())
    assert [tuple(p.shape) for p in pictures] == grids
    assert torch.equal(pictures[0].flatten(), seen.received().mean(1)[0])


def test_naflex_padding_is_lost_by_patch_dropout():
    model = build("naflexvit_base_patch16_gap", **NARROW, patch_drop_rate=0.5).train()
    with foveal.read(model, what="received") as seen:
        model(naflex_batch()[0])
    with pytest.raises(foveal.ReadError, match="patch dropout"):
        seen.received()


def test_a_masked_hiera_is_not_read():
    model = build("hiera_tiny_224", num_classes=5, img_size=64, embed_dim=16, num_heads=1, abs_win_pos_embed=False)
    mask = torch.arange(4).expand(2, 4) < 2  # mask units of 32 pixels
    with torch.no_grad(), pytest.raises(foveal.ReadError, match="masked"), foveal.read(model, what="received"):
        model.forward_features(images_of((64, 64), B=2), mask=mask)


OTHERS = ["maxvit_tiny_tf_224", "xcit_nano_12_p16_224", "resnet18", "vit_dlittle_patch16_reg1_gap_256"]


@pytest.mark.parametrize("name", [name for name in OTHERS if timm.is_model(name)])  # older timm lacks the last
def test_anything_else_is_refused_by_name(name):
    kwargs = {"depth": 2, "img_size": 64} if "dlittle" in name else {}
    model = timm.create_model(name, **kwargs)
    support = foveal.supported(model)
    assert not support
    assert "supported are" in support.reason
    with pytest.raises(foveal.UnsupportedModelError, match="supported are"):
        foveal.read(model)


def test_two_trunks_in_one_module_are_not_guessed():
    pair = torch.nn.ModuleDict(
        {name: build("vit_tiny_patch16_224", **GLOBAL["vit_tiny_patch16_224"][0]) for name in "ab"}
    )
    with pytest.raises(foveal.UnsupportedModelError, match="2 vision transformers: a, b"):
        foveal.attach(pair)


def test_a_vit_inside_another_module_is_found():
    class Classifier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = build("vit_tiny_patch16_224", **GLOBAL["vit_tiny_patch16_224"][0])

        def forward(self, x):
            return self.backbone(x) * 2

    model, images = Classifier(), images_of((64, 48))
    with torch.no_grad(), foveal.read(model) as outside:
        model(images)
    with torch.no_grad(), foveal.read(model.backbone) as inside:
        model.backbone(images)
    assert torch.equal(outside.class_logits(), inside.class_logits())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (2, r"values in \[-2, 1\]"),
        ("blocks.11", "not in the model"),
        ("block.1", "did you mean 'blocks.1'"),
        ([], "no layer"),
    ],
)
def test_a_layer_that_is_not_there(layers, message):
    model = build("vit_tiny_patch16_224", **GLOBAL["vit_tiny_patch16_224"][0])
    with pytest.raises(ValueError, match=message):
        foveal.read(model, layers=layers)


def test_a_value_that_is_not_there():
    model = build("vit_tiny_patch16_224", **GLOBAL["vit_tiny_patch16_224"][0])
    with pytest.raises(ValueError, match="did you mean 'received'"):
        foveal.read(model, what="recieved")
    with pytest.raises(ValueError, match="nothing asked"):
        foveal.read(model, what=[])


def test_a_branch_of_a_parallel_block_has_no_block_output():
    model = vision_transformer.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3,
        block_fn=vision_transformer.ParallelThingsBlock,
    ).eval()  # fmt: skip
    with pytest.raises(ValueError, match=r"blocks\.1\.attns\.1 \(self attention\) has no block_out"):
        foveal.read(model, -1, "block_out")
    with foveal.read(model, "blocks.1.attns.0", ("full", "attn_out")) as seen, torch.no_grad():
        model(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert seen.full().shape == (2, 2, 5, 5)
