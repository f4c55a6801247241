"""Measure the features of a model as they are: nothing of it is trained.

  foveal evaluate runs/NAME --knn --linear                 of a run, on the data that it was trained on
  foveal evaluate runs/NAME PHOTOS/ --knn --before-norm    on other data, features before the final norm
  foveal evaluate vit_small_patch16_224.dino PHOTOS/ --knn --logistic --label-fraction 0.01 0.1 1
  foveal evaluate vit_base_patch16_224 PHOTOS/ --init FILE --linear --base-lr 0.1

--knn votes among the training images; --linear trains one layer on them, as MAE does; --logistic fits a regression.
Whatever has to be chosen (k, learning rate, penalty) is chosen on val; docs/evaluation.md says what the numbers mean.
Prints a table and writes evaluation.json into the run's folder, or into --out.
"""

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveal.cli.flags import UsageError, pairs
from foveal.train.errors import RunError, SettingsError

if TYPE_CHECKING:
    from foveal.cli.evaluated import Evaluation, Subject, Taken
    from foveal.data import Data

ONLY_NAMES = ("init", "model_args", "image_size")  # a run knows its own


def declare(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("model", metavar="RUN", help="folder of a finished run (foveal train, pretrain), or a timm model")
    add("data", nargs="?", metavar="DATA", help="labelled images, as foveal train takes them (default: the run's)")
    group = parser.add_argument_group("protocols, one or several")
    group.add_argument("--knn", action="store_true", help="weighted k nearest neighbours, as DINO's")
    group.add_argument("--linear", action="store_true", help="linear probe, as MAE's, on augmented images")
    group.add_argument("--logistic", action="store_true", help="logistic regression, as DINO's for few labels")
    group = parser.add_argument_group("features")
    add = group.add_argument
    add(
        "--tokens",
        default="auto",
        metavar="class|mean|both|distillation",
        help="what a feature is (default: the class token; the mean of the patches where there is none)",
    )
    add("--block", type=int, nargs="+", default=[-1], metavar="N",
        help="blocks, from 0 or from the end, side by side (default: -1, the last)")  # fmt: skip
    add("--before-norm", action="store_true", help="before the final norm instead of after it")
    group = parser.add_argument_group("how")
    add = group.add_argument
    add(
        "--label-fraction",
        type=float,
        nargs="+",
        default=[1.0],
        metavar="X",
        help="use these shares of the training images of each class (default: 1)",
    )
    add("--k", type=int, nargs="+", default=[10, 20, 100, 200], metavar="K", help="neighbours (default: 10 20 100 200)")
    add("--temperature", type=float, nargs="+", default=[0.07], metavar="T", help="of the votes (default: 0.07)")
    add("--epochs", type=int, default=90, metavar="N", help="of the linear probe (default: 90)")
    add(
        "--base-lr",
        type=float,
        nargs="+",
        metavar="X",
        help="learning rates of the linear probe for 256 images a step; MAE's is 0.1 (default: 0.1 to 100)",
    )
    add("--probe-batch", type=int, metavar="N", help="images a step of the linear probe (default: by the set's size)")
    add("--cached", action="store_true", help="--linear on features taken once, without augmentation: far cheaper")
    add("--penalty", type=float, nargs="+", default=[0.01, 0.1, 1.0], metavar="X",
        help="of the logistic regression (default: 0.01 0.1 1)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="of start, order and crops of a probe (default: 0)")
    add("--data-seed", type=int, metavar="N", help="of the split and the subset (default: the run's, else 0)")
    add("--bfloat16", action="store_true", help="forwards in bfloat16")
    add("--batch-size", type=int, default=64, metavar="N", help="images per forward (default: 64)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add("--workers", type=int, default=0, metavar="N", help="processes that decode (default: 0)")
    add("--out", metavar="FOLDER", help="where evaluation.json goes (default: RUN)")
    group = parser.add_argument_group("of a timm model")
    add = group.add_argument
    add("--init", metavar="INIT", help="its weights: pretrained, none, a file, or a run folder (default: pretrained)")
    add("--model-args", metavar="KEY=VALUE,...", help="further arguments of timm.create_model")
    add("--image-size", type=int, metavar="N", help="side of the input in pixels (default: the model's own)")


def run(values: argparse.Namespace) -> int:
    """Measure, print, write."""
    _check(values)
    from foveal.cli.evaluated import table, write
    from foveal.evaluate.features import Reader

    _recipe(values)
    subject = _subject(values)
    data = _data(values, subject)
    definition = Reader(subject.model, **_features(values)).definition  # wrong blocks and tokens are told at once
    _say(f"model     {subject.name}; {subject.origin}")
    tests = ", ".join(f"{len(images):,} {name}" for name, images in data.tests.items())
    _say(
        f"data      {data.name}: {len(data.classes)} classes; {len(data.train):,} train, {len(data.val):,} val; {tests}"
    )
    for note in data.notes:
        _say(f"          {note}")
    _say(f"features  {definition}")
    _say(f"frame     {subject.frame}")
    found = _measure(values, subject, data)
    print(table(found))
    folder = Path(values.out) if values.out else subject.folder
    if folder is None:
        print("not kept: give --out FOLDER to keep it")
    else:
        print(f"written   {write(folder, found)}")
    return 0


def _measure(values: argparse.Namespace, subject: "Subject", data: "Data") -> list["Evaluation"]:
    """What was asked, for each label fraction. A further protocol is a function of evaluate/, a flag and lines here."""
    from foveal import evaluate
    from foveal.cli.evaluated import of_knn, of_probe
    from foveal.data import subset

    how: dict[str, Any] = {"batch_size": values.batch_size, "device": subject.device, "workers": values.workers}
    how |= _features(values) | {"autocast": subject.autocast}
    recipe = _recipe(values)
    taken = None
    if values.knn or values.logistic or (values.linear and values.cached):
        taken = _taken(subject, data, how)
    found = []
    for fraction in values.label_fraction:
        index = subset(data.train, share=fraction, seed=subject.data_seed)
        about = subject.about(data, fraction, len(index))
        if taken is not None:
            train, val, tests = taken.train.subset(index), taken.val, taken.tests
        if values.knn:
            ask = partial(evaluate.knn, train, k=values.k, temperature=values.temperature, device=subject.device)
            found.append(of_knn(about, ask(val), {name: ask(one) for name, one in tests.items()}))
        if values.logistic:
            _say("logistic regression")
            found.append(of_probe(about, evaluate.logistic_probe(train, tests, values.penalty, val, seed=values.seed)))
        if values.linear and values.cached:
            probe = evaluate.cached_linear_probe(train, tests, val, recipe, device=subject.device, progress=_progress)
            found.append(of_probe(about, probe))
        elif values.linear:
            part = replace(data, train=data.train.subset(index))
            probe = evaluate.linear_probe(subject.model, part, subject.config, recipe, **how, progress=_progress)
            found.append(of_probe(about, probe))
    return found


def _taken(subject: "Subject", data: "Data", how: dict[str, Any]) -> "Taken":
    """Features of all sets, each image's once."""
    from foveal.cli.evaluated import Taken
    from foveal.evaluate import features

    def of(name: str, images: Any) -> Any:
        _say(f"features of {len(images):,} images of {name}")
        return features(subject.model, images, subject.config, **how)

    return Taken(
        of("train", data.train), of("val", data.val), {name: of(name, one) for name, one in data.tests.items()}
    )


def _subject(values: argparse.Namespace) -> "Subject":
    """The model that was named, where it computes, with what it brings along."""
    import torch

    from foveal.cli.evaluated import Subject
    from foveal.train.machine import device_of
    from foveal.train.models import build
    from foveal.train.run import Run
    from foveal.train.settings import Settings

    device = device_of(values.device)
    autocast = torch.bfloat16 if values.bfloat16 else None
    folder = Path(values.model).expanduser()
    if folder.is_dir():
        if given := [name for name in ONLY_NAMES if getattr(values, name) is not None]:
            raise SettingsError(f"--{given[0].replace('_', '-')} is for timm models: {folder} brings its own")
        done = Run.load(folder)
        settings, card = done.settings, done.card
        seed = settings.seed if settings.data_seed is None else settings.data_seed
        return Subject(
            model=done.model().to(device), name=str(folder), origin=f"{card['architecture']}, from {card['init']}",
            config=done.config, device=device, autocast=autocast, folder=folder, data=settings.data,
            data_seed=seed if values.data_seed is None else values.data_seed, image_size=settings.image_size,
        )  # fmt: skip
    if folder.name != values.model and ":" not in values.model:
        raise RunError(f"there is no run {folder}")
    arguments = pairs("model_args", values.model_args or "")
    settings = Settings(
        model=values.model, model_args=arguments, image_size=values.image_size, init=values.init or "pretrained"
    )
    try:
        built = build(settings, 0)
    except SettingsError as error:
        raise SettingsError(f"there is no run {folder}, and {error}" if not arguments else str(error)) from None
    return Subject(
        model=built.model.eval().to(device), name=values.model, origin=built.origin, config=built.image, device=device,
        autocast=autocast, folder=None, data="", data_seed=values.data_seed or 0, image_size=values.image_size,
    )  # fmt: skip


def _data(values: argparse.Namespace, subject: "Subject") -> "Data":
    import warnings

    from foveal.data import DataError, DataWarning, load

    warnings.simplefilter("ignore", DataWarning)  # the notes on the data, which are shown, have them
    spec = values.data or subject.data
    if not spec:
        raise UsageError("no data given: foveal evaluate MODEL DATA", "foveal evaluate")
    data = load(spec, seed=subject.data_seed, image_size=subject.image_size)
    if len(data.train.labels.unique()) < 2:
        only = data.classes[int(data.train.labels[0])]
        raise DataError(f"the images of {data.name} are all of one class ({only}): there is nothing to tell apart")
    return data


def _recipe(values: argparse.Namespace) -> Any:
    """The linear probe's; and whatever the protocols would refuse is refused here, before features are taken."""
    from foveal.evaluate.heads import Recipe
    from foveal.evaluate.knn import check_settings
    from foveal.evaluate.logistic import check_penalties

    check_settings(values.k, values.temperature)
    check_penalties(values.penalty)
    rates = {} if values.base_lr is None else {"base_lr": values.base_lr}
    return Recipe(epochs=values.epochs, batch=values.probe_batch, seed=values.seed, **rates)


def _features(values: argparse.Namespace) -> dict[str, Any]:
    block = values.block[0] if len(values.block) == 1 else tuple(values.block)
    return {"block": block, "tokens": values.tokens, "norm": not values.before_norm}


def _check(values: argparse.Namespace) -> None:
    if not (values.knn or values.linear or values.logistic):
        raise UsageError("nothing asked: give --knn, --linear or --logistic, or several", "foveal evaluate")
    if values.cached and not values.linear:
        raise UsageError("--cached is for --linear", "foveal evaluate")
    if values.batch_size < 1 or values.workers < 0:
        raise SettingsError("--batch-size must be 1 or more, --workers 0 or more")
    if any(not 0 < fraction <= 1 for fraction in values.label_fraction):
        raise SettingsError(f"--label-fraction {values.label_fraction} must be in (0, 1]: 1 % is 0.01")


def _progress(epoch: int, epochs: int, best: float) -> None:
    if epoch % max(1, epochs // 9) == 0 or epoch == epochs:
        _say(f"linear probe: epoch {epoch}/{epochs}, best on val {100 * best:.1f} %")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
