"""Draw where a trained run looks in your images.

  foveal explain runs/NAME a.jpg b.jpg --output pictures/

Two pictures per image: the attention of the last layer over the image, and every head of every layer.
"""

import argparse
from pathlib import Path


def declare(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.set_defaults(run=run)
    parser.add_argument("folder", metavar="RUN", help="folder of a finished run")
    parser.add_argument("images", metavar="IMAGES", nargs="+", help="image files, or folders of them")
    parser.add_argument("--output", metavar="FOLDER", help="where to write (default: RUN/explain)")


def run(values: argparse.Namespace) -> int:
    """Draw, and print the path of each picture."""
    from foveal.explain import explain
    from foveal.train.labelling import find_images
    from foveal.train.run import Run

    trained = Run.load(values.folder)
    output = Path(values.output) if values.output else trained.folder / "explain"
    output.mkdir(parents=True, exist_ok=True)
    for path in explain(trained, find_images([Path(image) for image in values.images]), output):
        print(path)
    return 0
