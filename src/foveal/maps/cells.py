"""How many cells a model sees: the patch grid of a vision transformer, the last feature map of a CNN."""

from __future__ import annotations

import weakref

import torch
from torch import nn

from foveal.attention import UnsupportedModelError, read
from foveal.maps.asking import asking
from foveal.maps.errors import MapModelError
from foveal.maps.features import features

_ASKED: weakref.WeakKeyDictionary[nn.Module, dict[tuple[int, int], tuple[int, int]]] = weakref.WeakKeyDictionary()


def cells(model: nn.Module, image_size: tuple[int, int]) -> tuple[int, int]:
    """The grid (h, w) of images of (height, width) pixels, from one forward of an image of zeros; remembered.

    Fits every model that `features` or the door of attention knows. Raises MapModelError for others.
    """
    size = (int(image_size[0]), int(image_size[1]))
    known = _ASKED.setdefault(model, {})
    if size not in known:
        known[size] = _ask(model, size)
    return known[size]


def _ask(model: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    image = weight.new_zeros(1, 3, *size)
    with asking(model):
        try:
            return features(model, image).grid
        except MapModelError as error:
            try:
                with read(model, layers=-1, what="received") as seen:
                    model(image)
            except UnsupportedModelError as unread:
                raise MapModelError(f"the grid of {type(model).__name__} is not known: {error}; {unread}") from unread
    if isinstance(seen.grid, list):
        return (int(seen.grid[0][0]), int(seen.grid[0][1]))  # one image: its own grid
    return (int(seen.grid[0]), int(seen.grid[1]))
