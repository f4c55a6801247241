"""Train a model as settings say, into a run folder that a kill cannot spoil.

fit(settings)                 begins; refuses to touch a run that is there
fit(settings, resume=True)    continues from the last finished epoch (or begins); a finished run is returned
"""

import contextlib
import json
import warnings
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import torch
from safetensors.torch import load_file

from foveal.attention import attach, supported
from foveal.data import Data, DataWarning, load, subset
from foveal.data.order import step_sizes
from foveal.mix import MIXERS, TOKEN_MIXERS, TokenMixer, token_mixer
from foveal.train import memory, outcome
from foveal.train.errors import SettingsError
from foveal.train.files import write_text
from foveal.train.folder import is_finished, locked, prepare
from foveal.train.loop import Epochs, batches_of, stoppable, train, workers_for
from foveal.train.machine import device_of, has_unused, processes, quiet_lightning, trainer_for, wait_for_first
from foveal.train.mapping import source_of
from foveal.train.models import Built, build, resolve, write_model
from foveal.train.optimise import Average
from foveal.train.precision import choose
from foveal.train.progress import Show
from foveal.train.record import Record, Tell
from foveal.train.run import Run
from foveal.train.settings import Settings
from foveal.train.task import Classify
from foveal.transfer import GUIDES


def fit(settings: Settings, resume: bool = False, overwrite: bool = False, progress: bool | Tell = False) -> Run:
    """Train, select on validation, report on the test sets; the finished run.

    resume: continue an unfinished run from its last finished epoch; on the CPU the final weights are bit for bit
    those of a run that was never stopped. overwrite: remove a run that is in the folder. progress: show it on
    stderr, or call this with each epoch's row of metrics.csv. Raises SettingsError, foveal.data.DataError,
    RunError (weights, folder or disk), DivergedError, and Interrupted after Ctrl-C.
    """
    with stoppable(settings):
        return _fit(settings, resume, overwrite, progress)


def load_data(settings: Settings) -> Data:
    """The data of a run, with the subset of the training images that the settings ask for."""
    seed = settings.seed if settings.data_seed is None else settings.data_seed
    data = load(settings.data, seed=seed, image_size=settings.image_size)
    if settings.label_fraction is None and settings.per_class is None:
        return data
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DataWarning)
        index = subset(data.train, share=settings.label_fraction, per_class=settings.per_class, seed=seed)
    notes = [str(warning.message) for warning in caught]
    notes.append(f"{len(index):,} of {len(data.train):,} training images used")
    return replace(data, train=data.train.subset(index), notes=(*data.notes, *notes))


def mixer_of(settings: Settings, built: Built, data: Data, average: Average | None = None) -> Any:
    """The mixer that the settings name, with the map that it is to follow, and the token mixer on top of it.

    built: the model to be trained, before its first step.  average: its running average, where there is one.
    """
    source = source_of(settings, built, data, average)
    follow = {} if source is None else {"map": source}
    mixer = MIXERS[settings.mix](**settings.mix_args, **follow, seed=settings.seed)
    if settings.token_mix == "none":
        return mixer
    options = dict(settings.token_mix_args)
    if "smoothing" in TOKEN_MIXERS[settings.token_mix][0].__dataclass_fields__:
        options["smoothing"] = settings.smoothing
    return token_mixer(settings.token_mix, mixer, **options, seed=settings.seed)


def guide_of(settings: Settings, model: torch.nn.Module, mixer: Any = None) -> Any:
    """The guide that the settings name, its source the weights `model` has now; None for none or weight 0.

    mixer: where it mixes tokens of images inside the model, the guide keeps to the blocks before: the source sees none
    of that. Raises SettingsError where no block is left.
    """
    kind = GUIDES[settings.guide]
    if kind is None or settings.guide_weight == 0:
        return None
    first = mixer.first_mixed_block(model) if isinstance(mixer, TokenMixer) else None
    if first is None:
        return kind(source=model, weight=settings.guide_weight)
    if first == 0:
        raise SettingsError(
            f"token_mix={settings.token_mix} mixes before the first block, so guide={settings.guide} has nothing to"
            " compare: mix at a later block (token_mix_args), or leave one of them out"
        )
    return kind(source=model, weight=settings.guide_weight, layers=range(first))


def _fit(settings: Settings, resume: bool, overwrite: bool, progress: bool | Tell) -> Run:
    if not settings.data:
        raise SettingsError("no data given: a folder of class folders, a .npz pack, scenes, digits, cifar10, ...")
    folder = settings.folder
    if resume and is_finished(folder) and not overwrite:
        prepare(settings, resume=True, overwrite=False)
        return Run.load(folder)
    resolve(settings)  # a wrong model name is told before the data are read
    device = device_of(settings.device)
    memory.begin(device)
    data = load_data(settings)
    built = build(settings, len(data.classes))
    precision = choose(settings.precision, device, built.model)
    count, nodes = processes(settings.devices)
    world = count * nodes
    sizes = step_sizes(len(data.train), settings.batch_size, world, settings.accumulate)
    average = Average(built.model, settings.ema) if settings.ema else None
    mixer = mixer_of(settings, built, data, average)
    task = Classify(
        built.model,
        settings,
        classes=len(data.classes),
        sizes=sizes,
        parts=world * settings.accumulate,
        mixer=mixer,
        guide=guide_of(settings, built.model, mixer),
        average=average,
    )
    record = Record(folder, task, len(data.train), tell=progress if callable(progress) else None)
    show = Show(record) if progress is True else None
    unused = world > 1 and has_unused(built.model, built.image)
    with quiet_lightning():
        trainer = trainer_for(settings, device, precision, [record, *([show] if show else [])], unused)
    with contextlib.ExitStack() as stack:
        checkpoint = None
        if trainer.is_global_zero:
            stack.enter_context(locked(folder))
            checkpoint = prepare(settings, resume=resume, overwrite=overwrite)
            outcome.write_split(folder, data, resumed=checkpoint is not None)
        with quiet_lightning():
            wait_for_first(trainer)
        if not trainer.is_global_zero and record.last.is_file():
            checkpoint = record.last
        batches = batches_of(settings, data, built.image, trainer, settings.randaugment)
        if show is not None and trainer.is_global_zero:
            show.begin(data, built, _how(settings), f"{device} in {precision}", checkpoint)
        if supported(built.model):
            stack.enter_context(attach(built.model))
        stack.enter_context(quiet_lightning())
        train(trainer, task, batches, checkpoint)
    with contextlib.ExitStack() as stack:
        if trainer.is_global_zero:
            stack.enter_context(locked(folder))
        _finish(settings, data, built, task, trainer, precision, batches[0])
    return Run.load(folder)


def _how(settings: Settings) -> str:
    parts = (settings.mix, settings.token_mix, settings.guide)
    return " + ".join(part for part in parts if part != "none") or "plain"


def _finish(
    settings: Settings, data: Data, built: Built, task: Classify, trainer: Any, precision: str, train: Epochs
) -> None:
    """Take the best weights, write the model, test it, and close the run with results.json."""
    folder, device, first = settings.folder, trainer.strategy.root_device, trainer.is_global_zero
    best = Record(folder, task, len(data.train)).best(task.best["epoch"])
    built.model.load_state_dict(load_file(best))
    built.model.to(device).eval()
    sets: dict[str, Any] = {}
    for name, images in data.tests.items():
        predictions = outcome.predict_share(
            built.model,
            images,
            built.image,
            rank=trainer.global_rank,
            world=trainer.world_size,
            batch_size=settings.batch_size,
            device=device,
            workers=workers_for(settings.workers, data),
        )
        if predictions is not None:
            gaps = outcome.label_gaps(built, images, task.mixer, settings, device) if first else None
            outcome.write_predictions(folder, name, predictions, gaps)
            sets[name] = outcome.scores(predictions, gaps)
    if not first:
        trainer.strategy.barrier("results")
        return
    train.batches.set_epoch(0)
    outcome.write_samples(folder, next(iter(train.batches)), built.image, task.mixer, built.model, settings.seed)
    write_model(folder, built, data.classes, {"data": data.name, "settings": settings.as_dict()})
    rows = Run(folder).metrics
    chosen = rows[task.best["epoch"] - 1]
    seconds = sum(row["seconds"] or 0 for row in rows)
    results = {
        "sets": sets,
        "bg_gap": outcome.bg_gap(sets),
        "val": {name: chosen[f"val_{name}"] for name in ("accuracy", "balanced_accuracy", "loss")},
        "best_epoch": task.best["epoch"],
        "epochs": settings.epochs,
        "images": len(data.train),
        "parameters": sum(p.numel() for p in built.model.parameters()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": trainer.world_size,
        "precision": precision,
        "peak_memory": memory.peak(device),
        "seconds": seconds,
        "images_per_second": len(data.train) * len(rows) / seconds,
        "command": settings.command(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_text(folder / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    best.unlink(missing_ok=True)  # model.safetensors has the same weights
    if trainer.world_size > 1:
        trainer.strategy.barrier("results")
