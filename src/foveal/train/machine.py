"""Where a run computes: Lightning's trainer for one device or many, without the parts that we do ourselves."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from foveal.data.config import ImageConfig
from foveal.train.checkpoints import WholeCheckpoints
from foveal.train.errors import SettingsError
from foveal.train.precision import CHOICES
from foveal.train.pretrain_settings import PretrainSettings
from foveal.train.settings import Settings


def device_of(name: str) -> torch.device:
    """The device that a setting names; "auto" takes an accelerator where there is one. Raises SettingsError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SettingsError(f"device={name!r} is not one: use auto, cpu, cuda, cuda:1 or mps") from None
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not there.get(device.type, False):
        raise SettingsError(f"device={name}: torch {torch.__version__} sees no {device.type} on this machine")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(f"device={name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return device


def trainer_for(
    settings: Settings | PretrainSettings,
    device: torch.device,
    precision: str,
    callbacks: list[Any],
    unused: bool,
) -> lightning.Trainer:
    """A trainer that does the loop, the devices and the arithmetic; logs, progress and checkpoints are ours.

    unused: some parameters take no part in the loss, so processes must look for them at each step.
    """
    count, nodes = processes(settings.devices)
    plugins: list[Any] = [WholeCheckpoints()]
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # its mid-epoch checkpoints would not resume exactly
    several = count * nodes > 1
    return lightning.Trainer(
        accelerator={"cuda": "gpu"}.get(device.type, device.type),
        devices=[device.index or 0] if device.type == "cuda" and not several else count,
        num_nodes=nodes,
        # buffers stay each process's own: with uneven shares a broadcast in validation would wait for ever
        strategy=DDPStrategy(find_unused_parameters=unused, broadcast_buffers=False) if several else "auto",
        precision=CHOICES[precision],
        max_epochs=settings.epochs,
        accumulate_grad_batches=settings.accumulate,
        callbacks=callbacks,
        plugins=plugins,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def processes(devices: int) -> tuple[int, int]:
    """Processes per node, and nodes: as torchrun or SLURM started us, else `devices` on this machine."""
    if TorchElasticEnvironment.detect():
        local = int(os.environ.get("LOCAL_WORLD_SIZE", devices))
        return local, int(os.environ["WORLD_SIZE"]) // local
    if SLURMEnvironment.detect() and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        return devices, int(os.environ.get("SLURM_NNODES", 1))
    return devices, 1


def own(device: torch.device, settings: Settings | PretrainSettings) -> torch.device:
    """The device of this process where several train: as Lightning, torchrun or SLURM number them on a machine."""
    count, nodes = processes(settings.devices)
    if device.type != "cuda" or count * nodes == 1:
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))))


def wait_for_first(trainer: lightning.Trainer) -> None:
    """Where processes were started by torchrun or SLURM: go on when all have come here.

    Processes that Lightning starts itself come after the first has prepared the folder.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.world_size > 1 and not isinstance(environment, LightningEnvironment):
        trainer.strategy.setup_environment()
        trainer.strategy.barrier("folder")


def has_unused(model: nn.Module, image: ImageConfig) -> bool:
    """Whether some parameter that is trained takes no part in the logits: asked by one backward on grey images."""
    was_training = model.training
    model.train()
    images = torch.zeros(2, 3, *image.size)
    model(images).sum().backward()
    unused = any(p.requires_grad and p.grad is None for p in model.parameters())
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    return unused


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without Lightning's banners and advice: what the user should know, foveal says itself."""
    logger = logging.getLogger("lightning.pytorch")
    fabric = logging.getLogger("lightning.fabric")
    levels = logger.level, fabric.level
    logger.setLevel(logging.ERROR)
    fabric.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning(\.|$)")
            yield
    finally:
        logger.setLevel(levels[0])
        fabric.setLevel(levels[1])
