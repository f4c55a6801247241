"""Pictures of where a model looks: what the colours claim is what the numbers say."""

import numpy as np
import pytest
import torch
from PIL import Image

import foveal
from foveal.explain.grid import captioned, head_grid, sheet
from foveal.explain.overlay import LUMA, QUIET, colours, enlarge, overlay, resize, strength
from foveal.explain.pictures import pictures
from foveal.explain.save import save, save_png


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randint(0, 256, (3, 24, 36), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def quiet_grey(image: torch.Tensor) -> np.ndarray:
    """The image as an overlay shows it where nothing is coloured, written out slowly."""
    height, width = image.shape[1:]
    result = np.zeros((height, width, 3), np.uint8)
    for y in range(height):
        for x in range(width):
            pixel = image[:, y, x].double()
            grey = (pixel * LUMA).sum()
            result[y, x] = (20 + 0.85 * (QUIET * pixel + (1 - QUIET) * grey)).round().numpy()
    return result


def test_even_attention_shows_the_image_alone(image):
    assert np.abs(overlay(image, torch.ones(4, 6)).astype(int) - quiet_grey(image)).max() <= 1  # rounding


@pytest.mark.parametrize("level", [0.0, 1.0, 37.5])
def test_a_map_without_preference_has_no_strength(level):
    assert torch.equal(strength(torch.full((3, 5), level)), torch.zeros(3, 5))


def test_one_hot_patch_colours_that_patch_only(image):
    attn = torch.zeros(4, 6)
    attn[2, 1] = 1
    picture, grey = overlay(image, attn, smooth=False).astype(int), quiet_grey(image).astype(int)
    changed = np.abs(picture - grey).max(-1) > 1
    assert changed[12:18, 6:12].all()
    changed[12:18, 6:12] = False
    assert not changed.any()
    yellow = 255 * colours(torch.ones(())).numpy()
    assert np.allclose(picture[12:18, 6:12], 0.15 * grey[12:18, 6:12] + 0.85 * yellow, atol=1)


def test_scale_of_the_map_does_not_matter(image):
    attn = torch.rand(4, 6, generator=torch.Generator().manual_seed(1))
    assert np.array_equal(overlay(image, attn), overlay(image, attn * 4))


def test_strength_by_hand():
    # mean 2, ratios 0.5, 0.5, 1, 2: full colour at 2, none up to 1
    assert torch.equal(strength(torch.tensor([[1.0, 1.0], [2.0, 4.0]])), torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    # a common peak of 5: (2 - 1) / (5 - 1)
    assert strength(torch.tensor([[1.0, 1.0], [2.0, 4.0]]), peak=5)[1, 1] == 0.25


def test_small_preferences_stay_pale():
    attn = torch.tensor([[1.0, 1.0], [1.0, 1.04]])
    assert strength(attn).max() < 0.04


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (7, 3), (8, 8)])
def test_enlarging_invents_nothing(grid, smooth):
    attn = torch.rand(grid, generator=torch.Generator().manual_seed(2))
    large = enlarge(attn, (31, 45), smooth)
    assert large.shape == (31, 45)
    assert large.min() >= attn.min() - 1e-6  # float32 weights that sum to 1
    assert large.max() <= attn.max() + 1e-6


def test_patch_centres_keep_their_value():
    attn = torch.rand(3, 4, generator=torch.Generator().manual_seed(3))
    for smooth in (True, False):
        large = enlarge(attn, (15, 20), smooth)  # 5 x 5 pixels a patch: pixel 2 is the centre
        assert torch.allclose(large[2::5, 2::5], attn, atol=1e-6)


def test_nearest_is_the_patch_repeated():
    attn = torch.rand(2, 3, generator=torch.Generator().manual_seed(4))
    expected = attn.repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert torch.allclose(enlarge(attn, (8, 12), smooth=False), expected)


@pytest.mark.parametrize(
    ("side", "shape"), [(None, (24, 36, 3)), (24, (24, 36, 3)), (48, (48, 72, 3)), (12, (12, 18, 3))]
)
def test_size_of_the_picture(image, side, shape):
    assert overlay(image, torch.rand(4, 6), side=side).shape == shape


def test_half_precision_maps(image):
    attn = torch.rand(4, 6, generator=torch.Generator().manual_seed(5)).half()
    assert np.array_equal(overlay(image, attn), overlay(image, attn.float()))


def test_an_image_of_numpy_is_an_image(image):
    assert np.array_equal(overlay(image.numpy(), torch.eye(4)), overlay(image, torch.eye(4)))
    assert np.array_equal(resize(image), image.numpy().transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (torch.ones(2, 3, 3), "average or pick heads"),
        (torch.tensor([[1.0, float("nan")]]), "NaN"),
        (torch.tensor([[1.0, -0.1]]), "negative"),
        (torch.ones(0, 3), "must be"),
    ],
)
def test_bad_maps_are_named(image, bad, word):
    with pytest.raises(ValueError, match=word):
        overlay(image, bad)


def test_bad_images_are_named():
    with pytest.raises(ValueError, match="uint8"):
        overlay(torch.rand(3, 8, 8), torch.ones(2, 2))
    with pytest.raises(ValueError, match="above 1"):
        strength(torch.ones(2, 2), peak=1)


def rendered(figure) -> np.ndarray:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]


def test_head_grid_places_every_panel_pixel_for_pixel(image):
    rng = torch.Generator().manual_seed(6)
    maps = [torch.rand(3, 4, 6, generator=rng), torch.rand(2, 2, 3, generator=rng)]  # heads and grids differ
    page = rendered(head_grid(image, maps, ["blocks.0", "blocks.1"], panel=24))
    for attn in maps:
        for panel in [
            *(overlay(image, head, side=24) for head in attn),
            overlay(image, attn.mean(0), side=24),
        ]:
            first = (page[: -24 or None, :, :] == panel[0, 0]).all(-1)
            spots = [
                (y, x)
                for y, x in zip(*np.nonzero(first), strict=True)
                if np.array_equal(page[y : y + 24, x : x + 36], panel)
            ]
            assert len(spots) == 1


def test_head_grid_refuses_maps_without_heads(image):
    with pytest.raises(ValueError, match="heads"):
        head_grid(image, [torch.rand(4, 6)])
    with pytest.raises(ValueError, match="names"):
        head_grid(image, [torch.rand(1, 4, 6)], ["a", "b"])


def test_captions_are_text_and_never_mathematics():
    picture = np.zeros((60, 200, 3), np.uint8)
    page = rendered(captioned([picture], r"$5 notes & \frac{1} costs $10", "a note $"))
    assert (page[84:] < 128).any()  # letters were drawn under the picture


def test_sheet_keeps_places_free():
    red, blue = np.full((2, 3, 3), (255, 0, 0), np.uint8), np.full((4, 2, 3), (0, 0, 255), np.uint8)
    page = sheet([[red, None], [None, blue]], gap=1)
    assert page.shape == (2 + 1 + 4, 3 + 1 + 2, 3)
    assert (page[:2, :3] == (255, 0, 0)).all()
    assert (page[3:, 4:] == (0, 0, 255)).all()
    assert (page[3:, :4] == 255).all()
    assert (page[:3, 3:] == 255).all()
    with pytest.raises(ValueError, match="at least one"):
        sheet([[None]])


def test_saved_picture_is_the_picture(tmp_path, image):
    path = save_png(resize(image), tmp_path / "new" / "picture.png")
    assert np.array_equal(np.asarray(Image.open(path)), resize(image))
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = save(b"old", tmp_path / "page.html")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(b"new", path)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


@pytest.fixture
def vit():
    import timm

    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=(32, 48), patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5
    )


def test_pictures_are_what_the_door_reads(vit):
    images = torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    vit.train()
    seen_picture = pictures(vit, images)
    assert vit.training
    vit.eval()
    with torch.no_grad(), foveal.read(vit, layers="all") as seen:
        logits = vit(images)
    assert seen_picture.layers == ("blocks.0", "blocks.1")
    assert seen_picture.kinds == ("class", "class")
    assert torch.equal(seen_picture.logits, logits)
    for attn, row in zip(seen_picture.attention, seen.class_attention(), strict=True):
        assert attn.shape == (3, 3, 4, 6)
        assert torch.equal(attn.flatten(2), row)
    assert torch.equal(seen_picture.look(1, 0), seen_picture.attention[0][1].mean(0))
    assert not vit._forward_hooks


def test_chosen_layers_and_unknown_ones(vit):
    images = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pictures(vit, images, ["blocks.1"]).attention[0], pictures(vit, images).attention[1])
    with pytest.raises(ValueError, match=r"blocks\.7"):
        pictures(vit, images, ["blocks.7"])


def test_without_a_class_token_the_received_attention_is_shown_and_named():
    import timm

    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3, class_token=False,
        global_pool="avg", num_classes=5,
    )  # fmt: skip
    seen = pictures(model, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert seen.kinds == ("received",)
    assert "no class token" in seen.describe()
    assert torch.allclose(seen.attention[0].sum((-1, -2)), torch.ones(2, 3))  # nothing is lost on a prefix


def test_a_pooling_query_is_shown_beside_its_blocks():
    import timm

    torch.manual_seed(0)
    model = timm.create_model(
        "vit_base_patch16_siglip_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5
    )
    seen = pictures(model, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert seen.kinds == ("received", "received", "pool")
    assert torch.allclose(seen.attention[-1].sum((-1, -2)), torch.ones(2, 3))


def test_a_model_that_cannot_be_read_is_refused():
    with pytest.raises(foveal.UnsupportedModelError):
        pictures(torch.nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 8, 8))
