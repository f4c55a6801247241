"""Objects drawn over their image: each in a colour of its own, with its box.

    pixel = 0.4 image + 0.6 colour_k  on object k,  quiet elsewhere;   boxes are frames of the same colour

The colours are told apart by colour-blind readers too (Okabe & Ito, 2008).

K objects, H, W image size, h, w grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from foveal.data.images import Images
from foveal.explain.files import SIDE, Trained, numbered
from foveal.explain.grid import captioned
from foveal.explain.overlay import Pixels, overlay, resize
from foveal.explain.save import save_png
from foveal.explain.whole import whole_frames
from foveal.maps import Discovered, Found, Objects, make
from foveal.maps.discover import boxes_of

COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167))
NAMES = ("orange", "light blue", "green", "yellow", "red", "pink")
METHODS = ("tokencut", "maskcut", "lost", "dino")


def objects(image: Tensor | Pixels, masks: Tensor, *, side: int | None = None) -> Pixels:
    """The image with its objects.

    image: (3, H, W) uint8.  masks: (K, h, w) bool, spanning the image, of any grid; empty ones draw nothing. More
    objects than colours start again with the first.  side: length of the shorter side of the result.
    Returns (H', W', 3) uint8. Raises ValueError for masks of another shape.
    """
    if masks.dim() != 3:
        raise ValueError(f"masks of shape {tuple(masks.shape)}: one (h, w) mask per object, (K, h, w), is needed")
    base = resize(image, side).astype(np.float32)
    H, W = base.shape[:2]
    grey = (base @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
    out = 20 + 0.85 * (0.4 * base + 0.6 * grey)
    masks = masks.cpu()
    rows, columns = _cells(H, masks.shape[1]), _cells(W, masks.shape[2])
    on = [mask[rows][:, columns].numpy() for mask in masks]
    for k, here in enumerate(on):
        colour = np.array(COLOURS[k % len(COLOURS)], np.float32)
        out = np.where(here[..., None], 0.4 * base + 0.6 * colour, out)
    thick = max(1, round(min(H, W) / 120))
    for k, (mask, box) in enumerate(zip(masks, boxes_of(masks).tolist(), strict=True)):
        if mask.any():
            _frame(out, box, masks.shape[1:], thick, COLOURS[k % len(COLOURS)])
    return np.asarray(out.round().clip(0, 255).astype(np.uint8))


def masks_of(found: Found, i: int) -> Tensor | None:
    """The objects of image i, (K, h, w) bool, refined where they were; None of a source that finds none."""
    if isinstance(found, Objects):
        return found.masks[i]
    if isinstance(found, Discovered):
        return (found.mask if found.refined is None else found.refined)[i : i + 1]
    return None


def told(found: Found, i: int) -> str:
    """What was found in image i, in words."""
    masks = masks_of(found, i)
    if masks is None or not bool(masks.any()):
        return "no object: the image's features prefer no place"
    shares = [(k, float(mask.float().mean())) for k, mask in enumerate(masks) if bool(mask.any())]
    if len(masks) == 1:
        words = f"one object, {100 * shares[0][1]:.0f} % of the image"
    else:
        parts = [f"{NAMES[k % len(NAMES)]} {100 * share:.0f} %" for k, share in shares]
        words = f"{len(shares)} object{'s' if len(shares) > 1 else ''}: {', '.join(parts)} of the image"
    inverted = found.inverted[i] if isinstance(found, Discovered) else None
    if inverted is not None and bool(inverted):
        words += "; it has three of the corners, so it is probably what surrounds the object"
    return words


def discover(
    run: Trained, paths: Sequence[str | Path], out: str | Path, method: str = "tokencut", **options: Any
) -> list[Path]:
    """One picture per image in `out`, NAME-discover.png: the image, the map, and the objects with their boxes.

    method: `tokencut`, `maskcut`, `lost` or `dino`, in the features of the run's model; options: the source's own.
    The whole image is looked at, resized to the model's input, as an object that is cut off is often taken for
    background. Returns the files in order. Raises DataError for an image that cannot be read, before anything is
    written, ValueError for a method that is not known, and `foveal.maps.MapModelError` for a model that cannot be read.
    """
    if method not in METHODS:
        raise ValueError(f"discovery {method!r} is not known; use one of {', '.join(METHODS)}")
    if not paths:
        raise ValueError("give at least one image to find objects in")
    source = make(method, run.model(), run.config, **options)
    files = [Path(path) for path in paths]
    label = torch.zeros(1, dtype=torch.int64)
    ready = [whole_frames(Images(label, tuple(run.classes) or ("image",), files=(file,)), run.config) for file in files]
    written = []
    for name, frame in zip(numbered(files), ready, strict=True):
        found = source(frame.inputs)
        figure = drawn(frame.pixels[0], found, 0, name, method)
        written.append(save_png(figure, Path(out) / f"{name}-discover.png"))
    return written


def drawn(image: Tensor, found: Found, i: int, name: str, method: str) -> Figure:
    """Image, map and objects of image i, with what was found in words."""
    pictures = [resize(image, SIDE), overlay(image, found.map[i], side=SIDE)]
    if (masks := masks_of(found, i)) is not None:
        pictures.append(objects(image, masks, side=SIDE))
    note = f"{name}. Middle: the map of {method}; colour begins where a place gets more than its even share. Right: "
    note += "each object in its colour, with its box. Found without labels, in what the model makes of the whole image."
    return captioned(pictures, f"{method}: {told(found, i)}", note)


def _cells(pixels: int, cells: int) -> Tensor:
    """Cell of each pixel on a line: (pixels,)."""
    return ((torch.arange(pixels) + 0.5) * cells / pixels).long().clamp(0, cells - 1)


def _frame(
    picture: np.ndarray[Any, Any], box: list[int], grid: Sequence[int], thick: int, colour: tuple[int, int, int]
) -> None:
    """Draw a box, given in cells, into (H, W, 3)."""
    H, W = picture.shape[:2]
    scale = (H / grid[0], W / grid[1])
    top, left, bottom, right = (round(edge * scale[k % 2]) for k, edge in enumerate(box))
    inner = (
        slice(top + thick, max(top + thick, bottom - thick)),
        slice(left + thick, max(left + thick, right - thick)),
    )
    kept = picture[inner].copy()
    picture[top:bottom, left:right] = colour
    picture[inner] = kept
