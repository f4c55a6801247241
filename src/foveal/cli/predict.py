"""Label images with a trained run: CSV on stdout.

  foveal predict runs/NAME PHOTOS/ > labels.csv
  foveal predict runs/NAME a.jpg b.jpg --top 3

Columns: path, label, probability (and label_2, probability_2, ... with --top). Folders are searched for images.
"""

import argparse
import csv
import sys
from pathlib import Path
from typing import IO, Any

from foveal.train.errors import RunError


def declare(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.set_defaults(run=run)
    parser.add_argument("folder", metavar="RUN", help="folder of a finished run")
    parser.add_argument("images", metavar="IMAGES", nargs="+", help="image files, or folders of them")
    parser.add_argument("--top", type=int, default=1, metavar="K", help="how many labels to give (default: 1)")
    parser.add_argument("--output", metavar="FILE", help="write here instead of to stdout")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images per forward (default: 64)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that decode (default: 0)")


def run(values: argparse.Namespace) -> int:
    """Predict and write; images that cannot be read are counted on stderr."""
    from foveal.train.labelling import find_images, label
    from foveal.train.run import Run

    if values.top < 1 or values.batch_size < 1 or values.workers < 0:
        raise RunError("--top and --batch-size must be 1 or more, --workers 0 or more")
    trained = Run.load(values.folder)
    paths = find_images([Path(path) for path in values.images])
    labelled = label(
        trained, paths, top=values.top, batch_size=values.batch_size, device=values.device, workers=values.workers
    )
    if values.output:
        with open(values.output, "w", encoding="utf-8", newline="") as file:
            _write(file, labelled, values.top)
    else:
        _write(sys.stdout, labelled, values.top)
    for path, why in labelled.unreadable[:5]:
        print(f"foveal: left out {path}: {why}", file=sys.stderr)
    if len(labelled.unreadable) > 5:
        print(f"foveal: left out {len(labelled.unreadable)} images in all", file=sys.stderr)
    return 0


def _write(file: IO[str], labelled: Any, top: int) -> None:
    writer = csv.writer(file, lineterminator="\n")
    extra = [f"{name}_{k}" for k in range(2, top + 1) for name in ("label", "probability")]
    writer.writerow(["path", "label", "probability", *extra[: 2 * labelled.labels_each - 2]])
    for path, guesses in zip(labelled.paths, labelled.guesses, strict=True):
        writer.writerow([path, *(cell for name, share in guesses for cell in (name, f"{share:.6f}"))])
