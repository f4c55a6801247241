"""What every training does around its steps: batches by epoch, Ctrl-C, how many processes decode images."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from foveal.data import Data
from foveal.data.batches import Batch, Batches
from foveal.train.measured import Task


class Epochs:
    """Batches that ask the trainer which epoch it is each time they begin."""

    def __init__(self, batches: Batches, trainer: Any) -> None:
        self.batches, self.trainer = batches, trainer

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        self.batches.set_epoch(self.trainer.current_epoch)
        yield from self.batches


def train(trainer: Any, task: Task, batches: tuple[Epochs, Batches], checkpoint: Path | None) -> None:
    """Fit, from the checkpoint where there is one. Raises KeyboardInterrupt after Ctrl-C or SIGTERM."""
    before = None
    if threading.current_thread() is threading.main_thread():
        before = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(task, batches[0], batches[1], ckpt_path=checkpoint)
    except SystemExit:  # how Lightning leaves after Ctrl-C or SIGTERM
        if not trainer.interrupted:
            raise
        raise KeyboardInterrupt from None
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)  # Lightning leaves Ctrl-C switched off


def workers_for(asked: int | None, data: Data) -> int:
    """Processes that decode images: as asked, else none for sets held as pixels and up to 8 for files."""
    if asked is not None:
        return asked
    return 0 if data.train.pixels is not None else min(os.cpu_count() or 1, 8)
