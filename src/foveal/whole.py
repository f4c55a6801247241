"""Files that are whole or not there.

A file is written under a temporary name in its own folder, flushed to the disk, then renamed over the old one,
and the folder is flushed too: whatever kills the process or the machine, the old file or the new one is there.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def whole_file(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to write (binary) that takes its place at `path` only when the block ends well.

    Raises the OSError of a folder or disk that does not take it; the file that was at `path` is then still there and
    no temporary one, path.partial-<process>-<thread>, is left.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}-{threading.get_ident()}")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _flush_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":
        return  # a folder cannot be opened there
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
