"""The model of a run: a timm architecture with its starting weights, and the card that rebuilds it anywhere.

timm.create_model(card["architecture"], **card["arguments"])      and model.safetensors: no foveal needed,
                                                                  but for the models of foveal.models
"""

import json
import platform
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
from torch import nn

import foveal.models  # noqa: F401  CCT, CVT and ViT-Lite: importing the room tells timm their names
from foveal import __version__
from foveal.chance import seeded
from foveal.data.config import ImageConfig, image_config
from foveal.train.errors import RunError, SettingsError
from foveal.train.files import write_text, write_weights
from foveal.train.names import unknown
from foveal.train.pretrain_settings import PretrainSettings
from foveal.train.settings import Settings
from foveal.train.weights import load_weights

DEMO = Path(__file__).parents[1] / "assets"  # the encoder that comes with foveal: model.safetensors, model.json

FRESH = "give --init none to start from random weights, or --init FILE"


@dataclass(frozen=True)
class Built:
    """A model ready to train.

    architecture and arguments: what timm.create_model takes to build it again (without drop path, which the
    weights do not know).  image: how it wants its images.  origin: where its weights come from, in words.
    """

    model: nn.Module
    architecture: str
    arguments: dict[str, Any]
    image: ImageConfig
    origin: str


def build(settings: Settings | PretrainSettings, classes: int) -> Built:
    """The model that `settings` name, for `classes` classes (0: without classifier), with its starting weights.

    Raises SettingsError for an unknown model or argument, RunError where the weights cannot be had.
    """
    architecture, arguments = resolve(settings)
    arguments = arguments | {"num_classes": classes}
    drop_path = getattr(settings, "drop_path", 0.0)
    extra = {"drop_path_rate": drop_path} if drop_path else {}
    demo = settings.init == "demo" or (settings.init == "pretrained" and settings.model == "demo")
    with seeded(settings.seed, "init"):
        if settings.init == "pretrained" and not demo:
            model, origin = pretrained(architecture, arguments | extra, FRESH)
        else:
            model, origin = _create(architecture, arguments | extra), "random weights"
    if demo:
        origin = str(load_weights(model, DEMO))
    elif settings.init not in ("pretrained", "none"):
        origin = str(load_weights(model, settings.init))
    image = image_config(model)
    if settings.image_size is not None:  # models without a fixed size take it from the images
        image = ImageConfig(**(asdict(image) | {"size": (settings.image_size, settings.image_size)}))
    return Built(model, architecture, arguments, image, origin)


def resolve(settings: Settings | PretrainSettings) -> tuple[str, dict[str, Any]]:
    """timm's name and arguments of the model of `settings`, `demo` and image_size spelt out."""
    name, arguments = settings.model, dict(settings.model_args)
    if name == "demo":
        card = read_card(DEMO)
        name, arguments = card["architecture"], dict(card["arguments"]) | arguments
    check_name(name)
    if settings.image_size is not None and ":" not in name and timm.get_pretrained_cfg(name).fixed_input_size:
        arguments["img_size"] = settings.image_size
    return name, arguments


def check_name(name: str) -> None:
    """Raise SettingsError, naming the nearest, for a model or weights tag that timm does not have."""
    if ":" in name:
        return  # hf-hub:..., local-dir:...: timm looks there
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise SettingsError(unknown("model", architecture, timm.list_models()))
    tags = [known.partition(".")[2] for known in timm.list_models(f"{architecture}.*", pretrained=True)]
    if tag and tag not in tags:
        raise SettingsError(unknown(f"weights tag of {architecture}", tag, tags))


def write_model(folder: Path, built: Built, classes: tuple[str, ...], about: dict[str, Any]) -> None:
    """model.safetensors and its card model.json in `folder`. Raises RunError where the disk does not take them."""
    write_weights(folder / "model.safetensors", built.model.state_dict())
    card = {
        "architecture": built.architecture,
        "arguments": built.arguments,
        "classes": list(classes),
        "image": asdict(built.image),
        "init": built.origin,
        **about,
        "versions": versions(),
    }
    write_text(folder / "model.json", json.dumps(card, indent=2, ensure_ascii=False) + "\n")


def read_model(folder: Path) -> nn.Module:
    """The model that write_model left in `folder`: a timm model, in eval mode. Raises RunError."""
    from safetensors.torch import load_file

    card = read_card(folder)
    model = _create(card["architecture"], card["arguments"])
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise RunError(f"cannot load {folder / 'model.safetensors'}: {first}") from error
    return model.eval()


def read_card(folder: Path) -> dict[str, Any]:
    """The card of a saved model. Raises RunError where there is none."""
    try:
        card = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{folder} holds no finished run: cannot read model.json ({error})") from None
    return dict(card)


def versions() -> dict[str, str]:
    """What the run was made with."""
    names = ("torch", "timm", "lightning", "numpy")
    return {"python": platform.python_version(), "foveal": __version__, **{name: version(name) for name in names}}


def _create(architecture: str, arguments: dict[str, Any], pretrained: bool = False) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(architecture, pretrained=pretrained, **arguments)
    except (TypeError, ValueError) as error:  # an argument, or a value, that the architecture does not take
        raise SettingsError(f"{architecture} cannot be built with {arguments}: {error}") from None
    return model


def pretrained(architecture: str, arguments: dict[str, Any], remedy: str) -> tuple[nn.Module, str]:
    """A timm model with its pretrained weights, and their name. Raises RunError, with the remedy, without them."""
    if ":" not in architecture and not timm.is_model_pretrained(architecture):
        raise RunError(f"timm has no pretrained weights for {architecture}: {remedy}")
    try:
        with _patience():
            model = _create(architecture, arguments, pretrained=True)
    except (OSError, ConnectionError) as error:
        raise RunError(
            f"the pretrained weights of {architecture} are neither on this machine nor can they be downloaded"
            f" ({type(error).__name__}): {remedy}"
        ) from error
    except RuntimeError as error:
        first = " ".join(str(error).split())[:300]
        raise RunError(
            f"the pretrained weights do not fit {architecture} with {arguments}: {first}; {remedy}"
        ) from error
    tag = getattr(model, "pretrained_cfg", {}).get("tag") or "default"
    return model, f"pretrained weights {architecture.partition('.')[0]}.{tag}"


@contextmanager
def _patience() -> Iterator[None]:
    """Offline, the hub's client asks for most of a minute before it looks at its cache: spare the user that."""
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    try:
        constants.HF_HUB_OFFLINE = offline or not _reachable(constants.ENDPOINT)
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def _reachable(address: str) -> bool:
    if urllib.request.getproxies():
        return True  # a proxy resolves names for us
    try:
        socket.getaddrinfo(address.partition("//")[2].partition("/")[0].partition(":")[0], 443)
    except OSError:
        return False
    return True
