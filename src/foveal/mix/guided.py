"""Mixers that follow a map: something says where to look, they cut, paste and label by it.

    draw (all chance) -> maps of the clean images -> apply -> the training step, with the mixer's own losses

Maps are asked before the training forward, without gradient and with their model in evaluation. A draw that does not
need maps does not pay for them. While they are not trusted (the first epochs, when a model that makes its own maps
knows nothing) every place counts alike: windows fall anywhere and labels go by area.
"""

from __future__ import annotations

import warnings
import weakref
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from foveal import maps
from foveal.maps import Found, Source
from foveal.mix.mixed import Mixed
from foveal.mix.mixer import DrawT, Mixer, Step, Term
from foveal.mix.windows import check_grid

BLANK = (
    "some maps prefer no place (constant, zero or not finite): in their images every place counts alike, and labels go"
    " by area; step.measures()['map_blank'] has their share"
)


@dataclass(kw_only=True)
class MapMixer(Mixer[DrawT]):
    """A mixer with a map.

    map: a source, or the name of one (`foveal.maps.MAPS`) that is then made with its defaults for the model of `on`.
    """

    map: str | Source = "received_attention"
    _made: Any = field(default=None, init=False, repr=False, compare=False)

    @abstractmethod
    def apply(self, images: Tensor, draw: DrawT, map: Tensor | None = None) -> Mixed:
        """Mix by the maps (B, h, w) of the images, zero or more, on any grid; None counts every place alike."""

    def follows(self, draw: DrawT) -> bool:
        """Whether this draw needs maps. Asks the draw only, which is on the CPU."""
        return True

    def grid(self, model: nn.Module, image_size: tuple[int, int]) -> tuple[int, int] | None:
        """The cells (h, w) that `draw` is told of; None for a mixer that works on pixels."""
        return None

    @contextmanager
    def adding(
        self, model: nn.Module, images: Tensor, labels: Tensor, found: Found | None, draw: DrawT
    ) -> Iterator[Mapping[str, Term]]:
        """Around the training forward: gives the losses beside the task's, by name.

        images, labels: unmixed.  found: their maps, None where this step follows none.
        """
        yield {}

    def source(self, model: nn.Module) -> Source:
        """The source of the maps: the one given, or that of this name for `model`."""
        if not isinstance(self.map, str):
            return self.map
        if self._made is None or self._made[0]() is not model:
            self._made = (weakref.ref(model), maps.make(self.map, model))
        made: Source = self._made[1]
        return made

    def __getstate__(self) -> dict[str, Any]:
        """Without the source that was made by name: a copy of a mixer holds no copy of a model."""
        return {**self.__dict__, "_made": None}

    @property
    def measures(self) -> tuple[str, ...]:
        """map_blank: share of maps that prefer no place; map_on_object: share of the maps' mass on given masks."""
        return ("map_blank", "map_on_object")

    @contextmanager
    def on(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        rng: torch.Generator | None = None,
        num_classes: int | None = None,
        given: Tensor | None = None,
        trusted: bool = True,
    ) -> Iterator[Step]:
        """One training step on mixed images; see Mixer.on."""
        rng = self._begin(images, labels, rng)
        size = (images.shape[-2], images.shape[-1])
        draw = self.draw(len(images), size, self.grid(model, size), rng=rng)
        source = self.source(model)  # a model that does not fit fails at the first step, whatever is drawn
        found = source(images, labels, given) if trusted and self.follows(draw) else None
        if found is not None and images.device.type == "cpu" and bool(found.blank.any()):  # elsewhere it would wait
            warnings.warn(BLANK, maps.MapWarning, stacklevel=3)
        mixed = self.apply(images, draw, None if found is None else found.map)
        with (
            self.adding(model, images, labels, found, draw) as terms,
            self.relabelling(model, draw) as relabel,
        ):
            yield Step(mixed, labels, num_classes, relabel, terms, _measured(images, found, given))


@dataclass(kw_only=True)
class CellMixer(MapMixer[DrawT]):
    """A mixer with a map that cuts along whole cells.

    cells: of the grid, (h, w) or one number for both; None takes the model's own: the patches of a ViT, the last
    feature map of a CNN. Image sides must be multiples of it.
    """

    cells: int | tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.cells, int):
            self.cells = (self.cells, self.cells)
        elif self.cells is not None:
            h, w = self.cells
            self.cells = (int(h), int(w))
        if self.cells is not None and min(self.cells) < 1:
            raise ValueError(f"cells={self.cells} but a grid has at least one cell in each direction")

    def grid(self, model: nn.Module, image_size: tuple[int, int]) -> tuple[int, int]:
        """The cells that were asked for, or the model's."""
        assert self.cells is None or isinstance(self.cells, tuple)
        return maps.cells(model, image_size) if self.cells is None else self.cells

    def _grid(self, grid: tuple[int, int] | None, image_size: tuple[int, int]) -> tuple[int, int]:
        """The grid of a draw, checked."""
        grid = self.cells if grid is None else grid  # type: ignore[assignment]  # a pair since __post_init__
        if grid is None:
            raise ValueError(f"{type(self).__name__} cuts along cells: draw with grid=(h, w), or set cells")
        return check_grid(grid, image_size)


def _measured(images: Tensor, found: Found | None, given: Tensor | None) -> dict[str, Tensor]:
    nothing = images.new_full((), torch.nan, dtype=torch.float32)
    if found is None:
        return {"map_blank": nothing, "map_on_object": nothing}
    on_object = nothing
    if given is not None:
        share = maps.on_grid(given.float(), (found.map.shape[1], found.map.shape[2]))
        mass = found.map.sum((1, 2))
        held = (found.map * share).sum((1, 2)) / mass
        on_object = held.nanmean()  # a blank map is 0/0
    return {"map_blank": found.blank.float().mean(), "map_on_object": on_object}
