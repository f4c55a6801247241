"""The arms of a comparison, from words: every combination of the listed mixers, guides and label fractions.

    cutmix    tdattenmix:map=label_biased,map.sigma=0.5,beta=0.1    gta:weight=10,match=centred    0.15

In a mixer's words `map`, `map_model` and `map_warmup` are settings of the run, `map.KEY` is a setting of the map, and
the rest are settings of the mixer; `token_mix=horizontal` mixes tokens on top of it, `token.KEY` is a setting of
that. In a guide's words `weight`, `schedule`, `source`, `tune` and `head_start` are settings of the run, `tune.KEY` is
a setting of what is tuned, and the rest are settings of the guide; `none:tune=head` guides nothing and trains the head
alone. Each fraction of the labels has its own baseline: the first combination listed.

All arms have the same model: where a guide makes its classifier read the class token (`models.class_pool`), it does in
every arm.
"""

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from foveal.train.errors import SettingsError
from foveal.train.names import unknown
from foveal.train.settings import Settings

MAP = ("map", "map_args", "map_model", "map_warmup")  # settings that only a mixer that follows a map may have
TOKENS = ("token_mix", "token_mix_args")
GUIDE = {  # in a guide's words -> settings of the run
    "weight": "guide_weight",
    "schedule": "guide_schedule",
    "source": "guide_source",
    "tune": "tune",
    "head_start": "head_start",
}
GUIDING = ("guide_weight", "guide_args", "guide_schedule", "guide_source")  # settings that only a guided arm may have
OWN = ("mix_args", *TOKENS, *MAP)  # settings that belong to one mixer


@dataclass(frozen=True)
class Arms:
    """What is compared. baseline_of: the arm that each arm but the baselines is compared with.

    pool: arguments of the model that all arms have because the guide of some reads the class token's attention.
    """

    settings: dict[str, Settings]
    baseline_of: dict[str, str]
    pool: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Spoken:
    """A mixer or guide with what was said of it, and what it adds to an arm's name."""

    kind: str
    name: str
    values: dict[str, Any] = field(default_factory=dict)


def arms_of(
    common: Mapping[str, Any],
    mixes: Sequence[str],
    guides: Sequence[str],
    fractions: Sequence[float | None],
    recipe: Mapping[str, Any] | None = None,
) -> Arms:
    """Settings of every combination by name, those of the first fraction first.

    common: settings of all arms; what it says of maps holds for the arms whose mixer follows one.  mixes, guides: in
    the words above.  fractions: shares of the labels; None and 1 are all of them.  recipe: what else a recipe says of
    its mixer (`mix`, `mix_args`, `map`, ...), which holds for the arms of that mixer.
    Raises SettingsError for words that cannot be understood, settings that do not fit and arms listed twice.
    """
    settings: dict[str, Settings] = {}
    baseline_of: dict[str, str] = {}
    said = dict(recipe or {})
    mixed, guided = [_mixer(text) for text in mixes], [_guide(text) for text in guides]
    _check_followed(common, mixed)
    for fraction in fractions:
        first = None
        for mix, guide in itertools.product(mixed, guided):
            values = {name: value for name, value in common.items() if name not in OWN}
            values |= _own(mix, common, said)
            values = _guided(values, guide, said)
            if fraction is not None and fraction != 1:
                values["label_fraction"] = fraction
            name = mix.name + (f"+{guide.name}" if guide.name != "none" else "") + _share(fraction)
            if name in settings:
                raise SettingsError(f"arm {name} is listed twice")
            settings[name] = Settings.from_dict(values)
            if first is None:
                first = name
            else:
                baseline_of[name] = first
    pool = _pool(settings.values())
    if pool:
        settings = {name: one.replace(model_args=one.model_args | pool) for name, one in settings.items()}
    return Arms(settings, baseline_of, pool)


def _pool(arms: Collection[Settings]) -> dict[str, Any]:
    """What one arm's guide adds to the arguments of the model, for all: else the plain arm would train another."""
    if all(one.guide == "none" for one in arms):
        return {}
    from foveal.train.models import class_pool, wants_class_token

    return next((class_pool(one) for one in arms if wants_class_token(one)), {})  # the model is the same in all


def _own(mix: Spoken, common: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the mixer of an arm: what its words say before the flags before the recipe."""
    values: dict[str, Any] = {"mix": mix.kind}
    if mix.kind == recipe.get("mix", "none"):
        values |= {name: recipe[name] for name in OWN if name in recipe}
    values |= {name: common[name] for name in (*TOKENS, *(MAP if _follows(mix.kind) else ())) if name in common}
    before = dict(values)
    for name, value in mix.values.items():
        values[name] = {**(values.get(name) or {}), **value} if name.endswith("_args") else value
    for name in ("map", "token_mix"):
        if values.get(name) != before.get(name):  # another one has other settings
            values[f"{name}_args"] = mix.values.get(f"{name}_args", {})
    return values


def _guided(values: dict[str, Any], guide: Spoken, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an arm with its guide: what its words say before the flags; of a recipe only for the same guide."""
    same = guide.kind == recipe.get("guide", "none")
    kept = {
        name: value
        for name, value in values.items()
        if name not in GUIDING or (guide.kind != "none" and (same or value != recipe.get(name)))
    }
    for name in ("guide_args", "tune_args"):
        said = {**(kept.get(name) or {}), **guide.values.get(name, {})}
        kept[name] = {key: value for key, value in said.items() if name == "tune_args" or key in _options(guide.kind)}
    kept |= {"guide": guide.kind} | {name: v for name, v in guide.values.items() if not name.endswith("_args")}
    if kept.get("tune", "all") != "lora" and "tune" in guide.values:
        kept["tune_args"] = guide.values.get("tune_args", {})  # another way to tune has other settings
    return {name: value for name, value in kept.items() if name not in ("guide_args", "tune_args") or value}


def _mixer(text: str) -> Spoken:
    kind, pairs = _words(text)
    values: dict[str, Any] = {"mix_args": {}, "map_args": {}, "token_mix_args": {}}
    names = []
    fields = _fields(kind)
    for key, (value, written) in pairs.items():
        of_map, of_tokens = key.removeprefix("map."), key.removeprefix("token.")
        if key in MAP and key != "map_args":
            values[key] = value
            names.append(written if key == "map" else f"{key}={written}")
        elif key == "token_mix":
            values[key] = value
            names.append(written)
        elif of_tokens != key:
            values["token_mix_args"][of_tokens] = value
            names.append(f"{of_tokens}={written}")
        elif of_map != key:
            values["map_args"][of_map] = value
            names.append(f"{key if of_map in fields else of_map}={written}")
        else:
            values["mix_args"][key] = value
            names.append(f"{key}={written}")
    return Spoken(kind, "-".join([kind, *names]), {name: value for name, value in values.items() if value != {}})


def _guide(text: str) -> Spoken:
    kind, pairs = _words(text)
    values: dict[str, Any] = {"guide_args": {}, "tune_args": {}}
    known = [*GUIDE, *(f"tune.{name}" for name in _tune_options()), *_options(kind)]
    for key, (value, _) in pairs.items():
        if key not in known or (kind == "none" and key in ("weight", "schedule", "source")):
            raise SettingsError(unknown(f"setting of guide {kind}", key, known))
        if key in GUIDE:
            values[GUIDE[key]] = value
        elif key.startswith("tune."):
            values["tune_args"][key.removeprefix("tune.")] = value
        else:
            values["guide_args"][key] = value
    said = [f"{key}={written}" for key, (_, written) in pairs.items()]
    name = "-".join(said if kind == "none" and said else [kind, *said])
    return Spoken(kind, name, {key: value for key, value in values.items() if value != {}})


def _options(kind: str) -> list[str]:
    """What the guide itself takes; nothing for a name that is not known, which Settings tells."""
    from foveal.train.guiding import options_of
    from foveal.transfer import GUIDES

    return options_of(kind) if kind in GUIDES else []


def _tune_options() -> tuple[str, ...]:
    from foveal.train.tuning import LORA

    return LORA


def _words(text: str) -> tuple[str, dict[str, tuple[Any, str]]]:
    """`name:key=value,key=[a,b]` as the name and, by key, the value and how it is written in a folder's name."""
    kind, colon, rest = text.partition(":")
    pairs: dict[str, tuple[Any, str]] = {}
    for part in re.split(r",(?![^\[\]]*\])", rest) if colon else []:  # not at the commas of a list, [8,9]
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals and value):
            raise SettingsError(f"arm {text!r} does not fit: write name:key=value,key=value")
        if key in pairs:
            raise SettingsError(f"arm {text!r} gives {key} twice")
        pairs[key] = _scalar(value), re.sub(r"[^\w.+=-]+", "_", value).strip("_")
    return kind.strip(), pairs


def _scalar(text: str) -> Any:
    """A value as YAML reads it, and 1e-3 as a number."""
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+[eE][-+]?\d+", value):
        return float(value)
    return value


def _share(fraction: float | None) -> str:
    return "" if fraction is None or fraction == 1 else f"-{100 * fraction:g}%"


def _follows(kind: str) -> bool:
    return "map" in _fields(kind)


def _fields(kind: str) -> Mapping[str, Any]:
    """Settings of a mixer, with `map` where it follows one; none for a name that is not known, which Settings tells."""
    from foveal.mix import MIXERS

    return MIXERS[kind].__dataclass_fields__ if kind in MIXERS else {}


def _check_followed(common: Mapping[str, Any], mixes: Sequence[Spoken]) -> None:
    given = [name for name in MAP if name in common]
    if given and not any(_follows(mix.kind) for mix in mixes):
        raise SettingsError(f"{given[0]} is given, but no arm has a mixer that follows a map")
