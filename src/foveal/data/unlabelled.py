"""Images for training without labels: any data set, or a folder with images anywhere below it.

PHOTOS/*.jpg, PHOTOS/holiday/2019/*.png     all readable images; 5 % of them, by the seed, held out for validation
PHOTOS/<class>/*.jpg                        as for training with labels, so that held-out images stay unseen
"""

from pathlib import Path

import torch

from foveal.chance import generator
from foveal.data.errors import DataError
from foveal.data.folder import gathered, has_classes
from foveal.data.images import Data, Images
from foveal.data.packs import pack_files
from foveal.data.sources import SOURCES, load

HELD_OUT = 0.05
CLASS = "images"  # of unlabelled images: Images has classes always


def load_unlabelled(spec: str | Path, *, seed: int = 0, image_size: int | None = None) -> Data:
    """The data set that `spec` names, as `load`; and a folder of images without class folders as one class, "images".

    Raises DataError where there is no image, or only one, or most cannot be read.
    """
    path = Path(spec).expanduser()
    named = str(spec).partition(":")[0] in SOURCES
    if named or not path.is_dir() or has_classes(path) or pack_files(path):
        return load(spec, seed=seed, image_size=image_size)
    notes: list[str] = []
    files = gathered(path, notes)
    if len(files) < 2:
        raise DataError(f"{path} has one image: some are needed to learn from, and some to see whether it does")
    order = torch.randperm(len(files), generator=generator(seed, "split"))
    out = max(1, round(HELD_OUT * len(files)))
    images = Images(
        labels=torch.zeros(len(files), dtype=torch.int64),
        classes=(CLASS,),
        files=tuple(files),
        names=tuple(file.relative_to(path).as_posix() for file in files),
    )
    notes.append(f"no class folders: {out:,} of {len(files):,} images held out for validation")
    val, train = (images.subset(part.sort().values) for part in (order[:out], order[out:]))
    return Data(path.resolve().name, train, val, {}, notes=tuple(notes))
