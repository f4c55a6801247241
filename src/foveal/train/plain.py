"""Settings as plain values: a frozen dataclass whose fields are flags, keys of a recipe and arguments at once.

The argument of the library, the flag of the command line (`--label-fraction`) and the key of a YAML recipe
(`label_fraction`) are the same word with the same default. Importing this file is cheap: no torch.
"""

import dataclasses
import json
import math
import shlex
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from foveal.train.errors import SettingsError
from foveal.train.names import unknown

Ranges = dict[str, tuple[str, Callable[[Any], bool]]]


def setting(default: Any, doc: str) -> Any:
    """A field with its default and a line that explains it. A dictionary is copied."""
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"doc": doc})
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class Plain:
    """Base of settings. Raises SettingsError for a value that cannot be meant."""

    RANGES: ClassVar[Ranges] = {}  # name -> (what it must be, in words; whether a value is)
    COMMAND: ClassVar[str] = ""  # the command that takes them

    def __post_init__(self) -> None:
        for name, hint in hints(type(self)).items():
            object.__setattr__(self, name, _fitted(getattr(self, name), hint, name))
        for name, (claim, fits) in self.RANGES.items():
            value = getattr(self, name)
            if value is not None and not fits(value):
                raise SettingsError(f"{name}={value} does not fit: {name} must be {claim}")

    def replace(self, **changes: Any) -> Self:
        """These settings with some changed; unknown names are refused."""
        return type(self).from_dict(self.as_dict() | changes)

    def as_dict(self) -> dict[str, Any]:
        """Plain values only: numbers, strings, lists, dictionaries, None."""
        return {name: _plain(value) for name, value in dataclasses.asdict(self).items()}

    def to_yaml(self) -> str:
        """A recipe that gives these settings again."""
        import yaml

        return str(yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True))

    def command(self) -> str:
        """The command line that gives these settings: what differs from the defaults."""
        values, usual = self.as_dict(), defaults(type(self))
        words = ["foveal", self.COMMAND, str(values["data"])]
        for name, value in values.items():
            if name != "data" and value != _plain(usual[name]):
                words += _flag(name.replace("_", "-"), value)
        return shlex.join(words)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Settings from plain values. Raises SettingsError for an unknown name, naming the nearest."""
        known = hints(cls)
        for name in values:
            if name not in known:
                raise SettingsError(unknown("setting", str(name), known))
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path, **changes: Any) -> Self:
        """Settings from a recipe, with some changed. Raises SettingsError where it cannot be read."""
        return cls.from_dict(read_yaml(path) | changes)


def hints(kind: type[Plain]) -> dict[str, Any]:
    """Type of each setting by name, in the order of the class."""
    types_by_name = typing.get_type_hints(kind)
    return {one.name: types_by_name[one.name] for one in dataclasses.fields(kind)}


def docs(kind: type[Plain]) -> dict[str, str]:
    """One line on each setting."""
    return {one.name: one.metadata["doc"] for one in dataclasses.fields(kind)}


def defaults(kind: type[Plain]) -> dict[str, Any]:
    """Default of each setting. Nothing is made or checked: that can take torch."""
    return {
        one.name: one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
        for one in dataclasses.fields(kind)
    }


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
