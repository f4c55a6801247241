"""The guide that the settings name, with its source and its weight; and which options it takes."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from foveal import attention
from foveal.data import Data
from foveal.data.batches import Batches
from foveal.mix import TokenMixer
from foveal.train.errors import SettingsError
from foveal.train.models import Built
from foveal.train.names import unknown
from foveal.train.settings import Settings
from foveal.train.sources import guide_source
from foveal.transfer import GUIDES, Guide, co_tuning_of

OURS = ("source", "weight", "channels")  # arguments that are no plain values, or said elsewhere

COMPARES_BLOCKS = (
    "gta",
    "attention_transfer",
    "attn_distill",
    "delta",
)  # with those of a source, which mixes no tokens


def options_of(name: str) -> list[str]:
    """What `guide_args` may hold for a guide."""
    kind = GUIDES[name]
    if name == "co_tuning":
        return ["table"]
    return [] if kind is None else [one for one in inspect.signature(kind).parameters if one not in OURS]


def default_weight(name: str) -> float:
    """The weight that a guide has if none is asked for; 0 for none."""
    kind = GUIDES[name]
    return 0.0 if kind is None else float(inspect.signature(kind).parameters["weight"].default)


def weight_of(settings: Settings) -> float:
    """Factor of the guidance loss of a run: as asked, else the method's own."""
    return default_weight(settings.guide) if settings.guide_weight is None else settings.guide_weight


def has_source(name: str) -> bool:
    """Whether a guide compares with a source."""
    kind = GUIDES[name]
    return kind is not None and ("source" in inspect.signature(kind).parameters or name == "co_tuning")


def check_guide(settings: Settings) -> None:
    """Raise SettingsError for a guide, or an option of it, that is not known or cannot be meant."""
    if settings.guide not in GUIDES:
        raise SettingsError(unknown("guide", settings.guide, GUIDES))
    known = options_of(settings.guide)
    for option in settings.guide_args:
        if option not in known:
            raise SettingsError(unknown(f"setting of guide {settings.guide}", option, known))
    kind = GUIDES[settings.guide]
    if kind is None:
        return
    if settings.tune == "head":
        raise SettingsError(
            f"tune=head trains the classifier alone, which guide={settings.guide} does not move: leave one of them out"
        )
    if settings.tune == "lora" and settings.guide == "l2_sp":
        raise SettingsError(
            "tune=lora leaves the weights as they are, so guide=l2_sp has nothing to hold: leave one of them out"
        )
    if settings.init == "none" and settings.guide_source == "init" and has_source(settings.guide):
        raise SettingsError(
            f"guide={settings.guide} keeps to the initial weights, but init=none is random:"
            " give pretrained weights or a file as init, or another source as guide_source"
        )
    if kind.unmixed and (settings.mix != "none" or settings.token_mix != "none"):
        raise SettingsError(f"guide={settings.guide} needs images of one class each: leave out mix and token_mix")


def guide_of(
    settings: Settings, built: Built, data: Data, mixer: Any = None, device: torch.device | None = None
) -> Guide | None:
    """The guide that the settings name, its source the weights `built` has now; None for none or weight 0.

    mixer: where it mixes tokens of images inside the model, the guide keeps to the blocks before: the source sees none
    of that. device: where a source's answers to the training images are computed. Raises SettingsError where no block
    is left or an option does not fit, RunError where a source cannot be had.
    """
    kind = GUIDES[settings.guide]
    weight = weight_of(settings)
    if kind is None or weight == 0:
        return None
    options: dict[str, Any] = dict(settings.guide_args)
    try:
        if settings.guide == "co_tuning":
            return _co_tuning(settings, built, data, weight, options, device or torch.device("cpu"))
        first = mixer.first_mixed_block(built.model) if isinstance(mixer, TokenMixer) else None
        if first is not None and settings.guide in COMPARES_BLOCKS:
            options["layers"] = _before(first, options, settings, built.model)
        if settings.guide == "gta":
            options.setdefault("average_pooled", "global_pool" in built.arguments)  # then it was said
        if has_source(settings.guide):
            options["source"] = _source(settings, built)
        return kind(weight=weight, **options)
    except (TypeError, ValueError) as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(f"guide={settings.guide}: {error}") from error


def _before(first: int, options: dict[str, Any], settings: Settings, model: nn.Module) -> Any:
    """The blocks to compare where tokens of several images are mixed from block `first` on."""
    mixing = f"token_mix={settings.token_mix} mixes tokens from block {first} on"
    remedy = "mix at a later block (token_mix_args), or leave one of them out"
    if settings.guide == "attn_distill":
        raise SettingsError(f"{mixing}, and guide=attn_distill compares the last block: leave one of them out")
    if first == 0:
        raise SettingsError(f"{mixing}, so guide={settings.guide} has nothing to compare: {remedy}")
    if options.get("skip_last"):
        raise SettingsError(f"{mixing}: say which blocks to compare as layers, not by skip_last")
    asked = options.get("layers")
    if asked is None:
        return range(first)
    before = attention.read(model, range(first), "block_out").layers
    after = [name for name in attention.read(model, asked, "block_out").layers if name not in before]
    if after:
        raise SettingsError(f"{mixing}, but guide={settings.guide} is to compare {', '.join(after)}: {remedy}")
    return asked


def _source(settings: Settings, built: Built) -> nn.Module | None:
    """The model to compare with; None: the model itself without its adapters."""
    if settings.guide_source != "init":
        return _other(settings.guide_source, settings, built)
    if settings.tune == "lora" and settings.guide == "gta":
        return None
    return built.model


def _other(spec: str, settings: Settings, built: Built) -> nn.Module:
    return guide_source(spec, built.architecture, built.arguments, image=built.image, seed=settings.seed)[0]


def _co_tuning(
    settings: Settings, built: Built, data: Data, weight: float, options: dict[str, Any], device: torch.device
) -> Guide:
    """Co-Tuning: the source's own classifier, and what it says of the training images as they are."""
    which = settings.init if settings.guide_source == "init" else settings.guide_source
    model = _other(settings.model if which == "pretrained" else which, settings, built).to(device)
    batches = Batches(data.train, built.image, settings.batch_size, train=False, flip=False, device=device)
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    with torch.no_grad():
        for batch in batches:
            logits.append(model(batch.images).float().cpu())
            labels.append(batch.labels.cpu())
    answers = torch.cat(logits), torch.cat(labels)
    return co_tuning_of(model.cpu(), *answers, len(data.classes), weight=weight, seed=settings.seed, **options)
