"""Maps are computed once and kept: the store that training reads them from.

    image, upright and whole  -> resized to the source's input -> the source's map M
    M -> (M - min M) / (max M - min M)     constant or not finite: 0, flagged blank
      -> side x side, fitted to be read bilinearly (`fitted`) -> round(255 M) as uint8

Each image is decoded once, by worker processes, while the source runs on the device. What is done is written down every
few seconds: kill it at any time, run it again, and nothing is made twice that was written and nothing is lost.

B batch, h x w cells of the source's grid, side: cells of a stored map (30: a crop of a fifth of an image has 13 left).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveal import __version__
from foveal.data.config import ImageConfig
from foveal.data.errors import DataWarning, counted, listed
from foveal.data.images import Images
from foveal.maps import store_files as files
from foveal.maps.errors import MapStoreError, MapWarning
from foveal.maps.fitted import fitted
from foveal.maps.found import Found, Source
from foveal.maps.store_feed import Part, extras, feed
from foveal.maps.store_files import BLANK, DEGENERATE, INVERTED, KEY_BYTES, LARGE
from foveal.maps.store_key import NOTHING, Identity, Known, describe, find, fingerprint
from foveal.maps.store_read import MapStore

__all__ = ["MapStore", "MapStoreError", "describe", "fingerprint", "make_store", "quantised"]

SECONDS = 20.0  # of work that a kill can cost


def make_store(
    path: str | Path,
    images: Images,
    source: Source,
    settings: dict[str, Any],
    *,
    config: ImageConfig,
    side: int = 30,
    batch_size: int = 32,
    workers: int = 0,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world: int = 1,
    labels: bool = False,
    masks: Sequence[Path | None] | None = None,
    shard: int = LARGE,
    progress: Callable[[int, int], None] | None = None,
) -> MapStore:
    """The maps of `images` in the folder `path`; only those it lacks are made.

    settings: of the maps, plain values that name the source, its options and its model (`describe`); a store with
    others is refused.  config: how the source's model wants images; each is resized whole to config.size.
    rank, world: of several processes that fill one store, each makes the maps of a contiguous share of the images.
    labels: give the source the images' labels (sources that look for the label's class).
    masks: a file per image for the source `given`, None where there is none (that image gets no map); images held with
    masks give those.  shard: most maps in a file.  progress: called with (done, to do), first with 0 done.

    An image that cannot be read is left out, with a DataWarning that names it, and is in `unreadable` of the result.
    The result has what is there when this rank is done. The source's model must be on `device`.
    Raises MapStoreError for other settings, a folder that is something else, a disk that is full, and a second process
    of the same rank.
    """
    folder, device = Path(path), torch.device(device)
    _check(source, images, side, batch_size, workers, rank, world, masks, device)
    settings = json_settings(settings, config, side, labels=labels)
    extra = extras(images, labels=labels, masks=masks)
    mine = range(len(images) * rank // world, len(images) * (rank + 1) // world)
    with files.writing(folder, rank):
        files.begin(folder, settings)
        shards, damaged = files.read_shards(folder)
        if damaged:
            told = listed([file.name for file in damaged], 3)
            warnings.warn(f"damaged, to be made again: {told} in {folder}", MapWarning, stacklevel=2)
        writer = Writer(folder, rank, side, shard)
        files.remove_damaged(damaged, rank, world)
        at, moved = find(Known(shards, beside=extra is not None), images, mine, extra and [extra[i] for i in mine])
        todo = _once(images, [i for i, place in zip(mine, at.tolist(), strict=True) if place < 0], masks, extra)
        unreadable: list[tuple[int, str]] = []
        try:
            _repeat(writer, shards, at, moved)
            if progress is not None:
                progress(0, len(todo))
            done = 0
            for part in feed(images, todo, config, batch_size, workers, device, masks):
                unreadable += part.failed
                if part.index:
                    writer.add(
                        part.identities,
                        extra and [extra[i] for i in part.index],
                        *_maps(part, source, images, config, side, labels),
                    )
                done += len(part.index) + len(part.failed)
                if progress is not None:
                    progress(done, len(todo))
        except BaseException:
            with suppress(MapStoreError):  # the first error is the one to tell
                writer.flush()
            raise
        writer.flush()
        if writer.written:
            _tidy(folder, rank)
    if unreadable:
        told = listed([f"{images.names[i]} ({why})" for i, why in unreadable], 3)
        warnings.warn(f"{counted(len(unreadable), 'image')} left out: {told}", DataWarning, stacklevel=2)
    store = MapStore.open(folder, images, missing="weigh")
    store.unreadable = tuple((images.names[i], why) for i, why in unreadable)
    return store


def json_settings(settings: dict[str, Any], config: ImageConfig, side: int, *, labels: bool) -> dict[str, Any]:
    """All that the maps depend on, as it is written down; `made_by` is for people and may differ."""
    image = {name: value for name, value in asdict(config).items() if name not in ("crop_pct", "crop_mode")}
    return {**settings, "side": side, "image": image, "labels": labels, "made_by": f"foveal {__version__}"}


def quantised(map: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Maps as they are stored, (B, side, side) uint8, and which prefer no place, (B,) bool.

    map: (B, h, w) of any float type and range.
    """
    x = map.detach().double()  # of float32 the difference of extremes can overflow
    low, high = x.flatten(1).aminmax(dim=1)
    blank = ~(high > low) | ~x.isfinite().flatten(1).all(1)
    x = ((x - low[:, None, None]) / (high - low)[:, None, None]).masked_fill(blank[:, None, None], 0).float()
    return (fitted(x, side) * 255).round().to(torch.uint8), blank


def _maps(
    part: Part, source: Source, images: Images, config: ImageConfig, side: int, labels: bool
) -> tuple[Tensor, Tensor]:
    """Stored maps (B, side, side) and flags (B,) uint8 of what was read."""
    assert part.pixels is not None
    of = images.labels[part.index].to(part.pixels.device) if labels else None
    found = source(config.normalise(part.pixels), of, part.given)
    maps, blank = quantised(found.map, side)
    blank = blank | found.blank
    maps = maps.masked_fill(blank[:, None, None], 0)
    flags = BLANK * blank.to(torch.uint8)
    for bit, name in ((DEGENERATE, "degenerate"), (INVERTED, "inverted")):
        flags = flags | bit * _first(found, name, blank).to(torch.uint8)
    return maps.cpu(), flags.cpu()


def _first(found: Found, name: str, like: Tensor) -> Tensor:
    """A claim of the source about each image, of its first object where it has several: (B,) bool."""
    claim = getattr(found, name, None)
    if not isinstance(claim, Tensor):
        return torch.zeros_like(like)
    return claim if claim.dim() == 1 else claim[:, 0]


class Writer:
    """Gathers records and writes them when there are many, or when SECONDS have passed."""

    def __init__(self, folder: Path, rank: int, side: int, shard: int) -> None:
        self.folder, self.rank, self.side, self.most = folder, rank, side, shard
        self.number = files.next_number(folder)
        self.rows: list[tuple[Identity, bytes, int, np.ndarray[Any, Any]]] = []
        self.since = time.monotonic()
        self.written = 0

    def add(self, identities: Sequence[Identity], beside: Sequence[bytes] | None, maps: Tensor, flags: Tensor) -> None:
        """Maps (B, side, side) and flags (B,), uint8, of B images."""
        extra = [NOTHING] * len(identities) if beside is None else beside
        self.rows += zip(identities, extra, flags.tolist(), maps.numpy(), strict=True)
        while len(self.rows) >= self.most:
            self._write(self.most)
        if time.monotonic() - self.since > SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was gathered."""
        if self.rows:
            self._write(len(self.rows))

    def _write(self, number: int) -> None:
        rows = self.rows[:number]
        records = np.zeros(number, files.record(max(len(row[0].where) for row in rows), self.side))
        for record, (identity, extra, flags, map) in zip(records, rows, strict=True):
            record["where"], record["size"], record["time"] = identity.where, identity.size, identity.time
            record["key"] = np.frombuffer(identity.key, np.uint8, KEY_BYTES)
            record["beside"] = np.frombuffer(extra, np.uint8, KEY_BYTES)
            record["flags"], record["map"] = flags, map
        files.write_shard(self.folder, self.rank, self.number, records)
        self.rows, self.number, self.since = self.rows[number:], self.number + 1, time.monotonic()
        self.written += 1


def _repeat(writer: Writer, shards: Sequence[files.Shard], at: Any, moved: dict[int, Identity]) -> None:
    """Note files that were found by their content under their new path or time: next time no byte of them is read."""
    if moved:
        joined = {n: _record(shards, int(at[n])) for n in moved}
        for n, identity in moved.items():
            row = joined[n]
            maps, flags = (
                torch.from_numpy(row["map"][None].copy()),
                torch.tensor([int(row["flags"])], dtype=torch.uint8),
            )
            writer.add([identity], [row["beside"].tobytes()], maps, flags)


def _record(shards: Sequence[files.Shard], at: int) -> Any:
    for shard in shards:
        if at < len(shard.records):
            return shard.records[at]
        at -= len(shard.records)
    raise IndexError(at)


def _tidy(folder: Path, rank: int) -> None:
    """Join the small shards of this rank."""
    shards, _ = files.read_shards(folder)
    live = Known(shards, beside=False).live()
    ends = np.cumsum([len(shard.records) for shard in shards])[:-1]
    files.join(folder, rank, shards, np.split(live, ends))


def _once(
    images: Images, index: list[int], masks: Sequence[Path | None] | None, extra: Sequence[bytes] | None
) -> list[int]:
    """Without images that have no mask file, and without repetitions of the same pixels."""
    if masks is not None:
        index = [i for i in index if masks[i] is not None]
    if images.pixels is None:
        return index
    from foveal.maps.store_key import of_pixels

    seen = {of_pixels(images.pixels[i]).key + (extra[i] if extra else b""): i for i in reversed(index)}
    return sorted(seen.values())


def _check(
    source: Source,
    images: Images,
    side: int,
    batch_size: int,
    workers: int,
    rank: int,
    world: int,
    masks: Sequence[Path | None] | None,
    device: torch.device,
) -> None:
    if side < 1 or batch_size < 1 or workers < 0 or not 0 <= rank < world:
        raise ValueError(
            f"side={side}, batch_size={batch_size}, workers={workers}, rank={rank} of {world}: sizes must be at least"
            " 1, workers at least 0, rank in [0, world)"
        )
    if masks is not None and len(masks) != len(images):
        raise ValueError(f"{len(masks)} masks for {len(images)} images: give one for each, None where there is none")
    weight = None if source.model is None else next(source.model.parameters(), None)
    if weight is not None and weight.device.type != device.type:
        raise ValueError(f"the source's model is on {weight.device}, the images will be on {device}: move one of them")
