"""The masked autoencoder: equal to MAE written down plainly, on every encoder it takes, and it leaves a timm model."""

import copy
import math

import pytest
import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from foveal.attention import UnsupportedModelError
from foveal.chance import generator
from foveal.pretrain import (
    MaskedAutoencoder,
    guided_reconstruction,
    mae_rate,
    normalise,
    parameter_groups,
    patchify,
    peak_rate,
    sincos_table,
)
from slow_mae import slow_mae

SIZE, PATCH, GRID = (16, 24), 8, (2, 3)  # not square


def vit(**settings):
    settings = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": 16, "depth": 2, "num_heads": 2} | settings
    return VisionTransformer(**{"num_classes": 0} | settings)


def eva(**settings):
    settings = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": 16, "depth": 2, "num_heads": 2} | settings
    return Eva(**{"num_classes": 0, "use_rot_pos_emb": True} | settings)


class Own(VisionTransformer):
    def forward_features(self, x):
        return super().forward_features(x)


ENCODERS = {
    "class token": lambda: vit(),
    "no class token": lambda: vit(class_token=False, global_pool="avg"),
    "average of a class token's patches": lambda: vit(global_pool="avg"),
    "registers": lambda: vit(reg_tokens=3),
    "registers without positions": lambda: vit(reg_tokens=3, no_embed_class=True),
    "registers alone": lambda: vit(reg_tokens=2, class_token=False, global_pool="avg", no_embed_class=True),
    "attention pool": lambda: vit(class_token=False, global_pool="map"),
    "pre-norm, layer scale, norm of queries": lambda: vit(pre_norm=True, init_values=0.5, qk_norm=True),
    "any size": lambda: vit(dynamic_img_size=True),
    "distilled": lambda: timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=SIZE, patch_size=PATCH, embed_dim=16, depth=2, num_heads=2
    ),
    "rotary": lambda: eva(),
    "rotary, SwiGLU, fc_norm": lambda: eva(swiglu_mlp=True, scale_mlp=True, qkv_fused=False),
    "rotary only": lambda: eva(use_abs_pos_emb=False, num_reg_tokens=2, global_pool="token", rope_type="dinov3"),
    "rotary learnt": lambda: eva(rope_type="mixed", embed_dim=32, use_abs_pos_emb=False, no_embed_class=True),
    "rotary any size": lambda: eva(dynamic_img_size=True, class_token=False, attn_type="rope"),
    "eva without rotation": lambda: eva(use_rot_pos_emb=False, use_post_norm=True),
}


@pytest.fixture(params=ENCODERS)
def encoder(request):
    torch.manual_seed(0)
    return ENCODERS[request.param]()


def small(encoder=None, **settings):
    settings = {"decoder_width": 24, "decoder_depth": 2, "decoder_heads": 3, "mask_ratio": 0.5} | settings
    torch.manual_seed(0)
    autoencoder = MaskedAutoencoder(vit() if encoder is None else encoder, **settings)
    autoencoder.initialise(0)
    return autoencoder


def batch(B=3, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return torch.randn(B, 3, *SIZE, generator=g).to(dtype), torch.rand(B, GRID[0] * GRID[1], generator=g)


def shaken(autoencoder):
    """Every weight away from the zeros and ones that would hide a mistake."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=g, dtype=torch.float64).to(parameter.dtype)
    return autoencoder


def reconstruct(autoencoder, images, noise):
    out = autoencoder(images, noise)
    return out, guided_reconstruction(out.prediction, autoencoder.target(images), out.removed).loss


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_equals_mae_written_down_plainly(norm_pix_loss):
    autoencoder = shaken(small(norm_pix_loss=norm_pix_loss).double())
    images, noise = batch(dtype=torch.float64)
    out, loss = reconstruct(autoencoder, images, noise)
    latent, prediction, removed, expected = slow_mae(autoencoder, images, noise)
    close = {"atol": 1e-10, "rtol": 0}
    torch.testing.assert_close(out.latent, latent, **close)
    torch.testing.assert_close(out.prediction, prediction, **close)
    torch.testing.assert_close(loss, expected, **close)
    assert torch.equal(out.removed, removed.float())
    trained = [p for p in autoencoder.parameters() if p.requires_grad]
    for ours, theirs in zip(torch.autograd.grad(loss, trained), torch.autograd.grad(expected, trained), strict=True):
        torch.testing.assert_close(ours, theirs, **close)


def test_without_hiding_the_encoder_is_the_plain_one(encoder):
    with pytest.warns(UserWarning, match="removes none of 6 patches"):
        autoencoder = shaken(small(encoder, mask_ratio=0.0).double()).eval()
    images, noise = batch(dtype=torch.float64)
    out = autoencoder(images, noise)
    full = autoencoder.latent_norm(encoder.forward_features(images))
    P, order = encoder.num_prefix_tokens, noise.argsort(1)
    expected = torch.cat([full[:, :P], full[:, P:].gather(1, order[..., None].expand(-1, -1, full.shape[-1]))], 1)
    torch.testing.assert_close(out.latent, expected, atol=1e-10, rtol=0)
    assert out.prediction.shape == (3, 6, PATCH * PATCH * 3)


def test_removed_pixels_are_not_seen(encoder):
    autoencoder = shaken(small(encoder)).eval()
    images, noise = batch()
    out = autoencoder(images, noise)
    hidden = out.removed.view(3, 1, *GRID).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    changed = autoencoder(images + 5 * hidden, noise)
    assert out.latent.shape[1] == encoder.num_prefix_tokens + 3
    assert torch.equal(changed.latent, out.latent)
    assert torch.equal(changed.prediction, out.prediction)
    losses = [
        guided_reconstruction(out.prediction, autoencoder.target(x), out.removed).loss
        for x in (images, images + hidden)
    ]
    assert losses[0] != losses[1]
    seen = autoencoder(images + 5 * (1 - hidden), noise)
    assert not torch.equal(seen.latent, out.latent)


def test_kept_patches_keep_their_places(encoder):
    """A patch embedded at its own place: exchanging the pixels of two kept patches changes what comes out."""
    autoencoder = shaken(small(encoder, mask_ratio=0.3).double()).eval()
    images, noise = batch(B=1, dtype=torch.float64)
    noise = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]])
    first, second = (slice(0, PATCH), slice(PATCH, 2 * PATCH))
    exchanged = images.clone()
    exchanged[..., first, first], exchanged[..., second, first] = images[..., second, first], images[..., first, first]
    one, two = autoencoder(images, noise).latent, autoencoder(exchanged, noise).latent
    assert (one.sort(1).values - two.sort(1).values).abs().max() > 1e-6


def test_every_trained_parameter_gets_a_gradient(encoder):
    autoencoder = shaken(small(encoder))
    _, loss = reconstruct(autoencoder, *batch())
    loss.backward()
    left = [name for name, p in autoencoder.named_parameters() if p.requires_grad and p.grad is None]
    assert left == []  # what has no gradient would stop distributed training
    held = {name.split(".")[1] for name, p in autoencoder.named_parameters() if not p.requires_grad}
    assert held <= {"pos_embed", "head", "head_dist", "fc_norm", "attn_pool"}
    assert ("pos_embed" in held) == (encoder.pos_embed is not None)


def test_exports_an_ordinary_timm_model(encoder):
    fresh = copy.deepcopy(encoder)
    autoencoder = small(encoder)
    optimizer = torch.optim.AdamW(parameter_groups(autoencoder), lr=1e-2)
    _, loss = reconstruct(autoencoder, *batch())
    loss.backward()
    optimizer.step()
    fresh.load_state_dict(autoencoder.encoder.state_dict(), strict=True)
    images, _ = batch()
    fresh.eval(), autoencoder.eval()
    assert torch.equal(fresh(images), autoencoder.encoder(images))
    wanted = {name: p.requires_grad for name, p in fresh.named_parameters()}
    assert {name: p.requires_grad for name, p in autoencoder.release().named_parameters()} == wanted


def test_checkpointed_blocks_give_the_same_gradients(encoder):
    autoencoder = shaken(small(encoder).double())
    images, noise = batch(dtype=torch.float64)
    trained = [p for p in autoencoder.parameters() if p.requires_grad]
    plain = torch.autograd.grad(reconstruct(autoencoder, images, noise)[1], trained)
    calls = []
    first = autoencoder.encoder.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    autoencoder.set_grad_checkpointing()
    again = torch.autograd.grad(reconstruct(autoencoder, images, noise)[1], trained)
    first.remove()
    assert len(calls) == 2
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_one_image_alone_is_what_it_is_in_a_batch(encoder):
    autoencoder = shaken(small(encoder).double()).eval()
    images, noise = batch(dtype=torch.float64)
    together = autoencoder(images, noise).prediction
    alone = autoencoder(images[1:2], noise[1:2]).prediction
    torch.testing.assert_close(together[1:2], alone, atol=1e-12, rtol=0)


def test_initial_weights_are_maes():
    autoencoder = small(vit(embed_dim=64, num_classes=5, reg_tokens=1))
    encoder, decoder = autoencoder.encoder, autoencoder.decoder
    for weight in (encoder.blocks[0].attn.qkv.weight, decoder.blocks[1].mlp.fc1.weight, decoder.head.weight):
        bound = math.sqrt(6 / (weight.shape[0] + weight.shape[1]))
        assert bound * 0.99 < weight.abs().max() <= bound
    stem = encoder.patch_embed.proj
    bound = math.sqrt(6 / (64 + 3 * PATCH * PATCH))
    assert bound * 0.99 < stem.weight.abs().max() <= bound
    assert (3 * PATCH * PATCH) ** -0.5 * 0.8 < stem.bias.abs().max() <= (3 * PATCH * PATCH) ** -0.5
    assert not encoder.blocks[1].attn.qkv.bias.any()
    assert not decoder.embed.bias.any()
    assert (encoder.norm.weight == 1).all()
    assert not encoder.norm.bias.any()
    for token in (encoder.cls_token, encoder.reg_token, decoder.mask_token):
        assert 0.01 < token.std() < 0.03
    assert torch.equal(encoder.pos_embed[0], sincos_table(GRID, 64, prefix=2))
    assert torch.equal(decoder.pos_embed[0], sincos_table(GRID, 24, prefix=2))
    assert not encoder.pos_embed.requires_grad


def test_seed_alone_decides_the_start_and_draws_nothing_global(encoder):
    first = small(encoder).state_dict()
    first = {name: tensor.clone() for name, tensor in first.items()}
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    autoencoder = MaskedAutoencoder(copy.deepcopy(encoder), 24, 2, 3, 0.5)
    autoencoder.initialise(0)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(tensor, first[name]) for name, tensor in autoencoder.state_dict().items())
    deeper = MaskedAutoencoder(copy.deepcopy(encoder), 24, 3, 3, 0.5)
    deeper.initialise(0)
    own = deeper.encoder.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in autoencoder.encoder.state_dict().items())
    autoencoder.initialise(1)
    assert not torch.equal(autoencoder.decoder.embed.weight, first["decoder.embed.weight"])
    assert not torch.equal(autoencoder.encoder.blocks[0].norm1.weight + 1, first["encoder.blocks.0.norm1.weight"])


def test_building_leaves_the_encoders_weights_alone(encoder):
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    MaskedAutoencoder(encoder, 24, 1, 3, 0.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def test_positions_without_rows_for_the_prefix():
    table = small(ENCODERS["registers without positions"]()).encoder.pos_embed
    assert torch.equal(table[0], sincos_table(GRID, 16))


def test_target_is_patches_and_normalised_where_asked():
    images, _ = batch()
    assert torch.equal(small().target(images), patchify(images, PATCH))
    assert torch.equal(small(norm_pix_loss=True).target(images), normalise(patchify(images, PATCH)))
    assert small().target(images.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_picture_shows_visible_patches_and_true_pixels(norm_pix_loss):
    autoencoder = small(norm_pix_loss=norm_pix_loss)
    images, noise = batch()
    out = autoencoder(images, noise)
    perfect = copy.copy(out)
    object.__setattr__(perfect, "prediction", autoencoder.target(images))
    torch.testing.assert_close(autoencoder.picture(images, perfect), images, atol=1e-5, rtol=0)
    hidden = out.removed.view(3, 1, *GRID).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3).expand_as(images)
    picture = autoencoder.picture(images, out)
    assert torch.equal(picture[hidden == 0], images[hidden == 0])
    assert not torch.equal(picture[hidden == 1], images[hidden == 1])
    if norm_pix_loss:  # not normalised pixels: each patch has the true mean where the prediction has mean 0
        flat = copy.copy(out)
        object.__setattr__(flat, "prediction", torch.zeros_like(out.prediction))
        means = patchify(autoencoder.picture(images, flat), PATCH).mean(-1)
        torch.testing.assert_close(means, patchify(images, PATCH).mean(-1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["class token", "rotary"])
def test_autocast_keeps_the_loss_in_float32(name):
    autoencoder = small(ENCODERS[name]())
    images, noise = batch(B=1)
    with torch.autocast("cpu", torch.bfloat16):
        out, loss = reconstruct(autoencoder, images, noise)
    loss.backward()
    exact = reconstruct(autoencoder, images, noise)[1]
    assert out.prediction.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert abs(float((loss - exact).detach())) < 0.02 * float(exact.detach())  # bfloat16 has 8 bits


def test_drop_path_is_the_encoders_own():
    autoencoder = small(vit(drop_path_rate=0.9, depth=4))
    images, noise = batch()
    torch.manual_seed(0)
    one = autoencoder(images, noise).latent
    two = autoencoder(images, noise).latent
    assert not torch.equal(one, two)
    autoencoder.eval()
    assert torch.equal(autoencoder(images, noise).latent, autoencoder(images, noise).latent)


def test_learns_to_fill_in():
    autoencoder = small(vit(embed_dim=32), decoder_width=48)
    ramp = torch.linspace(-1, 1, SIZE[1]).expand(8, 3, *SIZE) * torch.linspace(-1, 1, 8)[:, None, None, None]
    optimizer = torch.optim.AdamW(parameter_groups(autoencoder), lr=3e-3)
    losses = []
    for step in range(40):
        noise = torch.rand(8, 6, generator=generator(0, "mask", step))
        _, loss = reconstruct(autoencoder, ramp, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: timm.create_model("swin_tiny_patch4_window7_224", num_classes=0), "windows"),
        (lambda: timm.create_model("hiera_tiny_224", num_classes=0), "mask units"),
        (lambda: timm.create_model("beit_base_patch16_224", num_classes=0, depth=1), "relative position bias"),
        (lambda: timm.create_model("naflexvit_base_patch16_gap", num_classes=0, depth=1), "grids of their own"),
        (lambda: timm.create_model("vit_small_r26_s32_224", num_classes=0, depth=1), "stem looks across patches"),
        (lambda: timm.create_model("resnet18", num_classes=0), "neither a VisionTransformer nor an Eva"),
        (lambda: vit(patch_drop_rate=0.5), "patch_drop_rate=0"),
        (lambda: eva(patch_drop_rate=0.5), "patch_drop_rate=0"),
        (lambda: vit(img_size=20), "not whole patches"),
        (lambda: torch.compile(vit()), "compile that"),
        (lambda: Own(embed_dim=16, num_heads=2, depth=1), "a forward of its own"),
    ],
)  # fmt: skip
def test_other_encoders_are_refused_with_the_reason(make, why):
    with pytest.raises(UnsupportedModelError, match=why) as error:
        MaskedAutoencoder(make())
    assert "what fits is a timm VisionTransformer or Eva" in str(error.value)


def test_overlapping_stem_is_refused():
    encoder = vit()
    encoder.patch_embed.proj = nn.Conv2d(3, 16, 10, stride=8, padding=1)
    with pytest.raises(UnsupportedModelError, match="across patches"):
        MaskedAutoencoder(encoder)


def test_wrong_settings_and_inputs_say_what_fits():
    for settings, why in [
        ({"mask_ratio": 0.9}, "keeps none of 6 patches"),
        ({"decoder_heads": 5}, "use a divisor of 24"),
        ({"decoder_width": 27}, "multiple of 4"),
    ]:
        with pytest.raises(ValueError, match=why):
            small(**settings)
    with pytest.raises(ValueError, match="multiple of 4"):
        small(vit(embed_dim=18))
    autoencoder = small()
    images, noise = batch()
    with pytest.raises(ValueError, match=r"\(B, C, 16, 24\)"):
        autoencoder(images.transpose(2, 3), noise)
    with pytest.raises(ValueError, match=r"give \(3, 6\)"):
        autoencoder(images, noise[:, :5])
    autoencoder.encoder.set_input_size((16, 32))  # too late: the decoder has the places of the size it was built for
    with pytest.raises(ValueError, match="before building it"):
        autoencoder(torch.zeros(1, 3, 16, 32), torch.rand(1, 8))


def test_learning_rate_is_maes():
    assert mae_rate(0, 800, 40, 2.4e-3) == 0
    assert mae_rate(10, 800, 40, 2.4e-3) == pytest.approx(0.6e-3)
    assert mae_rate(40, 800, 40, 2.4e-3) == pytest.approx(2.4e-3)
    assert mae_rate(420, 800, 40, 2.4e-3) == pytest.approx(1.2e-3)
    assert mae_rate(800, 800, 40, 2.4e-3) == pytest.approx(0, abs=1e-18)
    assert mae_rate(800, 800, 40, 2.4e-3, minimum=1e-5) == pytest.approx(1e-5)
    assert mae_rate(0.25, 2, 0.5, 1.0) == 0.5
    assert mae_rate(0, 10, 0, 1.0) == 1.0
    assert peak_rate(1.5e-4, 4096) == pytest.approx(2.4e-3)
    with pytest.raises(ValueError, match="fewer than all"):
        mae_rate(0, 10, 10, 1.0)


def test_biases_and_norms_are_not_decayed_and_frozen_ones_left_out():
    autoencoder = small(ENCODERS["rotary learnt"]())
    spared, decayed = parameter_groups(autoencoder, 0.05)
    names = {id(p): name for name, p in autoencoder.named_parameters()}
    assert (spared["weight_decay"], decayed["weight_decay"]) == (0.0, 0.05)
    assert {names[id(p)] for p in decayed["params"]} >= {
        "encoder.cls_token",
        "decoder.mask_token",
        "decoder.head.weight",
    }
    assert all(p.dim() == 1 or names[id(p)] == "encoder.rope.freqs" for p in spared["params"])
    assert len(spared["params"] + decayed["params"]) == sum(p.requires_grad for p in autoencoder.parameters())
    assert "encoder.pos_embed" not in {names[id(p)] for p in parameter_groups(small())[1]["params"] if id(p) in names}
