"""Packed data sets: .npz files of encoded images, in two layouts.

    sheets   blob, sheet_offset, sheet_count, label, classes      all images of a class on one lossless sheet,
                                                                  25 square tiles to a row
    blobs    image_blob, image_offset[, label, classes]           one JPEG or PNG per image
             [mask_blob, mask_offset] or [box (N, 4)]             the object: a 1-bit image of the same size, or
                                                                  xmin, ymin, xmax, ymax in pixels, inclusive

Both may have `name`, the original file names. Image n is image_blob[image_offset[n] : image_offset[n + 1]].
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as v2

from foveal.data.decode import Packed, decode_tensor
from foveal.data.errors import DataError, listed
from foveal.data.folder import ROLES
from foveal.data.images import Data, Images, concatenate
from foveal.data.splits import complete

TILES = 25  # to a row of a sheet
Arrays = dict[str, npt.NDArray[Any]]


def load_packs(path: Path, seed: int = 0, image_size: int | None = None) -> Data:
    """A data set from one pack, or from a folder with train.npz (or train_*.npz) and val.npz, test.npz.

    What is missing is held out of train by the seed, as for folders: a lone val.npz is the test set.
    Raises DataError for packs without labels (see read_pack) and for packs whose classes differ.
    """
    notes = []
    if path.is_file():
        found = {"train": [path]}
        if path.parent.joinpath("test.npz").is_file() and path.name != "test.npz":
            notes.append(f"{path.name} alone is split; the folder {path.parent.name} would use test.npz as well")
    else:
        found = pack_files(path)
    sets = {role: concatenate([_labelled(file, image_size) for file in files]) for role, files in found.items()}
    train = sets.pop("train")
    for role, images in sets.items():
        if images.classes != train.classes:
            raise DataError(f"the classes of {role} are not those of train in {path}")
    return complete(path.resolve().stem, train, sets.pop("val", None), sets, seed, notes)


def pack_files(folder: Path) -> dict[str, list[Path]]:
    """The packs of a folder by role: {"train": [train_a.npz, train_b.npz], "test": [test.npz]}."""
    role_of = {name: role for role, names in ROLES.items() for name in names}
    found: dict[str, list[Path]] = {}
    files = sorted(folder.glob("*.npz"))
    for file in files:
        role = role_of.get(file.stem.lower().replace("-", "_").split("_")[0])
        if role is not None:
            found.setdefault(role, []).append(file)
    if files and "train" not in found:
        names = listed([file.name for file in files])
        raise DataError(f"{folder} has {names} but no train.npz; give one of the files itself to split it")
    return found


def read_pack(path: Path, image_size: int | None = None) -> Images:
    """One pack as a set of images, also where it has no labels: all are then of one class, "object".

    Images of one size become pixels. Others stay encoded, as Packed files; but where they have masks or boxes,
    image and mask are resized (shorter side to image_size, or to the shortest there is) and cropped to the
    central square, because masks need a common frame.
    Raises DataError for a file that is no such pack.
    """
    arrays = _arrays(path)
    n = len(arrays["label"]) if "label" in arrays else len(arrays.get("image_offset", [0])) - 1
    labels = arrays.get("label", np.zeros(n))
    names = arrays["name"].astype(str).tolist() if "name" in arrays else [str(i) for i in range(n)]
    pixels, masks, files = None, None, None
    if "sheet_offset" in arrays:
        pixels = torch.cat(list(_sheets(arrays, path)))
    else:
        packed = [Packed(f"{path.name}:{n}", b) for n, b in zip(names, _blobs(arrays, "image", path), strict=True)]
        shown = [decode_tensor(image) for image in packed]
        objects = _masks(arrays, shown, path)
        if objects is not None and len({image.shape for image in shown}) > 1:
            side = image_size or min(min(image.shape[-2:]) for image in shown)
            shown = [v2.center_crop(v2.resize(image, [side], antialias=True), [side, side]) for image in shown]
            objects = [v2.center_crop(v2.resize(m, [side], antialias=True), [side, side]) for m in objects]
        if len({image.shape for image in shown}) == 1:
            pixels = torch.stack(shown)
            masks = None if objects is None else torch.cat(objects) >= 0.5
        else:
            files = tuple(packed)
    return Images(
        labels=torch.from_numpy(labels.astype(np.int64)),
        classes=tuple(str(c) for c in arrays.get("classes", ["object"])),
        pixels=pixels,
        files=files,
        masks=masks,
        names=tuple(names),
    )


def _labelled(path: Path, image_size: int | None) -> Images:
    images = read_pack(path, image_size)
    if len(images.classes) < 2:
        raise DataError(
            f"{path} has no labels of two classes or more, so nothing can be trained on it;"
            " foveal.data.read_pack gives its images and masks"
        )
    return images


def _arrays(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as members:
            arrays = {name: members[name] for name in members.files}
    except Exception as error:  # not a zip, cut short, pickled objects, ...
        raise DataError(f"{path} cannot be read as an .npz pack: {error}") from error
    if "sheet_offset" in arrays:
        needed = {"blob", "sheet_count", "label", "classes"}
    else:
        needed = {"image_blob", "image_offset"} | ({"classes"} if "label" in arrays else set())
    if needed - arrays.keys():
        raise DataError(
            f"{path} holds the arrays {listed(sorted(arrays), 12)} but not {listed(sorted(needed - arrays.keys()))},"
            " which a pack needs (foveal.data.packs describes both layouts)"
        )
    return arrays


def _blobs(arrays: Arrays, field: str, path: Path) -> Iterator[bytes]:
    blob = arrays["blob" if field == "sheet" else f"{field}_blob"]
    offset = arrays[f"{field}_offset"].tolist()
    if not offset or offset[0] != 0 or offset[-1] != len(blob) or sorted(offset) != offset:
        raise DataError(f"{path}: {field}_offset does not cut its {len(blob):,} bytes into files")
    return (blob[a:b].tobytes() for a, b in pairwise(offset))


def _sheets(arrays: Arrays, path: Path) -> Iterator[Tensor]:
    """The tiles of each sheet: uint8 (n, 3, side, side)."""
    for s, data in enumerate(_blobs(arrays, "sheet", path)):
        sheet = decode_tensor(Packed(f"{path.name}: sheet {s}", data))
        n, side = int(arrays["sheet_count"][s]), sheet.shape[-1] // TILES
        rows = -(-n // TILES)
        if sheet.shape[1:] != (rows * side, TILES * side):
            raise DataError(
                f"{path}: sheet {s} is {sheet.shape[1]} x {sheet.shape[2]} pixels, which is not {rows} rows of"
                f" {TILES} square tiles for its {n} images"
            )
        tiles = sheet.view(3, rows, side, TILES, side).permute(1, 3, 0, 2, 4)
        yield tiles.reshape(-1, 3, side, side)[:n]


def _masks(arrays: Arrays, images: list[Tensor], path: Path) -> list[Tensor] | None:
    """The object of each image: float (1, H, W), 1 on the object; None if the pack has neither masks nor boxes."""
    if "mask_blob" in arrays:
        blobs = _blobs(arrays, "mask", path)
        masks = [decode_tensor(Packed(f"{path.name}: mask {i}", b))[:1] / 255 for i, b in enumerate(blobs)]
    elif "box" in arrays:
        masks = [image.new_zeros((1, *image.shape[1:]), dtype=torch.float32) for image in images]
        for mask, (left, top, right, bottom) in zip(masks, arrays["box"].tolist(), strict=True):
            mask[:, top : bottom + 1, left : right + 1] = 1
    else:
        return None
    wrong = [i for i, (m, x) in enumerate(zip(masks, images, strict=True)) if m.shape[1:] != x.shape[1:]]
    if wrong:
        raise DataError(f"{path}: masks {listed([str(i) for i in wrong])} are not of the size of their images")
    return masks
