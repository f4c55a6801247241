"""Five sets of things that look alike, split as they were published; the sets of the low-label protocol.

    name        classes   train    test    labels at 15 / 30 / 50 %
    cub200          200    5,994   5,794   1,000 / 1,800 / 3,000      birds     Wah et al., 2011
    cars            196    8,144   8,041   1,310 / 2,531 / 4,123      cars      Krause et al., 2013
    aircraft        100    6,667   3,333   1,067 / 2,067 / 3,367      aircraft  Maji et al., 2013 (train and val)
    dogs            120   12,000   8,580   1,800 / 3,600 / 6,000      dogs      Khosla et al., 2011
    pets             37    3,680   3,669     554 / 1,105 / 1,841      pets      Parkhi et al., 2012 (trainval)

A share p takes ceil(n p) of the n training images of each class (`foveal.data.subset`). To select the epoch, 10 % of
the training images of each class are held out by the seed, beside what a share takes: it counts from all n, so the
numbers above hold, up to shares of some 85 %. All labels are the training images without those held out.

Images are called by their path, so masks in segmentations/ of CUB-200 go with them: foveal maps cub200 --map given
--masks CUB_200_2011/segmentations. The trimaps of Pets are no such masks (1 is the animal, 2 not, 3 in between).

(The lists of Chen et al., NeurIPS 2019, have one image more of the dogs at each rate, as if one breed had 101 images
and another 99; the published lists have 100 of each.)
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torchvision import datasets

from foveal.data import listings
from foveal.data.errors import DataError, counted, listed
from foveal.data.images import Data, Images
from foveal.data.listings import Entries, Listing
from foveal.data.places import may_download, root_of
from foveal.data.splits import hold_out, imbalance

HELD_OUT = 10  # percent of train for val, as with CIFAR


@dataclass(frozen=True)
class Published:
    """A published set. folder: what it is called on disk, in torchvision where it has the set.  needs: what is in it.

    home: where it is from.  archives: what to unpack.  train, test: how many images.  read: its lists.
    fetch: downloads it below a folder; None where nobody offers that.
    """

    title: str
    home: str
    archives: str
    folder: str
    needs: tuple[str, ...]
    train: int
    test: int
    read: Callable[[Path], Listing]
    fetch: Callable[[Path], object] | None = None


PUBLISHED = {
    "cub200": Published(
        title="Caltech-UCSD Birds-200-2011",
        home="www.vision.caltech.edu/datasets/cub_200_2011",
        archives="CUB_200_2011.tgz",
        folder="CUB_200_2011",
        needs=("images", "images.txt", "classes.txt", "image_class_labels.txt", "train_test_split.txt"),
        train=5994,
        test=5794,
        read=listings.cub,
    ),
    "cars": Published(
        title="Stanford Cars",
        home="its authors (ai.stanford.edu/~jkrause/cars; the files are gone from there: ask who has a copy)",
        archives="cars_train.tgz, cars_test.tgz, car_devkit.tgz and cars_test_annos_withlabels.mat",
        folder="stanford_cars",
        needs=(
            *("cars_train", "cars_test", "devkit/cars_meta.mat", "devkit/cars_train_annos.mat"),
            "cars_test_annos_withlabels.mat",
        ),
        train=8144,
        test=8041,
        read=listings.cars,
    ),
    "aircraft": Published(
        title="FGVC-Aircraft",
        home="www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft",
        archives="fgvc-aircraft-2013b.tar.gz",
        folder="fgvc-aircraft-2013b",
        needs=(
            *("data/images", "data/variants.txt", "data/images_variant_trainval.txt"),
            "data/images_variant_test.txt",
        ),
        train=6667,
        test=3333,
        read=listings.aircraft,
        fetch=lambda root: datasets.FGVCAircraft(root, download=True),
    ),
    "dogs": Published(
        title="Stanford Dogs",
        home="vision.stanford.edu/aditya86/ImageNetDogs",
        archives="images.tar and lists.tar",
        folder="stanford_dogs",
        needs=("Images", "train_list.mat", "test_list.mat"),
        train=12000,
        test=8580,
        read=listings.dogs,
    ),
    "pets": Published(
        title="Oxford-IIIT Pet",
        home="www.robots.ox.ac.uk/~vgg/data/pets",
        archives="images.tar.gz and annotations.tar.gz",
        folder="oxford-iiit-pet",
        needs=("images", "annotations/trainval.txt", "annotations/test.txt"),
        train=3680,
        test=3669,
        read=listings.pets,
        fetch=lambda root: datasets.OxfordIIITPet(root, download=True),
    ),
}


def loader_of(name: str) -> Callable[[dict[str, str], int, int | None], Data]:
    """The loader of one of PUBLISHED."""
    source = PUBLISHED[name]

    def load(options: dict[str, str], seed: int = 0, image_size: int | None = None) -> Data:
        """The published training images, of which 10 % of each class are val by the seed, and the published test.

        options: root, the folder of the set or one that holds it (else $FOVEAL_DATA, else ~/.cache/foveal);
        download, yes or no (no), where torchvision can. Images stay files and keep their size.
        Raises DataError where the set is not there or not whole, and where it cannot be downloaded.
        """
        listing = source.read(_found(name, source, root_of(options), may_download(options)))
        whole, test = _images(name, listing, listing.train), _images(name, listing, listing.test)
        sets, how = hold_out(whole, {"val": HELD_OUT}, seed)
        train = replace(sets["train"], published=tuple(whole.class_sizes().tolist()))
        notes = [how, f"a share of the labels counts from all {len(whole):,} published training images, beside val"]
        if (len(whole), len(test)) != (source.train, source.test):
            notes.append(
                f"{source.title} was published with {source.train:,} training and {source.test:,} test images;"
                f" these lists have {len(whole):,} and {len(test):,}"
            )
        return Data(name, train, sets["val"], {"test": test}, flip=True, notes=(*notes, *imbalance(train)))

    return load


def _found(name: str, source: Published, root: Path, download: bool) -> Path:
    """The folder of a set: `root` itself or the one of the usual name in it, fetched if need be and allowed."""
    folder, missing = _nearest(source, root)
    if missing and download:
        if source.fetch is None:
            raise DataError(f"{name} cannot be downloaded from here. {_how(name, source, root)}")
        try:
            source.fetch(root)
        except (RuntimeError, OSError, EOFError) as error:  # URLError is an OSError; a cut archive ends early
            how = _how(name, source, root)
            raise DataError(f"{name} could not be downloaded to {root}: {error}. Is there a network? {how}") from error
        folder, missing = _nearest(source, root)
    if missing:
        if len(missing) == len(source.needs):
            raise DataError(f"{name} is not in {root}. {_how(name, source, root, not download)}")
        raise DataError(f"{name} in {folder} is not whole: no {listed(missing)}. {_how(name, source, root)}")
    return folder


def _nearest(source: Published, root: Path) -> tuple[Path, list[str]]:
    """Of the two places the one with more of what is needed, and what is missing there."""
    places = [
        (place, [part for part in source.needs if not (place / part).exists()]) for place in _places(source, root)
    ]
    return min(places, key=lambda place: len(place[1]))


def _places(source: Published, root: Path) -> tuple[Path, Path]:
    return root / source.folder, root


def _how(name: str, source: Published, root: Path, fetch: bool = False) -> str:
    offer = f"To fetch it: {name}:download=yes. By hand: get" if fetch and source.fetch else "Get"
    return (
        f"{offer} {source.title} from {source.home} ({source.archives}) and unpack it so that"
        f" {root / source.folder} has {', '.join(source.needs)}; where it lies elsewhere, say so: {name}:root=FOLDER"
    )


def _images(name: str, listing: Listing, entries: Entries) -> Images:
    files = [listing.images / path for path, _ in entries]
    missing = [path for (path, _), file in zip(entries, files, strict=True) if not file.is_file()]
    if missing:
        raise DataError(
            f"{counted(len(missing), 'image')} of the {len(files):,} that a list of {name} names"
            f" {'is' if len(missing) == 1 else 'are'} not in {listing.images}: {listed(missing, 3)}; unpack them again"
        )
    return Images(
        labels=torch.tensor([label for _, label in entries], dtype=torch.int64),
        classes=listing.classes,
        files=tuple(files),
        names=tuple(path for path, _ in entries),
    )
