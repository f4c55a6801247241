"""Frozen features: one vector per image, and in words which.

    feature = norm(reduce(tokens after block n))        reduce: class token, mean of the patches, both side by side

The definition changes results more than most methods do: k-NN on MAE's ViT-B gives 35.6 % before the final norm and
16.1 % after it. So it is part of the result, and features of different definitions are not compared.

    DINO, iBOT k-NN; MAE linear    block=-1, tokens="class"
    DINO linear, ViT-S             block=range(-4, 0), tokens="class"     each block's through the final norm
    DINO linear, ViT-B             block=-1, tokens="both"

N images, B batch, T tokens (prefix and patches), D width.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from foveal.attention import TokenLayout, UnsupportedModelError, read, supported
from foveal.attention.norms import Norms, final_norms
from foveal.data.batches import Batches
from foveal.data.config import ImageConfig
from foveal.data.images import Images
from foveal.evaluate.running import autocasting, device_of
from foveal.maps.asking import as_wanted, asking

Tokens = Literal["auto", "class", "mean", "both", "distillation"]
REDUCTIONS: dict[str, str] = {
    "class": "class token",
    "mean": "mean of the patch tokens",
    "both": "class token beside the mean of the patch tokens",
    "distillation": "distillation token",
}


@dataclass(frozen=True, eq=False)
class Features:
    """Vectors of N images, on the CPU.

    values: (N, D) float32.  labels: (N,) int64, places in classes.  index: (N,) int64, which image of the set.
    classes: names; numbers where none are given.  definition: which features these are, in words.
    Raises ValueError where these do not fit together.
    """

    values: Tensor
    labels: Tensor
    index: Tensor | None = None
    classes: tuple[str, ...] = ()
    definition: str = ""

    def __post_init__(self) -> None:
        if self.values.dim() != 2 or self.labels.dim() != 1 or len(self.values) != len(self.labels):
            raise ValueError(
                f"features {tuple(self.values.shape)} and labels {tuple(self.labels.shape)} must be (N, D) and (N,)"
            )
        if len(self.labels) == 0:
            raise ValueError("there are no images: features need at least one")
        least, most = int(self.labels.min()), int(self.labels.max())
        names = tuple(self.classes) or tuple(str(c) for c in range(most + 1))
        if least < 0 or most >= len(names):
            raise ValueError(f"labels run from {least} to {most} but there are {len(names)} classes")
        object.__setattr__(self, "classes", names)
        if self.index is None:
            object.__setattr__(self, "index", torch.arange(len(self.labels)))

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor) -> Features:
        """Those at `index` (positions), of the same classes."""
        assert self.index is not None
        return replace(self, values=self.values[index], labels=self.labels[index], index=self.index[index])

    def checked(self, what: str) -> Features:
        """Itself. Raises ValueError for values that are not finite; what: how the message calls them."""
        finite = self.values.isfinite().all(1)
        if not bool(finite.all()):
            bad = (~finite).nonzero()[:, 0]
            raise ValueError(
                f"{len(bad):,} of {len(self):,} {what} features are not finite (image {int(bad[0])} first): the weights"
                " hold NaN, or 16-bit arithmetic ran over; try float32"
            )
        return self


def features(
    model: nn.Module,
    images: Images,
    config: ImageConfig,
    *,
    block: int | Sequence[int] = -1,
    tokens: Tokens = "auto",
    norm: bool = True,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    workers: int = 0,
) -> Features:
    """Features of every image, framed as for evaluation, in the order of the set; the model is left as it was.

    block: counted from 0, or from the end if negative; several are put side by side, in the order given.
    tokens: "class", "mean" (patches alone), "both", "distillation"; "auto" is the class token, or the mean for models
    without one. norm: through the model's final norm; where that follows pooling, what was pooled goes through it.
    device: where the model is (None: asked from its parameters).  autocast: torch.bfloat16 or None; means are float32.
    Memory: N D floats for the result, written batch by batch, beside one forward.
    Raises UnsupportedModelError for a model whose blocks or norm are not known, ValueError for a block or token that it
    does not have, DataError for unreadable images.
    """
    reader = Reader(model, block=block, tokens=tokens, norm=norm)
    where = device_of(model, device)
    batches = Batches(images, config, batch_size, train=False, workers=workers, device=where)
    values: Tensor | None = None
    for batch in batches:
        found = reader(batch.images, autocast=autocast)
        if values is None:
            values = torch.empty(len(images), found.shape[1])
        values[batch.index] = found.cpu()
    assert values is not None  # Batches refuses an empty set
    return Features(values, images.labels.cpu(), torch.arange(len(images)), images.classes, reader.definition)


class Reader:
    """Features of batches of a frozen model: reader(images (B, 3, H, W)) -> (B, D) float32, without gradient.

    definition: in words which.  Arguments and errors as `features` has them.
    """

    def __init__(
        self, model: nn.Module, *, block: int | Sequence[int] = -1, tokens: Tokens = "auto", norm: bool = True
    ) -> None:
        self.model = model
        names = blocks(model)
        self.places = _places(block, len(names))
        self.layers = [names[place] for place in self.places]
        layout = supported(model).layout
        assert layout is not None  # there are blocks
        self.layout = layout
        self.tokens = _reduction(tokens, layout)
        self.norms = final_norms(model) if norm else Norms(nn.Identity(), nn.Identity())
        self.definition = _definition(self.places, len(names), self.tokens, tokens == "auto", norm, self.norms)

    def __call__(self, images: Tensor, *, autocast: torch.dtype | None = None) -> Tensor:
        with asking(self.model), autocasting(images.device, autocast):
            with read(self.model, layers=self.layers, what="block_out") as seen:
                self.model(as_wanted(self.model, images))
            rows = [self._row(out) for out in seen.block_out(prefix=True)]
        return torch.cat(rows, 1)

    def _row(self, out: Tensor) -> Tensor:
        """A block's output (B, T, D) as a feature of each image."""
        if out.dim() != 3 or out.shape[1] <= self.layout.prefix:
            raise UnsupportedModelError(f"a block gives {tuple(out.shape)}, not prefix and patches: (B, T, D)")
        x = self.norms.tokens(out)
        parts = []
        if self.tokens in ("class", "both"):
            parts.append(x[:, self.layout.class_index])
        if self.tokens in ("mean", "both"):
            parts.append(x[:, self.layout.prefix :].float().mean(1))  # sums in float32
        if self.tokens == "distillation":
            parts.append(x[:, self.layout.distillation_index])
        if not isinstance(self.norms.pooled, nn.Identity):
            parts = [self.norms.pooled(part.to(x.dtype)) for part in parts]
        return torch.cat([part.float() for part in parts], 1)


def blocks(model: nn.Module) -> list[str]:
    """Names of the blocks whose output can be read, in the order of the forward. Raises UnsupportedModelError."""
    support = supported(model)
    if not support:
        raise UnsupportedModelError(support.reason)
    names = [name for name, what in support.what.items() if "block_out" in what]
    branches = [name for name in support.what if ".attns." in name]  # as timm calls them
    if not names and branches:
        raise UnsupportedModelError(f"{branches[0]} is one of several branches of a block: its output is not a block's")
    if not names:
        raise UnsupportedModelError(
            f"the blocks of {support.family} give no sequence of tokens: features are read where all attend to all"
        )
    return names


def _places(block: int | Sequence[int], depth: int) -> list[int]:
    asked = list(block) if isinstance(block, Sequence) else [block]
    if not asked:
        raise ValueError("no block asked: give at least one, for instance block=-1")
    for one in asked:
        if not -depth <= operator.index(one) < depth:
            raise ValueError(f"block={one} but the model has {depth} blocks; use values in [-{depth}, {depth - 1}]")
    return [one % depth for one in asked]


def _reduction(tokens: str, layout: TokenLayout) -> str:
    if tokens == "auto":
        return "mean" if layout.class_index is None else "class"
    if tokens not in REDUCTIONS:
        raise ValueError(f"tokens={tokens!r} is not known; use auto, {', '.join(REDUCTIONS)}")
    there: dict[str, Any] = {"class": layout.class_index, "both": layout.class_index}
    there["distillation"] = layout.distillation_index
    if tokens in there and there[tokens] is None:
        missing = "distillation" if tokens == "distillation" else "class"
        raise ValueError(f"tokens={tokens!r} but this model has no {missing} token: use tokens='mean'")
    return tokens


def _definition(places: list[int], depth: int, tokens: str, chosen: bool, norm: bool, norms: Norms) -> str:
    which = f"block {places[0]}" if len(places) == 1 else f"blocks {', '.join(map(str, places))} side by side"
    what = REDUCTIONS[tokens] + (" (there is no class token)" if chosen and tokens == "mean" else "")
    how = "before the final norm"
    if norm:
        follows = not isinstance(norms.pooled, nn.Identity)
        how = "after the norm that follows pooling" if follows else "after the final norm"
    return f"{which} of 0-{depth - 1}, {what}, {how}"
