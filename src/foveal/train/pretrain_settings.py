"""PretrainSettings: everything that decides a masked pre-training, written once. Importing this file is cheap."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from foveal.train.errors import SettingsError
from foveal.train.names import unknown
from foveal.train.plain import Plain, Ranges, setting


@dataclass(frozen=True)
class PretrainSettings(Plain):
    """A masked pre-training. Raises SettingsError for a value that cannot be meant.

    Defaults are MAE's (He et al., 2022) and, for the guided loss, those of Sick et al., 2025, but for the epochs.
    """

    data: str = setting("", "images to learn from: a folder of images, with or without class folders, scenes, ...")
    data_seed: int | None = setting(0, "seed of the split and of made images; null: the run's seed")

    model: str = setting("vit_small_patch16_224", "the encoder: a timm ViT; or demo")
    model_args: dict[str, Any] = setting({}, "further arguments of timm.create_model, such as {depth: 4}")
    image_size: int | None = setting(None, "side of the input in pixels; null: the model's own")
    init: str = setting("none", "encoder weights to start from: none, pretrained, demo, a file, or a run folder")
    decoder_width: int = setting(512, "width of the decoder's tokens")
    decoder_depth: int = setting(8, "blocks of the decoder")
    decoder_heads: int = setting(16, "attention heads of the decoder")
    mask_ratio: float = setting(0.75, "share of the patches that are hidden, in [0, 1)")
    norm_pix_loss: bool = setting(False, "predict each patch's pixels less their mean, over their deviation")

    map: str | None = setting(
        None, "where objects are: tokencut, dino, maskcut, lost, class_attention, grad_cam, ..., given; null: plain MAE"
    )
    map_args: dict[str, Any] = setting({}, "settings of the map, such as {variant: mask}")
    map_model: str = setting("vit_small_patch16_224.dino", "the network behind the map: a timm model or a run folder")
    maps: str | None = setting(None, "a folder that foveal maps made; null: maps are made, and kept below out/maps")
    guide: Literal["loss", "mask"] = setting(
        "loss", "what the map decides: the loss's weights, or (a control) which patches are hidden"
    )
    temperature: float = setting(0.75, "tau of the weights exp(map / tau): less makes objects count more")
    temperature_end: float | None = setting(None, "tau at the end, along half a cosine; null: constant")
    gamma: float = setting(1.0, "factor of the guided loss")
    normalise: Literal["none", "batch", "image"] = setting(
        "none", "whether weights are divided by their sum, and over what"
    )

    epochs: int = setting(100, "passes over the training images (published: 800 or 1600 over ImageNet)")
    batch_size: int = setting(64, "images per device and forward")
    accumulate: int = setting(1, "forwards per optimiser step")
    base_lr: float = setting(1.5e-4, "peak learning rate for a step of 256 images; scaled to yours")
    weight_decay: float = setting(0.05, "decay of matrices and tokens (never of biases and norms)")
    warmup_epochs: float | None = setting(None, "epochs of linear warm-up before the cosine; null: 5 % of them")
    crop_scale: tuple[float, float] = setting((0.2, 1.0), "area of the random crop as a share of the image")
    flip: bool | None = setting(None, "mirror training images; null: as the data set says")

    seed: int = setting(0, "seed of everything that training draws")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    devices: int = setting(1, "processes, one per device")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "arithmetic of the forward; auto: bfloat16 where it is faster"
    )
    workers: int | None = setting(None, "processes that decode images; null: none for small sets, else up to 8")

    out: str = setting("runs", "folder that holds the runs")
    name: str | None = setting(None, "name of the run's folder; null: made of data, model, map and seed")

    COMMAND: ClassVar[str] = "pretrain"
    RANGES: ClassVar[Ranges] = {
        "image_size": ("1 or more", lambda v: v >= 1),
        "decoder_width": ("1 or more", lambda v: v >= 1),
        "decoder_depth": ("1 or more", lambda v: v >= 1),
        "decoder_heads": ("1 or more", lambda v: v >= 1),
        "mask_ratio": ("in [0, 1)", lambda v: 0 <= v < 1),
        "temperature": ("above 0", lambda v: v > 0),
        "temperature_end": ("above 0", lambda v: v > 0),
        "gamma": ("above 0", lambda v: v > 0),
        "epochs": ("1 or more", lambda v: v >= 1),
        "batch_size": ("1 or more", lambda v: v >= 1),
        "accumulate": ("1 or more", lambda v: v >= 1),
        "base_lr": ("above 0", lambda v: v > 0),
        "weight_decay": ("0 or more", lambda v: v >= 0),
        "warmup_epochs": ("0 or more", lambda v: v >= 0),
        "crop_scale": ("two shares with 0 < low <= high <= 1", lambda v: 0 < v[0] <= v[1] <= 1),
        "devices": ("1 or more", lambda v: v >= 1),
        "workers": ("0 or more", lambda v: v >= 0),
        "model": ("a model's name", lambda v: bool(v)),
        "init": ("none, pretrained, demo or a path", lambda v: bool(v)),
        "name": ("a folder name", lambda v: bool(v) and Path(v).name == v),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_epochs is not None and self.warmup_epochs >= self.epochs:
            raise SettingsError(f"warmup_epochs={self.warmup_epochs:g} must be below epochs={self.epochs}")
        if self.map is not None:
            self._check_map()
        elif self.map_args:
            raise SettingsError("map_args need a map: give map=tokencut, dino, given, ...")
        elif self.guide != "loss" and not self.guided:
            raise SettingsError(f"guide={self.guide} needs a map: give map=tokencut, dino, given, ..., or maps=FOLDER")

    def _check_map(self) -> None:
        import inspect

        from foveal.maps import MAPS  # importing it takes torch

        if self.map not in MAPS:
            raise SettingsError(unknown("map", str(self.map), MAPS))
        known = [one for one in inspect.signature(MAPS[self.map]).parameters if one not in ("model", "mean", "std")]
        for option in self.map_args:
            if option not in known:
                raise SettingsError(unknown(f"setting of map {self.map}", option, known))

    @property
    def guided(self) -> bool:
        """Whether there are maps to follow."""
        return self.map is not None or self.maps is not None

    @property
    def folder(self) -> Path:
        """Where the run is kept: out/name."""
        return Path(self.out) / (self.name or self.default_name())

    def default_name(self) -> str:
        """A folder name from what one compares: data, model, map, seed."""
        data = Path(self.data.rstrip("/")).name or "data"
        ways = [self.map or "maps"] if self.guided else []
        used = [data, self.model, "mae", *ways, f"seed{self.seed}"]
        return "-".join("".join(c if c.isalnum() or c in "._+=" else "_" for c in part) for part in used)
