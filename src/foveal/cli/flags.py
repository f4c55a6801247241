"""Flags made of the settings: `--label-fraction 0.15` is Settings(label_fraction=0.15), with the same default.

Values are checked by Settings, so a wrong flag, keyword or recipe key gets the same message.
"""

import argparse
import difflib
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

from foveal.train.errors import SettingsError
from foveal.train.plain import Plain, defaults, docs, hints
from foveal.train.settings import Settings


class UsageError(ValueError):
    """The command line cannot be understood."""

    def __init__(self, message: str, command: str) -> None:
        super().__init__(message)
        self.command = command


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are raised, and name the nearest flag or command."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        if "invalid choice" in message:
            word = message.partition("invalid choice: ")[2].split("'")[1]
            message = f"there is no command {word!r}{_guess(word, self._commands())}"
        raise UsageError(message, self.prog)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse, but an unknown flag is told by the parser that knows what it may have meant."""
        values, left = super().parse_known_args(args, namespace)
        for word in left:
            if word.startswith("-"):
                flag = word.partition("=")[0]
                raise UsageError(f"there is no flag {flag}{_guess(flag, self._option_string_actions)}", self.prog)
        return values, left

    def _commands(self) -> list[str]:
        found = [a for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        return [name for action in found for name in action.choices]


def add_settings(parser: argparse.ArgumentParser, leave_out: Sequence[str] = (), kind: type[Plain] = Settings) -> None:
    """A flag for each setting but `data` and those to leave out; only those given end up in the namespace."""
    group = parser.add_argument_group("settings (also the keys of a recipe)")
    for name, hint in hints(kind).items():
        if name not in ("data", *leave_out):
            group.add_argument(
                f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, help=_help(name, kind), **_shape(name, hint)
            )


def given_settings(
    values: argparse.Namespace, leave_out: Sequence[str] = (), kind: type[Plain] = Settings
) -> dict[str, Any]:
    """The settings that were given as flags, as the settings take them; leave_out: as for `add_settings`."""
    given = vars(values)
    known = {name: hint for name, hint in hints(kind).items() if name not in ("data", *leave_out)}
    return {name: _read(name, given[name], hint) for name, hint in known.items() if name in given}


def _shape(name: str, hint: Any) -> dict[str, Any]:
    """How argparse takes a flag of this type."""
    kinds = _kinds(hint)
    if bool in kinds:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is tuple:
        return {"nargs": len(typing.get_args(hint)), "metavar": ("LOW", "HIGH")}
    if typing.get_origin(hint) is dict:
        return {"metavar": "KEY=VALUE,..."}
    if typing.get_origin(hint) is Literal:
        return {"metavar": "|".join(typing.get_args(hint))}
    return {"metavar": "N" if int in kinds else "X" if float in kinds else name.split("_")[-1].upper()}


def _help(name: str, kind: type[Plain]) -> str:
    default = defaults(kind)[name]
    shown = "" if default in (None, {}) else f" (default: {_shown(default)})"
    return f"{docs(kind)[name]}{shown}".replace("%", "%%")


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(f"{part:g}" for part in value)
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _read(name: str, value: Any, hint: Any) -> Any:
    """A flag's words as the value of the setting; the settings judge it."""
    import yaml

    if isinstance(value, bool):
        return value
    if isinstance(value, list):
        return [yaml.safe_load(word) for word in value]
    if typing.get_origin(hint) is dict:
        return pairs(name, value)
    if str in _kinds(hint) or typing.get_origin(hint) is Literal:
        return None if value == "null" and type(None) in _kinds(hint) else value
    return yaml.safe_load(value)


def pairs(name: str, text: str) -> dict[str, Any]:
    """`depth=4,num_heads=2`, or a mapping in YAML's or JSON's braces."""
    import yaml

    flag = f"--{name.replace('_', '-')}"
    try:
        if text.lstrip().startswith("{"):
            return dict(yaml.safe_load(text))
        pairs = [part.partition("=") for part in text.split(",") if part.strip()]
        if any(not equals or not key.strip() for key, equals, _ in pairs):
            raise ValueError(text)
        return {key.strip(): yaml.safe_load(value) for key, _, value in pairs}
    except (ValueError, yaml.YAMLError):
        raise SettingsError(f"{flag} {text!r} does not fit: write key=value,key=value") from None


def _kinds(hint: Any) -> Sequence[Any]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _guess(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f": did you mean {close[0]}?" if close else ""
