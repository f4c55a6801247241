"""Make maps of where to look, once for all images, and keep them.

  foveal maps PHOTOS/ --map tokencut                       objects found without labels, in the features of DINO
  foveal maps PHOTOS/ --map tokencut --model runs/NAME     in those of a model trained here
  foveal maps PHOTOS/ --map given --masks MASKS/           masks that you have: MASKS/cat/1.png for PHOTOS/cat/1.jpg
  foveal pretrain PHOTOS/ --map tokencut --maps maps/      what they are for

Stop it at any time: the same command goes on. Run it again after images were added or changed: only theirs are made.
Writes a folder with the maps and a contact sheet.
"""

import argparse
import time
import warnings
from pathlib import Path
from typing import Any, Self

from foveal.cli.flags import add_settings, given_settings
from foveal.train.errors import Interrupted
from foveal.train.map_settings import MapSettings


def declare(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.set_defaults(run=run)
    parser.add_argument("data", nargs="?", metavar="PHOTOS", help="a folder of images, a .npz pack, scenes, ...")
    add_settings(parser, kind=MapSettings)


def run(values: argparse.Namespace) -> int:
    """Make what is missing, tell what there is, draw the sheet."""
    from rich.console import Console

    from foveal.data import DataWarning
    from foveal.train.map_making import make_maps, ranks

    settings = MapSettings(data=values.data or "", **given_settings(values, kind=MapSettings))
    warnings.simplefilter("ignore", DataWarning)  # what it says is told below
    console = Console(stderr=True, highlight=False)
    first = ranks()[0] == 0
    shown = Shown(console if first else None, settings.map)
    try:
        with shown:
            made = make_maps(settings, shown)
    except KeyboardInterrupt:
        raise Interrupted(_how_to_go_on(settings, shown)) from None
    if first:
        for note in made.notes:
            console.print(note, soft_wrap=True, markup=False)
        print(_summary(settings, made, shown))
        if settings.sheet and bool(made.store.found.any()):
            print(f"sheet  {_sheet(settings, made)}")
    return 0


class Shown:
    """A bar with images per second on a terminal, a line elsewhere; called with (done, to do)."""

    def __init__(self, console: Any, name: str) -> None:
        self.console, self.name = console, name
        self.done, self.todo, self.began, self.ended = 0, 0, 0.0, 0.0
        self.bar: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, done: int, todo: int) -> None:
        """Tell how far it is."""
        self.done, self.todo, self.ended = done, todo, time.monotonic()
        if done == 0:
            self.began = self.ended
            if todo and self.console is not None:
                self._open(todo)
        elif self.bar is not None:
            self.bar.update(self.entry, completed=done, speed=f"{self.speed:,.0f} images/s")

    @property
    def speed(self) -> float:
        """Images per second."""
        return self.done / max(self.ended - self.began, 1e-9)

    def _open(self, todo: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if not self.console.is_terminal:
            self.console.print(f"{self.name} of {todo:,} images", soft_wrap=True, markup=False)
            return
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(),
                   TextColumn("{task.fields[speed]}"), TimeRemainingColumn())  # fmt: skip
        self.bar = Progress(*columns, console=self.console, transient=True, refresh_per_second=4)
        self.entry = self.bar.add_task(self.name, total=todo, speed="")
        self.bar.start()


def _how_to_go_on(settings: MapSettings, shown: Shown) -> str:
    if not shown.todo:
        return "stopped before the first map"
    return (
        f"stopped after {shown.done:,} of {shown.todo:,} images; their maps are kept in {settings.out}: the same"
        " command goes on"
    )


def _summary(settings: MapSettings, made: Any, shown: Shown) -> str:
    store = made.store
    found, total = int(store.found.sum()), len(store)
    lines = [f"maps   {settings.map} of {found:,} of {total:,} images in {store.folder}"]
    if shown.todo:
        lines[0] += f"; {shown.done - len(store.unreadable):,} made now, {shown.speed:,.1f} images/s"
    else:
        lines[0] += "; all were there" if found == total else "; nothing new to make"
    told = [
        (store.degenerate, "no object found (the image's features prefer no place)"),
        (store.blank & ~store.degenerate, "prefer no place"),
        (store.inverted, "probably what surrounds the object (three corners of the image are in it)"),
    ]
    lines += [f"       {int(flag.sum()):,} {words}" for flag, words in told if bool(flag.any())]
    if settings.map == "tokencut" and store.inverted.sum() > 0.2 * found and "foreground" not in settings.map_args:
        lines.append("       try --map-args foreground=corners, which takes the other side of these, in another folder")
    for names, words in (
        ([f"{n} ({why})" for n, why in store.unreadable], "cannot be read"),
        (made.unmasked, "no mask"),
    ):
        if names:
            some = ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
            lines.append(f"       {len(names):,} left out, {words}: {some}")
    return "\n".join(lines)


def _sheet(settings: MapSettings, made: Any) -> Path:
    """A sheet of images from all over the set."""
    import torch

    from foveal.explain import save_png
    from foveal.explain.map_sheet import map_sheet
    from foveal.explain.whole import whole_frames

    there = made.store.found.nonzero()[:, 0]
    index = there[torch.linspace(0, len(there) - 1, min(settings.sheet, len(there))).round().long()].tolist()
    images = made.images.subset(index)
    weight = None if made.source.model is None else next(made.source.model.parameters(), None)
    device = torch.device("cpu") if weight is None else weight.device
    found, pixels = [], []
    for k in range(len(index)):
        frame = whole_frames(images.subset([k]), made.config, device)
        pixels.append(frame.pixels[0])
        found.append(made.source(frame.inputs) if settings.map in ("tokencut", "maskcut", "lost", "dino") else None)
    objects = "; right, the objects it is of, with their boxes" if found[0] is not None else ""
    note = f"Of each image: itself; its map, coloured where a place gets more than its even share{objects}."
    figure = map_sheet(pixels, [made.store.map(i) for i in index], found, f"{settings.map} of {settings.data}", note)
    return save_png(figure, made.store.folder / "contact-sheet.png")
