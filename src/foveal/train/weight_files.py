"""Files with a ViT's tensors in them: what is read, and where in them the tensors lie.

a foveal run folder           model.safetensors, and the card's normalisation
a transformers folder         config.json with model.safetensors (or its shards, or pytorch_model.bin)
transformers:NAME             the same from the hub, or from its cache
*.safetensors                 tensors by name
PyTorch files                 tensors at the top or under one of PLACES: a teacher before its student
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveal.train.errors import RunError
from foveal.train.files import read_tensors
from foveal.train.hub import transformers_folder

HUB = "transformers:"
PLACES = ("teacher", "state_dict_ema", "model_ema", "state_dict", "model", "module", "student")  # the first counts

# what full checkpoints of DINO, iBOT and MAE keep beside their tensors: options and numpy's numbers, no code
_SCALAR = np._core.multiarray.scalar  # type: ignore[attr-defined]
_PLAIN: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "?")),
    (_SCALAR, "numpy.core.multiarray.scalar"),  # numpy 1 called it so
    (_SCALAR, "numpy._core.multiarray.scalar"),
]


@dataclass(frozen=True)
class WeightFile:
    """Tensors by name, and where they come from: "run/model.safetensors", or "ibot.pth[teacher]".

    config: a transformers model's config.json.  mean, std: how its images were normalised, where the file tells.
    """

    source: str
    tensors: dict[str, Tensor]
    config: dict[str, Any] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def read_weights(path: str | Path) -> WeightFile:
    """The tensors of a file, run folder or transformers model. Raises RunError for what cannot be read."""
    if str(path).startswith(HUB):
        return _transformers(transformers_folder(str(path).removeprefix(HUB)))
    path = Path(path).expanduser()
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise RunError(
            f"there is no file {path} to start from (init: pretrained, none, demo, a file, a run folder, a transformers"
            f" folder, or {HUB}NAME)"
        )
    if path.suffix == ".safetensors":
        return WeightFile(str(path), _safetensors(path))
    content, place = _torch_file(path), ""
    there = [name for name in PLACES if isinstance(content.get(name), dict)]
    if there:
        content, place = content[there[0]], f"[{there[0]}]"
        if there[0] == "teacher" and "student" in there:
            place = "[teacher, not student]"
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise RunError(f"{path} holds no tensors by name (looked at the top and under {', '.join(PLACES)})")
    return WeightFile(f"{path}{place}", tensors)


def _folder(path: Path) -> WeightFile:
    if not (path / "model.json").is_file() and "model_type" in _json(path / "config.json"):
        return _transformers(path)
    file = path / "model.safetensors"
    if not file.is_file():
        raise RunError(f"{path} is not a finished run: it has no model.safetensors")
    image = _json(path / "model.json").get("image", {})
    return WeightFile(str(file), _safetensors(file), None, _three(image.get("mean")), _three(image.get("std")))


def _transformers(folder: Path) -> WeightFile:
    config, image = _json(folder / "config.json"), _json(folder / "preprocessor_config.json")
    index = folder / "model.safetensors.index.json"
    if "model_type" not in config and "vision_config" not in config:
        raise RunError(f"{folder} is no transformers model: it has no config.json with a model_type")
    tensors: dict[str, Tensor] = {}
    if (file := folder / "model.safetensors").is_file():
        tensors = _safetensors(file)
    elif index.is_file():
        for part in sorted(set(_json(index).get("weight_map", {}).values())):
            tensors |= _safetensors(folder / part)
    elif (file := folder / "pytorch_model.bin").is_file():
        tensors = {name: value for name, value in _torch_file(file).items() if isinstance(value, Tensor)}
    if not tensors:
        raise RunError(f"{folder} holds no weights: neither model.safetensors, nor its parts, nor pytorch_model.bin")
    mean, std = _three(image.get("image_mean")), _three(image.get("image_std"))
    return WeightFile(f"{folder} (transformers {config.get('model_type')})", tensors, config, mean, std)


def _torch_file(path: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals(_PLAIN):
        return read_tensors(path)


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise RunError(f"cannot read {path}: {error}") from None
    return tensors


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {error}") from None
    return content if isinstance(content, dict) else {}


def _three(values: Any) -> tuple[float, ...] | None:
    return tuple(float(value) for value in values) if isinstance(values, list | tuple) and len(values) == 3 else None
