"""Digit scenes: handwritten digits on photographs, with exact object masks and misleading backgrounds.

    training:    background = the photograph of the digit's own class   with probability `shortcut`,
                 any photograph                                          otherwise
    mixed_same:  every digit on the photograph of its own class
    mixed_rand:  the same digits, same places, on any photograph

A model that looks at the background scores on mixed_same and fails on mixed_rand; the difference is the
BG-Gap of the Backgrounds Challenge (Xiao, Engstrom, Ilyas, Madry: "Noise or Signal", 2020) in miniature.

Disjoint by construction, whatever the seed: the digit images (`foveal.data.handwriting`) and the parts of the
photographs (`foveal.data.photographs`) of train, val and test, and those of the stages "source" (a model to
start from) and "target" (the model tuned from it).
"""

import math
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from foveal import chance
from foveal.data.errors import DataError
from foveal.data.handwriting import pool_digits, shape
from foveal.data.images import Data, Images
from foveal.data.photographs import PHOTOGRAPHS, Box, Pixels, photograph, tiles

Colour = tuple[float, float, float]  # red, green, blue in [0, 1]

STAGES = ("both", "source", "target")
MIN_SIZE = 32
_TEST_SEED = 0
_MIN_CELL = 16  # pixels; below that a digit cannot be told


@dataclass(frozen=True)
class Scenes:
    """What to make. As text: "scenes:shortcut=0.8,train=180,classes=5-9,size=32,digits=1,stage=target".

    shortcut: probability in [0, 1] that a training background is the one of the class; otherwise it is any
    of the classes' photographs, the own one included. Val is drawn like train: who has only such data has
    only such data to select on, and what the tests ask stays unseen until the end.
    train, val, test: numbers of scenes; classes take turns.  classes: the digits used, in rising order.
    size: side of the square image in pixels, at least 32.
    digits: how many digits of the scene's class are in it, side by side without overlap.
    stage: which pool of digit images and background tiles: "source", "target", or "both" together.
    """

    shortcut: float = 0.0
    train: int = 2000
    val: int = 200
    test: int = 500
    classes: tuple[int, ...] = tuple(range(10))
    size: int = 32
    digits: int = 1
    stage: str = "both"

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class Placed:
    """One digit: its number in scikit-learn's set, its box in the image, its two colours in [0, 1]."""

    digit: int
    top: int
    left: int
    side: int
    fill: Colour
    line: Colour


@dataclass(frozen=True)
class Scene:
    """All that was drawn for one image; painting it involves no chance."""

    label: int  # position in Scenes.classes
    digits: tuple[Placed, ...]
    photo: str
    crop: Box  # of the photograph, in its pixels


def parse(spec: str, image_size: int | None = None) -> Scenes:
    """Scenes from text: "scenes" or "scenes:key=value,..."; `image_size` where the text names no size."""
    name, _, text = spec.partition(":")
    if name != "scenes":
        raise DataError(f'{spec!r} does not begin with "scenes"')
    given: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        known = [field.name for field in fields(Scenes)]
        if key not in known or not equals:
            raise DataError(
                f"{part!r} in {spec!r} is not an option of scenes, written key=value; the keys are {', '.join(known)}"
            )
        if key in given:
            raise DataError(f"{key} is given twice in {spec!r}")
        given[key] = value
    if image_size is not None:
        given.setdefault("size", str(image_size))
    return Scenes(**{key: _value(key, value) for key, value in given.items()})  # type: ignore[arg-type]  # by key


def load(spec: str | Scenes = "scenes", *, seed: int = 0, image_size: int | None = None) -> Data:
    """Make the scenes: train, val, and the tests mixed_same and mixed_rand, with masks. Some 2,000 a second.

    The seed draws train and val; the tests are always the same ones, as a benchmark's are. Which digit images
    and background tiles a set may use is fixed. Fewer scenes with the same seed are a prefix of more.
    """
    options = parse(spec, image_size) if isinstance(spec, str) else spec
    sets = plan(options, seed)
    own = [PHOTOGRAPHS[c] for c in options.classes]
    return Data(
        name="scenes",
        train=_images(sets["train"], options),
        val=_images(sets["val"], options),
        tests={name: _images(sets[name], options) for name in ("mixed_same", "mixed_rand")},
        flip=False,  # a mirrored digit is no digit
        notes=(
            f"each digit has its photograph ({', '.join(own)}); in train and val it is behind its digit with"
            f" probability {options.shortcut:g} and any of them is otherwise",
            "mixed_same and mixed_rand show the same digits in the same places on different backgrounds",
        ),
    )


def plan(options: Scenes, seed: int = 0) -> dict[str, list[Scene]]:
    """Draw every scene of train, val, mixed_same and mixed_rand: all chance is here."""
    sizes = {"train": options.train, "val": options.val, "test": options.test}
    drawn = {split: [_draw(options, seed, split, i) for i in range(number)] for split, number in sizes.items()}
    return {
        "train": [biased for biased, _, _ in drawn["train"]],
        "val": [biased for biased, _, _ in drawn["val"]],
        "mixed_same": [same for _, same, _ in drawn["test"]],
        "mixed_rand": [any_ for _, _, any_ in drawn["test"]],
    }


def paint(scene: Scene, size: int) -> tuple[Pixels, npt.NDArray[np.bool_]]:
    """The image (size, size, 3) uint8 and its mask (size, size): True where a digit was painted.

    A digit is its strokes in one colour with a thin line around them in another, light on dark or dark on
    light, so that it can be told from any background. The line belongs to the digit: outside the mask the
    image is the bare photograph.
    """
    top, left, bottom, right = scene.crop
    crop = Image.fromarray(photograph(scene.photo)[top:bottom, left:right])
    image = np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    mask = np.zeros((size, size), dtype=bool)
    for placed in scene.digits:
        box = (slice(placed.top, placed.top + placed.side), slice(placed.left, placed.left + placed.side))
        strokes, cover = shape(placed.digit, placed.side)
        ink = strokes[:, :, None]
        colour = ink * np.array(placed.fill, np.float32) + (1 - ink) * np.array(placed.line, np.float32)
        image[box] += cover[:, :, None] * (colour - image[box])
        mask[box] |= cover > 0
    return np.rint(image * 255).clip(0, 255).astype(np.uint8), mask


def _draw(options: Scenes, seed: int, split: str, i: int) -> tuple[Scene, Scene, Scene]:
    """Scene i of a split on a background drawn as in training, on its own, and on any."""
    g = chance.generator(_TEST_SEED if split == "test" else seed, "scenes", ("train", "val", "test").index(split), i)
    label = i % len(options.classes)
    pools = [f"{stage}/{split}" for stage in ("source", "target") if options.stage in (stage, "both")]
    digits = _place(options, options.classes[label], pools, g, turn=i // len(options.classes))
    own = PHOTOGRAPHS[options.classes[label]]
    other = PHOTOGRAPHS[options.classes[_below(len(options.classes), g)]]
    biased = own if _uniform(0, 1, g) < options.shortcut else other
    where = torch.rand(4, generator=g).tolist()
    same, rand = (Scene(label, digits, name, _crop(name, pools, where)) for name in (own, other))
    return (same if biased == own else rand), same, rand


def _place(options: Scenes, digit: int, pools: list[str], g: torch.Generator, turn: int) -> tuple[Placed, ...]:
    """Digits in different cells of the smallest square division of the image that has room for them all."""
    available = [number for pool in pools for number in pool_digits(pool, digit)]
    # Turns go through the pool before any image comes again: 36 scenes of a class show 36 handwritings.
    start, step = turn * options.digits, len(available)
    numbers = [available[_scatter(start + k, step)] for k in range(options.digits)]
    division = math.isqrt(options.digits - 1) + 1
    cells = torch.randperm(division**2, generator=g)[: options.digits].tolist()
    edge = [options.size * c // division for c in range(division + 1)]
    placed = []
    for number, cell in zip(numbers, cells, strict=True):
        row, column = divmod(cell, division)
        room = options.size // division
        side = round(room * _uniform(0.7, 1.0, g))
        top = edge[row] + _below(room - side + 1, g)
        left = edge[column] + _below(room - side + 1, g)
        fill, line = _colours(g)
        placed.append(Placed(number, top, left, side, fill, line))
    return tuple(placed)


def _scatter(turn: int, n: int) -> int:
    """A fixed walk through 0..n-1 that meets every number once in n turns and neighbours late."""
    step = next(s for s in range(max(1, round(n * 0.618)), 2 * n + 2) if math.gcd(s, n) == 1)
    return turn * step % n


def _colours(g: torch.Generator) -> tuple[Colour, Colour]:
    """Fill and line: one light and one dark, either way round, each a little coloured."""
    light, dark = (_near(tone, g) for tone in (0.85, 0.15))
    return (light, dark) if _uniform(0, 1, g) < 0.5 else (dark, light)


def _near(tone: float, g: torch.Generator) -> Colour:
    red, green, blue = (tone + _uniform(-0.15, 0.15, g) for _ in range(3))
    return red, green, blue


def _crop(name: str, pools: list[str], where: list[float]) -> Box:
    """A square part of one of the pools' tiles; `where`: tile, side, top and left, each in [0, 1)."""
    boxes = [box for pool in pools for box in tiles(name, pool)]
    top, left, bottom, right = boxes[int(where[0] * len(boxes))]
    room = min(bottom - top, right - left)
    side = round(room * (0.6 + 0.4 * where[1]))
    top += int(where[2] * (bottom - top - side + 1))
    left += int(where[3] * (right - left - side + 1))
    return top, left, top + side, left + side


def _images(scenes: list[Scene], options: Scenes) -> Images:
    pixels = np.empty((len(scenes), options.size, options.size, 3), dtype=np.uint8)
    masks = np.empty((len(scenes), options.size, options.size), dtype=bool)
    for i, scene in enumerate(scenes):
        pixels[i], masks[i] = paint(scene, options.size)
    return Images(
        labels=torch.tensor([scene.label for scene in scenes], dtype=torch.int64),
        classes=tuple(str(c) for c in options.classes),
        pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        masks=torch.from_numpy(masks),
        names=tuple(_name(i, scene) for i, scene in enumerate(scenes)),
    )


def _name(i: int, scene: Scene) -> str:
    return f"{i}: digit {'+'.join(str(placed.digit) for placed in scene.digits)} on {scene.photo}"


def _uniform(low: float, high: float, g: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=g, dtype=torch.float64))


def _below(n: int, g: torch.Generator) -> int:
    return int(torch.randint(n, (), generator=g))


def _value(key: str, text: str) -> object:
    try:
        if key == "shortcut":
            return float(text)
        if key == "stage":
            return text
        if key == "classes":
            return tuple(number for part in text.split("+") for number in _range(part))
        return int(text)
    except ValueError:
        example = {"shortcut": "shortcut=0.8", "classes": "classes=5-9 or classes=1+4+7"}.get(key, f"{key}=32")
        raise DataError(f"{key}={text} cannot be read; write it like {example}") from None


def _range(text: str) -> list[int]:
    low, dash, high = text.partition("-")
    return list(range(int(low), int(high) + 1)) if dash else [int(low)]


def _check(options: Scenes) -> None:
    if not 0 <= options.shortcut <= 1:  # also refuses nan
        raise DataError(f"shortcut={options.shortcut} is a probability: a number from 0 to 1")
    classes = options.classes
    if len(classes) < 2 or list(classes) != sorted(set(classes)) or not set(classes) <= set(range(10)):
        raise DataError(f"classes={classes} must be at least two different digits from 0 to 9 in rising order")
    if options.stage not in STAGES:
        raise DataError(f"stage={options.stage!r} is none of {', '.join(STAGES)}")
    if options.size < MIN_SIZE:
        raise DataError(f"size={options.size} is too small to show a digit; use {MIN_SIZE} pixels or more")
    for name in ("train", "val", "test"):
        if getattr(options, name) < len(classes):
            raise DataError(f"{name}={getattr(options, name)} leaves a class empty: use {len(classes)} scenes or more")
    if options.digits < 1:
        raise DataError(f"digits={options.digits} leaves nothing to see; use 1 or more")
    division = math.isqrt(options.digits - 1) + 1
    if options.size // division < _MIN_CELL:
        raise DataError(
            f"digits={options.digits} do not fit an image of {options.size} pixels;"
            f" use size={_MIN_CELL * division} or more"
        )
