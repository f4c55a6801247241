"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) through torchvision, from disk or downloaded when that is allowed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torchvision import datasets

from foveal.data.errors import DataError
from foveal.data.images import Data, Images
from foveal.data.places import may_download, root_of
from foveal.data.splits import hold_out


def cifar(name: str, dataset: Callable[..., Any]) -> Callable[[dict[str, str], int, int | None], Data]:
    """The loader of one of the two; dataset: torchvision's class."""

    def load(options: dict[str, str], seed: int = 0, image_size: int | None = None) -> Data:
        """50,000 images, of which 10 % of each class are val by the seed, and the official test set of 10,000.

        options: root, a folder (else $FOVEAL_DATA, else ~/.cache/foveal); download, yes or no (no).
        Images keep their 32 x 32 pixels and are enlarged on the way to the model. Raises DataError where the
        files are not found, and where they cannot be downloaded.
        """
        root, download = root_of(options), may_download(options)
        train = _part(name, dataset, root, True, download)
        sets, how = hold_out(train, {"val": 10}, seed)
        tests = {"test": _part(name, dataset, root, False, download)}
        return Data(name, sets["train"], sets["val"], tests, flip=True, notes=(how,))

    return load


def _part(name: str, dataset: Callable[..., Any], root: Path, train: bool, download: bool) -> Images:
    try:
        found = dataset(root, train=train, download=download)
    except RuntimeError as error:  # not there, or not whole
        if not download:
            raise DataError(
                f"{name} is not (whole) in {root}. To fetch it: {name}:download=yes. Without a network, copy"
                f" torchvision's folder of it there, or say where it is: {name}:root=FOLDER"
            ) from error
        raise DataError(f"{name} could not be downloaded to {root}: {error}") from error
    except OSError as error:  # URLError is one
        raise DataError(
            f"{name} could not be downloaded to {root}: {error}. Is there a network? Without one, copy"
            f" torchvision's folder of it there, or use digits or scenes, which come with the package"
        ) from error
    return Images(
        labels=torch.tensor(found.targets, dtype=torch.int64),
        classes=tuple(found.classes),
        pixels=torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous(),
    )


load_cifar10 = cifar("cifar10", datasets.CIFAR10)
load_cifar100 = cifar("cifar100", datasets.CIFAR100)
