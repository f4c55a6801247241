"""Pre-train a vision transformer on images without labels, as a masked autoencoder that cares for objects.

  foveal pretrain PHOTOS/ --model vit_tiny_patch16_224        plain MAE
  foveal pretrain PHOTOS/ --map tokencut --map-model RUN      errors on objects cost more; maps of a network
  foveal pretrain PHOTOS/ --maps maps/                        maps made before, by foveal maps
  foveal pretrain --resume runs/NAME                          go on after a stop
  foveal train PHOTOS/ --model ... --init runs/NAME           fine-tune what came of it
  foveal evaluate runs/NAME PHOTOS/ --knn --linear            what its features are worth as they are

Writes a folder: the encoder for timm, the decoder, metrics and a picture of reconstructions.
"""

import argparse
import warnings
from typing import Any

from foveal.cli.flags import add_settings
from foveal.cli.train import chosen_settings, is_first
from foveal.train.pretrain_settings import PretrainSettings


def declare(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.set_defaults(run=run)
    parser.add_argument("data", nargs="?", metavar="DATA", help="a folder of images, a .npz pack, scenes, cifar10, ...")
    parser.add_argument("--config", metavar="RECIPE", help="a YAML file with settings; flags go before it")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run of these settings, or of the run folder DATA"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run that is in the folder")
    add_settings(parser, kind=PretrainSettings)


def run(values: argparse.Namespace) -> int:
    """Pre-train, and say where the results are."""
    settings = chosen_settings(values, PretrainSettings)
    from foveal.data import DataWarning
    from foveal.train.pretraining import pretrain

    warnings.simplefilter("ignore", DataWarning)  # the notes on the data, which are shown, have them
    done = pretrain(settings, resume=values.resume, overwrite=values.overwrite, progress=True)
    if is_first():
        print(_summary(done))
    return 0


def _summary(done: Any) -> str:
    results = done.results
    lines = [f"val loss {results['val']['loss']:.4f}, {results['images_per_second']:,.0f} images/s"]
    if (maps := results["maps"]) is not None:
        told = f"maps   of {maps['found']:,} of {maps['images']:,} images"
        told += f"; {maps['blank']:,} prefer no place, {maps['inverted']:,} are probably the border of an object"
        lines.append(told)
    lines.append(f"run    {done.folder}")
    lines.append(f"next   foveal evaluate {done.folder} --knn --linear")
    return "\n".join(lines)
