"""The maps that a pre-training follows: those of a folder, or made once and kept for the next run.

Kept in out/maps/<data>-<map>-<digest of the map's settings>, so that runs that differ in anything else share them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from foveal import maps
from foveal.data import Data, ImageConfig
from foveal.maps import MapStore, Source, make_store
from foveal.maps.store import describe
from foveal.train.errors import RunError, SettingsError
from foveal.train.loop import workers_for
from foveal.train.mapping import network, parameters
from foveal.train.pretrain_settings import PretrainSettings
from foveal.train.progress import Show


def store_of(
    settings: PretrainSettings, data: Data, image: ImageConfig, device: torch.device, show: Show | None
) -> MapStore | None:
    """The maps of the training images; None for plain MAE. What is missing is made, shown by `show`.

    image: how the encoder wants images, for maps that ask no network.
    Raises SettingsError, RunError for a network that cannot be had, and foveal.maps.MapStoreError.
    """
    if settings.maps is not None:
        wanted = dict[str, Any]() if settings.map is None else {"map": settings.map}
        wanted |= {"options": settings.map_args} if settings.map_args else {}
        store = MapStore.open(settings.maps, data.train, settings=wanted, missing="weigh")
        if not store.found.any():
            raise SettingsError(f"maps={settings.maps} has no map of any of the images of {data.name}")
        return store
    if settings.map is None:
        return None
    source, config, name, labels = source_of(settings, data, image, device)
    about = describe(settings.map, settings.map_args, source.model, name)
    digest = hashlib.sha256(json.dumps([about, vars(config), labels], sort_keys=True).encode()).hexdigest()[:8]
    word = "".join(c if c.isalnum() or c in "._" else "_" for c in data.name)
    return make_store(
        Path(settings.out) / "maps" / f"{word}-{settings.map}-{digest}",
        data.train,
        source,
        about,
        config=config,
        batch_size=settings.batch_size,
        workers=workers_for(settings.workers, data),
        device=device,
        labels=labels,
        progress=None if show is None else show.maps(settings.map),
    )


def source_of(
    settings: PretrainSettings, data: Data, image: ImageConfig, device: torch.device
) -> tuple[Source, ImageConfig, str | None, bool]:
    """The source, how its network wants images, the network's name, and whether it is told the labels.

    A network that knows the data's classes looks for the label's class (Grad-CAM and its like); another for its guess.
    """
    assert settings.map is not None
    if "model" not in parameters(settings.map):
        if settings.map == "given" and data.train.masks is None:
            raise SettingsError(
                f"map=given, but {data.name} has no masks: make maps of your own masks with foveal maps --map given"
                " --masks FOLDER, and give their folder as maps"
            )
        return maps.make(settings.map, torch.nn.Identity(), config=image, **settings.map_args), image, None, False
    try:
        model, config, classes = network(settings.map_model)
    except RunError as error:
        raise RunError(f"map_model={settings.map_model}: {error}") from None
    options = dict(settings.map_args)
    if "classes" in parameters(settings.map) and classes is not None:
        options["classes"] = len(classes)
    source = maps.make(settings.map, model.to(device), config=config, **options)
    labels = classes is not None and tuple(classes) == tuple(data.classes)
    return source, config, settings.map_model, labels
