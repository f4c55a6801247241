"""Settings: everything that decides a training run, written once.

The argument of the library, the flag of the command line (`--label-fraction`) and the key of a YAML recipe
(`label_fraction`) are the same word with the same default. Importing this file is cheap: no torch.
"""

import dataclasses
import functools
import json
import math
import shlex
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from foveal.train.errors import SettingsError
from foveal.train.names import unknown


def _setting(default: Any, doc: str) -> Any:
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class Settings:
    """A training run. Raises SettingsError for a value that cannot be meant."""

    data: str = _setting("", "what to learn: a folder of class folders, a .npz pack, scenes, digits, cifar10, ...")
    data_seed: int | None = _setting(0, "seed of the split, the subset and made images; null: the run's seed")
    label_fraction: float | None = _setting(None, "train on this share of the images of each class, in (0, 1]")
    per_class: int | None = _setting(None, "train on this many images of each class")

    model: str = _setting("vit_small_patch16_224", "a timm model, with or without a weights tag; or demo")
    model_args: dict[str, Any] = field(
        default_factory=dict, metadata={"doc": "further arguments of timm.create_model, such as {depth: 4}"}
    )
    image_size: int | None = _setting(None, "side of the input in pixels; null: the model's own")
    init: str = _setting("pretrained", "weights to start from: pretrained, none, demo, a file, or a run folder")

    mix: str = _setting("none", "how images and labels are mixed: none, mixup, cutmix, mixup+cutmix, transmix, ...")
    mix_args: dict[str, Any] = field(
        default_factory=dict, metadata={"doc": "settings of the mixer, such as {prob: 0.5, mode: elem}"}
    )
    map: str | None = _setting(
        None, "where to look, for mixers that follow a map: head_cosine, class_attention, ...; null: the mixer's own"
    )
    map_args: dict[str, Any] = field(
        default_factory=dict, metadata={"doc": "settings of the map, such as {sigma: 0.5}"}
    )
    map_model: str = _setting(
        "self", "the network behind the map: self, ema, frozen (the initial weights), a run folder, a timm model"
    )
    map_warmup: int = _setting(0, "epochs before the map is trusted; until then every place counts alike")
    token_mix: str = _setting(
        "none", "mixing inside the model, on top of mix: none, horizontal, vertical, both, manifold, alignmix"
    )
    token_mix_args: dict[str, Any] = field(
        default_factory=dict, metadata={"doc": "settings of the token mixer, such as {horizontal: 1, rho_unit: mean}"}
    )
    guide: str = _setting("none", "guidance towards the attention of the initial weights: none, gta")
    guide_weight: float = _setting(1.0, "weight of the guidance loss beside the task loss")

    epochs: int = _setting(30, "passes over the training images")
    batch_size: int = _setting(64, "images per device and forward")
    accumulate: int = _setting(1, "forwards per optimiser step")
    optimizer: Literal["adamw", "sgd"] = _setting("adamw", "adamw, or sgd with Nesterov momentum 0.9")
    lr: float = _setting(5e-4, "peak learning rate of the last layers")
    head_lr_factor: float = _setting(1.0, "times lr for the new classifier")
    layer_decay: float = _setting(0.75, "times lr for each block further from the head")
    weight_decay: float = _setting(0.05, "decay of matrices (never of biases, norms and embeddings)")
    warmup_epochs: float | None = _setting(None, "epochs of linear warm-up before the cosine; null: 5 % of them")
    smoothing: float = _setting(0.0, "label smoothing, in [0, 1)")
    drop_path: float = _setting(0.0, "stochastic depth of the last block, in [0, 1)")
    ema: float = _setting(0.0, "decay of the averaged weights that are validated and saved; 0: none")
    crop_scale: tuple[float, float] = _setting((0.2, 1.0), "area of the random crop as a share of the image")
    flip: bool | None = _setting(None, "mirror training images; null: as the data set says")
    randaugment: bool = _setting(False, "RandAugment (2 operations, magnitude 9) on training images")

    seed: int = _setting(0, "seed of everything that training draws")
    device: str = _setting("auto", "auto, cpu, cuda, cuda:1, mps")
    devices: int = _setting(1, "processes, one per device")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = _setting(
        "auto", "arithmetic of the forward; auto: bfloat16 where it is faster"
    )
    workers: int | None = _setting(None, "processes that decode images; null: none for small sets, else up to 8")

    out: str = _setting("runs", "folder that holds the runs")
    name: str | None = _setting(None, "name of the run's folder; null: made of data, model, mix, guide and seed")

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            value = _fitted(getattr(self, setting.name), hints()[setting.name], setting.name)
            object.__setattr__(self, setting.name, value)
        for name, (claim, fits) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not fits(value):
                raise SettingsError(f"{name}={value} does not fit: {name} must be {claim}")
        if self.label_fraction is not None and self.per_class is not None:
            raise SettingsError("label_fraction and per_class both choose the training images: give one")
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
        ways = [part for part in (self.mix, self.token_mix, self.guide) if part != "none"]
        used = [data, self.model, *ways, f"seed{self.seed}"]
        return "-".join("".join(c if c.isalnum() or c in "._+=" else "_" for c in part) for part in used)

    def replace(self, **changes: Any) -> "Settings":
        """These settings with some changed; unknown names are refused."""
        return Settings.from_dict(self.as_dict() | changes)

    def as_dict(self) -> dict[str, Any]:
        """Plain values only: numbers, strings, lists, dictionaries, None."""
        return {name: _plain(value) for name, value in dataclasses.asdict(self).items()}

    def to_yaml(self) -> str:
        """A recipe that gives these settings again."""
        import yaml

        return str(yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True))

    def command(self) -> str:
        """The command line that gives these settings: what differs from the defaults."""
        words = ["foveal", "train", self.data]
        for name, value in self.as_dict().items():
            if name != "data" and value != _plain(defaults()[name]):
                words += _flag(name.replace("_", "-"), value)
        return shlex.join(words)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Settings":
        """Settings from plain values. Raises SettingsError for an unknown name, naming the nearest."""
        for name in values:
            if name not in hints():
                raise SettingsError(unknown("setting", str(name), hints()))
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path, **changes: Any) -> "Settings":
        """Settings from a recipe, with some changed. Raises SettingsError where it cannot be read."""
        return cls.from_dict(read_yaml(path) | changes)


@functools.cache
def hints() -> dict[str, Any]:
    """Type of each setting by name, in the order of the class."""
    return typing.get_type_hints(Settings)


def docs() -> dict[str, str]:
    """One line on each setting."""
    return {setting.name: setting.metadata["doc"] for setting in dataclasses.fields(Settings)}


def defaults() -> dict[str, Any]:
    """Default of each setting."""
    return dataclasses.asdict(Settings())


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The keys and values of a recipe; SettingsError where the file is missing or is not one."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read the recipe {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"{path} is not a recipe: expected lines like 'epochs: 30'")
    return values


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, dict) and all(isinstance(part, int | float) for part in value.values()):
        return [f"--{name}", ",".join(f"{key}={part}" for key, part in value.items())]
    parts = value if isinstance(value, list) else [value]
    return [f"--{name}", *(part if isinstance(part, str) else json.dumps(part) for part in parts)]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _fitted(value: Any, hint: Any, name: str) -> Any:
    """`value` as its type says: 1 for a float becomes 1.0, "5e-4" (how YAML reads it) too, a list a tuple."""
    for kind in typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,):
        if kind is type(None) and value is None:
            return None
        if kind is bool and isinstance(value, bool):
            return value
        if kind is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if kind is float and (number := _number(value)) is not None:
            return number
        if kind is str and isinstance(value, str | Path):
            return str(value)
        if typing.get_origin(kind) is Literal and value in typing.get_args(kind):
            return value
        if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
            parts = typing.get_args(kind)
            if len(parts) == len(value):
                return tuple(_fitted(part, want, name) for part, want in zip(value, parts, strict=True))
        if typing.get_origin(kind) is dict and isinstance(value, dict):
            return dict(value)
    if typing.get_origin(hint) is Literal:
        raise SettingsError(unknown(name, str(value), typing.get_args(hint)))
    raise SettingsError(f"{name}={value!r} does not fit: expected {_spoken(hint)}")


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _spoken(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if isinstance(hint, types.UnionType):
        return " or ".join(_spoken(kind) for kind in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"{len(typing.get_args(hint))} numbers"
    return names.get(hint, "a dictionary")


_RANGES: dict[str, tuple[str, typing.Callable[[Any], bool]]] = {
    "label_fraction": ("in (0, 1]", lambda v: 0 < v <= 1),
    "per_class": ("1 or more", lambda v: v >= 1),
    "image_size": ("1 or more", lambda v: v >= 1),
    "guide_weight": ("0 or more", lambda v: v >= 0),
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
    if settings.guide != "none":
        from foveal.transfer import GUIDES

        if settings.guide not in GUIDES:
            raise SettingsError(unknown("guide", settings.guide, GUIDES))
        if settings.init == "none":
            raise SettingsError(
                f"guide={settings.guide} keeps the attention of the initial weights, but init=none is random:"
                " give pretrained weights or a file as init"
            )


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
