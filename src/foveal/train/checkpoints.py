"""Lightning's checkpoints as whole files (foveal.train.files), so that a kill never leaves half of one."""

from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO

from foveal.train.files import read_tensors, whole_file


class WholeCheckpoints(CheckpointIO):  # type: ignore[misc]  # Lightning is not typed for mypy here
    """Lightning's checkpoints as whole files of plain tensors and numbers, read without unpickling code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the checkpoint at `path`. Raises RunError where the disk or folder does not take it."""
        with whole_file(path) as file:
            target: Any = _Remembering(file)
            try:
                torch.save(checkpoint, target)
            except RuntimeError:
                if target.error is not None:  # torch reports a full disk as a fault of its archive writer
                    raise target.error from None
                raise

    def load_checkpoint(
        self,
        path: Any,
        map_location: Any = "cpu",
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read the checkpoint at `path`. Raises RunError where it cannot be read."""
        return read_tensors(path)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove the checkpoint at `path`, if it is there."""
        Path(path).unlink(missing_ok=True)


class _Remembering:
    """A file that remembers the error its write raised."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None
        self.flush: Callable[[], None] = file.flush

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise
