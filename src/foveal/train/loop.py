"""What every training does around its steps: batches by epoch, Ctrl-C, full memory, how many processes decode."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from foveal.data import Data, ImageConfig
from foveal.data.batches import Batch, Batches
from foveal.train.errors import Interrupted, RunError
from foveal.train.measured import Task
from foveal.train.pretrain_settings import PretrainSettings
from foveal.train.settings import Settings


class Epochs:
    """Batches that ask the trainer which epoch it is each time they begin."""

    def __init__(self, batches: Batches, trainer: Any) -> None:
        self.batches, self.trainer = batches, trainer

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        self.batches.set_epoch(self.trainer.current_epoch)
        yield from self.batches


@contextmanager
def stoppable(settings: Settings | PretrainSettings) -> Iterator[None]:
    """Ctrl-C as Interrupted, which says how to go on; a device without memory as RunError, which says what to lower."""
    try:
        yield
    except KeyboardInterrupt:
        command = f"foveal {settings.COMMAND} --resume {settings.folder}"
        raise Interrupted(f"stopped; continue with: {command}") from None
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"the device has no memory left: lower batch_size (now {settings.batch_size}) and raise accumulate"
        ) from error


def batches_of(
    settings: Settings | PretrainSettings, data: Data, image: ImageConfig, trainer: Any, randaugment: bool = False
) -> tuple[Epochs, Batches]:
    """Training and validation batches of this process."""
    shared = {
        "rank": trainer.global_rank,
        "world": trainer.world_size,
        "workers": workers_for(settings.workers, data),
        "device": trainer.strategy.root_device,
    }
    train = Batches(
        data.train,
        image,
        settings.batch_size,
        train=True,
        seed=settings.seed,
        flip=data.flip if settings.flip is None else settings.flip,
        crop_scale=settings.crop_scale,
        randaugment=randaugment,
        accumulate=settings.accumulate,
        **shared,
    )
    return Epochs(train, trainer), Batches(data.val, image, settings.batch_size, train=False, **shared)


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
