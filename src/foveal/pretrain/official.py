"""Released MAE checkpoints (facebookresearch/mae): their names, their tables.

    autoencoder.load_state_dict(from_official(torch.load("mae_visualize_vit_base.pth"), autoencoder))

The visualisation checkpoints hold encoder and decoder, the pre-trained ones the encoder alone. A checkpoint does not
say whether its decoder predicts normalised pixels: the name of the file may.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from foveal.models.official import check_same
from foveal.pretrain.autoencoder import MaskedAutoencoder
from foveal.pretrain.encoding import UNUSED

# their name -> ours, by how it begins; everything else is the encoder's, which timm names as they do
DECODER = (
    ("mask_token", "decoder.mask_token"),
    ("decoder_pos_embed", "decoder.pos_embed"),
    ("decoder_embed.", "decoder.embed."),
    ("decoder_blocks.", "decoder.blocks."),
    ("decoder_norm.", "decoder.norm."),
    ("decoder_pred.", "decoder.head."),
)
TABLES = ("encoder.pos_embed", "decoder.pos_embed")


def is_official(state: Mapping[str, Any]) -> bool:
    """Are these the names of a MAE checkpoint, with its decoder? (An encoder alone has timm's names.)"""
    names = _inner(state)
    return "mask_token" in names and any(name.startswith("decoder_blocks.") for name in names)


def from_official(state: Mapping[str, Any], autoencoder: MaskedAutoencoder) -> dict[str, Tensor]:
    """A released checkpoint as a state that `autoencoder.load_state_dict` takes strictly.

    state: names to tensors, or the file's {"model": ...}. Without decoder entries the autoencoder's own decoder stays;
    so does a classifier, which masked pre-training does not run. Position tables are fixed, so for images of another
    size the autoencoder's own tables stay too: call `initialise` first, or build it around an encoder that has them.
    Raises ValueError where anything else differs: another architecture.
    """
    own = autoencoder.state_dict()
    found = {_renamed(name, "latent_norm.weight" in own): tensor for name, tensor in _inner(state).items()}
    if not any(name.startswith("decoder.") for name in found):
        found |= {name: tensor for name, tensor in own.items() if name.startswith("decoder.")}
    found |= {name: tensor for name, tensor in own.items() if name.split(".")[:2][-1] in UNUSED and name not in found}
    for name in TABLES:
        if name in found and name in own and found[name].shape[::2] == own[name].shape[::2]:
            found[name] = found[name] if found[name].shape == own[name].shape else own[name]
    check_same(found, own, "autoencoder")
    return found


def _inner(state: Mapping[str, Any]) -> Mapping[str, Tensor]:
    inner: Mapping[str, Tensor] = state["model"] if isinstance(state.get("model"), Mapping) else state
    return inner


def _renamed(name: str, norm_is_ours: bool) -> str:
    for theirs, ours in DECODER:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    if norm_is_ours and name.startswith("norm."):
        return f"latent_{name}"
    return f"encoder.{name}"
