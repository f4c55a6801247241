"""Draw where a trained run looks in your images.

  foveal explain runs/NAME a.jpg b.jpg --output pictures/

Two pictures per image: the attention of the last layer over the image, and every head of every layer.
With --discover one picture: the objects that the model's features tell apart, found without labels.

  foveal explain runs/NAME a.jpg --discover                          TokenCut
  foveal explain runs/NAME a.jpg --discover maskcut                  several objects
  foveal explain runs/NAME a.jpg --discover tokencut:foreground=corners,tau=0.3
"""

import argparse
from pathlib import Path

from foveal.cli.flags import pairs
from foveal.train.errors import SettingsError


def declare(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.set_defaults(run=run)
    parser.add_argument("folder", metavar="RUN", help="folder of a finished run")
    parser.add_argument("images", metavar="IMAGES", nargs="+", help="image files, or folders of them")
    parser.add_argument(
        "--discover", nargs="?", const="tokencut", metavar="METHOD[:KEY=VALUE,...]",
        help="draw objects instead: tokencut (if none is given), maskcut, lost or dino",
    )  # fmt: skip
    parser.add_argument("--output", metavar="FOLDER", help="where to write (default: RUN/explain)")


def run(values: argparse.Namespace) -> int:
    """Draw, and print the path of each picture."""
    from foveal.explain import discover, explain
    from foveal.train.labelling import find_images
    from foveal.train.run import Run

    trained = Run.load(values.folder)
    output = Path(values.output) if values.output else trained.folder / "explain"
    output.mkdir(parents=True, exist_ok=True)
    images = find_images([Path(image) for image in values.images])
    if values.discover is None:
        written = explain(trained, images, output)
    else:
        method, _, text = values.discover.partition(":")
        options = pairs("discover", text)
        try:
            written = discover(trained, images, output, method, **options)
        except TypeError as error:  # an option that the method does not take
            raise SettingsError(f"--discover {values.discover}: {error}") from None
    for path in written:
        print(path)
    return 0
