"""The source of maps that the settings name: which map, of which network.

    self     the model being trained, as it is at that step
    ema      its running average
    frozen   its initial weights
    else     a run folder, a timm model, or for `topdown` a file of weights with feedback decoders

A model that makes its own maps can reinforce its own mistakes: `ema` and `frozen` are slower to, `map_warmup` waits.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from foveal import maps
from foveal.attention.door import bare
from foveal.data import Data
from foveal.data.batches import Batches
from foveal.data.config import ImageConfig, image_config
from foveal.maps import Found, Source
from foveal.train.errors import SettingsError
from foveal.train.models import Built, check_name, pretrained
from foveal.train.names import unknown
from foveal.train.optimise import Average
from foveal.train.settings import Settings


def name_of(settings: Settings) -> str | None:
    """Name of the map that the mixer follows; None for a mixer that follows none."""
    from foveal.mix import MIXERS

    own = MIXERS[settings.mix].__dataclass_fields__.get("map")
    if own is None:
        return None
    return str(own.default) if settings.map is None else settings.map


def check_options(name: str, settings: Settings) -> None:
    """Raise SettingsError for a map, or a setting of it, that is not known."""
    if name not in maps.MAPS:
        raise SettingsError(unknown("map", name, maps.MAPS))
    known = [one for one in parameters(name) if one not in ("model", "classes", "mean", "std", "decoders")]
    for option in settings.map_args:
        if option not in known:
            raise SettingsError(unknown(f"setting of map {name}", option, known))
    if "model" not in parameters(name) and settings.map_model != "self":
        raise SettingsError(f"map={name} asks no network: leave out map_model={settings.map_model}")
    if name == "topdown" and settings.map_model in ("self", "ema", "frozen"):
        raise SettingsError(
            "map=topdown needs a network with feedback decoders: give map_model=FILE, its weights (foveal.maps.TopDown)"
        )


def parameters(name: str) -> list[str]:
    """Names of what the source takes, by its constructor."""
    return list(inspect.signature(maps.MAPS[name]).parameters)


def source_of(settings: Settings, built: Built, data: Data, average: Average | None) -> Source | None:
    """The source that the settings name, for a mixer that follows a map; None for others.

    built: the model to be trained, before its first step.  average: its running average, where there is one.
    Raises SettingsError, RunError for a run that is not there, and foveal.maps.MapModelError.
    """
    name = name_of(settings)
    if name is None:
        return None
    options: dict[str, Any] = dict(settings.map_args)
    if "model" not in parameters(name):
        return maps.make(name, built.model, config=built.image, **options)
    if "classes" in parameters(name):
        options["classes"] = len(data.classes)
    if name == "topdown":
        return _topdown(Path(settings.map_model), options, built.image)
    model, config, classes = _network(settings, built, average)
    if "classes" in options and classes is not None and tuple(classes) != tuple(data.classes):
        raise maps.MapModelError(
            f"map_model={settings.map_model} knows other classes than {data.name}: its rows would look for the wrong"
            f" ones ({_some(classes)} against {_some(data.classes)})"
        )
    source = maps.make(name, model, config=config, **options)
    if options.get("label_vectors") == "class_mean":
        if settings.map_model in ("self", "ema"):
            raise SettingsError("label_vectors=class_mean needs a map_model that stays as it is, such as frozen")
        images = Batches(data.train, built.image, settings.batch_size, train=False, seed=settings.seed, flip=False)
        source.fit((batch.images, batch.labels) for batch in images)  # type: ignore[attr-defined]
    if settings.map_model == "self":
        return source
    return Beside(source, built.image, config, average if settings.map_model == "ema" else None)


class Beside:
    """A source whose network is not the one in training: on the images' device, with the image format it knows."""

    def __init__(self, source: Source, given: ImageConfig, wanted: ImageConfig, average: Average | None = None) -> None:
        self.source, self.model, self.average = source, source.model, average
        self.given, self.wanted = given, wanted

    def __call__(self, images: Tensor, labels: Tensor | None = None, given: Tensor | None = None) -> Found:
        """As the source. The running average is taken as it is now."""
        assert self.model is not None
        self.model.to(images.device)
        if self.average is not None:
            self.model.load_state_dict(self.average.weights, assign=True)
        return self.source(refitted(images, self.given, self.wanted), labels, given)


def refitted(images: Tensor, given: ImageConfig, wanted: ImageConfig) -> Tensor:
    """Images normalised and sized for one model, as another wants them: (B, 3, H, W)."""
    if (given.mean, given.std) != (wanted.mean, wanted.std):
        mean, std, to_mean, to_std = (
            images.new_tensor(v)[:, None, None] for v in (given.mean, given.std, wanted.mean, wanted.std)
        )
        images = (images * std + mean - to_mean) / to_std
    if given.size != wanted.size:
        images = F.interpolate(images, wanted.size, mode="bilinear", antialias=True)
    return images


def _network(
    settings: Settings, built: Built, average: Average | None
) -> tuple[nn.Module, ImageConfig, Sequence[str] | None]:
    """The map's network, its image format, and the names of its classes where they are known."""
    which = settings.map_model
    if which == "self":
        return built.model, built.image, None
    if which in ("ema", "frozen"):
        return copy.deepcopy(bare(built.model)).eval().requires_grad_(False), built.image, None
    return network(which)


def network(which: str, setting: str = "map_model") -> tuple[nn.Module, ImageConfig, Sequence[str] | None]:
    """A frozen network by name, its image format, and the names of its classes where they are known.

    which: a run folder, `demo` (the bundled encoder), or a timm model with its pretrained weights.  setting: what it is
    the value of, for messages. Raises SettingsError for a name that is none of these, RunError for a run that has not
    finished and weights that cannot be had.
    """
    if Path(which).is_dir():
        from foveal.train.run import Run

        run = Run.load(which)
        return run.model().requires_grad_(False), run.config, run.classes
    if which == "demo":
        from foveal.assets import demo_encoder

        model = demo_encoder().eval().requires_grad_(False)
        return model, image_config(model), None
    try:
        check_name(which)
    except SettingsError as error:
        raise SettingsError(f"{setting}={which}: {error}, and there is no such run folder") from None
    model = pretrained(which, {}, "give a run folder or another timm model")[0].eval().requires_grad_(False)
    return model, image_config(model), None


def _topdown(path: Path, options: dict[str, Any], image: ImageConfig) -> Source:
    if not path.is_file():
        raise SettingsError(f"map_model={path}: there is no such file of weights for map=topdown")
    source = maps.TopDown.load(path, **options)
    return Beside(source, image, image_config(source.model))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
