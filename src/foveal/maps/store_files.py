"""The files of a map store: shards that are whole or not there, and say themselves whether they are damaged.

    store.json                            the settings that all maps were made with
    maps-<rank>-<number>-<digest>.npy     records (see `record`), memory-mapped; digest: of the file's bytes
    rank-<rank>.lock                      held by the process that writes as this rank

A shard is written under another name, flushed to the disk and renamed. Its name holds the digest of its content, so a
file that was cut or changed is noticed. Later numbers come before earlier ones: a map made anew replaces the old one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foveal.maps.errors import MapStoreError
from foveal.whole import whole_file

BLANK, DEGENERATE, INVERTED = 1, 2, 4  # bits of a record's `flags`
KEY_BYTES = 16
LARGE = 32768  # records of a large shard; smaller ones of a run are joined at its end
MAPPED = 256  # files that are memory-mapped; more there are only while a long job is not done, and those are read
Records = NDArray[np.void]


@dataclass(frozen=True)
class Shard:
    """One file of records."""

    path: Path
    rank: int
    number: int
    records: Records  # memory-mapped and read-only, but for a few


def record(where: int, side: int) -> np.dtype[np.void]:
    """The type of a record. where: bytes of the longest path."""
    return np.dtype(
        [
            ("where", f"S{max(where, 1)}"),  # absolute path of the image; empty for images that are no files
            ("size", "<i8"),  # bytes of that file
            ("time", "<i8"),  # of its last change, ns
            ("key", "u1", KEY_BYTES),  # digest of its content
            ("beside", "u1", KEY_BYTES),  # digest of what else the map was made of: label, mask; zero without
            ("flags", "u1"),
            ("map", "u1", (side, side)),
        ]
    )


def begin(folder: Path, settings: dict[str, Any]) -> None:
    """Make the store of these settings, or check that it has them. Raises MapStoreError, naming the differences."""
    if (folder / "store.json").is_file():
        check_settings(folder, settings, exactly=True)
        return
    theirs = ("rank-", "store.json.partial-", ".")  # of ranks that begin beside this one; hidden files
    others = [path.name for path in folder.iterdir() if not path.name.startswith(theirs)]
    if others:
        raise MapStoreError(f"{folder} is not empty and no map store (it has {others[0]}): choose another folder")
    text = json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    write_whole(folder / "store.json", text.encode())


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of the store in a folder. Raises MapStoreError where there is none."""
    try:
        settings = json.loads((folder / "store.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MapStoreError(f"{folder} holds no map store: make one with foveal maps") from None
    except (OSError, ValueError) as error:
        raise MapStoreError(f"cannot read {folder / 'store.json'}: {error}") from None
    return dict(settings)


def check_settings(folder: Path, wanted: dict[str, Any], *, exactly: bool = False) -> None:
    """Raise MapStoreError, naming each difference, unless the store has these settings.

    exactly: and no others; what is only noted (`made_by`) may differ.
    """
    there, wanted = read_settings(folder), json.loads(json.dumps(wanted))
    names = [name for name in (dict.fromkeys([*wanted, *there]) if exactly else wanted) if name != "made_by"]
    absent = object()
    differ = [name for name in names if there.get(name, absent) != wanted.get(name, absent)]
    if differ:
        told = "; ".join(f"{n} was {_shown(there, n)}, now {_shown(wanted, n)}" for n in differ)
        raise MapStoreError(
            f"{folder} holds maps made with other settings: {told}. Choose another folder for these maps"
        )


def _shown(settings: dict[str, Any], name: str) -> str:
    return json.dumps(settings[name], ensure_ascii=False) if name in settings else "not given"


def read_shards(folder: Path) -> tuple[list[Shard], list[Path]]:
    """The whole shards, by number, and the paths of damaged ones. Reads every byte once, to check it."""
    for last in (False, False, True):  # another process may join small shards while we look
        try:
            return _read_shards(folder)
        except FileNotFoundError:
            if last:
                raise
    raise AssertionError


def _read_shards(folder: Path) -> tuple[list[Shard], list[Path]]:
    whole: list[Shard] = []
    damaged: list[Path] = []
    for path in folder.glob("maps-*.npy"):
        data = path.read_bytes()
        parts = path.stem.split("-")
        if len(parts) != 4 or _digest(data) != parts[3]:
            damaged.append(path)
            continue
        # each mapping holds a file open, of which a process may have about a thousand
        records = np.load(path, mmap_mode="r") if len(whole) < MAPPED else np.load(BytesIO(data))
        whole.append(Shard(path, int(parts[1]), int(parts[2]), records))
    return sorted(whole, key=lambda shard: (shard.number, shard.rank)), sorted(damaged)


def write_shard(folder: Path, rank: int, number: int, records: Records) -> Path:
    """Put records into a shard of their own. Raises MapStoreError where the disk does not take it."""
    buffer = BytesIO()
    np.save(buffer, records, allow_pickle=False)
    data = buffer.getvalue()
    path = folder / f"maps-{rank:04d}-{number:06d}-{_digest(data)}.npy"
    write_whole(path, data)
    return path


def next_number(folder: Path) -> int:
    """A number above those of all shards, whole or not."""
    numbers = [path.stem.split("-")[2] for path in folder.glob("maps-*-*-*.npy")]
    return 1 + max((int(number) for number in numbers if number.isdecimal()), default=0)


def join(folder: Path, rank: int, shards: Sequence[Shard], live: Sequence[NDArray[np.bool_]]) -> None:
    """Replace the rank's small shards by large ones, without the records that are not `live`.

    Stopped in between, records are there twice, which readers do not mind.
    """
    small = [(s, keep) for s, keep in zip(shards, live, strict=True) if s.rank == rank and len(s.records) < LARGE // 2]
    if len(small) < 2:
        return
    width = max(s.records.dtype["where"].itemsize for s, _ in small)
    dtype = record(width, small[0][0].records.dtype["map"].shape[0])
    records = np.concatenate([s.records[keep].astype(dtype) for s, keep in small])
    number = max(s.number for s, _ in small)  # its records stay older than what came after them
    written = {write_shard(folder, rank, number, records[i : i + LARGE]) for i in range(0, len(records), LARGE)}
    for shard, _ in small:
        if shard.path not in written:
            with suppress(PermissionError):  # Windows keeps a file that is mapped
                shard.path.unlink(missing_ok=True)


def remove_damaged(damaged: Sequence[Path], rank: int, world: int) -> None:
    """Remove the damaged shards that this rank answers for."""
    for path in damaged:
        word = path.stem.split("-")[1]
        if word.isdecimal() and int(word) % world == rank:
            path.unlink(missing_ok=True)


@contextmanager
def writing(folder: Path, rank: int) -> Iterator[None]:
    """Be the only process that writes as this rank; the lock goes with the process, however it ends.

    What a killed one left half-written is removed. Raises MapStoreError where the folder cannot be written or another
    process is at work.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / f"rank-{rank:04d}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    try:
        _lock(handle, folder)
        for leftover in folder.glob(f"maps-{rank:04d}-*.partial*"):
            leftover.unlink(missing_ok=True)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: no such locks
        return
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: processes that decode would keep it
    except (BlockingIOError, PermissionError):
        raise MapStoreError(f"another process is writing maps to {folder}") from None
    except OSError:
        pass  # a file system without locks


def write_whole(path: Path, data: bytes) -> None:
    """A file that is whole or not there, whatever kills the process or the machine. Raises MapStoreError."""
    try:
        with whole_file(path) as file:
            file.write(data)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> MapStoreError:
    return MapStoreError(
        f"cannot write {path}: {error.strerror or error}; free space or choose another folder, then run it again:"
        " maps written before are kept"
    )


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=8).hexdigest()
