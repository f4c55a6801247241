"""What a training shows while it runs: on a terminal a bar, elsewhere a line per epoch; on stderr."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from foveal.data import Data
from foveal.data.errors import counted
from foveal.train.drift import SourceQuality
from foveal.train.measured import Task
from foveal.train.models import Built
from foveal.train.record import Record
from foveal.train.table import Row

REFRESH = 4  # times per second: the bar never costs a tiny model's step much


class Show(lightning.Callback):  # type: ignore[misc]  # Lightning is not typed for mypy here
    """Tells on stderr, from the first process, what is trained on what and how it goes."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.console = Console(stderr=True, highlight=False)
        self.bar: Progress | None = None
        self.entry = TaskID(0)

    def begin(self, data: Data, built: Built, how: str, where: str, checkpoint: Path | None) -> None:
        """Say what will be trained. how: which way; where: device and arithmetic."""
        parameters = sum(p.numel() for p in built.model.parameters()) / 1e6
        sets = {"train": data.train, "val": data.val, **data.tests}
        sizes = ", ".join(f"{len(images):,} {name}" for name, images in sets.items())
        say, epochs = self._say, self.record.task.settings.epochs
        say(f"data   {data.name}: {counted(len(data.classes), 'class', 'classes')}; {sizes}")
        for note in data.notes:
            say(f"       {note}")
        h, w = built.image.size
        say(f"model  {built.architecture}, {parameters:.2f} M parameters, {h} x {w} pixels; {built.origin}")
        for note in built.notes:
            say(f"       {note}")
        say(f"train  {how}, {epochs} epochs on {where} -> {self.record.folder}")
        if checkpoint is not None:
            say(f"       continuing from {checkpoint}")

    def source(self, quality: SourceQuality) -> None:
        """Say how well the source looks at the objects, where that is known, and warn where it does not."""
        if quality.pointing is not None:
            self._say(f"source {quality}")
        if quality.warning and self.record.task.settings.guide != "none":
            self._say(f"       warning: {quality.warning}")

    def maps(self, name: str) -> Callable[[int, int], None]:
        """What to call with (done, to do) while maps are made."""

        def tell(done: int, todo: int) -> None:
            if not todo:
                self._say(f"maps   {name}: all there")
            elif done == 0:
                self._say(f"maps   {name} of {todo:,} images")
                if self.console.is_terminal:
                    self.bar = Progress(TextColumn("maps"), BarColumn(bar_width=30), TimeRemainingColumn(),
                                        console=self.console, refresh_per_second=REFRESH, transient=True)  # fmt: skip
                    self.entry = self.bar.add_task("maps", total=todo)
                    self.bar.start()
            elif self.bar is not None:
                self.bar.update(self.entry, completed=done)
                if done >= todo:
                    self._close()

        return tell

    def on_train_start(self, trainer: lightning.Trainer, task: Task) -> None:
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

    def on_train_epoch_end(self, trainer: lightning.Trainer, task: Task) -> None:
        """Tell how the epoch went."""
        row = self.record.latest
        if not trainer.is_global_zero or row is None:
            return
        told = (
            f"epoch {row['epoch']:>{len(str(task.settings.epochs))}}/{task.settings.epochs}"
            f"  loss {row['train_loss']:.4f}  {_validation(row)}"
            f"  {row['images_per_second'] or 0:,.0f} images/s"
        )
        if self.bar is not None:
            self.bar.update(self.entry, description=told)
        else:
            self._say(told)

    def on_exception(self, trainer: lightning.Trainer, task: Task, exception: BaseException) -> None:
        """Take the bar down."""
        self._close()

    def on_train_end(self, trainer: lightning.Trainer, task: Task) -> None:
        """Take the bar down."""
        self._close()

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False)

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def _validation(row: Row) -> str:
    if "val_accuracy" in row:
        return f"val accuracy {100 * (row['val_accuracy'] or 0):.1f} %"
    return f"val loss {row['val_loss'] or 0:.4f}"
