"""One way to any data set: load("scenes:shortcut=0.8"), load("digits"), load("PHOTOS/"), load("pack.npz")."""

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from foveal.data import scenes
from foveal.data.cifar import load_cifar10, load_cifar100
from foveal.data.decode import SUFFIXES
from foveal.data.digits import load_digits
from foveal.data.errors import DataError
from foveal.data.fine_grained import PUBLISHED, loader_of
from foveal.data.folder import load_folder
from foveal.data.images import Data
from foveal.data.packs import load_packs, pack_files
from foveal.data.places import OPTIONS


def load_scenes(options: dict[str, str], seed: int, image_size: int | None) -> Data:
    """Digit scenes; the options are those of scenes.Scenes."""
    text = ",".join(f"{key}={value}" for key, value in options.items())
    return scenes.load(f"scenes:{text}", seed=seed, image_size=image_size)


# name -> (loader(options, seed, image_size), the options it knows; None: it checks them itself)
SOURCES: dict[str, tuple[Callable[[dict[str, str], int, int | None], Data], tuple[str, ...] | None]] = {
    "scenes": (load_scenes, None),
    "digits": (load_digits, ()),
    "cifar10": (load_cifar10, OPTIONS),
    "cifar100": (load_cifar100, OPTIONS),
    **{name: (loader_of(name), OPTIONS) for name in PUBLISHED},  # cub200, cars, aircraft, dogs, pets
}


def load(spec: str | Path, *, seed: int = 0, image_size: int | None = None) -> Data:
    """The data set that `spec` names, with train, val and tests.

    spec: a name of SOURCES with options, "scenes:shortcut=0.8,train=180"; a folder of class folders (see
    foveal.data.folder); an .npz pack or a folder of packs (see foveal.data.packs). A folder called like a
    source is given as "./digits". seed: what is held out of train where the data come without val or test; give
    all runs of a comparison the same. image_size: pixels a side of sets made here (scenes, digits) and of packs
    that must be brought to one size; others keep theirs until they are framed for the model.
    Raises DataError where there is no such data; it says what was found and names the nearest fit.
    """
    if image_size is not None and image_size < 1:
        raise DataError(f"image_size={image_size} must be at least 1 pixel")
    if not str(spec).strip():
        raise DataError(f"no data given; data can be {_choices()}")
    name, _, text = str(spec).partition(":")
    if name in SOURCES:
        loader, known = SOURCES[name]
        return loader(_options(str(spec), text, known), seed, image_size)
    path = Path(spec).expanduser()
    if path.is_dir():
        if not any(d.is_dir() for d in path.iterdir()) and pack_files(path):
            return load_packs(path, seed, image_size)
        return load_folder(path, seed)
    if path.suffix.lower() == ".npz" and path.is_file():
        return load_packs(path, seed, image_size)
    if path.exists():
        kind = "an image" if path.suffix.lower() in SUFFIXES else "a file"
        raise DataError(f"{path} is {kind}; give the folder that holds the class folders, or an .npz pack")
    raise DataError(f"there is no data set {str(spec)!r}{_nearest(name, path)}; data can be {_choices()}")


def _options(spec: str, text: str, known: tuple[str, ...] | None) -> dict[str, str]:
    options: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals or not key or not value:
            raise DataError(f"{part!r} in {spec!r} is not an option: write name=value, with commas between")
        if known is not None and key not in known:
            near = get_close_matches(key, known, 1, 0.5)
            hint = f"; did you mean {near[0]}?" if near else f"; it has {', '.join(known) or 'none'}"
            raise DataError(f"{spec.partition(':')[0]} has no option {key!r}{hint}")
        if key in options:
            raise DataError(f"{key} is given twice in {spec!r}")
        options[key] = value
    return options


def _nearest(name: str, path: Path) -> str:
    """The closest thing that exists, in brackets: a source, or a neighbour of what is missing of the path."""
    near = get_close_matches(name.lower(), SOURCES, 1)
    if near:
        return f" (did you mean {near[0]}?)"
    where = ""
    while not path.parent.is_dir():
        path = path.parent
        where = f" ({path.parent} has no {path.name})"
    neighbours = {neighbour.name.lower(): neighbour for neighbour in path.parent.iterdir()}
    near = get_close_matches(path.name.lower(), neighbours, 1)
    return f" (did you mean {neighbours[near[0]]}?)" if near else where


def _choices() -> str:
    return f"{', '.join(SOURCES)}, a folder of class folders, or an .npz pack"
