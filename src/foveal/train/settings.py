"""Settings: everything that decides a training run, written once. Importing this file is cheap: no torch."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from foveal.train.errors import SettingsError
from foveal.train.names import unknown
from foveal.train.plain import Plain, Ranges, setting


@dataclass(frozen=True)
class Settings(Plain):
    """A training run. Raises SettingsError for a value that cannot be meant."""

    data: str = setting("", "what to learn: a folder of class folders, a .npz pack, scenes, digits, cub200, ...")
    data_seed: int | None = setting(0, "seed of the split, the subset and made images; null: the run's seed")
    label_fraction: float | None = setting(None, "train on this share of the images of each class, in (0, 1]")
    per_class: int | None = setting(None, "train on this many images of each class")
    train_list: str | None = setting(None, "train on the images that this text file names, one per line")
    held_out: float | None = setting(
        None, "select the epoch on this share of the training images, held out class by class, not on the val images"
    )

    model: str = setting("vit_small_patch16_224", "a timm model, with or without a weights tag; or demo")
    model_args: dict[str, Any] = setting({}, "further arguments of timm.create_model, such as {depth: 4}")
    image_size: int | None = setting(None, "side of the input in pixels; null: the model's own")
    init: str = setting(
        "pretrained",
        "weights to start from: pretrained, none, demo, a file, a run or transformers folder, transformers:NAME",
    )

    mix: str = setting("none", "how images and labels are mixed: none, mixup, cutmix, mixup+cutmix, transmix, ...")
    mix_args: dict[str, Any] = setting({}, "settings of the mixer, such as {prob: 0.5, mode: elem}")
    map: str | None = setting(
        None, "where to look, for mixers that follow a map: head_cosine, class_attention, ...; null: the mixer's own"
    )
    map_args: dict[str, Any] = setting({}, "settings of the map, such as {sigma: 0.5}")
    map_model: str = setting(
        "self", "the network behind the map: self, ema, frozen (the initial weights), a run folder, a timm model"
    )
    map_warmup: int = setting(0, "epochs before the map is trusted; until then every place counts alike")
    token_mix: str = setting(
        "none", "mixing inside the model, on top of mix: none, horizontal, vertical, both, manifold, alignmix"
    )
    token_mix_args: dict[str, Any] = setting({}, "settings of the token mixer, such as {horizontal: 1, rho_unit: mean}")
    guide: str = setting(
        "none",
        "a term beside the task's loss: none, gta, l2_sp, delta, bss, co_tuning, attention_transfer, attn_distill",
    )
    guide_weight: float | None = setting(None, "factor of the guide's term; null: the method's own (gta: 1)")
    guide_args: dict[str, Any] = setting({}, "settings of the guide, such as {match: centred}")
    guide_schedule: Literal["constant", "linear", "cosine"] = setting(
        "constant", "the guide's weight over the run: constant, or linear or cosine to zero"
    )
    guide_source: str = setting(
        "init",
        "the model to keep to: init (the initial weights), none (random), a run or transformers folder, a file,"
        " a timm model",
    )
    tune: str = setting("all", "what is trained: all, head, attention, bias, last-K (blocks, as last-2), lora")
    tune_args: dict[str, Any] = setting({}, "settings of lora, such as {rank: 8, targets: [qkv, proj]}")
    head_start: Literal["random", "probe"] = setting(
        "random", "the classifier's first weights: random, or probe: a linear probe's (LP-FT)"
    )

    epochs: int = setting(30, "passes over the training images")
    batch_size: int = setting(64, "images per device and forward")
    accumulate: int = setting(1, "forwards per optimiser step")
    optimizer: Literal["adamw", "sgd"] = setting("adamw", "adamw, or sgd with Nesterov momentum 0.9")
    lr: float = setting(5e-4, "peak learning rate of the last layers")
    head_lr_factor: float = setting(1.0, "times lr for the new classifier")
    layer_decay: float = setting(0.75, "times lr for each block further from the head")
    weight_decay: float = setting(0.05, "decay of matrices (never of biases, norms and embeddings)")
    warmup_epochs: float | None = setting(None, "epochs of linear warm-up before the cosine; null: 5 % of them")
    smoothing: float = setting(0.0, "label smoothing, in [0, 1)")
    drop_path: float = setting(0.0, "stochastic depth of the last block, in [0, 1)")
    ema: float = setting(0.0, "decay of the averaged weights that are validated and saved; 0: none")
    crop_scale: tuple[float, float] = setting((0.2, 1.0), "area of the random crop as a share of the image")
    flip: bool | None = setting(None, "mirror training images; null: as the data set says")
    randaugment: bool = setting(False, "RandAugment (2 operations, magnitude 9) on training images")

    seed: int = setting(0, "seed of everything that training draws")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    devices: int = setting(1, "processes, one per device")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "arithmetic of the forward; auto: bfloat16 where it is faster"
    )
    workers: int | None = setting(None, "processes that decode images; null: none for small sets, else up to 8")

    out: str = setting("runs", "folder that holds the runs")
    name: str | None = setting(None, "name of the run's folder; null: made of data, model, mix, guide and seed")

    COMMAND: ClassVar[str] = "train"
    RANGES: ClassVar[Ranges] = {
        "label_fraction": ("in (0, 1]", lambda v: 0 < v <= 1),
        "per_class": ("1 or more", lambda v: v >= 1),
        "held_out": ("in [0.01, 0.5]", lambda v: 0.01 <= v <= 0.5),
        "image_size": ("1 or more", lambda v: v >= 1),
        "guide_weight": ("0 or more", lambda v: v >= 0),
        "guide_source": ("init, none, a folder, a file or a timm model", lambda v: bool(v)),
        "epochs": ("1 or more", lambda v: v >= 1),
        "batch_size": ("1 or more", lambda v: v >= 1),
        "accumulate": ("1 or more", lambda v: v >= 1),
        "lr": ("above 0", lambda v: v > 0),
        "head_lr_factor": ("above 0", lambda v: v > 0),
        "layer_decay": ("in (0, 1]", lambda v: 0 < v <= 1),
        "weight_decay": ("0 or more", lambda v: v >= 0),
        "warmup_epochs": ("0 or more", lambda v: v >= 0),
        "map_warmup": ("0 or more", lambda v: v >= 0),
        "map_model": ("self, ema, frozen, a run folder or a timm model", lambda v: bool(v)),
        "smoothing": ("in [0, 1)", lambda v: 0 <= v < 1),
        "drop_path": ("in [0, 1)", lambda v: 0 <= v < 1),
        "ema": ("in [0, 1)", lambda v: 0 <= v < 1),
        "crop_scale": ("two shares with 0 < low <= high <= 1", lambda v: 0 < v[0] <= v[1] <= 1),
        "devices": ("1 or more", lambda v: v >= 1),
        "workers": ("0 or more", lambda v: v >= 0),
        "model": ("a model's name", lambda v: bool(v)),
        "init": ("pretrained, none, demo or a path", lambda v: bool(v)),
        "name": ("a folder name", lambda v: bool(v) and Path(v).name == v),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        chosen = [n for n in ("label_fraction", "per_class", "train_list") if getattr(self, n) is not None]
        if len(chosen) > 1:
            raise SettingsError(f"{' and '.join(chosen)} both choose the training images: give one")
        if self.warmup_epochs is not None and self.warmup_epochs >= self.epochs:
            raise SettingsError(f"warmup_epochs={self.warmup_epochs:g} must be below epochs={self.epochs}")
        _check_choices(self)

    @property
    def folder(self) -> Path:
        """Where the run is kept: out/name."""
        return Path(self.out) / (self.name or self.default_name())

    def default_name(self) -> str:
        """A folder name from what one compares: data, model, mix, guide, seed."""
        data = Path(self.data.rstrip("/")).name or "data"
        tuned = "none" if self.tune == "all" else self.tune
        ways = [part for part in (self.mix, self.token_mix, self.guide, tuned) if part != "none"]
        used = [data, self.model, *ways, f"seed{self.seed}"]
        return "-".join("".join(c if c.isalnum() or c in "._+=" else "_" for c in part) for part in used)


def _check_choices(settings: Settings) -> None:
    if settings.mix != "none" or settings.mix_args:  # the dictionaries know the names; importing them takes torch
        from foveal.mix import MIXERS

        if settings.mix not in MIXERS:
            raise SettingsError(unknown("mixer", settings.mix, MIXERS))
        known = [
            one.name for one in dataclasses.fields(MIXERS[settings.mix]) if one.init and one.name not in ("seed", "map")
        ]
        for name in settings.mix_args:
            if name not in known:
                raise SettingsError(unknown(f"setting of {settings.mix}", name, known))
        try:
            MIXERS[settings.mix](**settings.mix_args)
        except (TypeError, ValueError) as error:
            raise SettingsError(f"mix={settings.mix}: {error}") from None
    if settings.map is not None or settings.map_args or settings.map_model != "self" or settings.map_warmup:
        _check_map(settings)
    if settings.token_mix != "none" or settings.token_mix_args:
        _check_token_mix(settings)
    if settings.guide != "none" or settings.guide_args:
        from foveal.train.guiding import check_guide

        check_guide(settings)
    else:
        _check_unguided(settings)
    if settings.tune != "all" or settings.tune_args:
        from foveal.train.tuning import check_tune

        check_tune(settings)


def _check_unguided(settings: Settings) -> None:
    for name, unsaid in (("guide_weight", None), ("guide_schedule", "constant"), ("guide_source", "init")):
        value = getattr(settings, name)
        if value != unsaid:
            raise SettingsError(f"{name}={value} has no guide to act on: name one, such as guide=gta, or leave it out")


def _check_token_mix(settings: Settings) -> None:
    from foveal.mix import TOKEN_MIXERS, token_mixer

    if settings.token_mix not in TOKEN_MIXERS:
        raise SettingsError(unknown("token mixer", settings.token_mix, ["none", *TOKEN_MIXERS]))
    kind, _ = TOKEN_MIXERS[settings.token_mix]
    kept = ("seed", "over", "smoothing")  # the run's own
    known = [one.name for one in dataclasses.fields(kind) if one.init and one.name not in kept]
    for name in settings.token_mix_args:
        if name not in known:
            raise SettingsError(unknown(f"setting of {settings.token_mix}", name, known))
    try:
        token_mixer(settings.token_mix, None, **settings.token_mix_args)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"token_mix={settings.token_mix}: {error}") from None


def _check_map(settings: Settings) -> None:
    from foveal.mix import MIXERS
    from foveal.train.mapping import check_options, name_of

    name = name_of(settings)
    if name is None:
        following = ", ".join(mix for mix, kind in MIXERS.items() if "map" in kind.__dataclass_fields__)
        raise SettingsError(f"mix={settings.mix} follows no map; those that do: {following}")
    check_options(name, settings)
    if settings.map_model == "ema" and not settings.ema:
        raise SettingsError("map_model=ema is the averaged model, but ema=0 keeps none: give ema, such as 0.999")
    if settings.map_warmup >= settings.epochs:
        raise SettingsError(f"map_warmup={settings.map_warmup} must be below epochs={settings.epochs}")
