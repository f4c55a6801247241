"""DINOv2 and DINOv3 files of their authors: the names and tokens that differ from timm's.

    register_tokens, storage_tokens  -> reg_token
    cls_token + pos_embed[:, 0]      -> cls_token       with registers: timm adds positions to patches alone
    blocks.<chunk>.<i>.              -> blocks.<i>.
    DINOv3: ls1.gamma -> gamma_1, qkv.bias -> q_bias and v_bias (the keys' third is held at zero)

iBOT, DINO and MAE files have timm's names already. Names may carry a prefix; others are left as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

BLOCK = r"((?:.*\.)?blocks\.\d+\.)"
ALWAYS = (
    (r"((?:.*\.)?)(?:register_tokens|storage_tokens)", r"\1reg_token"),
    (rf"{BLOCK}mlp\.w12\.(\w+)", r"\1mlp.fc1.\2"),
    (r"((?:.*\.)?)blocks\.\d+\.(\d+\..*)", r"\1blocks.\2"),
)
SECOND = ((rf"{BLOCK}mlp\.w3\.(\w+)", r"\1mlp.fc2.\2"),)  # beside w12
THIRD = (  # DINOv3 keeps its SwiGLU in three layers, and timm its layer scale in the block
    (rf"{BLOCK}ls([12])\.gamma", r"\1gamma_\2"),
    (rf"{BLOCK}mlp\.w1\.(\w+)", r"\1mlp.fc1_g.\2"),
    (rf"{BLOCK}mlp\.w2\.(\w+)", r"\1mlp.fc1_x.\2"),
    (rf"{BLOCK}mlp\.w3\.(\w+)", r"\1mlp.fc2.\2"),
)


def under_timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors as timm names them; a state with timm's names comes back as it is."""
    third = any(name.endswith("storage_tokens") for name in state)
    rules = ALWAYS + (THIRD if third else SECOND)
    found = {_renamed(name, rules): tensor for name, tensor in state.items()}
    for name in [_renamed(name, rules) for name in state if name.endswith("register_tokens")]:
        _fold_class_position(found, name.removesuffix("reg_token"))
    if third:
        for name in [name for name in found if name.endswith(".attn.qkv.bias")]:
            q, _, v = found.pop(name).chunk(3)
            attn = name.removesuffix("qkv.bias")
            found |= {f"{attn}q_bias": q, f"{attn}v_bias": v}
    return found


def _fold_class_position(found: dict[str, Tensor], prefix: str) -> None:
    """The class token takes its position along, which leaves positions of patches."""
    token, table = found.get(f"{prefix}cls_token"), found.get(f"{prefix}pos_embed")
    if token is not None and table is not None:
        found[f"{prefix}cls_token"] = token + table[:, :1]
        found[f"{prefix}pos_embed"] = table[:, 1:]


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for theirs, ours in rules:
        match = re.fullmatch(theirs, name)
        if match:
            name = match.expand(ours)
    return name
