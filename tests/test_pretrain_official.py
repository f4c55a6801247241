"""Released MAE checkpoints: their names load strictly, with and without decoder."""

import pytest
import timm
import torch

from foveal.pretrain import from_official, is_official
from test_pretrain_autoencoder import batch, shaken, small, vit

OURS = {
    "decoder.mask_token": "mask_token",
    "decoder.pos_embed": "decoder_pos_embed",
    "decoder.embed": "decoder_embed",
    "decoder.blocks": "decoder_blocks",
    "decoder.norm": "decoder_norm",
    "decoder.head": "decoder_pred",
}


def official(autoencoder):
    """The autoencoder's weights under the released names, in new tensors."""
    state = {}
    for name, tensor in autoencoder.state_dict().items():
        start = next((ours for ours in OURS if name.startswith(ours)), None)
        theirs = name.removeprefix("encoder.") if start is None else OURS[start] + name.removeprefix(start)
        state[theirs] = tensor.clone()
    return state


def test_released_names():
    state = official(small())
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.1.attn.qkv.bias", "norm.weight",
                 "mask_token", "decoder_pos_embed", "decoder_embed.weight", "decoder_blocks.1.mlp.fc2.bias",
                 "decoder_norm.bias", "decoder_pred.weight"):  # fmt: skip
        assert name in state
    assert is_official(state)
    assert is_official({"model": state})
    assert not is_official(vit().state_dict())


@pytest.mark.parametrize("wrapped", [False, True])
def test_loads_strictly_and_computes_the_same(wrapped):
    trained, fresh = shaken(small()), small()
    state = official(trained)
    fresh.load_state_dict(from_official({"model": state, "epoch": 3} if wrapped else state, fresh), strict=True)
    one, two = trained(*batch()), fresh(*batch())
    assert torch.equal(one.prediction, two.prediction)
    assert torch.equal(one.latent, two.latent)


def test_encoder_alone_keeps_the_own_decoder():
    trained, fresh = shaken(small()), small()
    state = {
        name: tensor for name, tensor in official(trained).items() if "decoder" not in name and name != "mask_token"
    }
    decoder = {name: tensor.clone() for name, tensor in fresh.decoder.state_dict().items()}
    fresh.load_state_dict(from_official(state, fresh), strict=True)
    assert all(torch.equal(tensor, decoder[name]) for name, tensor in fresh.decoder.state_dict().items())
    assert torch.equal(trained(*batch()).latent, fresh(*batch()).latent)
    assert torch.equal(trained.encoder(batch()[0]), fresh.encoder(batch()[0]))


def test_an_encoder_with_average_pooling_takes_the_final_norm_beside_it():
    trained = shaken(small())
    averaging = small(vit(global_pool="avg", num_classes=7))
    own = averaging.encoder.head.weight.clone()
    averaging.load_state_dict(from_official(official(trained), averaging), strict=True)
    assert torch.equal(trained(*batch()).prediction, averaging(*batch()).prediction)
    assert torch.equal(averaging.encoder.head.weight, own)
    assert (averaging.encoder.fc_norm.weight == 1).all()


def test_other_image_size_keeps_the_own_tables():
    trained, larger = shaken(small()), small(vit(img_size=(32, 24)))
    tables = larger.encoder.pos_embed.clone(), larger.decoder.pos_embed.clone()
    larger.load_state_dict(from_official(official(trained), larger), strict=True)
    assert torch.equal(larger.encoder.pos_embed, tables[0])
    assert torch.equal(larger.decoder.pos_embed, tables[1])
    assert torch.equal(larger.decoder.head.weight, trained.decoder.head.weight)


def test_another_architecture_is_an_error_that_names_what_differs():
    with pytest.raises(ValueError, match=r"blocks\.2\.norm1\.weight missing in the checkpoint"):
        from_official(official(small()), small(vit(depth=3)))
    with pytest.raises(ValueError, match=r"\(1, 1, 16\) in the checkpoint, \(1, 1, 32\)"):
        from_official(official(small()), small(vit(embed_dim=32)))
    with pytest.raises(ValueError, match="another architecture"):
        from_official(vit(global_pool="avg", num_classes=3).state_dict(), small())
    broken = official(small())
    del broken["decoder_norm.weight"]
    with pytest.raises(ValueError, match=r"decoder\.norm\.weight missing"):
        from_official(broken, small())


def test_names_of_the_released_base_model_are_timms():
    encoder = timm.create_model("vit_base_patch16_224.mae", num_classes=0, depth=1)
    assert {name.partition(".")[0] for name in encoder.state_dict()} == {
        "cls_token",
        "pos_embed",
        "patch_embed",
        "blocks",
        "norm",
    }
