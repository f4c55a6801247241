"""What `foveal maps` does: images, a source with its network, the store, and a sheet to look at."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from foveal import maps
from foveal.data import ImageConfig, Images, image_config, read_pack
from foveal.data.decode import SUFFIXES
from foveal.data.folder import gathered
from foveal.data.images import concatenate
from foveal.data.sources import SOURCES, load
from foveal.maps import MapStore, Source, make_store
from foveal.maps.mask_files import mask_files
from foveal.maps.store import describe
from foveal.train.errors import SettingsError
from foveal.train.machine import device_of
from foveal.train.map_settings import MapSettings
from foveal.train.mapping import network, parameters
from foveal.train.models import build
from foveal.train.pretrain_settings import PretrainSettings

FEW = 256  # images for which starting processes that decode does not pay
USUAL = 224  # input of a source that has no network, in pixels


@dataclass(frozen=True)
class Made:
    """images: all of them.  store: their maps.  source, config: what made them.  notes: on the data, a sentence each.
    unmasked: images for which the folder of masks has none."""

    images: Images
    store: MapStore
    source: Source
    config: ImageConfig
    notes: tuple[str, ...]
    unmasked: tuple[str, ...] = ()


def make_maps(settings: MapSettings, progress: Callable[[int, int], None] | None = None) -> Made:
    """The maps that the settings ask for; only those that are missing are made.

    Started by torchrun, each process makes its share. progress: called with (done, to do).
    Raises SettingsError, DataError for images that are not there, RunError for a network that cannot be had,
    foveal.maps.MapModelError and foveal.maps.MapStoreError.
    """
    if not settings.data:
        raise SettingsError("no images given: foveal maps PHOTOS/ (see foveal maps --help)")
    notes: list[str] = []
    images = images_of(settings, notes)
    masks = None if settings.masks is None else mask_files(images.names, settings.masks)
    if settings.map == "given" and masks is None and images.masks is None:
        raise SettingsError(
            f"map=given, but {settings.data} comes without masks: give --masks FOLDER, images of the same names,"
            " white on the object"
        )
    rank, world, local = ranks()
    device = device_of(settings.device)
    if device.type == "cuda" and world > 1 and ":" not in settings.device:
        device = torch.device("cuda", local)
    source, config = source_of(settings, images, device)
    about = describe(settings.map, settings.map_args, source.model, settings.model)
    store = make_store(
        settings.out,
        images,
        source,
        about,
        config=config,
        side=settings.side,
        batch_size=settings.batch_size,
        workers=workers_of(settings, images),
        device=device,
        rank=rank,
        world=world,
        labels=settings.labels,
        masks=masks,
        progress=progress,
    )
    unmasked = () if masks is None else tuple(n for n, mask in zip(images.names, masks, strict=True) if mask is None)
    return Made(images, store, source, config, tuple(notes), unmasked)


def images_of(settings: MapSettings, notes: list[str]) -> Images:
    """All images of the data: those below a folder, or every set of a data set that has a name."""
    path = Path(settings.data).expanduser()
    if settings.data.partition(":")[0] not in SOURCES and not settings.labels:
        if path.is_dir() and not _is_packs(path):
            files = gathered(path, notes)
            names = tuple(file.relative_to(path).as_posix() for file in files)
            return Images(torch.zeros(len(files), dtype=torch.int64), ("images",), files=tuple(files), names=names)
        if path.suffix.lower() == ".npz" and path.is_file():
            return read_pack(path)
    data = load(settings.data, seed=settings.seed)
    notes += data.notes
    sets = [data.train, data.val, *data.tests.values()]
    if not all(one.masks is not None for one in sets):
        sets = [replace(one, masks=None) for one in sets]
    return concatenate(sets)


def _is_packs(folder: Path) -> bool:
    """Whether a folder has .npz packs and no images beside them."""
    return any(folder.glob("*.npz")) and not any(file.suffix.lower() in SUFFIXES for file in folder.iterdir())


def source_of(settings: MapSettings, images: Images, device: torch.device) -> tuple[Source, ImageConfig]:
    """The source with its network on the device, and how it wants images."""
    takes = parameters(settings.map)
    if "model" not in takes and settings.map != "topdown":
        config = ImageConfig((settings.image_size or USUAL,) * 2)
        return maps.make(settings.map, nn.Identity(), config=config, **settings.map_args), config
    if settings.map == "topdown":
        if not Path(settings.model).is_file():
            raise SettingsError(
                f"map=topdown needs a network with feedback decoders: model={settings.model} is no file"
            )
        guide = maps.TopDown.load(settings.model, **settings.map_args)
        guide.model.to(device)
        return guide, image_config(guide.model)
    model, config, classes = network_of(settings)
    options = dict(settings.map_args)
    if "classes" in takes and settings.labels:
        options["classes"] = len(images.classes)
        if classes is not None and tuple(classes) != tuple(images.classes):
            raise SettingsError(f"labels: {settings.model} was trained on other classes than those of {settings.data}")
    return maps.make(settings.map, model.to(device), config=config, **options), config


def network_of(settings: MapSettings) -> tuple[nn.Module, ImageConfig, tuple[str, ...] | None]:
    """The network behind the map, how it wants images, and its classes where they are known."""
    if settings.init == "pretrained" and not settings.model_args:
        model, config, classes = network(settings.model, "model")
        if settings.image_size is not None and config.size != (settings.image_size,) * 2:
            resize = getattr(model, "set_input_size", None)
            if resize is None:
                raise SettingsError(f"image_size={settings.image_size}: {settings.model} takes {config.size} only")
            resize(img_size=(settings.image_size, settings.image_size))
            config = replace(config, size=(settings.image_size, settings.image_size))
        return model.eval(), config, None if classes is None else tuple(classes)
    if Path(settings.model).is_dir():
        raise SettingsError(
            f"model={settings.model} is a run, which has weights of its own: leave out init, model_args"
        )
    named = PretrainSettings(
        model=settings.model,
        model_args=settings.model_args,
        image_size=settings.image_size,
        init=settings.init,
        seed=settings.seed,
    )
    built = build(named, 0)
    return built.model.eval().requires_grad_(False), built.image, None


def workers_of(settings: MapSettings, images: Images) -> int:
    """Processes that decode."""
    if settings.workers is not None:
        return settings.workers
    if images.files is None or len(images) < FEW:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores - 1)


def ranks() -> tuple[int, int, int]:
    """Number of this process, of all, and of this one on its machine, as torchrun sets them."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in RANKS)
    if not 0 <= rank < world:
        raise SettingsError(f"RANK={rank} of WORLD_SIZE={world} make no sense")
    return rank, world, local


RANKS = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
