"""Tables that grow by rows during training (CSV), and are cut back to the checkpoint on resume."""

import csv
import io
import os
from pathlib import Path

from foveal.train.errors import RunError
from foveal.train.files import cannot_write, write_text

Row = dict[str, float | int | None]  # None where there is nothing to tell


class Table:
    """A CSV file with fixed columns, the first of which is `epoch`."""

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self.path, self.columns = path, columns

    def begin(self, epochs: int) -> None:
        """Keep the rows of the first `epochs` epochs, which a checkpoint covers; drop later and torn ones.

        Epochs count from 1. Raises RunError.
        """
        kept = [row for row in read_table(self.path, torn=True) if 1 <= (row["epoch"] or 0) <= epochs]
        write_text(self.path, ",".join(self.columns) + "\n" + self._lines(kept))

    def append(self, rows: list[Row]) -> None:
        """Add rows and flush them to the disk. Raises RunError."""
        try:
            with open(self.path, "a", encoding="utf-8", newline="") as file:
                file.write(self._lines(rows))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def _lines(self, rows: list[Row]) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([_written(row.get(column)) for column in self.columns] for row in rows)
        return text.getvalue()


def read_table(path: Path, torn: bool = False) -> list[Row]:
    """The rows of a CSV file of numbers. torn: leave out lines that a killed process cut off.

    Raises RunError where the file is missing (with torn: no rows) or is not such a table.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError as error:
        if torn:
            return []
        raise RunError(f"cannot read {path}: {error.strerror or error}") from None
    rows: list[Row] = []
    header: list[str] = []
    for line in lines:
        cells = line.rstrip("\n").split(",")
        if not header:
            header = cells
            continue
        try:
            if len(cells) != len(header) or not line.endswith("\n"):
                raise ValueError(line)
            rows.append({name: _read(cell) for name, cell in zip(header, cells, strict=True)})
        except ValueError:
            if not torn:
                raise RunError(f"{path} has a line that is not a row of its table: {line!r}") from None
    return rows


def _written(value: float | int | None) -> str:
    return "" if value is None else repr(value)  # repr: reads back as the very same number


def _read(cell: str) -> float | int | None:
    if not cell:
        return None
    return int(cell) if cell.lstrip("-").isdigit() else float(cell)
