"""A source by its name, for a model."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from torch import nn

from foveal import maps
from foveal.data.config import ImageConfig, image_config
from foveal.maps.found import Source


def make(name: str, model: nn.Module, config: ImageConfig | None = None, **options: Any) -> Source:
    """The source called `name`, for `model`.

    config: how the images are normalised, by default as the model wants them.  options: the source's own.
    Raises ValueError for a name, TypeError for an option that is not known.
    """
    if name not in maps.MAPS:
        near = difflib.get_close_matches(name, maps.MAPS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"map {name!r} is not known; {hint}there are {', '.join(maps.MAPS)}")
    build = maps.MAPS[name]
    takes = inspect.signature(build).parameters
    free = [option for option in takes if option not in ("model", "mean", "std")]
    for option in options:
        if option not in takes:
            near = difflib.get_close_matches(option, free, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise TypeError(f"map {name!r} has no option {option!r}; {hint}it takes {', '.join(free) or 'none'}")
    if "model" in takes:
        options = {"model": model, **options}
    if "mean" in takes and ("model" not in takes or config is not None):  # with a model it can ask for itself
        config = image_config(model) if config is None else config
        options = {"mean": config.mean, "std": config.std, **options}
    source: Source = build(**options)
    return source
