"""Which image a stored map belongs to, and which model made it.

    a file      its absolute path, size and time of last change; where these differ, the digest of its bytes
    pixels      the digest of their shape and bytes

A file that was moved or touched keeps its map; one whose bytes changed does not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from foveal.data.decode import Packed
from foveal.data.images import Images
from foveal.maps.store_files import KEY_BYTES, Shard

NOTHING = bytes(KEY_BYTES)


@dataclass(frozen=True)
class Identity:
    """What tells an image from others. where, size, time: of a file; empty and 0 for what is none."""

    key: bytes
    where: bytes = b""
    size: int = 0
    time: int = 0


def digest(*parts: bytes) -> bytes:
    """16 bytes that other content does not have."""
    state = blake2b(digest_size=KEY_BYTES)
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.digest()


def of_pixels(pixels: Tensor) -> Identity:
    """Of an image (3, H, W) uint8."""
    array = np.ascontiguousarray(pixels.cpu().numpy())
    return Identity(digest(str(array.shape).encode(), array.tobytes()))


def read_file(file: Path | Packed) -> tuple[Identity, bytes]:
    """Identity and bytes of an image file, read once. Raises OSError."""
    if isinstance(file, Packed):
        return Identity(digest(file.data)), file.data
    with open(file, "rb") as opened:
        told = os.fstat(opened.fileno())
        data = opened.read()
    return Identity(digest(data), where(file), told.st_size, told.st_mtime_ns), data


def where(file: Path) -> bytes:
    """The absolute path of a file, as bytes."""
    return os.fsencode(os.path.abspath(file))


def fingerprint(model: nn.Module) -> str:
    """Digest of a model's weights and buffers by name, 32 hexadecimal digits; the same on any device."""
    state = blake2b(digest_size=KEY_BYTES)
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue
        values = tensor.detach().cpu().contiguous()
        state.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        if values.numel():
            state.update(values.flatten().view(dtype=torch.uint8).numpy().tobytes())
    return state.hexdigest()


def describe(name: str, options: dict[str, Any], model: nn.Module | None, model_name: str | None) -> dict[str, Any]:
    """Settings of maps for `make_store`: the source's name and options, the model's name and weights."""
    return {
        "map": name,
        "options": json.loads(json.dumps(options, default=str)),
        "model": model_name if model is not None else None,
        "weights": None if model is None else fingerprint(model),
    }


class Known:
    """The maps of a store, by image: positions in its shards laid end to end; the latest of several."""

    def __init__(self, shards: Sequence[Shard], *, beside: bool) -> None:
        """beside: maps of the same image but made of another label or mask are of another image."""
        self.by_where: dict[bytes, tuple[int, int, int, bytes]] = {}
        self.by_key: dict[bytes, int] = {}
        self.beside = beside
        self.sizes: set[int] = set()
        self._pathless: set[int] = set()
        start = 0
        for shard in shards:
            records = shard.records
            keys, extras = (np.ascontiguousarray(records[name]).tobytes() for name in ("key", "beside"))
            sizes, times = records["size"].tolist(), records["time"].tolist()
            self.sizes.update(sizes)
            for i, path in enumerate(records["where"].tolist()):
                at = slice(KEY_BYTES * i, KEY_BYTES * (i + 1))
                if path:
                    self.by_where[path] = (start + i, sizes[i], times[i], extras[at])
                else:
                    self._pathless.add(start + i)
                self.by_key[keys[at] + (extras[at] if beside else b"")] = start + i
            start += len(records)
        self.total = start

    def at_path(self, file: Path, extra: bytes) -> int:
        """Position of the map of a file that is as it was, -1 without; no byte of the file is read."""
        held = self.by_where.get(where(file))
        if held is None or (self.beside and held[3] != extra):
            return -1
        try:
            told = os.stat(file)
        except OSError:
            return -1
        return held[0] if (told.st_size, told.st_mtime_ns) == held[1:3] else -1

    def at_key(self, key: bytes, extra: bytes) -> int:
        """Position of the map of this content, -1 without."""
        return self.by_key.get(key + (extra if self.beside else b""), -1)

    def live(self) -> NDArray[np.bool_]:
        """Which positions are the latest of their path, or of their content where there is no path: (total,) bool."""
        live = np.zeros(self.total, bool)
        live[[held[0] for held in self.by_where.values()]] = True
        live[[at for at in self.by_key.values() if at in self._pathless]] = True
        return live


def find(
    known: Known, images: Images, index: Sequence[int], beside: Sequence[bytes] | None = None
) -> tuple[NDArray[np.int64], dict[int, Identity]]:
    """Where the maps of the images at `index` are, (n,) position or -1; and files found by content, not by path."""
    extras = [NOTHING] * len(index) if beside is None else list(beside)
    if images.pixels is not None or not images.files:
        pixels = images.pixels
        assert pixels is not None or not index
        places = [known.at_key(of_pixels(pixels[i]).key, e) for i, e in zip(index, extras, strict=True)]  # type: ignore[index]
        return np.array(places, np.int64), {}
    files = images.files
    with ThreadPoolExecutor(8) as pool:  # waiting for the disk, mostly
        pairs = [(files[i], extra) for i, extra in zip(index, extras, strict=True)]
        places = list(pool.map(lambda pair: _at(known, *pair), pairs))
        doubtful = [n for n, place in enumerate(places) if place < 0 and _size(files[index[n]]) in known.sizes]
        read: Iterable[Identity | None] = pool.map(_identity, [files[index[n]] for n in doubtful])
        moved = {}
        for n, identity in zip(doubtful, read, strict=True):
            if identity is not None:
                places[n] = known.at_key(identity.key, extras[n])
                if places[n] >= 0:
                    moved[n] = identity
    return np.array(places, np.int64), moved


def _at(known: Known, file: Path | Packed, extra: bytes) -> int:
    if isinstance(file, Packed):
        return known.at_key(digest(file.data), extra)
    return known.at_path(file, extra)


def _size(file: Path | Packed) -> int:
    if isinstance(file, Packed):
        return -1  # was looked for by content already
    try:
        return os.stat(file).st_size
    except OSError:
        return -1


def _identity(file: Path | Packed) -> Identity | None:
    try:
        return read_file(file)[0]
    except OSError:
        return None
