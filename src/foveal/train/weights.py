"""Weights to start from: any file with a ViT's tensors in it, put into a timm model and accounted for.

Read are foveal run folders, safetensors, and PyTorch files whose tensors lie at the top or under `state_dict`,
`model`, `teacher` or `student`, with any prefix (`module.`, `backbone.`, `module.backbone.`, ...); and the checkpoints
of the Compact-Transformers authors, whose names are other ones.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from foveal.models.compact import CompactTransformer
from foveal.models.official import is_official, renamed
from foveal.train.errors import RunError
from foveal.train.files import read_tensors
from foveal.train.optimise import classifier_parameters

PLACES = ("state_dict", "model", "teacher", "student")


@dataclass(frozen=True)
class Loaded:
    """What became of the tensors of a file.

    loaded, resized: names now filled from the file (resized: position embeddings brought to the model's grid).
    fresh: names of the model that keep their random start.  unused: names of the file that the model lacks.
    """

    source: str
    loaded: tuple[str, ...]
    resized: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors from {self.source}"]
        if self.resized:
            parts.append(f"resized: {_some(self.resized)}")
        if self.fresh:
            parts.append(f"new: {_some(self.fresh)}")
        if self.unused:
            parts.append(f"not used: {_some(self.unused)}")
        return "; ".join(parts)


def load_weights(model: nn.Module, path: str | Path) -> Loaded:
    """Fill a timm `model` from a file or a foveal run folder, in place.

    The classifier is left as it is when the class counts differ. Position embeddings of another grid are
    resampled. Raises RunError for a file that cannot be read, tensors of other shapes (another architecture), or
    when less than half of the model below its classifier is found.
    """
    source, found = read_weights(path)
    return fill(model, found, source)


def read_weights(path: str | Path) -> tuple[str, dict[str, Tensor]]:
    """Where the tensors were found ("file", or "file[teacher]"), and the tensors by name."""
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / "model.safetensors"
        if not path.is_file():
            raise RunError(f"{path.parent} is not a finished run: it has no model.safetensors")
    if not path.is_file():
        raise RunError(f"there is no file {path} to start from (init: pretrained, none, demo, a file, or a run folder)")
    if path.suffix == ".safetensors":
        return str(path), _safetensors(path)
    content, place = read_tensors(path), ""
    for name in PLACES:
        if isinstance(content.get(name), dict):
            content, place = content[name], f"[{name}]"
            break
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise RunError(f"{path} holds no tensors by name (looked at the top and under {', '.join(PLACES)})")
    return f"{path}{place}", tensors


def fill(model: nn.Module, found: dict[str, Tensor], source: str) -> Loaded:
    """Copy the tensors of `found` that belong to `model` into it; see load_weights."""
    own = model.state_dict()
    if is_official(found):
        try:
            found = renamed(found)
        except ValueError as error:
            raise RunError(f"{source} cannot be read: {error}") from None
    prefix = common_prefix(found, own)
    named = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
    head = classifier_names(model)
    taken: dict[str, Tensor] = {}
    resized, foreign = [], []
    for name in own.keys() & named.keys():
        tensor = named[name]
        if tensor.shape == own[name].shape:
            taken[name] = tensor
        elif name in head:
            continue  # another number of classes
        elif name.endswith("pos_embed") and (fitted := _resampled(tensor, own[name], model)) is not None:
            taken[name] = fitted
            resized.append(name)
        else:
            foreign.append(f"{name} {tuple(tensor.shape)} here, {tuple(own[name].shape)} in the model")
    if foreign:
        raise RunError(
            f"{source} is of another architecture: {_some(sorted(foreign))}; set model (and image_size) to match"
        )
    body = own.keys() - head
    if len(taken.keys() & body) < len(body) / 2:
        raise RunError(
            f"{source} does not fit the model: {len(taken.keys() & body)} of {len(body)} tensors found; the file has"
            f" {_some(sorted(found))}, the model {_some(sorted(body))}"
        )
    model.load_state_dict(taken, strict=False)
    order = list(own)
    return Loaded(
        source=source,
        loaded=tuple(name for name in order if name in taken),
        resized=tuple(resized),
        fresh=tuple(name for name in order if name not in taken),
        unused=tuple(sorted(name for name in found if name.removeprefix(prefix) not in taken)),
    )


def common_prefix(found: dict[str, Any], own: dict[str, Any]) -> str:
    """The prefix under which most of the model's names appear among the file's: "" or "module.backbone." """
    seen: Counter[str] = Counter()
    for name in found:
        start = 0
        while start >= 0:
            if name[start:] in own:
                seen[name[:start]] += 1
            start = name.find(".", start) + 1 or -1
    return max(seen, key=lambda prefix: (seen[prefix], -len(prefix)), default="")


def classifier_names(model: nn.Module) -> set[str]:
    """Names of the classifier's tensors in the state of a timm model."""
    own = {id(parameter) for parameter in classifier_parameters(model)}
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise RunError(f"cannot read {path}: {error}") from None
    return tensors


def _resampled(tensor: Tensor, wanted: Tensor, model: nn.Module) -> Tensor | None:
    """A (1, tokens, D) position embedding brought to the model's grid, or None where it cannot be."""
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is None or tensor.dim() != 3 or wanted.dim() != 3 or tensor.shape[-1] != wanted.shape[-1]:
        return None
    prefix = wanted.shape[1] - grid[0] * grid[1]
    side = round((tensor.shape[1] - prefix) ** 0.5)
    if prefix < 0 or side * side + prefix != tensor.shape[1]:
        return None
    if isinstance(model, CompactTransformer):  # bilinear, and sines stay sines
        return model.fitted_positions(tensor)
    from timm.layers import resample_abs_pos_embed

    fitted: Tensor = resample_abs_pos_embed(tensor.float(), list(grid), old_size=[side, side], num_prefix_tokens=prefix)
    return fitted


def _some(names: Any, most: int = 4) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
