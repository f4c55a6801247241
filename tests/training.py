"""Small trainings for tests, in this process or in one that may be killed."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from foveal.train import Settings

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def tiny(out: Path, **changes: Any) -> Settings:
    """A ViT of width 32 and depth 2 on digit scenes: a few seconds."""
    values = {
        "data": "scenes:train=50,val=20,test=20,shortcut=0.8,classes=0-4",
        "model": "vit_tiny_patch16_224",
        "model_args": TINY,
        "image_size": 32,
        "init": "none",
        "epochs": 3,
        "batch_size": 8,
        "device": "cpu",
        "precision": "float32",
        "out": str(out),
        "name": "run",
    }
    return Settings.from_dict(values | changes)


@cache
def _processes() -> Any:
    """Children are forked from a server that has imported everything and computed nothing: quick, and clean."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["foveal.train.fitting"])
    return context


def child(target: Callable[..., None], *args: Any) -> multiprocessing.Process:
    """Start target(*args) in a process of its own, on one thread."""
    process = _processes().Process(target=_on_one_thread, args=(target, args))
    process.start()
    return process


def exit_code(target: Callable[..., None], *args: Any, within: float = 120) -> int:
    """Run target(*args) in a process of its own to its end; -9 if it was killed."""
    process = child(target, *args)
    process.join(within)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"{target.__name__} did not end within {within} s")
    return process.exitcode


def die() -> None:
    """kill -9 of this very process: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def _on_one_thread(target: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite that runs in the background ignores Ctrl-C
    target(*args)
