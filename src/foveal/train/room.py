"""Whether one more training has room beside those that run.

    begins if    sum over running of max(held now, P)  +  P  <=  limit        P: the largest peak seen so far

A run that has just begun holds little of what it will: it counts as P. While no peak is known one run is alone.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROC = Path("/proc")


def has_room(limit: float | None, held: Sequence[int], peak: int | None, idle: int = 0) -> bool:
    """Whether a run may begin.

    limit: bytes for all of them, None for no limit.  held: bytes that each running one holds now.  peak: most bytes
    that a run was seen to hold, None while that is not known.  idle: bytes of processes that wait for work.
    One run alone may always begin: no other would leave it more room.
    """
    if limit is None or not held:
        return True
    if peak is None:
        return False
    return sum(max(now, peak) for now in held) + idle + peak <= limit


@dataclass(frozen=True)
class Held:
    """Bytes of memory of a process and those it started: now, and the most at one time as far as is known."""

    now: int
    peak: int

    def then(self, later: "Held") -> "Held":
        """As seen later."""
        return Held(later.now, max(self.peak, later.peak))


def can_be_read() -> bool:
    """Whether the memory of another process can be read here: on Linux, or with psutil."""
    return sys.platform == "linux" or _psutil() is not None


def held(pid: int) -> Held:
    """What a process holds, with what it started (pages that they share count for each); zero once it has ended."""
    return _linux(pid) if sys.platform == "linux" else _portable(pid)


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _linux(pid: int) -> Held:
    own, most = _status(pid)
    below = 0
    for child in _children(pid):
        below += _linux(child).now
    return Held(own + below, max(own, most) + below)


def _status(pid: int) -> tuple[int, int]:
    """(resident now, most so far) of one process; (0, 0) if it is gone."""
    found = {"VmRSS:": 0, "VmHWM:": 0}
    with suppress(OSError):
        for line in (PROC / str(pid) / "status").read_text().splitlines():
            words = line.split()
            if words and words[0] in found:
                found[words[0]] = int(words[1]) * 1024
    return found["VmRSS:"], found["VmHWM:"]


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):  # it ended, or the kernel does not list children
        for task in (PROC / str(pid) / "task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def _portable(pid: int) -> Held:
    psutil = _psutil()
    try:
        process = psutil.Process(pid)
        now = sum(each.memory_info().rss for each in [process, *process.children(recursive=True)])
    except psutil.Error:
        return Held(0, 0)
    return Held(now, now)


def _psutil() -> Any:
    try:
        import psutil  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError:
        return None
    return psutil
