"""Several runs at a time, each by a worker process of its own (foveal.train.worker)."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

from foveal.train import errors
from foveal.train.errors import RunError
from foveal.train.settings import Settings

Tell = Callable[[str, dict[str, Any]], None]


def train_all(runs: Sequence[Settings], jobs: int, tell: Tell) -> None:
    """Train `runs` (or resume them) in order, `jobs` at a time; tell(name, row) after each epoch.

    The first failure ends all: raises its error (RunError, SettingsError, DivergedError, ...). So does Ctrl-C. Runs
    that were cut off continue when called again.
    """
    waiting = list(reversed(runs))
    events: SimpleQueue[tuple[_Worker, dict[str, Any]]] = SimpleQueue()
    crew = [_Worker(events) for _ in range(min(jobs, len(waiting)))]
    try:
        for worker in crew:
            worker.begin(waiting.pop())
        busy = len(crew)
        while busy:
            worker, event = events.get()
            name = str(worker.run.name) if worker.run else ""
            if "epoch" in event:
                tell(name, event["epoch"])
            elif "done" in event:
                tell(name, {})
                if waiting:
                    worker.begin(waiting.pop())
                else:
                    busy -= 1
            else:
                raise _error(event, name)
    finally:
        for worker in crew:
            worker.end()


class _Worker:
    """A worker process and the run it is at."""

    def __init__(self, events: "SimpleQueue[tuple[_Worker, dict[str, Any]]]") -> None:
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        self.run: Settings | None = None
        self.process = subprocess.Popen(
            [sys.executable, "-m", "foveal.train.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | one_thread,
            text=True,
        )
        threading.Thread(target=self._listen, args=(events,), daemon=True).start()

    def begin(self, run: Settings) -> None:
        """Give it a run."""
        self.run = run
        assert self.process.stdin is not None
        print(json.dumps(run.as_dict()), file=self.process.stdin, flush=True)

    def end(self) -> None:
        """Kill it: a run survives that."""
        self.process.kill()
        self.process.wait()

    def _listen(self, events: "SimpleQueue[tuple[_Worker, dict[str, Any]]]") -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            events.put((self, json.loads(line)))
        code = self.process.wait()
        events.put((self, {"error": f"its process ended with code {code} (out of memory?)", "kind": "RunError"}))


def _error(event: dict[str, Any], name: str) -> Exception:
    kind = getattr(errors, event["kind"], None)
    message = f"{name}: {event['error']}"
    if isinstance(kind, type) and issubclass(kind, Exception):
        return kind(message)
    return RunError(message if event["kind"] in ("DataError", "ValueError") else f"{message} ({event['kind']})")
