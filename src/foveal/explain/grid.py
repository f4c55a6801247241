"""Figures made of overlays: layers x heads of one image, pictures with a caption, a sheet of many.

Figures are matplotlib's objects drawn by Agg: no pyplot, no global state, no display, safe in threads.
Pictures are placed pixel for pixel, never resampled.  Text is never read as mathematics: a class may be
called "$5".
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from foveal.explain.overlay import Pixels, overlay

DPI = 144
INK, QUIET_INK = "#1c1c1f", "#66666d"
GAP, MARGIN = 6, 20  # pixels between panels and around them


def head_grid(
    image: Tensor | Pixels,
    maps: Sequence[Tensor],
    names: Sequence[str] | None = None,
    *,
    title: str = "",
    note: str = "",
    panel: int | None = None,
) -> Figure:
    """Where every head of every layer looks, on one image.

    image: (3, S, T) uint8.  maps: per layer (H, h, w) non-negative; heads and grids may differ by layer.
    names: of the layers.  panel: pixels of a panel's shorter side, by default what fits 1500 pixels.
    Rows are layers from the input up, columns are heads, and the last column is their mean.  Every panel has
    its own scale (full colour is its largest patch), so a row tells where heads look, not how sharply.
    """
    if not maps or any(attn.ndim != 3 for attn in maps):
        raise ValueError("maps must be a list with one (heads, h, w) map per layer, and at least one")
    names = [f"layer {i}" for i in range(len(maps))] if names is None else list(names)
    if len(names) != len(maps):
        raise ValueError(f"{len(names)} names for {len(maps)} layers")
    heads = max(len(attn) for attn in maps)
    side = panel or int(np.clip(1500 // (heads + 1), 48, 160))
    rows: list[list[Pixels | None]] = []
    for attn in maps:
        row: list[Pixels | None] = [overlay(image, head, side=side) for head in attn]
        rows.append([*row, *[None] * (heads - len(attn)), overlay(image, attn.float().mean(0), side=side)])
    height, width = overlay(image, maps[0][0], side=side).shape[:2]

    mosaic = sheet(rows)
    above, below = _lines(title, mosaic.shape[1], 10), _lines(note, mosaic.shape[1], 8)
    left, top = 24 + 11 * max(len(name) for name in names), 42 + _tall(above, 10)
    figure = _page(mosaic, left=left, top=top, bottom=16 + _tall(below, 8))
    _write(figure, left, 14, above, size=10)
    _write(figure, left, top + mosaic.shape[0] + 12, below, colour=QUIET_INK)
    for i, name in enumerate(names):
        y = top + i * (height + GAP) + height / 2
        _write(figure, left - 10, y, [name], colour=QUIET_INK, ha="right", va="center")
    numbers = [f"head {i + 1}" if width >= 80 else f"{i + 1}" for i in range(heads)]
    for i, label in enumerate([*numbers, "mean"]):
        x = left + i * (width + GAP) + width / 2
        _write(figure, x, top - 8, [label], colour=QUIET_INK, ha="center", va="bottom")
    return figure


def captioned(pictures: Sequence[Pixels], caption: str, note: str = "") -> Figure:
    """Pictures in a row with a caption and a quieter note below."""
    return captioned_rows([list(pictures)], caption, note)


def captioned_rows(rows: Sequence[Sequence[Pixels | None]], caption: str, note: str = "") -> Figure:
    """The same of several rows, as `sheet` lays them out."""
    mosaic = sheet(rows)
    below, last = _lines(caption, mosaic.shape[1], 11), _lines(note, mosaic.shape[1], 8)
    bottom = 14 + _tall(below, 11) + _tall(last, 8) + 14
    figure = _page(mosaic, left=MARGIN, top=MARGIN, bottom=bottom)
    y = MARGIN + mosaic.shape[0] + 14
    _write(figure, MARGIN, y, below, size=11)
    _write(figure, MARGIN, y + _tall(below, 11), last, colour=QUIET_INK)
    return figure


def sheet(rows: Sequence[Sequence[Pixels | None]], gap: int = GAP) -> Pixels:
    """A contact sheet: rows of (H, W, 3) uint8 pictures on white, None for a place left free.

    A column is as wide as its widest picture, a row as high as its highest; pictures sit at the upper left.
    """
    columns = max((len(row) for row in rows), default=0)
    widths, heights = [0] * columns, [0] * len(rows)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            if picture is not None:
                heights[i] = max(heights[i], picture.shape[0])
                widths[j] = max(widths[j], picture.shape[1])
    if not any(heights):
        raise ValueError("a sheet needs at least one picture")
    page = np.full((sum(heights) + gap * (len(rows) - 1), sum(widths) + gap * (columns - 1), 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            if picture is not None:
                y, x = sum(heights[:i]) + gap * i, sum(widths[:j]) + gap * j
                page[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
    return page


def _page(mosaic: Pixels, *, left: int, top: int, bottom: int) -> Figure:
    """A figure with the mosaic pixel for pixel and margins in pixels."""
    width, height = mosaic.shape[1] + left + MARGIN, mosaic.shape[0] + top + bottom
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    figure.figimage(mosaic, xo=left, yo=bottom, origin="upper", resize=False)
    return figure


def _write(
    figure: Figure,
    x: float,
    y: float,
    lines: Sequence[str],
    *,
    size: float = 8,
    colour: str = INK,
    ha: str = "left",
    va: str = "top",
) -> None:
    """Text at pixels from the upper left corner."""
    width, height = figure.bbox.width, figure.bbox.height
    text = figure.text(x / width, 1 - y / height, "\n".join(lines), fontsize=size, color=colour, ha=ha, va=va)
    text.set_parse_math(False)


def _lines(text: str, width: int, size: float) -> list[str]:
    """Lines that fit `width` pixels, broken at spaces; a letter is about 0.56 of its size wide."""
    return textwrap.wrap(text, max(12, int(width / (0.56 * size * DPI / 72))))


def _tall(lines: Sequence[str], size: float) -> int:
    """Pixels that these lines take, with a little room after them."""
    return round(len(lines) * 1.25 * size * DPI / 72) + (8 if lines else 0)
