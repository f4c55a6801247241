"""Weights to start from: any file with a ViT's tensors in it, put into a timm model and accounted for.

Which files are read, `weight_files` says. Names may carry a prefix (`module.`, `backbone.`, `module.backbone.`, ...);
those of the Compact-Transformers authors, of DINOv2's and DINOv3's, and of transformers become timm's. What cannot
compute as it did in its own model is refused, with the model that it would fit.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from foveal.models.compact import CompactTransformer
from foveal.models.converted import check_arithmetic, converted, vision_config
from foveal.models.likeness import likeness
from foveal.models.official import is_official, renamed
from foveal.models.published import under_timm_names
from foveal.train.errors import RunError
from foveal.train.weight_files import WeightFile, read_weights
from foveal.transfer.head import classifier_names

# of the file: a model without them computes something else.  of the model: with random ones it looks nowhere
FILE_PARTS = ("blocks.", "cls_token", "reg_token", "dist_token", "pos_embed", "norm_pre.")
MODEL_PARTS = ("blocks.", "cls_token", "pos_embed", "patch_embed.", "norm_pre.")
TABLES = ("relative_position_index", "bias_mask", "rope", "num_batches_tracked")  # computed or counted, not learnt


@dataclass(frozen=True)
class Loaded:
    """What became of the tensors of a file.

    loaded, resized: names now filled from the file (resized: position embeddings brought to the model's grid).
    fresh: names of the model that keep their random start.  unused: names of the file that the model lacks.
    prefix: what the names in the file begin with ("module.backbone.").  notes: what else should be known, in words.
    mean, std: how the images of the file's model were normalised, where the file tells.
    """

    source: str
    loaded: tuple[str, ...]
    resized: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]
    prefix: str = ""
    notes: tuple[str, ...] = ()
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __str__(self) -> str:
        under = f", under {self.prefix.rstrip('.')}" if self.prefix else ""
        parts = [f"{len(self.loaded)} tensors from {self.source}{under}"]
        if self.resized:
            parts.append(f"resized: {_some(self.resized)}")
        if self.fresh:
            parts.append(f"new: {_some(self.fresh)}")
        if self.unused:
            parts.append(f"not used: {_some(self.unused)}")
        return "; ".join(parts)


def load_weights(model: nn.Module, path: str | Path) -> Loaded:
    """Fill a timm `model` from a file, a foveal run folder or a transformers model, in place.

    path: see weight_files.  The classifier is left as it is when the class counts differ. Position embeddings of
    another grid are resampled. Raises RunError for a file that cannot be read, one of another architecture (tensors of
    other shapes, blocks or tokens that one of the two lacks), or when less than half of the model below its classifier
    is found.
    """
    return fill(model, read_weights(path))


def fill(model: nn.Module, file: WeightFile) -> Loaded:
    """Copy the tensors of a file that belong to `model` into it; see load_weights."""
    own = model.state_dict()
    found, notes = _named_as_timm(model, file)
    prefix = common_prefix(found, own)
    named = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
    head = set(classifier_names(model))
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
    remedy = _remedy(named, file.config)
    if foreign:
        raise RunError(f"{file.source} is of another architecture: {_some(sorted(foreign))}; {remedy}")
    body = own.keys() - head
    if len(taken.keys() & body) < len(body) / 2:
        raise RunError(
            f"{file.source} does not fit the model: {len(taken.keys() & body)} of {len(body)} tensors found; the file"
            f" has {_some(sorted(found))}, the model {_some(sorted(body))}"
        )
    differing = _differing(model, named, taken)
    if differing:
        raise RunError(f"{file.source} is of another architecture: {'; '.join(differing)}; {remedy}")
    model.load_state_dict(taken, strict=False)
    order = list(own)
    return Loaded(
        source=file.source,
        loaded=tuple(name for name in order if name in taken),
        resized=tuple(resized),
        fresh=tuple(name for name in order if name not in taken),
        unused=tuple(sorted(name for name in found if name.removeprefix(prefix) not in taken)),
        prefix=prefix,
        notes=notes,
        mean=file.mean,
        std=file.std,
    )


def classes_of(model: nn.Module, file: WeightFile) -> int:
    """How many classes the classifier in a file tells apart; 0 where it has none that `model` could run."""
    found, _ = _named_as_timm(None, file)
    weight = found.get(f"{common_prefix(found, model.state_dict())}head.weight")
    width = getattr(model, "num_features", None)
    return weight.shape[0] if weight is not None and weight.dim() == 2 and weight.shape[1] == width else 0


def _named_as_timm(model: nn.Module | None, file: WeightFile) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The file's tensors under timm's names, and what differs without harm. model: what they must compute like."""
    try:
        if file.config is not None:
            notes = () if model is None else check_arithmetic(model, file.config)
            return converted(file.tensors, file.config), notes
        if is_official(file.tensors):
            return renamed(file.tensors), ()
    except ValueError as error:
        hint = ""
        if model is not None and file.config is not None and not _unknown(file):
            hint = f"; {_remedy(converted(file.tensors, file.config), file.config)}"
        raise RunError(f"{file.source} cannot be used: {error}{hint}") from None
    return under_timm_names(file.tensors), ()


def _unknown(file: WeightFile) -> bool:
    """Whether a transformers model cannot be converted at all."""
    try:
        converted(file.tensors, file.config or {})
    except ValueError:
        return True
    return False


def _differing(model: nn.Module, named: Mapping[str, Tensor], taken: Mapping[str, Tensor]) -> list[str]:
    """Parts of the body that only one of file and model has, in words; none where they compute the same."""
    depths = [
        1 + max((int(m[1]) for n in names if (m := re.match(r"blocks\.(\d+)\.", n))), default=-1)
        for names in (named, model.state_dict())
    ]
    if min(depths) > 0 and depths[0] < depths[1]:
        return [f"{depths[0]} blocks here, {depths[1]} in the model"]
    deeper = tuple(f"blocks.{i}." for i in range(depths[1], depths[0]))  # a model may take the first of them
    lacking = [n for n, _ in model.named_parameters() if n.startswith(MODEL_PARTS) and n not in taken]
    spare = [
        n
        for n, tensor in named.items()
        if n.startswith(FILE_PARTS)
        and n not in taken
        and not n.startswith(deeper)
        and not any(table in n for table in TABLES)
        and (not n.endswith("bias") or bool(tensor.any()))  # a bias of zeros adds nothing
    ]
    words = [f"the model has no {_some(sorted(spare))}"] if spare else []
    return [*words, f"the file has no {_some(sorted(lacking))}"] if lacking else words


def _remedy(named: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> str:
    """Which model would fit."""
    config = {} if config is None else vision_config(config)
    fitting = likeness(named, config.get("num_attention_heads"), config.get("hidden_act") == "quick_gelu")
    return f"it is {fitting}" if fitting else "set model (and image_size) to match"


def common_prefix(found: dict[str, Any], own: dict[str, Any]) -> str:
    """The prefix under which most of the model's names appear among the file's: "" or "module.backbone."

    Of a teacher and a student in one dictionary, the teacher.
    """
    seen: Counter[str] = Counter()
    for name in found:
        start = 0
        while start >= 0:
            if name[start:] in own:
                seen[name[:start]] += 1
            start = name.find(".", start) + 1 or -1
    return max(seen, key=lambda prefix: (seen[prefix], "teacher" in prefix, -len(prefix)), default="")


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


def _some(names: Iterable[str], most: int = 4) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
