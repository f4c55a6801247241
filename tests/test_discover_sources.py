"""The sources that discover objects: what of the model they read, no trace, any grid, boxes in pixels, errors."""

import pytest
import timm
import torch

import foveal
from foveal import maps
from foveal.data.config import ImageConfig
from foveal.maps import discover
from foveal.maps.pixels import pixels_of
from map_models import MODELS, batch, everything, resnet, same, vit

NAMES = {"tokencut": maps.TokenCut, "maskcut": maps.MaskCut, "lost": maps.Lost, "dino": maps.DinoMass}
OPTIONS = [
    ("tokencut", {}),
    ("tokencut", {"variant": "soft"}),
    ("tokencut", {"foreground": "corners", "features": "values"}),
    ("maskcut", {}),
    ("lost", {}),
    ("dino", {}),
]


@pytest.fixture(params=OPTIONS, ids=str)
def make(request):
    name, options = request.param
    return lambda model: maps.make(name, model, **options)


def part_by_hand(model, images, part):
    """Keys, queries or values of the last block of a plain timm ViT: (B, N, D)."""
    seen = []
    hook = model.blocks[-1].attn.qkv.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model.eval()(images)
    hook.remove()
    third = ("queries", "keys", "values").index(part)
    return seen[0][:, model.num_prefix_tokens :].chunk(3, -1)[third]


@pytest.mark.parametrize("part", ["keys", "queries", "values"])
@pytest.mark.parametrize("settings", [{}, {"reg_tokens": 2}])
def test_features_are_the_patches_part_of_the_projection(part, settings):
    model = vit(img_size=(28, 20), **settings)
    images, _ = batch(3, (28, 20))
    x = part_by_hand(model, images, part)
    assert x.shape == (3, 35, 32)
    assert same(vars(discover.tokencut(x, (7, 5))), without_image(maps.TokenCut(model, features=part)(images)))
    assert same(vars(discover.maskcut(x, (7, 5))), without_image(maps.MaskCut(model, features=part)(images)))
    assert same(vars(discover.lost(x, (7, 5))), without_image(maps.Lost(model, features=part)(images)))


def without_image(found):
    """What the features alone say."""
    return {**vars(found), "logits": None, "pixel_boxes": None}


def test_keys_are_taken_after_their_norm():
    model = vit(img_size=(28, 20), qk_norm=True)
    with torch.no_grad():
        model.blocks[-1].attn.k_norm.bias.normal_(generator=torch.Generator().manual_seed(0))
    images, _ = batch(2, (28, 20))
    raw = part_by_hand(model, images, "keys")
    with torch.no_grad():
        normed = model.blocks[-1].attn.k_norm(raw.unflatten(-1, (2, 16))).flatten(-2)
    found = maps.TokenCut(model)(images)
    assert torch.allclose(found.eigenvector, discover.tokencut(normed, (7, 5)).eigenvector, atol=1e-5)
    assert not torch.allclose(found.eigenvector, discover.tokencut(raw, (7, 5)).eigenvector, atol=1e-3)


@pytest.mark.parametrize("layer", [0, -1, "blocks.1"])
@pytest.mark.parametrize("features", ["tokens", "block_out"])
def test_tokens_of_any_block(layer, features):
    model = vit(img_size=(28, 20))
    images, _ = batch(2, (28, 20))
    with torch.no_grad(), foveal.read(model.eval(), layers=layer, what=features) as seen:
        model(images)
    found = maps.TokenCut(model, layer=layer, features=features)(images)
    assert torch.equal(found.map, discover.tokencut(getattr(seen, features)(), (7, 5)).map)


def test_rotary_models_are_read_before_rotation():
    torch.manual_seed(0)
    model = timm.models.eva.Eva(
        img_size=32,
        patch_size=4,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=3,
        use_rot_pos_emb=True,
        use_abs_pos_emb=False,
    ).eval()
    images = torch.randn(1, 3, 32, 32).expand(2, -1, -1, -1).clone()
    images[1] = images[1].roll(4, -1)  # one patch along
    with torch.no_grad(), foveal.read(model, layers=0, what="keys") as seen:
        model(images)
    k = seen.keys().transpose(1, 2).flatten(2).unflatten(1, (8, 8))
    assert torch.allclose(k[0].roll(1, 1), k[1], atol=1e-5)  # keys do not know where they are
    found = maps.TokenCut(model, layer=0)(images)
    assert torch.allclose(found.map[0].roll(1, 1), found.map[1], atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("B", [1, 2, 3])
def test_maps_are_not_negative_and_on_the_models_grid(make, name, B):
    build, size, grid = MODELS[name]
    model = build()
    images, labels = batch(B, size)
    source = make(model)
    found = source(images, labels)
    assert source.model is model
    assert isinstance(found, maps.Found)
    assert found.map.shape == (B, *(size if getattr(source, "variant", "") == "soft" else grid))
    assert found.map.dtype == torch.float32
    assert (found.map >= 0).all()
    assert found.mask.shape == (B, *grid)
    assert torch.equal(found.pixel_boxes, 4 * found.boxes)
    assert not found.degenerate.any()
    with torch.no_grad():
        assert torch.equal(found.logits, model.eval()(images))


def test_images_do_not_see_their_neighbours(make):
    model = vit(img_size=(28, 20))
    images, _ = batch(3, (28, 20))
    source = make(model)
    together = source(images)
    for i in range(3):
        alone = source(images[i : i + 1])
        assert torch.allclose(together.map[i], alone.map[0], atol=1e-4)
        assert torch.equal(together.mask[i], alone.mask[0])


def test_no_trace(make):
    model = vit(drop_rate=0.1, drop_path_rate=0.2, attn_drop_rate=0.1)
    model.blocks[1].eval()  # modes that differ within the model
    images, labels = batch(3, (32, 32))
    model(images).sum().backward()
    model.blocks[0].requires_grad_(False)
    before, kept = everything(model), images.clone()
    found = make(model)(images, labels)
    assert same(before, everything(model))
    assert torch.equal(kept, images)
    assert not any(value.requires_grad for value in vars(found).values() if value is not None)


def test_no_trace_when_the_forward_raises(make):
    model = vit()

    def stop(*args):
        raise KeyboardInterrupt

    images, _ = batch(2, (32, 32))
    source = make(model)
    handle = model.blocks[2].mlp.register_forward_pre_hook(stop)
    before = everything(model)
    with pytest.raises(KeyboardInterrupt):
        source(images)
    assert same(before, everything(model))
    handle.remove()


def test_readers_outside_see_nothing_of_it(make):
    model = vit().eval()
    images, _ = batch(2, (32, 32))
    source = make(model)
    with foveal.read(model) as seen:
        logits = model(images)
        source(images)
    assert len(seen.calls) == 1
    assert logits.shape == (2, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(make, dtype):
    model = vit().to(dtype).eval()
    images, _ = batch(2, (32, 32))
    found = make(model)(images)
    assert found.map.dtype == found.logits.dtype == torch.float32
    assert found.map.isfinite().all()


def test_autocast_does_not_reach_the_graph():
    model = vit().eval()
    images, _ = batch(2, (32, 32))
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad(), foveal.read(model, what="keys") as seen:
            model(images)
        found = maps.TokenCut(model)(images)
    keys = seen.keys().transpose(1, 2).flatten(2)
    assert torch.equal(found.map, discover.tokencut(keys, (8, 8)).map)


def test_by_name():
    model = vit()
    images, labels = batch(2, (32, 32))
    for name, kind in NAMES.items():
        assert maps.MAPS[name] is kind
        assert same(vars(maps.make(name, model)(images, labels)), vars(kind(model)(images)))


# -- what differs between them


def test_attention_decides_the_side():
    model = vit(img_size=(28, 20)).eval()
    images, _ = batch(6, (28, 20))
    with torch.no_grad(), foveal.read(model, what=("keys", "class_logits")) as seen:
        model(images)
    attention = seen.class_attention().mean(1)
    found = maps.TokenCut(model, foreground="attention")(images)
    side = (found.eigenvector > found.eigenvector.mean((1, 2), keepdim=True)).flatten(1)
    inside, outside = ((attention * part).sum(1) / part.sum(1) for part in (side, ~side))
    assert (inside >= outside).all()
    published = maps.TokenCut(model)(images)
    assert torch.equal(found.inverted, ~torch.isclose(found.eigenvector, published.eigenvector).flatten(1).all(1))
    assert 0 < found.inverted.sum() < 6


def test_soft_maps_are_refined_masks_in_the_images_own_normalisation():
    model = vit(img_size=(28, 20))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    pixels = torch.randint(256, (2, 3, 28, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = ImageConfig((28, 20), mean, std).normalise(pixels)
    found = maps.TokenCut(model, variant="soft", mean=mean, std=std)(images)
    mask = maps.TokenCut(model, variant="mask")(images).mask
    refined = discover.refine(pixels, mask)
    assert torch.equal(found.mask, mask)
    assert torch.equal(found.refined, refined.mask)
    assert torch.equal(found.map, refined.soft.clamp(0, 1))
    made = maps.make("tokencut", model, config=ImageConfig((28, 20), mean, std), variant="soft")
    assert torch.equal(made(images).map, found.map)
    usual = maps.TokenCut(model, variant="soft")(images)  # as the model wants its images
    config = foveal.data.image_config(model)
    assert torch.equal(usual.refined, discover.refine(pixels_of(images, config.mean, config.std), mask).mask)


def test_maskcut_counts_all_objects_alike():
    model = vit(img_size=(28, 20))
    found = maps.MaskCut(model, objects=4)(batch(3, (28, 20))[0])
    assert found.masks.shape == found.eigenvectors.shape == (3, 4, 7, 5)
    assert found.boxes.shape == found.pixel_boxes.shape == (3, 4, 4)
    assert torch.equal(found.mask, found.masks.any(1))
    assert torch.equal(found.map, found.mask.float())


def test_dino_of_heads_and_of_models_without_class_token():
    images, _ = batch(2, (28, 20))
    model = vit(img_size=(28, 20)).eval()
    with torch.no_grad(), foveal.read(model) as seen:
        model(images)
    attn = seen.class_attention()
    assert torch.equal(maps.DinoMass(model)(images).map, attn.mean(1).view(2, 7, 5))
    assert torch.equal(maps.DinoMass(model)(images).map, maps.ClassAttention(model)(images).map)
    one = maps.DinoMass(model, head=1, keep=0.3)(images)
    assert torch.equal(one.map, attn[:, 1].reshape(2, 7, 5))
    assert (one.mask & ~discover.mass_mask(attn[:, 1], 0.3).view(2, 7, 5)).sum() == 0
    with pytest.raises(ValueError, match="head=2 is not there: use 0 to 1"):
        maps.DinoMass(model, head=2)(images)
    pooled = MODELS["pooled"][0]()
    assert torch.equal(maps.DinoMass(pooled)(images).map, maps.ReceivedAttention(pooled)(images).map)


@pytest.mark.parametrize("name", NAMES)
def test_models_without_attention_are_refused(name):
    with pytest.raises(maps.MapModelError, match="ResNet"):
        maps.make(name, resnet())


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("tokencut", {"variant": "hard"}, ValueError, "variant='hard'"),
        ("tokencut", {"features": "key"}, ValueError, "features='key'"),
        ("tokencut", {"tau": 1.5}, ValueError, "tau=1.5"),
        ("tokencut", {"foreground": "larger"}, ValueError, "foreground='larger'"),
        ("tokencut", {"layer": 7}, ValueError, "layers=7"),
        ("maskcut", {"objects": 0}, ValueError, "objects=0"),
        ("maskcut", {"eps": 0.0}, ValueError, "eps=0.0"),
        ("lost", {"candidates": 0}, ValueError, "candidates=0"),
        ("dino", {"keep": 1.5}, ValueError, "keep=1.5"),
    ],
)
def test_settings_are_refused_before_the_first_image(name, options, error, message):
    with pytest.raises(error, match=message):
        maps.make(name, vit(), **options)


def test_models_that_show_something_else():
    with pytest.raises(maps.MapModelError, match="foreground='corners' needs none"):
        maps.TokenCut(MODELS["pooled"][0](), foreground="attention")
    torch.manual_seed(0)
    swin = timm.models.swin_transformer.SwinTransformer(
        img_size=32, patch_size=2, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4, num_classes=3
    )
    with pytest.raises(ValueError, match="has no keys; it offers received"):
        maps.TokenCut(swin)


def test_patches_of_any_proportions():
    torch.manual_seed(0)
    naflex = timm.create_model("naflexvit_base_patch16_gap", embed_dim=32, depth=1, num_heads=2, num_classes=3)
    assert maps.TokenCut(naflex)(torch.randn(2, 3, 32, 48)).map.shape == (2, 2, 3)
    free = vit(img_size=(28, 20), dynamic_img_size=True)
    found = maps.TokenCut(free)(torch.randn(2, 3, 12, 36))
    assert found.map.shape == (2, 3, 9)
    assert torch.equal(found.pixel_boxes, 4 * found.boxes)
