"""Pre-train an encoder as settings say, into a run folder that a kill cannot spoil.

pretrain(settings)                 begins; refuses to touch a run that is there
pretrain(settings, resume=True)    continues from the last finished epoch (or begins); a finished run is returned

The run's model is the encoder, an ordinary timm model without classifier: `foveal train DATA --init RUN` starts from it
and `foveal evaluate RUN DATA` measures its features. decoder.safetensors holds what is thrown away.
"""

import contextlib
import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import torch

from foveal.attention import UnsupportedModelError
from foveal.data import Data, load_unlabelled
from foveal.data.order import step_sizes
from foveal.maps import MapStore
from foveal.pretrain import MaskedAutoencoder
from foveal.train import memory, outcome
from foveal.train.errors import SettingsError
from foveal.train.files import write_text, write_weights
from foveal.train.folder import is_finished, locked, prepare
from foveal.train.loop import batches_of, stoppable, train
from foveal.train.machine import device_of, own, processes, quiet_lightning, trainer_for, wait_for_first
from foveal.train.models import Built, build, resolve, write_model
from foveal.train.precision import choose
from foveal.train.pretrain_maps import store_of
from foveal.train.pretrain_settings import PretrainSettings
from foveal.train.pretrain_task import Pretrain
from foveal.train.progress import Show
from foveal.train.record import Record, Tell
from foveal.train.run import Run


def pretrain(
    settings: PretrainSettings, resume: bool = False, overwrite: bool = False, progress: bool | Tell = False
) -> Run:
    """Train a masked autoencoder; the finished run.

    resume: continue an unfinished run from its last finished epoch; on the CPU the final weights are bit for bit
    those of a run that was never stopped. overwrite: remove a run that is in the folder. progress: show it on
    stderr, or call this with each epoch's row of metrics.csv. Raises SettingsError, foveal.data.DataError,
    foveal.UnsupportedModelError for an encoder whose patches cannot be hidden, foveal.maps.MapStoreError, RunError
    (weights, folder or disk), DivergedError, and Interrupted after Ctrl-C.
    """
    with stoppable(settings):
        return _pretrain(settings, resume, overwrite, progress)


def _pretrain(settings: PretrainSettings, resume: bool, overwrite: bool, progress: bool | Tell) -> Run:
    if not settings.data:
        raise SettingsError("no data given: a folder of images, a .npz pack, scenes, digits, cifar10, ...")
    folder = settings.folder
    if resume and is_finished(folder) and not overwrite:
        prepare(settings, resume=True, overwrite=False)
        return Run.load(folder)
    resolve(settings)  # a wrong model name is told before the data are read
    device = own(device_of(settings.device), settings)
    memory.begin(device)
    seed = settings.seed if settings.data_seed is None else settings.data_seed
    data = load_unlabelled(settings.data, seed=seed, image_size=settings.image_size)
    built = build(settings, 0)
    autoencoder = autoencoder_of(settings, built)
    precision = choose(settings.precision, device, built.model)
    count, nodes = processes(settings.devices)
    parts = count * nodes * settings.accumulate
    sizes = step_sizes(len(data.train), settings.batch_size, count * nodes, settings.accumulate)
    task = Pretrain(autoencoder, settings, store=None, guided=settings.guided, sizes=sizes, parts=parts)
    record = Record(folder, task, len(data.train), tell=progress if callable(progress) else None)
    show = Show(record) if progress is True else None
    with quiet_lightning():
        trainer = trainer_for(settings, device, precision, [record, *([show] if show else [])], unused=False)
    with contextlib.ExitStack() as stack:
        checkpoint = None
        if trainer.is_global_zero:
            stack.enter_context(locked(folder))
            checkpoint = prepare(settings, resume=resume, overwrite=overwrite)
            outcome.write_split(folder, data, resumed=checkpoint is not None)
            if show is not None:
                show.begin(data, built, _how(settings), f"{device} in {precision}", checkpoint)
            task.store = store_of(settings, data, built.image, device, show)
        with quiet_lightning():
            wait_for_first(trainer)
        if not trainer.is_global_zero:
            task.store = store_of(settings, data, built.image, device, None)
            checkpoint = record.last if record.last.is_file() else None
        bare = replace(data, train=replace(data.train, masks=None), val=replace(data.val, masks=None))
        batches = batches_of(settings, bare, built.image, trainer)  # maps follow the crops; masks need not
        stack.enter_context(quiet_lightning())
        train(trainer, task, batches, checkpoint)
        if trainer.is_global_zero:
            _finish(settings, data, built, task, record, device, precision, trainer.world_size)
    if trainer.world_size > 1:
        trainer.strategy.barrier("results")
    return Run.load(folder)


def autoencoder_of(settings: PretrainSettings, built: Built) -> MaskedAutoencoder:
    """The autoencoder that the settings name around `built.model`; with init=none it starts as MAE does."""
    try:
        autoencoder = MaskedAutoencoder(
            built.model,
            settings.decoder_width,
            settings.decoder_depth,
            settings.decoder_heads,
            settings.mask_ratio,
            settings.norm_pix_loss,
        )
    except UnsupportedModelError:
        raise
    except ValueError as error:
        raise SettingsError(str(error)) from None
    if settings.init == "none":
        autoencoder.initialise(settings.seed)
    return autoencoder


def _how(settings: PretrainSettings) -> str:
    if not settings.guided:
        return "masked autoencoder"
    named = settings.map or settings.maps
    if settings.guide == "mask":
        return f"masked autoencoder, patches hidden by {named}"
    return f"masked autoencoder, errors weighted by {named} (tau {settings.temperature:g})"


def _finish(
    settings: PretrainSettings,
    data: Data,
    built: Built,
    task: Pretrain,
    record: Record,
    device: torch.device,
    precision: str,
    world: int,
) -> None:
    """Write encoder, decoder and a picture, and close the run with results.json."""
    from foveal.train.reconstructions import write_reconstructions

    folder, autoencoder = settings.folder, task.autoencoder
    autoencoder.to(device).eval()
    write_reconstructions(folder / "reconstructions.png", autoencoder, data, built.image, settings.seed, task.store)
    state = autoencoder.state_dict()
    write_weights(folder / "decoder.safetensors", {k: v for k, v in state.items() if not k.startswith("encoder.")})
    write_model(folder, built, (), {"data": data.name, "settings": settings.as_dict()})
    rows = Run(folder).metrics
    seconds = sum(row["seconds"] or 0 for row in rows)
    results = {
        "task": "pretrain",
        "sets": {},
        "bg_gap": None,
        "val": {"loss": rows[-1]["val_loss"]},
        "best_epoch": settings.epochs,
        "epochs": settings.epochs,
        "images": len(data.train),
        "maps": _of_store(task.store),
        "parameters": sum(p.numel() for p in built.model.parameters()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": world,
        "precision": precision,
        "peak_memory": memory.peak(device),
        "seconds": seconds,
        "images_per_second": len(data.train) * len(rows) / seconds,
        "command": settings.command(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_text(folder / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")


def _of_store(store: MapStore | None) -> dict[str, Any] | None:
    """What the maps were, in numbers: how many images have one, and of how many it says nothing or doubts itself."""
    if store is None:
        return None
    claims = {name: int(getattr(store, name).sum()) for name in ("found", "blank", "degenerate", "inverted")}
    return {"folder": str(store.folder), "images": len(store), **claims, "settings": store.settings}
