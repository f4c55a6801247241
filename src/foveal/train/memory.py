"""The most memory that a run has held: on the accelerator where it has one, else of the process."""

import contextlib
import ctypes
import gc
import sys
from pathlib import Path
from typing import Any

import torch

STATUS = Path("/proc/self/status")


def begin(device: torch.device) -> None:
    """Count from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        gc.collect()  # what a run before this one left behind is not this one's
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # of glibc: gives freed memory back
        # sets the process's high-water mark to what it holds now; where that is forbidden the mark is of all its life
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> dict[str, Any] | None:
    """{"bytes": most memory held since `begin`, "of": "device" or "process"}; None where it cannot be known."""
    if device.type == "cuda":
        return {"bytes": torch.cuda.max_memory_allocated(device), "of": "device"}
    try:
        lines = STATUS.read_text().splitlines()
        held = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None
    return {"bytes": held, "of": "process"}
