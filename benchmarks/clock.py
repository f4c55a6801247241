"""How the benchmarks measure: variants in turns, in one process; a ratio is that of a round."""

from __future__ import annotations

import contextlib
import platform
import random
import statistics
import time
from collections.abc import Callable

import torch

Clock = Callable[[], float]
Variants = dict[str, Callable[[int], object]]  # called with the number of the round


def clock_of(name: str) -> Clock:
    """`cpu`: seconds of the processor for this process alone, for a machine that does other things; else the wall's."""
    return time.process_time if name == "cpu" else time.perf_counter


def interleaved(variants: Variants, rounds: int, device: torch.device, clock: Clock) -> dict[str, list[float]]:
    """Seconds of each variant in each round: all in every round, in shuffled order, after a run that is not counted."""
    for run in variants.values():
        run(0)
    times: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    for number in range(rounds):
        random.Random(number).shuffle(order)
        for name in order:
            times[name].append(timed(variants[name], number, device, clock))
    return times


def timed(run: Callable[[int], object], number: int, device: torch.device, clock: Clock) -> float:
    """Seconds of one run, the device waited for before and after."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = clock()
    run(number)
    wait()
    return clock() - start


def spread(taken: list[float], base: list[float]) -> str:
    """Median and quartiles of the ratios within rounds."""
    low, mid, high = statistics.quantiles([t / b for t, b in zip(taken, base, strict=True)], n=4)
    return f"x {mid:.3f} [{low:.3f}, {high:.3f}]"


def processor() -> str:
    """The CPU's name; platform.processor() is empty on many Linux machines."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
