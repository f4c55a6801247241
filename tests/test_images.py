"""Images and Data: parts that fit together, and subsets that keep what belongs to an image."""

from pathlib import Path

import pytest
import torch

from foveal.data import Data, DataError, Images, Packed, concatenate


def images(n: int = 4, classes: int = 2, masks: bool = True) -> Images:
    pixels = torch.arange(n * 3 * 2 * 2, dtype=torch.uint8).view(n, 3, 2, 2)
    labels = torch.arange(n) % classes
    return Images(labels, tuple("abcdef"[:classes]), pixels, masks=(pixels[:, 0] % 2 == 0) if masks else None)


def test_subset_keeps_everything_of_an_image():
    whole = images()
    part = whole.subset([3, 1])
    assert part.names == ("3", "1")
    assert torch.equal(part.image(0), whole.image(3))
    assert torch.equal(part.masks[1], whole.masks[1])
    assert part.labels.tolist() == [1, 1]
    assert part.classes == whole.classes


def test_subset_by_bool_mask_is_subset_by_positions():
    keep = torch.tensor([True, False, False, True])
    assert images().subset(keep).names == ("0", "3")


def test_subset_of_subset_names_the_source():
    assert images().subset([3, 1, 0]).subset([2, 0]).names == ("0", "3")


def test_files_keep_their_paths():
    files = (Path("a/1.png"), Packed("2", b""), Path("b/3.png"))
    part = Images(torch.tensor([0, 1, 1]), ("a", "b"), files=files).subset([2, 1])
    assert part.files == (files[2], files[1])
    assert part.pixels is None


def test_class_sizes_count_empty_classes():
    part = images(classes=3).subset([0, 1])
    assert part.class_sizes().tolist() == [1, 1, 0]


def test_concatenate_undoes_subset():
    whole = images()
    joined = concatenate([whole.subset([0, 1]), whole.subset([2, 3])])
    assert torch.equal(joined.pixels, whole.pixels)
    assert torch.equal(joined.masks, whole.masks)
    assert joined.names == whole.names


def test_concatenate_refuses_other_classes_and_mixed_kinds():
    with pytest.raises(DataError, match="different classes"):
        concatenate([images(classes=2), images(classes=3)])
    as_files = Images(torch.tensor([0]), ("a", "b"), files=(Path("x.png"),))
    with pytest.raises(DataError, match="all are files"):
        concatenate([images(), as_files])


def test_split_names_every_image_of_every_set():
    whole = images()
    data = Data("toy", whole.subset([0]), whole.subset([1]), {"rand": whole.subset([3, 2])})
    assert data.split() == {"train": ("0",), "val": ("1",), "test/rand": ("3", "2")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 1, 2, 0])}, "0 to 2 but there are 2 classes"),
        ({"labels": torch.tensor([0, 1, -1, 0])}, "-1"),
        ({"labels": torch.tensor([0.0, 1, 1, 0])}, "int64"),
        ({"labels": torch.tensor([0, 1])}, "2 labels but 4 images"),
        ({"pixels": None}, "either as pixels or as files"),
        ({"files": (Path("x"),) * 4}, "either as pixels or as files"),
        ({"pixels": torch.zeros(4, 3, 2, 2)}, "uint8"),
        ({"pixels": torch.zeros(4, 2, 2, 3, dtype=torch.uint8)}, "3, H, W"),
        ({"masks": torch.ones(4, 2, 3, dtype=torch.bool)}, "masks must be"),
        ({"masks": torch.ones(4, 2, 2)}, "masks must be"),
        ({"names": ("a", "b")}, "2 names"),
        ({"pixels": None, "files": (Path("x"),) * 4, "masks": torch.ones(4, 2, 2).bool()}, "no common frame"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    good = {
        "labels": torch.tensor([0, 1, 1, 0]),
        "classes": ("a", "b"),
        "pixels": torch.zeros(4, 3, 2, 2, dtype=torch.uint8),
    }
    Images(**good)
    with pytest.raises(DataError, match=message):
        Images(**(good | change))
