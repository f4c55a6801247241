"""A run on disk: everything that one training left behind.

settings.yaml  split.json  metrics.csv  steps.csv  tensorboard/  checkpoints/  samples.npz
model.safetensors + model.json     timm's own architecture: loads with timm alone; of a pre-training the encoder
predictions/<test set>.npz  results.json (written last: a run with it is finished)
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveal.train.errors import RunError
from foveal.train.table import Row, read_table

if TYPE_CHECKING:
    from torch import nn

    from foveal.data.config import ImageConfig
    from foveal.evaluate.predict import Predictions


@dataclass(frozen=True)
class Run:
    """A finished run in its folder. Files are read when they are asked for."""

    folder: Path

    @classmethod
    def load(cls, path: str | Path) -> "Run":
        """The run in a folder. Raises RunError where there is none or it has not finished."""
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise RunError(f"there is no run {folder}")
        if not (folder / "results.json").is_file():
            if (folder / "settings.yaml").is_file():
                from foveal.train.folder import settings_in

                command = settings_in(folder).COMMAND
                raise RunError(f"{folder} has not finished: continue it with foveal {command} --resume {folder}")
            raise RunError(f"{folder} is not the folder of a run: it has no results.json")
        return cls(folder)

    @cached_property
    def settings(self) -> Any:
        """The settings it was trained with: Settings, or PretrainSettings of a pre-training."""
        from foveal.train.folder import settings_in

        return settings_in(self.folder)

    @cached_property
    def card(self) -> dict[str, Any]:
        """model.json: architecture, arguments, classes, image configuration, where its weights began, versions."""
        from foveal.train.models import read_card

        return read_card(self.folder)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        return tuple(self.card["classes"])

    @cached_property
    def config(self) -> "ImageConfig":
        """How the model wants its images."""
        from foveal.data.config import ImageConfig

        return ImageConfig(**self.card["image"])

    def model(self) -> "nn.Module":
        """The trained timm model on the CPU, in eval mode: the weights of the best epoch on validation."""
        from foveal.train.models import read_model

        return read_model(self.folder)

    @cached_property
    def metrics(self) -> list[Row]:
        """One row per epoch: {"epoch": 1, "train_loss": ..., "val_accuracy": ..., ...}."""
        return read_table(self.folder / "metrics.csv")

    @cached_property
    def steps(self) -> list[Row]:
        """One row per optimiser step: {"epoch", "step", "lr", "loss", "accuracy", ...}."""
        return read_table(self.folder / "steps.csv")

    @cached_property
    def results(self) -> Mapping[str, Any]:
        """results.json: scores per test set, BG-Gap, best epoch, time, hardware."""
        return read_json(self.folder / "results.json")

    @cached_property
    def split(self) -> Mapping[str, Any]:
        """split.json: which image was used for what, and the notes on the data."""
        return read_json(self.folder / "split.json")

    def predictions(self, name: str) -> "Predictions":
        """What the model said of each image of a test set. Raises RunError for a set it was not tested on."""
        from foveal.train.outcome import read_predictions

        return read_predictions(self.folder, name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a run's folder. Raises RunError where it cannot be read."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {error}") from None
