"""Where published data sets are kept, and whether one may be fetched: the options that all of them have."""

import os
from pathlib import Path

from foveal.data.errors import DataError

OPTIONS = ("root", "download")
YES, NO = ("yes", "true", "1"), ("no", "false", "0")


def root_of(options: dict[str, str]) -> Path:
    """The folder to look in: the option root, else $FOVEAL_DATA, else ~/.cache/foveal."""
    return Path(options.get("root") or os.environ.get("FOVEAL_DATA") or "~/.cache/foveal").expanduser()


def may_download(options: dict[str, str]) -> bool:
    """The option download, yes or no (no). Raises DataError for anything else."""
    allowed = options.get("download", "no").lower()
    if allowed not in YES + NO:
        raise DataError(f"download={options['download']} is neither yes nor no")
    return allowed in YES
