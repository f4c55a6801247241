"""A vector per patch of any vision transformer, through the door.

    keys, queries, values   of a block, heads side by side; after their norm, before rotation
    tokens, block_out       as they enter a block, as they leave it

Prefix tokens (class, distillation, registers) are left out. DINO's discoveries use the keys of the last block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor, nn

from foveal.attention import Seen, UnsupportedModelError, read
from foveal.maps.asking import as_wanted, asking
from foveal.maps.attended import logits_of
from foveal.maps.errors import MapModelError

Kind = Literal["keys", "queries", "values", "tokens", "block_out"]


@dataclass(frozen=True)
class Patches:
    """What one forward showed."""

    features: Tensor  # (B, N, D), row-major
    grid: tuple[int, int]  # (h, w)
    logits: Tensor | None  # (B, C), None of a model that gives something else
    attention: Tensor | None = None  # (B, N) mean over heads of the class token's, where it was asked for


def reader(model: nn.Module, kind: Kind, layer: int | str, attention: bool = False) -> Seen:
    """A reader of these features, and of the class token's attention in the same block.

    Raises ValueError for a kind or layer that is not there, MapModelError for a model that does not show them.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"features={kind!r} is not known; use one of {', '.join(get_args(Kind))}")
    try:
        seen = read(model, layers=layer, what=kind)
    except UnsupportedModelError as error:
        raise MapModelError(
            f"no patch features to discover objects in: {error}. centre_surround and spectral_residual need no model"
        ) from error
    if not attention:
        return seen
    try:
        return read(model, layers=layer, what=(kind, "class_logits"))
    except ValueError as error:
        raise MapModelError(
            f"foreground='attention' needs the class token's row: {error}. foreground='corners' needs none"
        ) from error


def patches(model: nn.Module, images: Tensor, kind: Kind, layer: int | str, attention: bool = False) -> Patches:
    """Features of images (B, 3, H, W) from one forward that leaves no trace.

    Raises MapModelError where images have grids of their own or the patches do not fill theirs.
    """
    with asking(model):
        with reader(model, kind, layer, attention) as seen:
            output = model(as_wanted(model, images))
        x = getattr(seen, kind)()
        grid = one_grid(seen)
        x = x.transpose(1, 2).flatten(2) if x.dim() == 4 else x  # heads side by side
        if x.shape[1] != grid[0] * grid[1]:
            raise MapModelError(f"{x.shape[1]} patches do not fill the {grid} grid: other tokens, or patch dropout")
        return Patches(x, grid, logits_of(output), seen.class_attention().mean(1) if attention else None)


def one_grid(seen: Seen) -> tuple[int, int]:
    """(h, w) of the patches of all images. Raises MapModelError where each has its own."""
    if isinstance(seen.grid, list):
        raise MapModelError("images with patch grids of their own have no common grid: give all images one size")
    return (int(seen.grid[0]), int(seen.grid[1]))
