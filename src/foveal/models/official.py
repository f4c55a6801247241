"""Checkpoints of the authors' code (SHI-Labs/Compact-Transformers): their names, their sizes.

    model.load_state_dict(from_official(torch.load("cct_7_3x1_32_cifar10_300epochs.pth"), model))

A checkpoint's position table is kept as it is, also in a model with sine positions: published "sine" models were built
with learned tables (the authors' builders drop the argument), so their weights need the table that comes with them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from foveal.models.compact import CompactTransformer

# their name -> ours; the first that matches counts
NAMES = (
    (r"tokenizer\.conv_layers\.(\d+)\.0\.weight", r"patch_embed.conv_layers.\1.0.weight"),
    (r"classifier\.positional_emb", r"pos_embed"),
    (r"classifier\.class_emb", r"cls_token"),
    (r"classifier\.blocks\.(\d+)\.pre_norm\.(\w+)", r"blocks.\1.norm1.\2"),
    (r"classifier\.blocks\.(\d+)\.self_attn\.(qkv|proj)\.(\w+)", r"blocks.\1.attn.\2.\3"),
    (r"classifier\.blocks\.(\d+)\.norm1\.(\w+)", r"blocks.\1.norm2.\2"),
    (r"classifier\.blocks\.(\d+)\.linear1\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (r"classifier\.blocks\.(\d+)\.linear2\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    (r"classifier\.norm\.(\w+)", r"norm.\1"),
    (r"classifier\.attention_pool\.(\w+)", r"seq_pool.score.\1"),
    (r"classifier\.fc\.(\w+)", r"head.\1"),
)
# one convolution with bias is a patch embedding (CVT, ViT-Lite)
PATCHES = ((r"tokenizer\.conv_layers\.0\.0\.(\w+)", r"patch_embed.proj.\1"),)
HEAD = ("head.weight", "head.bias")


def is_official(state: Mapping[str, object]) -> bool:
    """Are these the names of the authors' code?"""
    return "tokenizer.conv_layers.0.0.weight" in state and "classifier.norm.weight" in state


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under our names. Raises ValueError for a name that the authors' models do not have."""
    rules = (*(PATCHES if "tokenizer.conv_layers.0.0.bias" in state else ()), *NAMES)
    return {_renamed(name, rules): tensor for name, tensor in state.items()}


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for theirs, ours in rules:
        found = re.fullmatch(theirs, name)
        if found:
            return found.expand(ours)
    raise ValueError(f"{name!r} is no name of a Compact-Transformers checkpoint (tokenizer..., classifier...)")


def from_official(state: Mapping[str, Tensor], model: CompactTransformer) -> dict[str, Tensor]:
    """The authors' checkpoint as a state that `model.load_state_dict` takes strictly.

    Positions of another image size are resized (bilinear, class row kept). A classifier of other classes is left out:
    the model's own stays, as it does where it has none. Raises ValueError where anything else differs: another
    architecture.
    """
    own, found = model.state_dict(), renamed(state)
    for name in HEAD:
        if name not in own:
            found.pop(name, None)
        elif name not in found or found[name].shape != own[name].shape:
            found |= {part: own[part] for part in HEAD}
    same_parts = found.keys() == own.keys()
    if same_parts and "pos_embed" in own and found["pos_embed"].shape[1] != own["pos_embed"].shape[1]:
        found["pos_embed"] = model.fitted_positions(found["pos_embed"])
    check_same(found, own, "model")
    return found


def check_same(found: Mapping[str, Tensor], own: Mapping[str, Tensor], of: str) -> None:
    """Raise ValueError, naming some, where tensors of a checkpoint differ from a model's own in name or shape.

    of: what the model is called.
    """
    differing = [
        f"{name} {_shape(found.get(name))} in the checkpoint, {_shape(own.get(name))} in the {of}"
        for name in {**own, **found}
        if _shape(found.get(name)) != _shape(own.get(name))
    ]
    if differing:
        more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError(f"the checkpoint is of another architecture: {'; '.join(differing[:3])}{more}")


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))
