"""CCT, CVT and ViT-Lite: sizes, arithmetic against a plain twin, positions, timm's interface."""

import math
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import foveal.models
from foveal.models import Block, CompactTransformer, ConvTokenizer, SequencePool, resize_table, sine_table

# name: parameters, tokens (class token included), GMACs of convolutions and linears, with attention products
PUBLISHED = {
    "cct_2_3x2_32": (283_723, 64, 0.033, 0.035),
    "cct_4_3x2_32": (482_123, 64, 0.046, 0.050),
    "cct_6_3x1_32": (3_233_803, 256, 0.812, 1.014),
    "cct_6_3x2_32": (3_326_923, 64, 0.241, 0.253),
    "cct_7_3x1_32": (3_760_139, 256, 0.947, 1.182),
    "cct_7_3x2_32": (3_853_259, 64, 0.274, 0.289),
    "cct_7_7x2_224": (4_573_735, 196, None, None),
    "cct_14_7x2_224": (22_367_273, 196, 5.109, 5.522),
    "cct_14_7x2_384": (22_513_193, 576, None, None),
    "cvt_2_4_32": (214_539, 64, None, None),
    "cvt_4_4_32": (412_939, 64, None, None),
    "cvt_6_4_32": (3_190_283, 64, None, None),
    "cvt_7_4_32": (3_716_619, 64, 0.236, 0.250),
    "vit_lite_2_4_32": (214_666, 65, None, None),
    "vit_lite_4_4_32": (413_066, 65, None, None),
    "vit_lite_6_4_32": (3_190_538, 65, None, None),
    "vit_lite_7_4_32": (3_716_874, 65, 0.239, 0.254),
}
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
FORMS = {
    "one convolution": {"conv_layers": 1},
    "two convolutions, sines": {"conv_layers": 2, "pos_embed": "sine"},
    "three convolutions, not square": {"conv_layers": 3, "img_size": (32, 40)},
    "kernel 7, no positions": {"kernel_size": 7, "conv_layers": 2, "pos_embed": "none", "img_size": 56},
    "kernel 5, stride 2": {"kernel_size": 5, "stride": 2, "padding": 0, "img_size": (28, 40)},
    "patches": {"conv_layers": 0, "kernel_size": 4, "img_size": (16, 24)},
    "patches, class token": {"conv_layers": 0, "kernel_size": 4, "class_token": True, "img_size": (16, 24)},
    "patches, class token, sines": {"conv_layers": 0, "kernel_size": 8, "class_token": True, "pos_embed": "sine"},
}


def tiny(dtype=torch.float64, seed=0, **changes) -> CompactTransformer:
    """A small model whose every parameter is away from its start: a zero or a one would hide a missing term."""
    torch.manual_seed(seed)
    model = CompactTransformer(**{**TINY, **changes}).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def images_of(model, B=3, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, 3, *model.patch_embed.img_size, dtype=model.norm.weight.dtype, generator=g)


def plain(model, images):
    """The same model in plain operations, from its weights: logits, attention per block, pooling weights."""
    w = model.state_dict()
    layers = 0
    while f"patch_embed.conv_layers.{layers}.0.weight" in w:
        layers += 1
    x = images
    for i in range(layers):
        kernel = w[f"patch_embed.conv_layers.{i}.0.weight"]
        x = F.conv2d(x, kernel, None, model.patch_embed.stride, model.patch_embed.padding)
        x = F.max_pool2d(x.clamp(min=0), 3, 2, 1)
    if not layers:
        kernel = w["patch_embed.proj.weight"]
        x = F.conv2d(x, kernel, w["patch_embed.proj.bias"], kernel.shape[-1])
    x = torch.stack([x[:, :, r, c] for r in range(x.shape[2]) for c in range(x.shape[3])], 1)  # row by row
    if "cls_token" in w:
        x = torch.cat([w["cls_token"].repeat(len(x), 1, 1), x], 1)
    if "pos_embed" in w:
        x = x + w["pos_embed"]

    def norm(x, name):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    maps, H = [], TINY["num_heads"]
    B, T, D = x.shape
    for i in range(TINY["depth"]):
        name = f"blocks.{i}"
        qkv = norm(x, f"{name}.norm1") @ w[f"{name}.attn.qkv.weight"].T  # no bias
        q, k, v = (part.reshape(B, T, H, D // H).transpose(1, 2) for part in qkv.split(D, -1))
        maps.append((q @ k.mT / math.sqrt(D // H)).softmax(-1))
        out = (maps[-1] @ v).transpose(1, 2).reshape(B, T, D)
        x = x + out @ w[f"{name}.attn.proj.weight"].T + w[f"{name}.attn.proj.bias"]
        x = norm(x, f"{name}.norm2")  # from here on the residual is the normalised tensor
        hidden = x @ w[f"{name}.mlp.fc1.weight"].T + w[f"{name}.mlp.fc1.bias"]
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + hidden @ w[f"{name}.mlp.fc2.weight"].T + w[f"{name}.mlp.fc2.bias"]
    x = norm(x, "norm")
    pooling = None
    if "seq_pool.score.weight" in w:
        pooling = (x @ w["seq_pool.score.weight"][0] + w["seq_pool.score.bias"]).softmax(-1)
        z = sum(pooling[:, t, None] * x[:, t] for t in range(T))
    else:
        z = x[:, 0]
    return z @ w["head.weight"].T + w["head.bias"], maps, pooling


# -- published numbers


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    parameters, tokens, macs, macs_with_attention = PUBLISHED[name]
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        image = torch.zeros(1, 3, *model.patch_embed.img_size)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.pos_embed.shape[1] == tokens == model.patch_embed.num_patches + model.num_prefix_tokens
    plain_macs, products = operations(model, image)
    if macs is not None:
        assert round(plain_macs / 1e9, 3) == macs
        assert round((plain_macs + products) / 1e9, 3) == macs_with_attention


def operations(model, image):
    """Multiply-adds of one forward: of convolutions and linears, and of attention (q k^T, and with the values)."""
    counts = {"plain": 0, "products": 0}

    def conv(module, args, out):
        counts["plain"] += out.numel() * module.weight[0].numel()

    def linear(module, args, out):
        counts["plain"] += out.numel() * module.in_features

    def attention(module, args, out):
        T, D = args[0].shape[1:]
        counts["products"] += 2 * T * T * D

    for module in model.modules():
        kind = type(module).__name__
        hook = {"Conv2d": conv, "Linear": linear, "Attention": attention}.get(kind)
        if hook is not None:
            module.register_forward_hook(hook)
    assert model(image).shape == (1, model.num_classes)
    return counts["plain"], counts["products"]


def test_cct_7_for_100_classes():
    with torch.device("meta"):
        model = timm.create_model("cct_7_3x1_32", num_classes=100)
    assert sum(p.numel() for p in model.parameters()) == 3_783_269


# -- the arithmetic


@pytest.mark.parametrize("form", FORMS)
def test_logits_match_a_plain_twin(form):
    model = tiny(**FORMS[form])
    images = images_of(model)
    expected, _, pooling = plain(model, images)
    with torch.no_grad():
        assert (model(images) - expected).abs().max() <= 1e-10
    assert (pooling is None) == FORMS[form].get("class_token", False)


@pytest.mark.parametrize("form", FORMS)
def test_an_image_does_not_see_its_batch(form):
    model = tiny(**FORMS[form])
    images = images_of(model)
    with torch.no_grad():
        together, alone = model(images), torch.cat([model(one[None]) for one in images])
        assert torch.allclose(together, alone, rtol=0, atol=1e-12)
        assert torch.equal(model(images), together)  # evaluation draws nothing


def test_block_without_output_is_its_second_norm():
    """Not x: the residual of the MLP starts from the normalised tokens."""
    block = tiny().blocks[0]
    with torch.no_grad():
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.zero_()
            layer.bias.zero_()
        x = torch.randn(2, 7, 32, dtype=torch.float64)
        assert torch.equal(block(x), block.norm2(x))
        assert not torch.allclose(block(x), x, atol=0.1)


def test_sequence_pooling_by_hand():
    """Tokens (1, 0) and (0, 2), a = (1, 0), a0 = 0.5: logits 1.5 and 0.5."""
    pool = SequencePool(2).double()
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]], dtype=torch.float64)
    with torch.no_grad():
        pool.score.weight.copy_(torch.tensor([[1.0, 0.0]]))
        pool.score.bias.fill_(0.5)
        assert torch.allclose(pool(tokens), torch.tensor([[0.7311, 0.5379]], dtype=torch.float64), atol=5e-5)
        pool.score.weight.zero_()
        assert torch.equal(pool(tokens), tokens.mean(1))


def test_start_of_the_weights():
    torch.manual_seed(0)
    model = timm.create_model("cct_7_3x2_32")
    blocks, D = model.blocks, 256
    assert model.pos_embed.std().item() == pytest.approx(0.2, rel=0.05)
    assert blocks[3].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert blocks[3].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.seq_pool.score.weight.std().item() == pytest.approx(0.02, rel=0.2)
    first, second = (layer[0].weight for layer in model.patch_embed.conv_layers)
    assert first.std().item() == pytest.approx(math.sqrt(2 / 27), rel=0.1)
    assert second.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.02)
    zeros = [model.head.bias, blocks[0].attn.proj.bias, blocks[0].mlp.fc1.bias, blocks[0].mlp.fc2.bias]
    assert not any(bias.any() for bias in zeros)
    assert blocks[0].attn.qkv.bias is None
    assert model.patch_embed.conv_layers[0][0].bias is None
    assert torch.equal(model.norm.weight, torch.ones(D))
    lite = timm.create_model("vit_lite_2_4_32")
    assert not lite.cls_token.any()
    assert lite.patch_embed.proj.bias.any()


def test_rates_of_dropping():
    model = timm.create_model("cct_7_3x1_32")
    paths = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert paths == pytest.approx([0.1 * i / 6 for i in range(7)])
    assert paths == [getattr(block.drop_path2, "drop_prob", 0.0) for block in model.blocks]
    assert isinstance(model.blocks[0].drop_path1, nn.Identity)
    assert {block.attn.attn_drop.p for block in model.blocks} == {0.1}
    assert model.pos_drop.p == model.head_drop.p == 0.0
    assert {block.mlp.drop1.p + block.mlp.drop2.p + block.attn.proj_drop.p for block in model.blocks} == {0.0}
    still = timm.create_model("cct_2_3x2_32", drop_path_rate=0.0, attn_drop_rate=0.0).train()
    images = images_of(still)
    assert torch.equal(still(images), still(images))
    dropped = timm.create_model("cct_2_3x2_32", proj_drop_rate=0.5, pos_drop_rate=0.25)
    assert dropped.blocks[0].mlp.drop1.p == dropped.blocks[0].mlp.drop2.p == dropped.blocks[0].attn.proj_drop.p == 0.5
    assert dropped.pos_drop.p == 0.25


def test_the_two_branches_of_a_block_are_dropped_independently():
    torch.manual_seed(0)
    block = Block(8, num_heads=2, mlp_ratio=2.0, drop_path=0.5).train()
    kept = []
    for path in (block.drop_path1, block.drop_path2):
        path.register_forward_hook(lambda module, args, out: kept.append(out / args[0]))
    block(torch.randn(64, 3, 8))
    factors = torch.stack([factor.flatten(1).T for factor in kept])  # (branches, numbers of a sample, samples)
    assert torch.allclose(factors, factors[:, :1], atol=1e-4)  # a sample is dropped whole
    pairs = {(round(a), round(b)) for a, b in zip(*factors[:, 0].tolist(), strict=True)}
    assert pairs == {(0, 0), (0, 2), (2, 0), (2, 2)}  # scaled by 1 / keep


# -- tokenizer


@pytest.mark.parametrize(
    ("size", "kernel", "layers", "grid"),
    [
        (32, 3, 1, (16, 16)),
        (32, 3, 2, (8, 8)),
        (224, 7, 2, (14, 14)),
        (384, 7, 2, (24, 24)),
        ((33, 50), 3, 1, (17, 25)),
    ],
)
def test_grid_is_told_before_it_is_made(size, kernel, layers, grid):
    with torch.device("meta"):
        tokenizer = ConvTokenizer(size, kernel, layers, embed_dim=8)
        out = tokenizer.conv_layers(torch.zeros(1, 3, *tokenizer.img_size))
    assert tokenizer.grid_size == grid == tuple(out.shape[-2:])
    assert tokenizer.num_patches == grid[0] * grid[1]


def test_convolutions_have_64_channels_between_them():
    tokenizer = ConvTokenizer(32, 3, 3, embed_dim=8)
    shapes = [tuple(layer[0].weight.shape[:2]) for layer in tokenizer.conv_layers]
    assert shapes == [(64, 3), (64, 64), (8, 64)]


# -- positions


def test_sine_table_by_hand():
    expected = [(0, 1, 0, 1), (0.8415, 0.5403, 0.0100, 0.9999), (0.9093, -0.4161, 0.0200, 0.9998)]
    assert torch.allclose(sine_table(3, 4)[0], torch.tensor(expected), atol=5e-5)
    assert sine_table(5, 3).shape == (1, 5, 3)  # an odd width ends with a sine


def test_sine_names_really_are_sines():
    for name in ("cct_2_3x2_32_sine", "cvt_2_4_32_sine", "vit_lite_2_4_32_sine"):
        model = timm.create_model(name)
        tokens = model.patch_embed.num_patches + model.num_prefix_tokens
        assert torch.equal(model.pos_embed, sine_table(tokens, 128))
        assert "pos_embed" not in dict(model.named_parameters())
        assert "pos_embed" in model.state_dict()


def test_resized_table_by_hand():
    """One row of two patches, 0 and 4, to four: bilinear with half-pixel centres; the class row stays."""
    table = torch.tensor([[[9.0], [0.0], [4.0]]])
    resized = resize_table(table, (1, 2), (2, 4), prefix=1)
    assert resized.flatten().tolist() == [9, 0, 1, 3, 4, 0, 1, 3, 4]
    assert resize_table(table, (1, 2), (1, 2), prefix=1) is table
    assert resize_table(table.half(), (1, 2), (1, 3), prefix=1).dtype == torch.float16
    with pytest.raises(ValueError, match=r"must be \(1, 5, width\)"):
        resize_table(table, (2, 2), (1, 2), prefix=1)


@pytest.mark.parametrize("form", ["one convolution", "patches, class token"])
def test_another_image_size(form):
    model = tiny(**FORMS[form])
    old, before = model.patch_embed.grid_size, model.pos_embed.detach().clone()
    with pytest.raises(ValueError, match=r"set_input_size\(\(64, 48\)\)"):
        model(torch.zeros(1, 3, 64, 48, dtype=torch.float64))
    model.set_input_size((64, 48))
    new = model.patch_embed.grid_size
    assert torch.equal(model.pos_embed, resize_table(before, old, new, model.num_prefix_tokens))
    assert model.pos_embed.requires_grad
    images = images_of(model, B=2)
    assert images.shape[-2:] == (64, 48)
    with torch.no_grad():
        assert torch.allclose(model(images), plain(model, images)[0], atol=1e-10, rtol=0)


def test_another_image_size_with_sines_and_without_positions():
    model = tiny(pos_embed="sine")
    model.set_input_size((32, 64))
    assert torch.equal(model.pos_embed, sine_table(16 * 32, 32).double())
    free = tiny(pos_embed="none")
    assert free(torch.zeros(2, 3, 20, 44, dtype=torch.float64)).shape == (2, 5)


# -- what cannot be meant


def test_errors_name_cause_and_fix():
    with pytest.raises(ValueError, match=r"pos_embed='sinus'.*learnable, sine, none"):
        CompactTransformer(pos_embed="sinus")
    with pytest.raises(ValueError, match="stride and padding belong to convolutions"):
        CompactTransformer(conv_layers=0, kernel_size=4, stride=2)
    with pytest.raises(ValueError, match="has a class token, so use 'token'"):
        CompactTransformer(class_token=True, global_pool="seq")
    with pytest.raises(ValueError, match="leaves no token"):
        CompactTransformer(img_size=2, kernel_size=7, conv_layers=2, padding=0)
    with pytest.raises(ValueError, match="say which grid"):
        tiny().fitted_positions(torch.zeros(1, 12, 32))


# -- timm's interface


def test_names_are_known_to_timm():
    assert len(foveal.models.NAMES) == 2 * len(PUBLISHED)
    assert set(PUBLISHED) | {f"{name}_sine" for name in PUBLISHED} == set(foveal.models.NAMES)
    assert all(timm.is_model(name) for name in foveal.models.NAMES)
    assert "cct_7_3x1_32" in timm.list_models("cct_*")
    cfg = timm.get_pretrained_cfg("cct_7_3x1_32")
    assert cfg.input_size == (3, 32, 32)
    assert cfg.mean == (0.4914, 0.4822, 0.4465)
    assert cfg.std == (0.2470, 0.2435, 0.2616)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = timm.create_model("cct_7_3x1_32", num_classes=3, img_size=(40, 24), depth=3, in_chans=1)
    assert (model.num_classes, len(model.blocks), model.patch_embed.grid_size) == (3, 3, (20, 12))
    assert model(torch.zeros(1, 1, 40, 24)).shape == (1, 3)


@pytest.mark.parametrize("form", ["one convolution", "patches, class token"])
def test_features_head_and_classifier(form):
    model = tiny(**FORMS[form])
    images = images_of(model)
    with torch.no_grad():
        tokens = model.forward_features(images)
        h, w = model.patch_embed.grid_size
        assert tokens.shape == (3, model.num_prefix_tokens + h * w, model.num_features)
        pooled = model.forward_head(tokens, pre_logits=True)
        assert pooled.shape == (3, 32)
        assert torch.equal(model(images), model.get_classifier()(pooled))
    model.reset_classifier(7)
    assert model(images).shape == (3, 7)
    assert model.num_classes == model.get_classifier().out_features == 7
    assert not model.head.bias.any()
    model.reset_classifier(0)
    assert torch.equal(model(images), model.forward_head(model.forward_features(images), pre_logits=True))
    model.reset_classifier(0, "")
    assert model(images).shape == (3, model.num_prefix_tokens + h * w, 32)


def test_layers_for_learning_rates_by_depth():
    from foveal.train.optimise import parameter_groups

    model = timm.create_model("vit_lite_2_4_32")
    lite = {id(p): group for group in parameter_groups(model, 0.05, layer_decay=0.5) for p in group["params"]}
    scale = {name: lite[id(p)]["lr_scale"] for name, p in model.named_parameters()}
    assert scale["cls_token"] == scale["pos_embed"] == scale["patch_embed.proj.weight"] == 0.125
    assert scale["blocks.0.attn.qkv.weight"] == 0.25
    assert scale["blocks.1.mlp.fc2.bias"] == 0.5
    assert scale["norm.weight"] == 0.5
    assert scale["head.weight"] == 1.0
    model = timm.create_model("cct_2_3x2_32")
    groups = {id(p): group for group in parameter_groups(model, 0.05) for p in group["params"]}
    decayed = {name for name, p in model.named_parameters() if groups[id(p)]["weight_decay"] > 0}
    assert decayed == {name for name, p in model.named_parameters() if p.dim() > 1}
    assert {"pos_embed", "seq_pool.score.weight", "patch_embed.conv_layers.0.0.weight"} <= decayed


def test_gradient_checkpointing_changes_no_gradient():
    model = tiny().train()
    images = images_of(model)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(3)  # drop path and attention dropout draw the same in the recomputation
        model(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_pooling_offset_changes_nothing():
    model = tiny()
    images = images_of(model)
    model(images).square().sum().backward()
    assert model.seq_pool.score.weight.grad.abs().max() > 1e-3
    assert model.seq_pool.score.bias.grad.abs().max() < 1e-12


def test_compiled_forward_is_the_forward():
    model = tiny(torch.float32)
    images = images_of(model)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(images), model(images), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = tiny(torch.float32, attn_drop_rate=0.0)
    images = images_of(model)
    with torch.no_grad():
        exact = model(images)
        with torch.autocast("cpu", dtype):
            cast = model(images)
        half = model.to(dtype)(images.to(dtype))
    assert half.dtype == dtype
    assert (cast.float() - exact).abs().max() < 0.1 * exact.abs().max()
    assert (half.float() - exact).abs().max() < 0.1 * exact.abs().max()
