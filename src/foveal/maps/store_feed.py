"""Images for a source of maps: whole, upright, at the size of its input, with what tells them from others.

Files are read once, by worker processes: their bytes are digested and decoded from memory. A file that cannot be read
is told, and the others go on.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from foveal.data.config import ImageConfig
from foveal.data.decode import Packed, decode
from foveal.data.errors import DataError
from foveal.data.framing import FileFrame, resize
from foveal.data.images import Images
from foveal.maps.store_key import Identity, digest, of_pixels, read_file, where


@dataclass(frozen=True)
class Part:
    """Some images. Those that could be read have places in all but `failed`."""

    index: list[int]
    identities: list[Identity]
    pixels: Tensor | None  # (B, 3, h, w) in [0, 255]; None where none could be read
    given: Tensor | None  # (B, H', W') masks, float, zero or more; None without
    failed: list[tuple[int, str]]  # position and reason


def feed(
    images: Images,
    index: Sequence[int],
    config: ImageConfig,
    batch_size: int,
    workers: int,
    device: torch.device,
    masks: Sequence[Path | None] | None = None,
) -> Iterator[Part]:
    """The images at `index`, in order, resized whole to config.size, on the device."""
    turns = [list(index[i : i + batch_size]) for i in range(0, len(index), batch_size)]
    if not turns:
        return
    if images.pixels is not None and masks is None:
        for turn in turns:
            yield _of_pixels(images, turn, config, device)
        return
    loader: DataLoader[Part] = DataLoader(
        _Read(images, config, masks),
        batch_sampler=turns,
        num_workers=workers,
        collate_fn=_only,
        generator=torch.Generator(),  # else the loader draws its workers' seeds from the global one
        worker_init_fn=_ignore_interrupt,
    )
    for part in loader:
        if part.pixels is None:
            yield part
        else:
            given = None if part.given is None else part.given.to(device).float()
            yield replace(part, pixels=part.pixels.to(device), given=given)


def extras(images: Images, *, labels: bool, masks: Sequence[Path | None] | None) -> list[bytes] | None:
    """Digest of what each map is made of besides the image: its class, its mask. None where that is nothing."""
    parts: list[list[bytes]] = [[] for _ in range(len(images))]
    if labels:
        for part, label in zip(parts, images.labels.tolist(), strict=True):
            part.append(images.classes[label].encode())
    if masks is not None:
        for part, mask in zip(parts, masks, strict=True):
            part.append(_stamp(mask))
    elif images.masks is not None:
        for part, held in zip(parts, np.packbits(images.masks.cpu().numpy(), axis=-1), strict=True):
            part.append(held.tobytes())
    return [digest(*part) for part in parts] if any(parts) else None


def _stamp(mask: Path | None) -> bytes:
    if mask is None:
        return b""
    try:
        told = os.stat(mask)
    except OSError:
        return where(mask)
    return where(mask) + f"\n{told.st_size}\n{told.st_mtime_ns}".encode()


def _of_pixels(images: Images, turn: list[int], config: ImageConfig, device: torch.device) -> Part:
    assert images.pixels is not None
    held = images.pixels[turn]
    return Part(
        index=turn,
        identities=[of_pixels(one) for one in held],
        pixels=resize(held.to(device), config.size, config.interpolation),
        given=None if images.masks is None else images.masks[turn].to(device).float(),
        failed=[],
    )


class _Read(Dataset[Part]):
    """Reads, digests and frames a batch of files (or of pixels that have mask files)."""

    def __init__(self, images: Images, config: ImageConfig, masks: Sequence[Path | None] | None) -> None:
        self.images, self.masks, self.config = images, masks, config
        self.frame = FileFrame(replace(config, crop_pct=1.0, crop_mode="squash"), None)

    def __getitems__(self, index: list[int]) -> list[Part]:
        rows: list[tuple[int, Identity, Tensor, Tensor | None]] = []
        failed: list[tuple[int, str]] = []
        for i in index:
            try:
                rows.append((i, *self._read(i), self._mask(i)))
            except (DataError, OSError) as error:
                failed.append((i, _reason(error)))
        if not rows:
            return [Part([], [], None, None, failed)]
        positions, identities, pixels, given = (list(column) for column in zip(*rows, strict=True))
        masks = None if self.masks is None else torch.stack(given)
        return [Part(positions, identities, torch.stack(pixels), masks, failed)]

    def _read(self, i: int) -> tuple[Identity, Tensor]:
        if self.images.files is None:
            assert self.images.pixels is not None
            held = self.images.pixels[i]
            framed = resize(held[None], self.config.size, self.config.interpolation)
            return of_pixels(held), framed.round()[0].to(torch.uint8)
        identity, data = read_file(self.images.files[i])
        return identity, self.frame(decode(Packed(self.images.names[i], data)), 0, i)[0]

    def _mask(self, i: int) -> Tensor | None:
        if self.masks is None:
            return None
        mask = self.masks[i]
        assert mask is not None  # images without one are not asked for
        h, w = self.config.size
        grey = decode(mask).convert("L").resize((w, h), Image.Resampling.BOX)
        return torch.from_numpy(np.array(grey))


def _reason(error: Exception) -> str:
    text = str(getattr(error, "strerror", None) or error)
    return text.partition(": ")[2] if text.startswith("cannot read image") and ": " in text else text


def _only(parts: list[Part]) -> Part:
    return parts[0]


def _ignore_interrupt(_: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that writes, which ends its workers
