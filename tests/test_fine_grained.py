"""CUB-200, Cars, Aircraft, Dogs and Pets in small: published files read, and the counts of the low-label protocol."""

import shutil
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from foveal.data import DataError, DataWarning, Images, load, subset
from foveal.data.fine_grained import PUBLISHED
from foveal.data.listings import cub_boxes
from foveal.maps.mask_files import mask_files

TRAIN, TEST = 20, 4  # images of each of two classes, as made here
SHARES = (0.15, 0.3, 0.5)


def picture(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 5, 3), shade, np.uint8)).save(path)


def members() -> list[tuple[int, int, bool]]:
    """(class, number of the image, whether it is of the training set), the sets and classes taking turns."""
    return [(c, i, i % 6 != 5) for i in range(TRAIN + TEST) for c in (0, 1)]


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def cells(words: list[str]) -> np.ndarray:
    """A column of MATLAB strings."""
    made = np.empty((len(words), 1), dtype=object)
    made[:, 0] = words
    return made


def make_cub200(root: Path) -> None:
    folder = root / "CUB_200_2011"
    classes = ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
    paths = [f"{classes[c]}/{c}_{i:02d}.jpg" for c, i, _ in members()]
    for (_, i, _), path in zip(members(), paths, strict=True):
        picture(folder / "images" / path, i)
    write(folder / "classes.txt", *(f"{c + 1} {name}" for c, name in enumerate(classes)))
    write(folder / "images.txt", *(f"{k + 1} {path}" for k, path in enumerate(paths)))
    write(folder / "image_class_labels.txt", *(f"{k + 1} {c + 1}" for k, (c, _, _) in enumerate(members())))
    write(folder / "train_test_split.txt", *(f"{k + 1} {int(train)}" for k, (_, _, train) in enumerate(members())))
    write(folder / "bounding_boxes.txt", *(f"{k + 1} 1.0 0.0 {k}.0 3.0" for k in range(len(paths))))


def make_cars(root: Path) -> None:
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    kind = [("bbox_x1", object), ("class", object), ("fname", object)]
    for part, file, of_train in (
        ("cars_train", folder / "devkit" / "cars_train_annos.mat", True),
        ("cars_test", folder / "cars_test_annos_withlabels.mat", False),
    ):
        rows = [(c, i) for c, i, train in members() if train is of_train]
        for k, (_, i) in enumerate(rows):
            picture(folder / part / f"{k + 1:05d}.jpg", i)
        noted = [(1, np.uint8(c + 1), f"{k + 1:05d}.jpg") for k, (c, _) in enumerate(rows)]
        savemat(file, {"annotations": np.array([noted], dtype=kind)})
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": cells(["AM General Hummer", "Acura RL"]).T})


def make_aircraft(root: Path) -> None:
    data = root / "fgvc-aircraft-2013b" / "data"
    classes = ["707-320", "Boeing 717"]
    write(data / "variants.txt", *classes)
    number = {(c, i): f"{1000 * c + i:07d}" for c, i, _ in members()}
    for (_, i), name in number.items():
        picture(data / "images" / f"{name}.jpg", i)
    for part, of_train in (("trainval", True), ("test", False)):
        rows = [f"{number[c, i]} {classes[c]}" for c, i, train in members() if train is of_train]
        write(data / f"images_variant_{part}.txt", *rows)


def make_dogs(root: Path) -> None:
    folder = root / "stanford_dogs"
    breeds = ["n02085620-Chihuahua", "n02085782-Japanese_spaniel"]
    path = {(c, i): f"{breeds[c]}/{breeds[c][:9]}_{i}.jpg" for c, i, _ in members()}
    for (_, i), name in path.items():
        picture(folder / "Images" / name, i)
    for part, of_train in (("train", True), ("test", False)):
        rows = [(c, i) for c, i, train in members() if train is of_train]
        labels = np.array([[c + 1] for c, _ in rows], dtype=np.uint8)
        savemat(folder / f"{part}_list.mat", {"file_list": cells([path[row] for row in rows]), "labels": labels})


def make_pets(root: Path) -> None:
    folder = root / "oxford-iiit-pet"
    breeds = ["Abyssinian", "great_pyrenees"]
    for c, i, _ in members():
        picture(folder / "images" / f"{breeds[c]}_{i}.jpg", i)
    for part, of_train in (("trainval", True), ("test", False)):
        rows = [f"{breeds[c]}_{i} {c + 1} {c + 1} 1" for c, i, train in members() if train is of_train]
        write(folder / "annotations" / f"{part}.txt", *rows)


MADE = {
    "cub200": (make_cub200, ("Black footed Albatross", "Laysan Albatross")),
    "cars": (make_cars, ("AM General Hummer", "Acura RL")),
    "aircraft": (make_aircraft, ("707-320", "Boeing 717")),
    "dogs": (make_dogs, ("Chihuahua", "Japanese spaniel")),
    "pets": (make_pets, ("Abyssinian", "Great Pyrenees")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All five, below one folder."""
    root = tmp_path_factory.mktemp("sets")
    for make, _ in MADE.values():
        make(root)
    return root


def shades(images: Images) -> list[int]:
    """Which image each is: made of one shade, its number in its class."""
    return [round(images.image(i).float().mean().item()) for i in range(len(images))]


def test_every_published_set_is_tested_here():
    assert MADE.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", MADE)
def test_the_published_split_is_kept_and_val_is_of_its_training_images(folder: Path, name: str):
    data = load(f"{name}:root={folder}", seed=3)
    assert (data.name, data.classes, data.flip) == (name, MADE[name][1], True)
    assert [len(x) for x in (data.train, data.val, data.tests["test"])] == [36, 4, 8]
    truth = {True: set(), False: set()}
    for c, i, train in members():
        truth[train].add((c, i))
    found = [set(zip(x.labels.tolist(), shades(x), strict=True)) for x in (data.train, data.val, data.tests["test"])]
    assert found[0] | found[1] == truth[True]
    assert not found[0] & found[1]
    assert found[2] == truth[False]
    names = [one for images in data.split().values() for one in images]
    assert len(set(names)) == 48
    assert all(str(file).endswith(one) for file, one in zip(data.train.files, data.train.names, strict=True))


@pytest.mark.parametrize("name", MADE)
def test_a_share_counts_from_the_published_images_and_leaves_val_alone(folder: Path, name: str):
    data = load(f"{name}:root={folder}")
    sizes = [data.train.subset(subset(data.train, share=p)).class_sizes().tolist() for p in (*SHARES, 0.9, 1)]
    assert sizes == [[3, 3], [6, 6], [10, 10], [18, 18], [18, 18]]  # of 20, not of the 18 that are left
    assert any("counts from all 40 published training images" in note for note in data.notes)


def test_the_same_seed_draws_the_same_images_and_smaller_shares_lie_in_larger(folder: Path):
    drawn = []
    for share in (0.15, 0.15, 0.3, 0.5, 1):
        data = load(f"cub200:root={folder}", seed=1)
        drawn.append(set(data.train.subset(subset(data.train, share=share, seed=1)).names))
        assert not drawn[-1] & set(data.val.names)
    assert drawn[0] == drawn[1]
    assert all(a < b for a, b in pairwise(drawn[1:]))
    assert set(load(f"cub200:root={folder}", seed=2).val.names) != set(data.val.names)


def test_shares_that_reach_into_val_say_so(folder: Path):
    train = load(f"pets:root={folder}").train
    with pytest.warns(DataWarning, match="2 classes have fewer than 95 % of the published images beside val and give"):
        assert len(subset(train, share=0.95)) == 36
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        assert len(subset(train, share=1)) == 36
        assert len(subset(train, share=0.9)) == 36


def test_a_subset_is_a_set_of_its_own(folder: Path):
    train = load(f"dogs:root={folder}").train
    assert train.published == (20, 20)
    half = train.subset(subset(train, share=0.5))
    assert half.published is None
    assert half.subset(subset(half, share=0.5)).class_sizes().tolist() == [5, 5]


def test_published_sizes_are_of_the_same_classes():
    with pytest.raises(DataError, match="2 classes but 3 published class sizes"):
        Images(torch.tensor([0, 1]), ("a", "b"), torch.zeros(2, 3, 1, 1).byte(), published=(1, 1, 1))


def counts(*sizes: int, percent: int) -> int:
    """Images drawn of classes of these sizes, 10 % of them held out: the rule at work, no files."""
    kept = [n - max(1, (n * 10 + 50) // 100) for n in sizes]
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(kept))
    names = tuple(str(c) for c in range(len(sizes)))
    train = Images(labels, names, torch.zeros(len(labels), 3, 1, 1, dtype=torch.uint8), published=sizes)
    return len(subset(train, share=percent / 100))


CUB = (30,) * 194 + (29,) * 6
AIRCRAFT = (67,) * 67 + (66,) * 33
DOGS = (100,) * 120
DOGS_OF_THE_LISTS = (101, 99) + (100,) * 118  # what one more image at each rate and 12,000 in all come to
PETS_LIKE = (93, 95, 96, 96) + (100,) * 33  # fits the counts; which breeds these are is of no matter


@pytest.mark.parametrize(
    ("sizes", "total", "expected"),
    [
        (CUB, 5994, [1000, 1800, 3000]),
        (AIRCRAFT, 6667, [1067, 2067, 3367]),
        (DOGS, 12000, [1800, 3600, 6000]),
        (DOGS_OF_THE_LISTS, 12000, [1801, 3601, 6001]),
        (PETS_LIKE, 3680, [554, 1105, 1841]),
    ],
    ids=["cub200", "aircraft", "dogs", "dogs of the lists", "pets"],
)
def test_counts_of_the_protocol(sizes: tuple[int, ...], total: int, expected: list[int]):
    assert sum(sizes) == total
    assert [counts(*sizes, percent=p) for p in (15, 30, 50)] == expected


def test_published_numbers():
    assert {name: (one.train, one.test) for name, one in PUBLISHED.items()} == {
        "cub200": (5994, 5794),
        "cars": (8144, 8041),
        "aircraft": (6667, 3333),
        "dogs": (12000, 8580),
        "pets": (3680, 3669),
    }


def test_lists_of_other_sizes_are_noted(folder: Path):
    notes = load(f"cars:root={folder}").notes
    told = "Stanford Cars was published with 8,144 training and 8,041 test images; these lists have 40 and 8"
    assert told in notes


@pytest.mark.parametrize(("name", "dataset"), [("cars", "StanfordCars"), ("aircraft", "FGVCAircraft")])
def test_torchvision_reads_the_same(folder: Path, name: str, dataset: str):
    theirs = getattr(datasets, dataset)(folder, split="test")
    ours = load(f"{name}:root={folder}").tests["test"]
    assert tuple(theirs.classes) == ours.classes
    for i, (image, label) in enumerate(theirs):
        assert label == ours.labels[i]
        assert np.array_equal(np.array(image), ours.image(i).permute(1, 2, 0).numpy())


def test_torchvision_reads_the_same_pets(folder: Path):
    theirs = datasets.OxfordIIITPet(folder, split="test")
    ours = load(f"pets:root={folder}").tests["test"]
    assert tuple(theirs.classes) == ours.classes
    assert [(label, round(np.array(image).mean())) for image, label in theirs] == list(
        zip(ours.labels.tolist(), shades(ours), strict=True)
    )


def test_root_is_the_folder_or_what_holds_it(folder: Path, monkeypatch: pytest.MonkeyPatch):
    inside = load(f"dogs:root={folder / 'stanford_dogs'}")
    monkeypatch.setenv("FOVEAL_DATA", str(folder))
    assert load("dogs").split() == inside.split()


def test_boxes_of_birds(folder: Path):
    boxes = cub_boxes(folder / "CUB_200_2011")
    assert len(boxes) == 48
    assert boxes["002.Laysan_Albatross/1_00.jpg"] == (0, 1, 3, 2)  # x 1, y 0, width 1, height 3


def test_segmentations_of_birds_go_with_their_images(copied: Path):
    masks = copied / "CUB_200_2011" / "segmentations"
    for c, bird in enumerate(("001.Black_footed_Albatross", "002.Laysan_Albatross")):
        for i in range(TRAIN + TEST):
            picture(masks / bird / f"{c}_{i:02d}.png", 255)
    names = load(f"cub200:root={copied}").train.names
    found = mask_files(names, masks)
    assert [path.relative_to(masks).with_suffix(".jpg").as_posix() for path in found] == list(names)


@pytest.mark.parametrize("name", MADE)
def test_what_is_not_there_is_asked_for(tmp_path: Path, name: str):
    source = PUBLISHED[name]
    with pytest.raises(DataError) as told:
        load(f"{name}:root={tmp_path}")
    text = str(told.value)
    assert text.startswith(f"{name} is not in {tmp_path}. ")
    for part in (source.title, source.home, str(tmp_path / source.folder), *source.needs, f"{name}:root=FOLDER"):
        assert part in text
    assert (f"{name}:download=yes" in text) == (name in ("aircraft", "pets"))


@pytest.mark.parametrize("name", ["cub200", "cars", "dogs"])
def test_what_nobody_offers_for_download(tmp_path: Path, name: str):
    with pytest.raises(DataError, match=f"{name} cannot be downloaded from here. Get .*{PUBLISHED[name].folder}"):
        load(f"{name}:root={tmp_path},download=yes")


@pytest.mark.parametrize(("name", "dataset"), [("aircraft", "FGVCAircraft"), ("pets", "OxfordIIITPet")])
def test_download_is_torchvisions(folder: Path, tmp_path: Path, monkeypatch, name: str, dataset: str):
    asked = []

    def fetch(root: Path, download: bool) -> None:
        asked.append((root, download))
        if tmp_path / "offline" == root:
            raise OSError("no route to host")
        shutil.copytree(folder / PUBLISHED[name].folder, root / PUBLISHED[name].folder)

    monkeypatch.setattr(datasets, dataset, fetch)
    assert len(load(f"{name}:root={tmp_path},download=yes").train) == 36
    assert len(load(f"{name}:root={tmp_path},download=yes").train) == 36
    assert asked == [(tmp_path, True)]  # what is there is not fetched again
    with pytest.raises(DataError, match=r"could not be downloaded .*no route to host\. Is there a network\? Get"):
        load(f"{name}:root={tmp_path / 'offline'},download=yes")


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(folder, tmp_path / "sets")
    return tmp_path / "sets"


def test_part_of_a_set_is_not_a_set(copied: Path):
    (copied / "CUB_200_2011" / "train_test_split.txt").unlink()
    with pytest.raises(DataError, match=r"cub200 in .*CUB_200_2011 is not whole: no train_test_split\.txt\. Get"):
        load(f"cub200:root={copied}")


def test_missing_images_are_counted_and_named(copied: Path):
    for i in (0, 1):
        (copied / "oxford-iiit-pet" / "images" / f"Abyssinian_{i}.jpg").unlink()
    with pytest.raises(DataError, match=r"2 images of the 40 that a list of pets names are not in .*Abyssinian_0\.jpg"):
        load(f"pets:root={copied}")


@pytest.mark.parametrize(
    ("name", "file", "text", "message"),
    [
        ("cub200", "CUB_200_2011/images.txt", "1\n", r"the line '1' instead of: number name"),
        ("cub200", "CUB_200_2011/image_class_labels.txt", "1 1\n", "are not of the same images"),
        ("cub200", "CUB_200_2011/classes.txt", "1 001.A\n1 001.B\n", "every class one number and one name"),
        ("aircraft", "fgvc-aircraft-2013b/data/variants.txt", "707-320\n", "a variant 'Boeing 717' that variants.txt"),
        ("pets", "oxford-iiit-pet/annotations/test.txt", "a_1 1 x 1\n", "instead of: name number number number"),
        ("dogs", "stanford_dogs/test_list.mat", "no matlab", r"cannot read .*test_list\.mat"),
    ],
)
def test_spoilt_lists_are_named(copied: Path, name: str, file: str, text: str, message: str):
    (copied / file).write_text(text)
    with pytest.raises(DataError, match=message):
        load(f"{name}:root={copied}")


def test_test_annotations_of_cars_without_labels(copied: Path):
    savemat(
        copied / "stanford_cars" / "cars_test_annos_withlabels.mat",
        {"annotations": np.array([[("00001.jpg",), ("00002.jpg",)]], dtype=[("fname", object)])},
    )
    with pytest.raises(DataError, match=r"have no class: for the test images take those with labels"):
        load(f"cars:root={copied}")


def test_options_are_known():
    with pytest.raises(DataError, match="cub200 has no option 'rot'; did you mean root"):
        load("cub200:rot=x")
    with pytest.raises(DataError, match=r"did you mean cub200\?"):
        load("cub-200")
