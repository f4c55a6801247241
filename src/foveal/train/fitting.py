"""Train a model as settings say, into a run folder that a kill cannot spoil.

fit(settings)                 begins; refuses to touch a run that is there
fit(settings, resume=True)    continues from the last finished epoch (or begins); a finished run is returned
"""

import contextlib
import json
import warnings
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from foveal.attention import attach, supported
from foveal.data import Data, DataWarning, listed, load, subset
from foveal.data.batches import Batches
from foveal.data.order import step_sizes
from foveal.data.splits import hold_out
from foveal.mix import MIXERS, TOKEN_MIXERS, token_mixer
from foveal.train import memory, outcome
from foveal.train.drift import Drift, SourceQuality, comparable, readable
from foveal.train.errors import SettingsError
from foveal.train.files import write_text
from foveal.train.folder import is_finished, locked, prepare
from foveal.train.guiding import guide_of
from foveal.train.loop import Epochs, batches_of, stoppable, train, workers_for
from foveal.train.machine import device_of, has_unused, own, processes, quiet_lightning, trainer_for, wait_for_first
from foveal.train.mapping import source_of
from foveal.train.models import Built, build, resolve, write_model
from foveal.train.optimise import Average
from foveal.train.precision import choose
from foveal.train.progress import Show
from foveal.train.record import Record, Tell
from foveal.train.run import Run
from foveal.train.settings import Settings
from foveal.train.task import Classify
from foveal.train.tuning import choose_trained, merged, start_head
from foveal.transfer import DELTA, GTA, AttentionTransfer, Guide


def fit(
    settings: Settings,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool | Tell = False,
    tested: bool = True,
) -> Run:
    """Train, select on validation, report on the test sets; the finished run.

    resume: continue an unfinished run from its last finished epoch; on the CPU the final weights are bit for bit
    those of a run that was never stopped. overwrite: remove a run that is in the folder. progress: show it on
    stderr, or call this with each epoch's row of metrics.csv. tested: report on the test sets; else on the validation
    images alone, for choices that must not know the tests. Raises SettingsError, foveal.data.DataError,
    RunError (weights, folder or disk), DivergedError, and Interrupted after Ctrl-C.
    """
    with stoppable(settings):
        return _fit(settings, resume, overwrite, progress, tested)


def load_data(settings: Settings) -> Data:
    """The data of a run, with the subset of the training images that the settings ask for.

    What is held out for selection is taken from that subset, so that no label outside of it is used.
    """
    seed = settings.seed if settings.data_seed is None else settings.data_seed
    data = load(settings.data, seed=seed, image_size=settings.image_size)
    notes = list(data.notes)
    train = data.train
    if any(part is not None for part in (settings.label_fraction, settings.per_class, settings.train_list)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DataWarning)
            if settings.train_list is not None:
                index = listed(train, lines_of(settings.train_list))
            else:
                index = subset(train, share=settings.label_fraction, per_class=settings.per_class, seed=seed)
        notes += [str(warning.message) for warning in caught]
        notes.append(f"{len(index):,} of {len(train):,} training images used")
        train = train.subset(index)
    if settings.held_out is None:
        return replace(data, train=train, notes=tuple(notes))
    parts, how = hold_out(train, {"val": round(100 * settings.held_out)}, seed)
    return replace(data, train=parts["train"], val=parts["val"], notes=(*notes, f"for selection {how}"))


def lines_of(path: str) -> list[str]:
    """The lines of a text file. Raises SettingsError where it cannot be read."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read train_list={path}: {error}") from None


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


def _fit(settings: Settings, resume: bool, overwrite: bool, progress: bool | Tell, tested: bool) -> Run:
    if not settings.data:
        raise SettingsError("no data given: a folder of class folders, a .npz pack, scenes, digits, cifar10, ...")
    folder = settings.folder
    if resume and is_finished(folder) and not overwrite:
        prepare(settings, resume=True, overwrite=False)
        return Run.load(folder)
    resolve(settings)  # a wrong model name is told before the data are read
    device = own(device_of(settings.device), settings)
    memory.begin(device)
    data = load_data(settings)
    if not tested:
        data = replace(data, tests={"val": data.val})
    built = build(settings, len(data.classes))
    if settings.head_start == "probe" and not (resume and (folder / "checkpoints" / "last.ckpt").is_file()):
        start_head(settings, built, data, device)
    choose_trained(settings, built)
    precision = choose(settings.precision, device, built.model)
    count, nodes = processes(settings.devices)
    world = count * nodes
    sizes = step_sizes(len(data.train), settings.batch_size, world, settings.accumulate)
    average = Average(built.model, settings.ema) if settings.ema else None
    mixer = mixer_of(settings, built, data, average)
    guide = guide_of(settings, built, data, mixer, device)
    task = Classify(
        built.model,
        settings,
        classes=len(data.classes),
        sizes=sizes,
        parts=world * settings.accumulate,
        mixer=mixer,
        guide=guide,
        average=average,
        watches=(settings.init != "none" or _source_of(guide) is not None) and readable(built.model) is not None,
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
        quality = _watch(task, guide, batches[1], trainer.strategy.root_device)
        if show is not None and trainer.is_global_zero and quality is not None:
            show.source(quality)
        if supported(built.model):
            stack.enter_context(attach(built.model))
        stack.enter_context(quiet_lightning())
        train(trainer, task, batches, checkpoint)
    with contextlib.ExitStack() as stack:
        if trainer.is_global_zero:
            stack.enter_context(locked(folder))
        _finish(settings, data, built, task, trainer, precision, batches[0], quality)
    return Run.load(folder)


def _how(settings: Settings) -> str:
    tuned = "none" if settings.tune == "all" else f"{settings.tune} alone"
    probed = "none" if settings.head_start == "random" else "a probe's head"
    parts = (settings.mix, settings.token_mix, settings.guide, tuned, probed)
    return " + ".join(part for part in parts if part != "none") or "plain"


def _source_of(guide: Guide | None) -> nn.Module | None:
    """The model that a guide compares with block by block; None for other guides, and with LoRA."""
    return guide.frozen.model if isinstance(guide, GTA | AttentionTransfer | DELTA) else None


def _watch(task: Classify, guide: Guide | None, batches: Batches, device: torch.device) -> SourceQuality | None:
    """Look at the validation images with the source, before the first step: what the drift is measured from."""
    if "drift" not in task.extras:
        return None
    own = _source_of(guide)
    source = task.model if own is None else own
    drift = Drift.of(source.to(device), batches)
    if own is None or comparable(source, task.model.to(device), batches.config.size):
        task.watch(drift)
    return None if drift is None else drift.quality


def _finish(
    settings: Settings,
    data: Data,
    built: Built,
    task: Classify,
    trainer: Any,
    precision: str,
    train: Epochs,
    quality: SourceQuality | None,
) -> None:
    """Take the best weights, write the model, test it, and close the run with results.json."""
    folder, device, first = settings.folder, trainer.strategy.root_device, trainer.is_global_zero
    best = Record(folder, task, len(data.train)).best(task.best["epoch"])
    built.model.load_state_dict(load_file(best))
    built = merged(built)
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
        "drift": chosen.get("drift"),
        "source": None if quality is None else quality.told(),
        "val": {name: chosen[f"val_{name}"] for name in ("accuracy", "balanced_accuracy", "loss")},
        "best_epoch": task.best["epoch"],
        "epochs": settings.epochs,
        "images": len(data.train),
        "parameters": sum(p.numel() for p in built.model.parameters()),
        "trained": sum(p.numel() for p in task.model.parameters() if p.requires_grad),
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
