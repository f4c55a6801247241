"""A store of maps, opened: the map of each image, cut and mirrored as the image was.

    crop (left, top, right, bottom) as shares of the image, map G x G  ->  box G (left, top, right, bottom)
    value of cell (r, c) of an h x w grid = mean of 4 x 4 bilinear samples in its part of the box        RoIAlign
    then mirrored where the image was

On smooth maps this is within 1e-3, in the mean, of cutting out the map as a picture, resizing it to the model's input
and averaging over patches (tests/test_map_store.py), without the picture. Maps are normalised before they are cut, so
a crop of background stays background.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import roi_align

from foveal.data.errors import counted, listed
from foveal.data.images import Images
from foveal.maps.errors import MapStoreError, MapWarning
from foveal.maps.store_files import BLANK, DEGENERATE, INVERTED, Shard, check_settings, read_settings, read_shards
from foveal.maps.store_key import Known, find

SAMPLES = 4  # along each side of a cell


class MapStore:
    """Maps of a set of images, memory-mapped. Made by `open`, or by `foveal.maps.make_store`.

    settings: what the maps were made with.  side: of a map, in cells.  names: of the images.
    found, blank, degenerate, inverted: (N,) bool: there is a map; it prefers no place; its source found no object, or
    probably the surroundings of one.
    missed: how many missing maps `sample` was asked for so far.  unreadable: images left out when the store was made.
    """

    def __init__(
        self, folder: Path, settings: dict[str, Any], shards: list[Shard], at: NDArray[np.int64], names: tuple[str, ...]
    ) -> None:
        """at: (N,) positions in the shards laid end to end, -1 for an image without map."""
        self.folder, self.settings, self.names = folder, settings, names
        self.side = int(settings["side"])
        self.missed = 0
        self.unreadable: tuple[tuple[str, str], ...] = ()
        self._maps = [shard.records["map"] for shard in shards]
        ends = np.cumsum([0, *(len(maps) for maps in self._maps)])
        self._shard = np.searchsorted(ends, at, side="right") - 1  # -1 where there is none
        self._row = at - ends[self._shard.clip(0)]
        self.found = torch.from_numpy(at >= 0)
        flags = np.zeros(len(at), np.uint8)
        for s, shard in enumerate(shards):
            here = self._shard == s
            flags[here] = shard.records["flags"][self._row[here]]
        self.blank, self.degenerate, self.inverted = (
            torch.from_numpy((flags & bit) > 0) for bit in (BLANK, DEGENERATE, INVERTED)
        )

    @classmethod
    def open(
        cls,
        path: str | Path,
        images: Images | None = None,
        *,
        settings: dict[str, Any] | None = None,
        missing: Literal["refuse", "weigh"] = "refuse",
    ) -> MapStore:
        """The store in a folder, for `images`: map i is that of images.image(i). Without images: all its maps.

        settings: those that the maps must have been made with; others may be left out.
        missing: `refuse` images without a map, or give them none (`sample` says which, and warns once).
        Raises MapStoreError where there is no store, for other settings and for images it does not know.
        """
        if missing not in ("refuse", "weigh"):
            raise ValueError(f"missing={missing!r} is not known; use refuse or weigh")
        folder = Path(path)
        there = read_settings(folder)
        check_settings(folder, settings or {})
        shards, damaged = read_shards(folder)
        if damaged:
            names = listed([file.name for file in damaged], 3)
            warnings.warn(
                f"{counted(len(damaged), 'file')} of {folder} cannot be read as written ({names}): make the maps again,"
                " what is whole is kept",
                MapWarning,
                stacklevel=2,
            )
        known = Known(shards, beside=False)
        if images is None:
            at = np.flatnonzero(known.live())
            return cls(folder, there, shards, at, _names(shards, at))
        at, _ = find(known, images, range(len(images)))
        unknown = [images.names[i] for i in np.flatnonzero(at < 0)]
        if unknown and missing == "refuse":
            raise MapStoreError(
                f"{folder} has no map of {len(unknown):,} of {counted(len(images), 'image')} ({listed(unknown, 3)}): it"
                " was made for other images, or they have changed. foveal maps into the same folder adds what it lacks"
            )
        return cls(folder, there, shards, at, images.names)

    def __len__(self) -> int:
        """Number of images, with a map or without."""
        return len(self.found)

    def map(self, i: int) -> Tensor:
        """The whole map of image i: (side, side) float32 in [0, 1], zero where there is none."""
        return self._bytes(np.array([range(len(self))[i]]))[0].float() / 255

    def sample(
        self,
        index: Tensor,
        boxes: Tensor | None,
        flip: Tensor | None,
        grid: tuple[int, int],
        device: torch.device | str = "cpu",
    ) -> tuple[Tensor, Tensor]:
        """The maps of a batch in its crops: (B, *grid) float32 in [0, 1], and which are missing, (B,) bool.

        index: (B,) int64 positions of the images, on the CPU.  boxes: (B, 4) float: left, top, right, bottom of each
        crop as shares of the whole image; None for whole images.  flip: (B,) bool, which were mirrored after the crop.
        A missing map is zero: all places count alike.  Both results are on `device`, which is not waited for.
        """
        device, at = torch.device(device), index.cpu().numpy()
        B = len(at)
        missing = ~self.found[torch.from_numpy(at)]
        self._count(missing)
        share = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(B, 4) if boxes is None else boxes.float()
        if share.shape != (B, 4):
            raise ValueError(f"boxes of shape {tuple(share.shape)} for {B} images: left, top, right, bottom, (B, 4)")
        rois = torch.cat([torch.arange(B, device=share.device)[:, None], share * self.side], 1)
        maps = _send(self._bytes(at), device)[:, None].float() / 255
        cells: Tensor = roi_align(maps, _send(rois, device), grid, sampling_ratio=SAMPLES, aligned=True)[:, 0]
        if flip is not None:
            cells = torch.where(_send(flip.bool(), device)[:, None, None], cells.flip(-1), cells)
        return cells, _send(missing, device)

    def _bytes(self, at: NDArray[np.int64]) -> Tensor:
        """The maps as stored, (B, side, side) uint8, zero where there is none."""
        out = np.zeros((len(at), self.side, self.side), np.uint8)
        which, rows = self._shard[at], self._row[at]
        for s in np.unique(which[which >= 0]):
            here = which == s
            out[here] = self._maps[s][rows[here]]
        return torch.from_numpy(out)

    def _count(self, missing: Tensor) -> None:
        number = int(missing.sum())  # on the CPU: nothing is waited for
        if number and not self.missed:
            warnings.warn(
                f"{counted(int((~self.found).sum()), 'image')} of {len(self):,} have no map in {self.folder}: all their"
                " places count alike",
                MapWarning,
                stacklevel=3,
            )
        self.missed += number


def _names(shards: list[Shard], at: NDArray[np.int64]) -> tuple[str, ...]:
    """Paths of the stored images, the first digits of their digest for those that were no files."""
    import os

    told = [
        os.fsdecode(path) or key.tobytes().hex()[:12]
        for shard in shards
        for path, key in zip(shard.records["where"].tolist(), shard.records["key"], strict=True)
    ]
    return tuple(told[i] for i in at)


def _send(x: Tensor, device: torch.device) -> Tensor:
    if x.device == device or device.type != "cuda":
        return x.to(device)
    return (x.pin_memory() if x.device.type == "cpu" else x).to(device, non_blocking=True)  # else the copy would wait
