"""What a run writes down at the end of each epoch, in the order that survives a kill at any moment.

1 rows of metrics.csv, steps.csv, TensorBoard     cut back on resume if 3 was not reached
2 best-<epoch>.safetensors, if it is the best     beside the last best, which the checkpoint still names
3 last.ckpt                                       from here on the epoch is done
4 remove what the checkpoint no longer names
"""

import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
from torch import Tensor

from foveal.maps import MapWarning
from foveal.mix.guided import BLANK
from foveal.train.files import sweep, write_weights
from foveal.train.measured import Task
from foveal.train.table import Row, Table

Tell = Callable[[Row], None]


class Record(lightning.Callback):  # type: ignore[misc]  # Lightning is not typed for mypy here
    """Writes a run's folder while it trains. images: number of training images. tell: called with each epoch's row."""

    def __init__(self, folder: Path, task: Task, images: int, tell: Tell | None = None) -> None:
        self.folder, self.task, self.images, self.tell = folder, task, images, tell
        trained = tuple(f"train_{name}" for name in task.columns)
        validated = tuple(f"val_{name}" for name in task.validates)
        self.metrics = Table(
            folder / "metrics.csv", ("epoch", "lr", *trained, *validated, *task.extras, "seconds", "images_per_second")
        )
        self.steps = Table(folder / "steps.csv", ("epoch", "step", "lr", *task.columns))
        self.board: Any = None
        self.started = self.trained = 0.0
        self.latest: Row | None = None
        self.warned = False

    @property
    def last(self) -> Path:
        """The checkpoint of the last finished epoch."""
        return self.folder / "checkpoints" / "last.ckpt"

    def best(self, epoch: int) -> Path:
        """The weights of an epoch that was the best so far."""
        return self.folder / "checkpoints" / f"best-{epoch}.safetensors"

    def on_train_start(self, trainer: lightning.Trainer, task: Task) -> None:
        """Cut the tables back to the checkpoint (or begin them), open TensorBoard's file."""
        if not trainer.is_global_zero:
            return
        done = trainer.current_epoch
        sweep(self.folder)
        self.metrics.begin(done)
        self.steps.begin(done)
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=done * task.steps + 1)

    def on_train_epoch_start(self, trainer: lightning.Trainer, task: Task) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_validation_start(self, trainer: lightning.Trainer, task: Task) -> None:
        """Training of this epoch ends here."""
        self.trained = time.perf_counter() - self.started

    def on_train_epoch_end(self, trainer: lightning.Trainer, task: Task) -> None:
        """Write the epoch down, checkpoint last."""
        curve, scores, epoch = task.epoch_curve(), task.validated(), trainer.current_epoch + 1
        extra = task.extra()
        better = task.is_better(scores)
        if trainer.is_global_zero:
            self._write_rows(task, epoch, curve, scores, extra)
        if better:
            task.best = {"epoch": epoch} | scores
            if trainer.is_global_zero:
                write_weights(self.best(epoch), task.weights())
        trainer.save_checkpoint(self.last)
        if trainer.is_global_zero:
            for path in self.last.parent.glob("best-*.safetensors"):
                if path != self.best(task.best["epoch"]):
                    path.unlink(missing_ok=True)
            if self.tell is not None and self.latest is not None:
                self.tell(self.latest)

    def on_exception(self, trainer: lightning.Trainer, task: Task, exception: BaseException) -> None:
        """Close TensorBoard's file."""
        self.close()

    def on_fit_end(self, trainer: lightning.Trainer, task: Task) -> None:
        """Close TensorBoard's file."""
        self.close()

    def close(self) -> None:
        """Close TensorBoard's file, if it is open."""
        if self.board is not None:
            self.board.close()
            self.board = None

    def _write_rows(
        self, task: Task, epoch: int, curve: Tensor, scores: dict[str, float], extra: dict[str, float | None]
    ) -> None:
        first = (epoch - 1) * task.steps
        rates = [task.lr * task.rate(first + step) for step in range(task.steps)]
        rows: list[Row] = [
            {
                "epoch": epoch,
                "step": first + step + 1,
                "lr": rates[step],
                **dict(zip(task.columns, map(_or_none, values), strict=True)),
            }
            for step, values in enumerate(curve.tolist())
        ]
        self.steps.append(rows)
        # the mean over samples: the steps' means weighed by their sizes
        sizes = task.sizes[:, None] * curve.isfinite()
        mean = (curve.double().nan_to_num() * sizes).sum(0) / sizes.sum(0)
        row: Row = {"epoch": epoch, "lr": rates[-1]}
        row |= {f"train_{name}": _or_none(float(value)) for name, value in zip(task.columns, mean, strict=True)}
        row |= {f"val_{name}": value for name, value in scores.items()} | extra
        row |= {
            "seconds": time.perf_counter() - self.started,
            "images_per_second": self.images / self.trained if self.trained > 0 else None,
        }
        self.metrics.append([row])
        if task.device.type != "cpu" and (row.get("train_map_blank") or 0) > 0 and not self.warned:
            warnings.warn(BLANK, MapWarning, stacklevel=2)  # on the CPU the mixer has said so at once
            self.warned = True
        self.latest = row
        for line in rows:
            for name in ("lr", *task.columns):
                if line[name] is not None:
                    self.board.add_scalar(f"step/{name}", line[name], line["step"])
        for name, value in row.items():
            if name not in ("epoch", "lr") and value is not None:
                self.board.add_scalar(f"epoch/{name}", value, first + task.steps)
        self.board.flush()


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
