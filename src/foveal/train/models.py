"""The model of a run: a timm architecture with its starting weights, and the card that rebuilds it anywhere.

timm.create_model(card["architecture"], **card["arguments"])      and model.safetensors: no foveal needed,
                                                                  but for the models of foveal.models
"""

import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import foveal.models  # noqa: F401  CCT, CVT and ViT-Lite: importing the room tells timm their names
from foveal import __version__
from foveal.chance import seeded
from foveal.data.config import ImageConfig, image_config
from foveal.train.errors import RunError, SettingsError
from foveal.train.files import write_text, write_weights
from foveal.train.hub import patience
from foveal.train.names import unknown
from foveal.train.pretrain_settings import PretrainSettings
from foveal.train.settings import Settings
from foveal.train.weights import load_weights

DEMO = Path(__file__).parents[1] / "assets"  # the encoder that comes with foveal: model.safetensors, model.json

FRESH = "give --init none to start from random weights, or --init FILE"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation


# guides that compare class rows of attention: the classifier should read that token, where that has not been decided
CLASS_ROW_GUIDES = ("gta", "attn_distill")


@dataclass(frozen=True)
class Built:
    """A model ready to train.

    architecture and arguments: what timm.create_model takes to build it again (without drop path, which the
    weights do not know).  image: how it wants its images.  origin: where its weights come from, in words.  notes: what
    was chosen for the user, or should be known of the weights, in words.
    """

    model: nn.Module
    architecture: str
    arguments: dict[str, Any]
    image: ImageConfig
    origin: str
    notes: tuple[str, ...] = ()


def build(settings: Settings | PretrainSettings, classes: int) -> Built:
    """The model that `settings` name, for `classes` classes (0: without classifier), with its starting weights.

    Under a guide of the class token's attention, a model with a class token that would average its patches reads the
    class token instead, unless model_args say global_pool. Images are normalised as those of a run or a transformers
    model that the weights come from. Raises SettingsError for an unknown model or argument, RunError where the weights
    cannot be had.
    """
    architecture, arguments = resolve(settings)
    arguments = arguments | {"num_classes": classes}
    model, origin = _start(settings, architecture, arguments)
    notes: tuple[str, ...] = ()
    pool = _class_pool(settings, model)
    if pool:
        arguments |= pool
        model, origin = _start(settings, architecture, arguments)
        said = ", ".join(f"{name}={value}" for name, value in pool.items())
        notes = (
            f"the classifier reads the class token ({said}), whose attention {getattr(settings, 'guide', '')} guides;"
            " say model_args {global_pool: avg} for the mean of patches",
        )
    image = image_config(model)
    init = DEMO if _is_demo(settings) else settings.init
    if init not in ("pretrained", "none"):
        loaded = load_weights(model, init)
        origin, notes = str(loaded), notes + loaded.notes
        if loaded.mean is not None and loaded.std is not None:
            image = ImageConfig(**(asdict(image) | {"mean": loaded.mean, "std": loaded.std}))
        elif "." not in architecture and (image.mean, image.std) != IMAGENET:
            notes += (
                f"images are normalised with mean {image.mean[0]:g}, as {architecture} was trained; files of DINO, iBOT"
                " or MAE saw ImageNet's mean: say so by a tag, such as model=vit_small_patch16_224.dino",
            )
    if settings.image_size is not None:  # models without a fixed size take it from the images
        image = ImageConfig(**(asdict(image) | {"size": (settings.image_size, settings.image_size)}))
    return Built(model, architecture, arguments, image, origin, notes)


def _is_demo(settings: Settings | PretrainSettings) -> bool:
    return settings.init == "demo" or (settings.init == "pretrained" and settings.model == "demo")


def _start(
    settings: Settings | PretrainSettings, architecture: str, arguments: dict[str, Any]
) -> tuple[nn.Module, str]:
    """A model with timm's pretrained weights, or random ones, which depend on the seed only; and what they are."""
    drop_path = getattr(settings, "drop_path", 0.0)
    extra = {"drop_path_rate": drop_path} if drop_path else {}
    with seeded(settings.seed, "init"):
        if settings.init == "pretrained" and not _is_demo(settings):
            return pretrained(architecture, arguments | extra, FRESH)
        return create(architecture, arguments | extra), "random weights"


def wants_class_token(settings: Settings | PretrainSettings) -> bool:
    """Whether a guide of the class token's attention wants the classifier to read that token, and nobody decided it."""
    options: dict[str, Any] = getattr(settings, "guide_args", {})
    if getattr(settings, "guide", "none") not in CLASS_ROW_GUIDES or "global_pool" in settings.model_args:
        return False
    return not options.get("average_pooled") and options.get("query", "class") == "class"


def class_pool(settings: Settings) -> dict[str, Any]:
    """What `build` would add to the arguments so that the classifier reads the class token. No weights are made.

    Raises SettingsError for an unknown model or argument.
    """
    architecture, arguments = resolve(settings)
    with torch.device("meta"):
        return _class_pool(settings, create(architecture, arguments))


def _class_pool(settings: Settings | PretrainSettings, model: nn.Module) -> dict[str, Any]:
    """timm arguments that let the classifier read the class token; none where it does, or need not."""
    if not wants_class_token(settings):
        return {}
    if getattr(model, "cls_token", None) is None or getattr(model, "global_pool", None) not in ("avg", "avgmax", "max"):
        return {}
    pool: dict[str, Any] = {"global_pool": "token"}
    if isinstance(getattr(model, "fc_norm", None), nn.modules.normalization.LayerNorm):
        # the norm stays behind the pool: pretrained weights have it there
        pool["fc_norm" if isinstance(model, timm.models.VisionTransformer) else "use_fc_norm"] = True
    return pool


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
    model = create(card["architecture"], card["arguments"])
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


def create(architecture: str, arguments: dict[str, Any], pretrained: bool = False) -> nn.Module:
    """timm.create_model. Raises SettingsError for an argument, or a value, that the architecture does not take."""
    try:
        model: nn.Module = timm.create_model(architecture, pretrained=pretrained, **arguments)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{architecture} cannot be built with {arguments}: {error}") from None
    return model


def pretrained(architecture: str, arguments: dict[str, Any], remedy: str) -> tuple[nn.Module, str]:
    """A timm model with its pretrained weights, and their name. Raises RunError, with the remedy, without them."""
    if ":" not in architecture and not timm.is_model_pretrained(architecture):
        raise RunError(f"timm has no pretrained weights for {architecture}: {remedy}")
    try:
        with patience():
            model = create(architecture, arguments, pretrained=True)
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
