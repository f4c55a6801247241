"""Make where-it-looks.png, the picture of the README, from a finished demo.

    foveal demo                                       # runs/demo
    python docs/images/make.py [runs/demo]            # seconds; needs no training of its own

Columns are test scenes of mixed_rand (any background) that one arm answers right and the other does not: first those
that guidance gains, then those that it loses, in about the proportion in which they occur. They are evenly spaced
through the test set, not picked. Rows: the scene, where plain fine-tuning looks, where the guided one looks; both from
the runs with the first seed.
"""

from __future__ import annotations

import sys
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from foveal.data import Data
from foveal.explain import overlay, resize, save
from foveal.report.gather import of_comparison, test_images
from foveal.report.tiles import shown, spread
from foveal.train import Comparison

TEST, COLUMNS, SIDE, GAP, DPI = "mixed_rand", 7, 144, 10, 110
INK, QUIET, ACCENT = "#1b1b1f", "#5f6068", "#0b62c4"
NAMES = {"plain": "plain\nfine-tuning", "guided": "guided\nattention", "gta": "guided\nattention"}


def main(folder: Path, target: Path) -> None:
    subject = of_comparison(Comparison.load(folder))
    data = test_images(subject.first)
    if not isinstance(data, Data):
        raise SystemExit(data)
    runs = [arm.runs[0] for arm in (subject.base, subject.others[0])]
    made = [run.predictions(TEST) for run in runs]
    right = [one.correct.numpy() for one in made]
    gained, lost = np.flatnonzero(right[1] & ~right[0]), np.flatnonzero(right[0] & ~right[1])
    few = min(len(lost), max(1, round(COLUMNS * len(lost) / max(1, len(gained) + len(lost)))))
    columns = [*spread(gained, COLUMNS - few), *spread(lost, few)]
    print(
        f"gained by guidance: {len(gained)} of {len(right[0])} scenes, lost: {len(lost)}; shown: {COLUMNS - few}, {few}"
    )

    left, line = 124, 22
    height, width = 3 * (SIDE + line + GAP) - GAP, left + COLUMNS * (SIDE + GAP) - GAP
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)

    def write(
        x: float, y: float, text: str, colour: str, size: float = 9, weight: str = "normal", va: str = "top"
    ) -> None:
        placed = figure.text(x / width, 1 - y / height, text, color=colour, fontsize=size, weight=weight, va=va)
        placed.set_parse_math(False)

    names = [NAMES.get(arm.name, arm.name) for arm in subject.arms[:2]]
    rows = [("test scene", QUIET), (names[0], QUIET), (names[1], ACCENT)]
    for i, (name, colour) in enumerate(rows):
        write(
            0, i * (SIDE + line + GAP) + SIDE / 2, name, colour, 11, "bold" if colour == ACCENT else "normal", "center"
        )
    for j, row in enumerate(columns):
        pixels = shown(data.tests[TEST], int(made[0].index[row]), runs[0])
        x = left + j * (SIDE + GAP)
        pictures = [resize(pixels, SIDE), *(overlay(pixels, one.attention[row], side=SIDE) for one in made)]
        for i, picture in enumerate(pictures):
            y = i * (SIDE + line + GAP)
            figure.figimage(picture, xo=x, yo=height - y - SIDE, origin="upper")
            if i == 0:
                write(x, y + SIDE + 3, runs[0].classes[int(made[0].labels[row])], INK, weight="bold")
            else:
                guess = runs[0].classes[int(made[i - 1].logits[row].argmax())]
                good = bool(right[i - 1][row])
                write(
                    x,
                    y + SIDE + 3,
                    f"{'✓' if good else '✗'} {guess}",
                    INK if good else QUIET,
                    weight="bold" if good else "normal",
                )
    figure.canvas.draw()
    page = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])
    target.parent.mkdir(parents=True, exist_ok=True)
    small = page.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.FLOYDSTEINBERG)
    buffer = BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    save(buffer.getvalue(), target)
    print(f"{target}: {page.size[0]} x {page.size[1]}, {len(buffer.getvalue()) / 1000:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"), Path(__file__).with_name("where-it-looks.png"))
