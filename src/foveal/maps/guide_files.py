"""A top-down guide in one file: the vision transformer, its feedback decoders and the prompt.

Names are those of AbSViT's release: a timm VisionTransformer's own, `decoders.N.linear.weight` (W1),
`decoders.N.linear2.weight` (W2) and `prompt`. The architecture is read off the shapes; what shapes do not tell (heads,
a grid that is not square) is in the file's notes if `save` wrote it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveal import chance
from foveal.maps.errors import MapModelError
from foveal.maps.feedback import Decoders

PLACES = ("model", "state_dict", "module")
"""Where a training script's checkpoint keeps the tensors."""


@dataclass(frozen=True)
class Card:
    """What the shapes do not tell."""

    heads: int | None = None
    image_size: tuple[int, int] | None = None
    feedback_bias: bool = True  # as AbSViT
    pool: str | None = None


def load(
    path: str | Path, *, heads: int | None, image_size: tuple[int, int] | None
) -> tuple[nn.Module, Decoders, Tensor | None, Card]:
    """Model (evaluation), decoders, prompt and notes of a file. Raises MapModelError."""
    tensors, card = _read(Path(path))
    name = str(path)
    arguments = architecture(tensors, heads or card.heads, image_size or card.image_size, name)
    arguments["global_pool"] = card.pool or arguments["global_pool"]
    model = _build(arguments)
    decoders = Decoders(arguments["depth"], arguments["embed_dim"], seed=None)
    prompt = tensors.pop("prompt", None)
    own = {f"decoders.{key}": value for key, value in decoders.state_dict().items()}
    expected = {**model.state_dict(), **own}
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    odd = [key for key in expected if key in tensors and expected[key].shape != tensors[key].shape]
    for what, keys in (("lacks", missing), ("also holds", extra), ("has another shape of", odd)):
        if keys:
            raise MapModelError(
                f"{name} {what} {_some(keys)}: it is no guide for a plain timm VisionTransformer of width "
                f"{arguments['embed_dim']}, depth {arguments['depth']}, patch {arguments['patch_size']}"
            )
    model.load_state_dict({key: tensors[key] for key in model.state_dict()})
    decoders.load_state_dict({key.removeprefix("decoders."): tensors[key] for key in own})
    return model.eval(), decoders, None if prompt is None else nn.Parameter(prompt.float()), card


def save(path: str | Path, model: Any, decoders: Decoders, prompt: Tensor | None, feedback_bias: bool) -> None:
    """One safetensors file, whole or not there. Raises MapModelError for what `load` could not build again."""
    from safetensors.torch import save_file

    heads, size = int(model.blocks[0].attn.num_heads), tuple(model.patch_embed.img_size)
    tensors = {**model.state_dict(), **{f"decoders.{key}": value for key, value in decoders.state_dict().items()}}
    if prompt is not None:
        tensors["prompt"] = prompt
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    built = _build(architecture(tensors, heads, size, type(model).__name__))
    if _plan(built) != _plan(model) or getattr(model, "pool_include_prefix", False):
        raise MapModelError(
            f"{type(model).__name__} differs from a plain timm VisionTransformer of its shapes (activation, norm, "
            "pooling, or a part of its own), so its file could not be loaded again"
        )
    notes = {
        "heads": str(heads),
        "image_size": f"{size[0]} {size[1]}",
        "feedback_bias": str(int(feedback_bias)),
        "pool": model.global_pool,
    }
    target = Path(path)
    handle, part = tempfile.mkstemp(dir=target.parent, suffix=".part")
    os.close(handle)
    try:
        save_file(tensors, part, metadata={"foveal": "topdown", **notes})
        os.replace(part, target)
    finally:
        Path(part).unlink(missing_ok=True)


def architecture(
    tensors: dict[str, Tensor], heads: int | None, image_size: tuple[int, ...] | None, name: str
) -> dict[str, Any]:
    """Arguments of timm's VisionTransformer for tensors by name. Raises MapModelError for what is not one."""
    for key in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight", "head.weight"):
        if key not in tensors:
            raise MapModelError(f"{name} has no {key}: it holds no vision transformer with a classifier")
    if not any(key.startswith("decoders.") for key in tensors):
        raise MapModelError(
            f"{name} has no feedback decoders (decoders.N.linear.weight): topdown needs an AbSViT-type checkpoint; "
            "head_cosine needs none"
        )
    if "dist_token" in tensors:
        raise MapModelError(f"{name} has a distillation token; a guide has a class token, registers, or neither")
    width, channels, *patch = tensors["patch_embed.proj.weight"].shape
    if heads is None:
        if width % 64:
            raise MapModelError(
                f"{name} does not tell its number of heads, and its width {width} is no multiple of 64: give heads"
            )
        heads = width // 64
    has_class = "cls_token" in tensors
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    prefix = int(has_class) + registers
    rows = tensors["pos_embed"].shape[1]
    size, bare_embed = _image_size(rows, prefix, (patch[0], patch[1]), image_size, name)
    scale = tensors.get("blocks.0.ls1.gamma")
    depth = 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("blocks."))
    return {
        "img_size": size,
        "patch_size": tuple(patch),
        "in_chans": channels,
        "num_classes": tensors["head.weight"].shape[0],
        "global_pool": "avg" if "fc_norm.weight" in tensors or not has_class else "token",
        "fc_norm": "fc_norm.weight" in tensors,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": tensors["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "qk_norm": "blocks.0.attn.q_norm.weight" in tensors,
        "init_values": None if scale is None else 1e-5,
        "class_token": has_class,
        "no_embed_class": bare_embed,
        "reg_tokens": registers,
        "pre_norm": "norm_pre.weight" in tensors,
    }


def _image_size(
    rows: int, prefix: int, patch: tuple[int, int], given: tuple[int, ...] | None, name: str
) -> tuple[tuple[int, int], bool]:
    """Pixels (height, width), and whether positions leave the prefix out."""
    if given is None:
        side = isqrt(max(rows - prefix, 0))
        if side == 0 or side**2 != rows - prefix:
            raise MapModelError(
                f"{name} has {rows} positions, {prefix} of them no patches: no square grid, give image_size=(height, "
                "width)"
            )
        return (side * patch[0], side * patch[1]), False
    cells = (given[0] // patch[0]) * (given[1] // patch[1])
    if cells not in (rows, rows - prefix):
        raise MapModelError(f"{name} has {rows} positions, which do not fit images of {given} in patches of {patch}")
    return (given[0], given[1]), cells != rows - prefix


def _build(arguments: dict[str, Any]) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    with chance.seeded(0, "init"):  # its weights are replaced; what is drawn for them must not show elsewhere
        model: nn.Module = VisionTransformer(**arguments)
    return model


def _plan(model: nn.Module) -> list[tuple[str, str, str]]:
    """Names, types and settings of the modules that shape what the model computes."""
    return [
        (name, type(module).__name__, module.extra_repr())
        for name, module in model.named_modules()
        if not isinstance(module, nn.Dropout | nn.Identity)
        and type(module).__name__ not in ("DropPath", "PatchDropout")
    ]


def _read(path: Path) -> tuple[dict[str, Tensor], Card]:
    if not path.is_file():
        raise MapModelError(f"there is no file {path}: give the weights of a vision transformer with feedback decoders")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # training scripts store their arguments beside
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is cut, foreign or unsafe
        raise MapModelError(
            f"cannot read {path} as plain tensors: {str(error).strip().splitlines()[0][:200]}"
        ) from error
    for place in PLACES:
        if isinstance(content, dict) and isinstance(content.get(place), dict):
            content = content[place]
            break
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise MapModelError(f"{path} holds no tensors by name (looked at the top and under {', '.join(PLACES)})")
    if all(key.startswith("module.") for key in tensors):  # saved from a parallel wrapper
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors, Card()


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Card]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            notes = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dictionary
    except (SafetensorError, OSError) as error:
        raise MapModelError(f"cannot read {path}: {error}") from None
    if notes.get("foveal") != "topdown":
        return tensors, Card()
    h, w = (int(side) for side in notes["image_size"].split())
    return tensors, Card(int(notes["heads"]), (h, w), notes["feedback_bias"] == "1", notes["pool"])


def _some(keys: list[str], most: int = 4) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
