"""A labelled set of images, and a data set made of such sets.

Small sets keep their pixels (uint8, ready to sit on the device); photographs stay files until needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from foveal.data.decode import Packed, decode_tensor
from foveal.data.errors import DataError

__all__ = ["Data", "DataError", "Images", "Packed"]


@dataclass(frozen=True, eq=False)
class Images:
    """N labelled images of C classes, held either as pixels or as files.

    labels: (N,) int64 in [0, C).  classes: C names.  pixels: (N, 3, H, W) uint8.  files: N paths or Packed.
    masks: (N, H, W) bool, True on the object; only beside pixels, in the same frame.
    names: N names that say which image of the source this is (a path below the data folder, or a number);
    left empty they become "0", "1", ...
    published: images per class of the training set as it was published, where some were held out of this one for
    validation: a share of the labels is a share of those (see foveal.data.subset). A subset does not keep it.
    Raises DataError where these do not fit together.
    """

    labels: Tensor
    classes: tuple[str, ...]
    pixels: Tensor | None = None
    files: tuple[Path | Packed, ...] | None = None
    masks: Tensor | None = None
    names: tuple[str, ...] = ()
    published: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        n = len(self.labels)
        object.__setattr__(self, "classes", tuple(self.classes))
        object.__setattr__(self, "names", tuple(self.names) or tuple(str(i) for i in range(n)))
        if self.files is not None:
            object.__setattr__(self, "files", tuple(self.files))
        _check(self)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int) -> Tensor:
        """Image i as uint8 (3, H, W), upright and in RGB; a file is decoded in full size."""
        if self.pixels is not None:
            return self.pixels[i]
        assert self.files is not None
        return decode_tensor(self.files[i])

    def subset(self, index: Tensor | Sequence[int]) -> "Images":
        """The images at `index` (positions, any order; or a bool mask of length N), same classes."""
        at = torch.as_tensor(index, device="cpu")
        at = at.nonzero()[:, 0] if at.dtype == torch.bool else at.to(torch.int64)
        picked = at.tolist()
        return replace(
            self,
            labels=self.labels[at],
            pixels=None if self.pixels is None else self.pixels[at],
            files=None if self.files is None else tuple(self.files[i] for i in picked),
            masks=None if self.masks is None else self.masks[at],
            names=tuple(self.names[i] for i in picked),
            published=None,
        )

    def class_sizes(self) -> Tensor:
        """Number of images of each class: (C,) int64."""
        return torch.bincount(self.labels, minlength=len(self.classes))


@dataclass(frozen=True, eq=False)
class Data:
    """A data set: train to fit, val to select, tests to report.

    tests: named test sets ("test", or "mixed_same" and "mixed_rand", ...), in the order of the report.
    flip: whether a mirrored image still shows its class.  notes: what the user should know about the data
    (class imbalance, images left out, how it was split), a sentence each.
    """

    name: str
    train: Images
    val: Images
    tests: dict[str, Images]
    flip: bool = True
    notes: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes

    def split(self) -> dict[str, tuple[str, ...]]:
        """Names of the images of each set, for the run to save: which image was used for what."""
        sets = {"train": self.train, "val": self.val, **{f"test/{k}": v for k, v in self.tests.items()}}
        return {name: images.names for name, images in sets.items()}


def concatenate(sets: Sequence[Images]) -> Images:
    """Sets of the same classes, one after the other; pixels (and masks) only if all have them in one size."""
    first = sets[0]
    if any(images.classes != first.classes for images in sets):
        raise DataError("sets of different classes cannot be joined")
    pixels = [images.pixels for images in sets if images.pixels is not None]
    masks = [images.masks for images in sets if images.masks is not None]
    files = [file for images in sets for file in images.files or ()]
    if pixels and (files or len({p.shape[1:] for p in pixels}) > 1):
        raise DataError("sets can be joined if all are files or all have pixels of one size")
    return Images(
        labels=torch.cat([images.labels for images in sets]),
        classes=first.classes,
        pixels=torch.cat(pixels) if pixels else None,
        files=None if pixels else tuple(files),
        masks=torch.cat(masks) if len(masks) == len(sets) else None,
        names=tuple(name for images in sets for name in images.names),
    )


def _check(images: Images) -> None:
    n = len(images.labels)
    labels, pixels, files, masks = images.labels, images.pixels, images.files, images.masks
    if labels.dtype != torch.int64 or labels.dim() != 1:
        raise DataError(f"labels must be (N,) int64, not {tuple(labels.shape)} {labels.dtype}")
    if n and not 0 <= int(labels.min()) <= int(labels.max()) < len(images.classes):
        raise DataError(
            f"labels run from {int(labels.min())} to {int(labels.max())}"
            f" but there are {len(images.classes)} classes: 0 to {len(images.classes) - 1}"
        )
    if (pixels is None) == (files is None):
        raise DataError("give the images either as pixels or as files")
    held = files if pixels is None else pixels
    if held is not None and len(held) != n:
        raise DataError(f"{n} labels but {len(held)} images")
    if len(images.names) != n:
        raise DataError(f"{n} labels but {len(images.names)} names")
    if images.published is not None and len(images.published) != len(images.classes):
        raise DataError(f"{len(images.classes)} classes but {len(images.published)} published class sizes")
    if pixels is not None and (pixels.dtype != torch.uint8 or pixels.dim() != 4 or pixels.shape[1] != 3):
        raise DataError(f"pixels must be (N, 3, H, W) uint8, not {tuple(pixels.shape)} {pixels.dtype}")
    if masks is not None:
        if pixels is None:
            raise DataError("masks need pixels: files have no common frame")
        if masks.dtype != torch.bool or masks.shape != (n, *pixels.shape[2:]):
            raise DataError(f"masks must be {(n, *pixels.shape[2:])} bool, not {tuple(masks.shape)} {masks.dtype}")
