"""A process that trains one run after another for a comparison: `python -m foveal.train.worker`.

Reads settings (a JSON object per line) from stdin; answers on stdout with {"epoch": row} after each epoch and
{"done": folder} or {"error": message, "kind": class} at the end of each run. It imports Lightning once; when its
stdin closes, because whoever started it is gone, it ends at once: runs survive that.
"""

import json
import os
import queue
import signal
import sys
import threading
import traceback
import warnings
from typing import Any


def main() -> None:
    """Train what comes, until nothing comes any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for our starter, which sees to us
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not look like an answer
    orders: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()

    def answer(what: dict[str, Any]) -> None:
        print(json.dumps(what), file=answers, flush=True)

    warnings.showwarning = _warn  # type: ignore[assignment]  # it takes any further arguments
    from foveal.train.fitting import fit
    from foveal.train.settings import Settings

    while True:
        settings = Settings.from_dict(json.loads(orders.get()))
        try:
            run = fit(settings, resume=True, progress=lambda row: answer({"epoch": row}))
        except Exception as error:
            if os.environ.get("FOVEAL_TRACEBACK"):
                traceback.print_exc()
            answer({"error": " ".join(str(error).split()), "kind": type(error).__name__})
        else:
            answer({"done": str(run.folder)})


def _warn(message: Warning | str, category: type[Warning], *_: object) -> None:
    print(f"{category.__name__}: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


def _listen(orders: "queue.SimpleQueue[str]") -> None:
    for line in sys.stdin:
        orders.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
