"""MapSettings: everything that decides a store of maps, written once. Importing this file is cheap."""

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

from foveal.train.errors import SettingsError
from foveal.train.names import unknown
from foveal.train.plain import Plain, Ranges, setting


@dataclass(frozen=True)
class MapSettings(Plain):
    """Maps of a set of images. Raises SettingsError for a value that cannot be meant."""

    data: str = setting("", "images: a folder with images anywhere below it, a .npz pack, scenes, cifar10, ...")

    map: str = setting("tokencut", "where objects are: tokencut, maskcut, lost, dino, class_attention, ..., given")
    map_args: dict[str, Any] = setting({}, "settings of the map, such as foreground=corners,tau=0.3")
    masks: str | None = setting(None, "for map=given: a folder of masks with the images' names, white on the object")
    labels: bool = setting(False, "tell the map the images' classes, from class folders (grad_cam, head_cosine, ...)")

    model: str = setting(
        "vit_small_patch16_224.dino", "the network behind the map: a timm model, demo, or a run folder"
    )
    model_args: dict[str, Any] = setting({}, "further arguments of timm.create_model, such as depth=4")
    init: str = setting("pretrained", "the network's weights: pretrained, demo, none, a file, or a run folder")
    image_size: int | None = setting(None, "side of the network's input in pixels; null: its own")

    side: int = setting(30, "cells of a kept map, along each side")
    batch_size: int = setting(32, "images per forward")
    workers: int | None = setting(None, "processes that decode images; null: none for few images, else up to 8")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    seed: int = setting(0, "seed of made images and of random weights")

    out: str = setting("maps", "folder that the maps are kept in")
    sheet: int = setting(12, "images on the contact sheet; 0: no sheet")

    COMMAND: ClassVar[str] = "maps"
    RANGES: ClassVar[Ranges] = {
        "image_size": ("1 or more", lambda v: v >= 1),
        "side": ("1 or more", lambda v: v >= 1),
        "batch_size": ("1 or more", lambda v: v >= 1),
        "workers": ("0 or more", lambda v: v >= 0),
        "sheet": ("0 or more", lambda v: v >= 0),
        "model": ("a model's name", lambda v: bool(v)),
        "init": ("pretrained, demo, none or a path", lambda v: bool(v)),
        "out": ("a folder", lambda v: bool(v)),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        from foveal.maps import MAPS  # importing it takes torch

        if self.map not in MAPS:
            raise SettingsError(unknown("map", self.map, MAPS))
        takes = inspect.signature(MAPS[self.map]).parameters
        known = [one for one in takes if one not in ("model", "mean", "std", "classes", "decoders")]
        for option in self.map_args:
            if option not in known:
                raise SettingsError(unknown(f"setting of map {self.map}", option, known))
        if self.masks is not None and self.map != "given":
            raise SettingsError(f"masks={self.masks} are maps themselves: give map=given, not {self.map}")
