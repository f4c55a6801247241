"""A run's files: whole or not there, with one error for a disk that is full."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from foveal import whole
from foveal.train.errors import RunError


@contextmanager
def whole_file(path: str | Path) -> Iterator[IO[bytes]]:
    """As foveal.whole.whole_file, but a folder or disk that does not take the file raises RunError with the remedy."""
    try:
        with whole.whole_file(path) as file:
            yield file
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: str | Path, error: OSError) -> RunError:
    """The one message for a full disk or a folder that is closed to us."""
    return RunError(f"cannot write {path}: {error.strerror or error}; free space or choose another folder (out)")


def write_text(path: str | Path, text: str) -> None:
    """Put `text` at `path` as a whole (UTF-8). Raises RunError."""
    with whole_file(path) as file:
        file.write(text.encode())


def write_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Tensors by name as a whole safetensors file. Raises RunError where the disk does not take it."""
    from safetensors.torch import save

    with whole_file(path) as file:
        file.write(save({k: v.detach().cpu().contiguous() for k, v in weights.items()}, metadata={"format": "pt"}))


def sweep(folder: Path) -> None:
    """Remove what killed processes left behind: temporary files below `folder`."""
    for leftover in folder.rglob("*.partial-*"):
        leftover.unlink(missing_ok=True)


def read_tensors(path: str | Path) -> dict[str, Any]:
    """A dictionary saved by torch.save, on the CPU, without running code from the file. Raises RunError."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(f"there is no file {path}") from None
    except Exception as error:  # torch raises many kinds for a file that is cut, foreign or unsafe
        first = str(error).strip().splitlines()[0][:200]
        raise RunError(f"cannot read {path} as plain tensors: {first}") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} holds a {type(content).__name__}, not named tensors")
    return content
