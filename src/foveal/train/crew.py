"""Several runs at a time, each by a worker process of its own (foveal.train.worker).

A run that fails is noted and its worker replaced, so that nothing it left behind reaches another run; so is a worker
that the system kills. The others go on.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from foveal.data import DataError
from foveal.train import errors
from foveal.train.errors import RunError
from foveal.train.room import Held, cores, has_room, held
from foveal.train.settings import Settings

Tell = Callable[[str, dict[str, Any]], None]
WORKER = (sys.executable, "-m", "foveal.train.worker")
LOOK = 0.5  # seconds between two looks at the memory


def train_all(
    runs: Sequence[Settings],
    jobs: int,
    tell: Tell,
    limit: float | None = None,
    look: Callable[[int], Held] = held,
) -> dict[str, Exception]:
    """Train `runs` (or resume them) in order, at most `jobs` at a time; what failed, by name.

    tell(name, row) after each epoch, tell(name, {}) when a run is done, tell(name, {"failed": why}) when it failed, and
    tell(name, {"said": line}) for what its process prints on stderr, such as warnings.
    limit: bytes that all of them may hold, see foveal.train.room; look: tells what a process holds.
    Raises DataError, as all runs have the same data. That and Ctrl-C end all: runs continue when called again.
    """
    waiting = list(reversed(runs))
    events: queue.SimpleQueue[tuple[_Worker, dict[str, Any]]] = queue.SimpleQueue()
    crew: list[_Worker] = []
    devices = _devices() if all(run.device in ("auto", "cuda") for run in runs) else []
    failed: dict[str, Exception] = {}
    peak: int | None = None  # of a run, known once one has ended an epoch
    try:
        while waiting or any(worker.run for worker in crew):
            while waiting and (worker := _next(crew, jobs, devices, events, limit, peak)) is not None:
                worker.begin(_shared(waiting.pop(), jobs))
            try:
                worker, event = events.get(timeout=None if limit is None else LOOK)
            except queue.Empty:
                event = {}
            if limit is not None:
                for one in crew:
                    one.held = one.held.then(look(one.process.pid))
            if not event or worker not in crew:
                continue
            if limit is not None and ("epoch" in event or "done" in event):
                peak = max(peak or 0, worker.held.peak)
            name = str(worker.run.name) if worker.run else ""
            if "epoch" in event or "said" in event:
                tell(name, event.get("epoch", event))
                continue
            if "done" in event:
                tell(name, {})
            else:
                error = _error(event)
                if isinstance(error, DataError):
                    raise error
                if worker.run:
                    failed[name] = error
                    tell(name, {"failed": str(error)})
                crew.remove(worker)
                worker.end()
            worker.run = None
    finally:
        for worker in crew:
            worker.end()
    return failed


def _shared(run: Settings, jobs: int) -> Settings:
    """The run with its share of the cores for decoding images, where it does not say how many."""
    return run if run.workers is not None or jobs == 1 else run.replace(workers=max(1, min(cores() // jobs, 8)))


def environment(slot: int, jobs: int, count: int, devices: Sequence[str]) -> dict[str, str]:
    """Variables of the worker in a slot (0 to jobs - 1): its share of `count` cores, and one of several devices."""
    given: dict[str, str] = {}
    if jobs > 1:
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        given |= dict.fromkeys(names, str(max(1, count // jobs)))
        if len(devices) > 1:
            given["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    return given


def _next(
    crew: list["_Worker"],
    jobs: int,
    devices: Sequence[str],
    events: "queue.SimpleQueue[tuple[_Worker, dict[str, Any]]]",
    limit: float | None,
    peak: int | None,
) -> "_Worker | None":
    """A worker for the next run: one that waits, or a new one; None while all are busy or memory has no room."""
    crew[:] = [w for w in crew if w.run or w.process.poll() is None]
    busy, idle = [w for w in crew if w.run], [w for w in crew if not w.run]
    if len(busy) == jobs or not has_room(
        limit, [w.held.now for w in busy], peak, idle=sum(w.held.now for w in idle[1:])
    ):
        return None
    if idle:
        return idle[0]
    slot = min(set(range(jobs)) - {w.slot for w in crew})
    worker = _Worker(slot, environment(slot, jobs, cores(), devices), events)
    crew.append(worker)
    return worker


class _Worker:
    """A worker process and the run it is at, None while it waits."""

    def __init__(
        self, slot: int, environ: dict[str, str], events: "queue.SimpleQueue[tuple[_Worker, dict[str, Any]]]"
    ) -> None:
        self.slot = slot
        self.run: Settings | None = None
        self.held = Held(0, 0)
        self.process = subprocess.Popen(
            WORKER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | environ,
            text=True,
            process_group=0,  # Ctrl-C in the terminal is ours to answer
        )
        for listen in (self._listen, self._overhear):
            threading.Thread(target=listen, args=(events,), daemon=True).start()

    def begin(self, run: Settings) -> None:
        """Give it a run."""
        self.run = run
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and says so by an event
            print(json.dumps(run.as_dict()), file=self.process.stdin, flush=True)

    def end(self) -> None:
        """Kill it: a run survives that."""
        self.process.kill()
        self.process.wait()

    def _listen(self, events: "queue.SimpleQueue[tuple[_Worker, dict[str, Any]]]") -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            events.put((self, json.loads(line)))
        code = self.process.wait()
        events.put((self, {"error": f"its process ended with code {code}{_because(code)}", "kind": "RunError"}))

    def _overhear(self, events: "queue.SimpleQueue[tuple[_Worker, dict[str, Any]]]") -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            events.put((self, {"said": line.rstrip()}))


def _because(code: int) -> str:
    return " (killed: out of memory?)" if code in (-9, 137) else ""


def _error(event: dict[str, Any]) -> Exception:
    """The error that a worker tells of, as far as it is one of ours; else RunError that names its kind."""
    kind, message = event["kind"], event["error"]
    known = DataError if kind == "DataError" else getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, Exception):
        return known(message)
    return RunError(message if kind in ("ValueError", "MapModelError") else f"{kind}: {message}")


def _devices() -> list[str]:
    """Names of the CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES takes them."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    return [str(i) for i in range(torch.cuda.device_count())]
