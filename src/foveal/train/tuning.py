"""What of the model is trained and how its classifier begins: the settings tune, tune_args and head_start."""

import inspect
from dataclasses import replace

import torch

from foveal.data import Data, DataError
from foveal.train.errors import RunError, SettingsError
from foveal.train.head_start import probe_head
from foveal.train.loop import workers_for
from foveal.train.models import Built, create
from foveal.train.names import unknown
from foveal.train.settings import Settings
from foveal.transfer import freeze, inject, is_adapted, merged_state
from foveal.transfer.tuned import TUNES, is_way_to_tune

LORA = tuple(inspect.signature(inject).parameters)[1:-1]  # what tune_args may hold: without the model and the seed


def check_tune(settings: Settings) -> None:
    """Raise SettingsError for a way to tune, or a setting of it, that is not known or cannot be meant."""
    if not is_way_to_tune(settings.tune):
        raise SettingsError(unknown("tune", settings.tune, TUNES))
    known = LORA if settings.tune == "lora" else ()
    for name in settings.tune_args:
        if name not in known:
            raise SettingsError(unknown(f"setting of tune={settings.tune}", name, known))
    if settings.tune == "head" and settings.head_start == "probe":
        raise SettingsError("tune=head trains the classifier alone: head_start=probe would have done that already")


def start_head(settings: Settings, built: Built, data: Data, device: torch.device) -> None:
    """Give the classifier the weights of a linear probe on the frozen features of the training images (LP-FT)."""
    try:
        probe_head(
            built.model,
            data.train,
            built.image,
            val=data.val,
            batch_size=settings.batch_size,
            device=device,
            seed=settings.seed,
            workers=workers_for(settings.workers, data),
        )
    except ValueError as error:
        if isinstance(error, RunError | SettingsError | DataError):
            raise
        raise SettingsError(f"head_start=probe: {error}") from error


def choose_trained(settings: Settings, built: Built) -> None:
    """Freeze what is not to be trained, or add adapters. Raises SettingsError where the model has no such part."""
    if settings.tune == "all":
        return
    try:
        if settings.tune == "lora":
            inject(built.model, **settings.tune_args, seed=settings.seed)
        else:
            freeze(built.model, settings.tune)
    except (TypeError, ValueError, ImportError) as error:
        raise SettingsError(f"tune={settings.tune}: {error}") from error


def merged(built: Built) -> Built:
    """The model as timm builds it, with its adapters merged into the weights; without adapters as it is."""
    if not is_adapted(built.model):
        return built
    model = create(built.architecture, built.arguments)
    model.load_state_dict(merged_state(built.model))
    return replace(built, model=model)
