"""What a training shows while it runs: on a terminal a bar, elsewhere a line per epoch; on stderr."""

from pathlib import Path
from typing import Any

import lightning
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from foveal.data import Data
from foveal.train.models import Built
from foveal.train.record import Record
from foveal.train.settings import Settings
from foveal.train.task import Classify

REFRESH = 4  # times per second: the bar never costs a tiny model's step much


class Show(lightning.Callback):  # type: ignore[misc]  # Lightning is not typed for mypy here
    """Tells on stderr, from the first process, what is trained on what and how it goes."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.console = Console(stderr=True, highlight=False)
        self.bar: Progress | None = None
        self.entry = TaskID(0)

    def begin(
        self,
        settings: Settings,
        data: Data,
        built: Built,
        precision: str,
        device: torch.device,
        checkpoint: Path | None,
    ) -> None:
        """Say what will be trained."""
        parameters = sum(p.numel() for p in built.model.parameters()) / 1e6
        sets = {"train": data.train, "val": data.val, **data.tests}
        sizes = ", ".join(f"{len(images):,} {name}" for name, images in sets.items())
        say = self._say
        say(f"data   {data.name}: {len(data.classes)} classes; {sizes}")
        for note in data.notes:
            say(f"       {note}")
        h, w = built.image.size
        say(f"model  {built.architecture}, {parameters:.2f} M parameters, {h} x {w} pixels; {built.origin}")
        how = [part for part in (settings.mix, settings.guide) if part != "none"] or ["plain"]
        say(f"train  {' + '.join(how)}, {settings.epochs} epochs on {device} in {precision} -> {settings.folder}")
        if checkpoint is not None:
            say(f"       continuing from {checkpoint}")

    def on_train_start(self, trainer: lightning.Trainer, task: Classify) -> None:
        """Open the bar."""
        if self.console.is_terminal and trainer.is_global_zero:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), TimeRemainingColumn())
            self.bar = Progress(*columns, console=self.console, refresh_per_second=REFRESH, transient=True)
            total = task.settings.epochs * task.steps * task.settings.accumulate
            done = trainer.current_epoch * task.steps * task.settings.accumulate
            self.entry = self.bar.add_task(f"epoch {trainer.current_epoch + 1}", total=total, completed=done)
            self.bar.start()

    def on_train_batch_end(self, *_: Any) -> None:
        """Move the bar; it draws itself a few times per second."""
        if self.bar is not None:
            self.bar.advance(self.entry)

    def on_train_epoch_end(self, trainer: lightning.Trainer, task: Classify) -> None:
        """Tell how the epoch went."""
        row = self.record.latest
        if not trainer.is_global_zero or row is None:
            return
        told = (
            f"epoch {row['epoch']:>{len(str(task.settings.epochs))}}/{task.settings.epochs}"
            f"  loss {row['train_loss']:.4f}  val accuracy {100 * (row['val_accuracy'] or 0):.1f} %"
            f"  {row['images_per_second'] or 0:,.0f} images/s"
        )
        if self.bar is not None:
            self.bar.update(self.entry, description=told)
        else:
            self._say(told)

    def on_exception(self, trainer: lightning.Trainer, task: Classify, exception: BaseException) -> None:
        """Take the bar down."""
        self._close()

    def on_train_end(self, trainer: lightning.Trainer, task: Classify) -> None:
        """Take the bar down."""
        self._close()

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False)

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
