"""predict: the model's own logits, its attention as read by hand, the pointing game, and a model left alone."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import foveal
from foveal.data import ImageConfig, Images, image_config
from foveal.evaluate import energy_share
from foveal.evaluate.predict import predict


def images(n: int = 7, size: tuple[int, int] = (32, 32), masks: bool = True) -> Images:
    x = torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Images(torch.arange(n) % 3, ("a", "b", "c"), x, masks=x[:, 0] > 200 if masks else None)


def vit(**options: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = timm.models.VisionTransformer(**(sizes | options))
    for block in model.blocks:  # sharper than at the start, or all maps look alike
        nn.init.normal_(block.attn.qkv.weight, std=0.2)
    return model


def test_logits_and_attention_are_those_of_one_forward():
    model, given = vit(), images()
    config = image_config(model)
    found = predict(model, given, config, batch_size=3)
    model.eval()
    with foveal.read(model, layers=-1) as seen, torch.no_grad():
        logits = model(config.normalise(given.pixels))
    assert torch.allclose(found.logits, logits, atol=1e-5)  # kernels sum batches of other sizes in another order
    assert torch.allclose(found.attention, seen.class_attention().mean(1).view(7, 4, 4), atol=1e-6)
    assert found.attention_kind == "class"
    assert found.attention_note == ""
    assert torch.allclose(found.pointing, energy_share(found.attention, given.masks))
    assert torch.equal(found.labels, given.labels)
    assert torch.equal(found.index, torch.arange(7))
    assert found.accuracy == float((logits.argmax(1) == given.labels).double().mean())
    assert found.mean_pointing == pytest.approx(float(found.pointing.mean()))
    assert found.attention.flatten(1).std(1).min() > 1e-3  # not uniform: the comparison above tells something


def test_batch_size_does_not_matter():
    model, given = vit(), images()
    one, all_ = (predict(model, given, image_config(model), batch_size=b) for b in (1, 64))
    assert torch.allclose(one.logits, all_.logits, atol=1e-5)
    assert torch.allclose(one.attention, all_.attention, atol=1e-6)


def test_grid_that_is_not_square():
    model, given = vit(img_size=(16, 40)), images(size=(16, 40))
    found = predict(model, given, image_config(model))
    assert found.attention.shape == (7, 2, 5)
    assert found.pointing.shape == (7,)


def test_model_without_class_token_shows_what_patches_receive():
    model, given = vit(class_token=False, global_pool="avg"), images()
    found = predict(model, given, image_config(model))
    assert found.attention_kind == "received"
    assert "no class token" in found.attention_note
    assert torch.allclose(found.attention.sum((1, 2)), torch.ones(7), atol=1e-5)


def test_class_attention_layers_where_self_attention_cannot_be_read():
    model = timm.models.Cait(
        img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=3, depth_token_only=2
    )
    found = predict(model, images(), image_config(model))
    assert found.attention_kind == "class"
    assert found.attention.shape == (7, 4, 4)


def test_model_that_cannot_be_read_still_predicts():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))
    found = predict(model, images(), ImageConfig((32, 32)))
    assert found.logits.shape == (7, 3)
    assert found.attention is found.pointing is found.attention_kind is found.mean_pointing is None
    assert "Sequential" in found.attention_note


def test_without_masks_or_attention():
    model = vit()
    assert predict(model, images(masks=False), image_config(model)).pointing is None
    plain = predict(model, images(), image_config(model), attention=False)
    assert plain.attention is plain.pointing is None
    assert torch.allclose(plain.logits, predict(model, images(), image_config(model)).logits, atol=1e-6)


def test_image_without_object_has_no_pointing():
    given = images()
    given.masks[2] = False
    model = vit()
    found = predict(model, given, image_config(model))
    assert found.pointing.isnan().tolist() == [False, False, True, False, False, False, False]
    assert found.mean_pointing == pytest.approx(float(found.pointing[~found.pointing.isnan()].mean()))


def test_model_is_left_alone():
    model = vit(proj_drop_rate=0.5)
    model.train()
    model.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    rng = torch.random.get_rng_state()
    first = predict(model, images(), image_config(model))
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert torch.equal(first.logits, predict(model, images(), image_config(model)).logits)  # dropout was off
    assert not first.logits.requires_grad


def test_mode_is_put_back_after_an_error():
    model = vit(num_classes=5).train()
    with pytest.raises(ValueError, match=r"gives \(7, 5\), not one logit for each of the 3 classes"):
        predict(model, images(), image_config(model))
    assert model.training


def test_bfloat16_gives_float32_results():
    model, given = vit(), images()
    exact = predict(model, given, image_config(model))
    found = predict(model, given, image_config(model), autocast=torch.bfloat16)
    assert found.logits.dtype == found.attention.dtype == torch.float32
    assert torch.allclose(found.logits, exact.logits, atol=0.05)
    assert not torch.equal(found.logits, exact.logits)


def test_files_are_predicted_in_order(tmp_path):
    given, paths = images(masks=False), []
    for i in range(7):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(np.ascontiguousarray(given.image(i).permute(1, 2, 0).numpy())).save(paths[-1])
    files = Images(given.labels, given.classes, files=tuple(paths))
    model, config = vit(), ImageConfig((32, 32))
    by_file = predict(model, files, config, batch_size=3, workers=1)
    assert torch.allclose(by_file.logits, predict(model, given, config).logits, atol=1e-5)
