"""MAE's linear probe: how well one linear layer on frozen features tells the classes apart.

Training images are cropped and mirrored anew in each epoch and go through the backbone in evaluation, without gradient;
or the features are taken once, from whole images ("cached": far cheaper, about a point lower). Head, optimiser and
schedule are those of foveal.evaluate.heads. Learning rate and epoch are chosen on validation, and reported on tests.

Unlike MAE's: the statistics are those of the whole step (MAE's: of a process's share); crops are drawn as torchvision
does (ten tries; MAE's in one go); what would be a last, smaller step is spread over the others (MAE's: left out).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from foveal.data.batches import Batches
from foveal.data.config import ImageConfig
from foveal.data.images import Data, Images
from foveal.data.order import permutation
from foveal.evaluate.features import Features, Reader, Tokens, features
from foveal.evaluate.heads import ROWS, Head, Pieces, Recipe, Tell, fit_heads, logits_of
from foveal.evaluate.probe import Probe, Trial, check, distinct, hold_out, named, scored
from foveal.evaluate.running import device_of


def linear_probe(
    model: nn.Module,
    data: Data,
    config: ImageConfig,
    recipe: Recipe | None = None,
    *,
    block: int | Sequence[int] = -1,
    tokens: Tokens = "auto",
    norm: bool = True,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    workers: int = 0,
    progress: Tell | None = None,
) -> Probe:
    """The probe on augmented training images; the backbone is in evaluation, gets no gradient and is left as it was.

    Chosen on data.val, reported on data.tests.  block, tokens, norm, autocast: which features, as `features` has them.
    batch_size: images per forward, whatever the recipe's batch.  Memory: the features of a step, val and tests.
    Raises ValueError where nothing can be told apart, or every learning rate diverges.
    """
    recipe = recipe or Recipe()
    reader = Reader(model, block=block, tokens=tokens, norm=norm)
    where = device_of(model, device)

    def whole(images: Images) -> Features:
        return features(
            model, images, config, block=block, tokens=tokens, norm=norm,
            batch_size=batch_size, device=where, autocast=autocast, workers=workers,
        )  # fmt: skip

    distinct(data.train.labels, data.classes)
    val = whole(data.val).checked("val")
    tests = {name: whole(images).checked(name) for name, images in data.tests.items()}
    batches = Batches(
        data.train,
        config,
        batch_size,
        train=True,
        seed=recipe.seed,
        flip=data.flip,
        crop_scale=recipe.crop_scale,
        workers=workers,
        device=where,
    )

    def epoch(number: int) -> Pieces:
        batches.set_epoch(number)
        return ((reader(batch.images, autocast=autocast), batch.labels) for batch in batches)

    augmented = f"crops of {recipe.crop_scale[0]:g}-{recipe.crop_scale[1]:g}{', mirrored' if data.flip else ''}"
    heads = fit_heads(epoch, len(data.train), data.classes, val, recipe, where, progress)
    how = f"{recipe.told(len(data.train))}, {augmented}"
    return _probe("linear probe", heads, named(tests), data.classes, reader.definition, how, "val")


def cached_linear_probe(
    train: Features,
    tests: Features | Mapping[str, Features],
    val: Features | None = None,
    recipe: Recipe | None = None,
    *,
    device: torch.device | str = "cpu",
    progress: Tell | None = None,
) -> Probe:
    """The same head, optimiser and schedule on features that were taken once, without augmentation.

    val: what rate and epoch are chosen on; None holds 15 % of train out, by the recipe's seed.
    """
    recipe = recipe or Recipe()
    sets = named(tests)
    check(train, sets | ({} if val is None else {"val": val}))
    chosen_on = "val"
    if val is None:
        train, val, chosen_on = hold_out(train, recipe.seed)

    def epoch(number: int) -> Pieces:
        at = permutation(len(train), recipe.seed, number)
        return ((train.values[rows].to(device), train.labels[rows].to(device)) for rows in at.split(ROWS))

    heads = fit_heads(epoch, len(train), train.classes, val, recipe, torch.device(device), progress)
    how = f"{recipe.told(len(train))}, no augmentation"
    return _probe("linear probe on cached features", heads, sets, train.classes, train.definition, how, chosen_on)


def _probe(
    kind: str,
    heads: list[Head],
    tests: dict[str, Features],
    classes: tuple[str, ...],
    definition: str,
    recipe: str,
    chosen_on: str,
) -> Probe:
    tried = ", ".join(f"{one.base_lr:g}" for one in heads)
    best = max(heads, key=lambda one: one.key)
    if not all(bool(p.isfinite().all()) for p in best.best.parameters()):
        raise ValueError(f"the linear probe diverged at base_lr={tried}: give smaller ones")
    at_best, at_last = (
        {name: scored(logits_of(head, one.values).argmax(1), one, classes) for name, one in tests.items()}
        for head in (best.best, best.head)
    )
    return Probe(
        kind=kind,
        definition=definition,
        recipe=recipe,
        setting=f"base lr {best.base_lr:g}" + (f" of {tried}" if len(heads) > 1 else ""),
        epoch=best.epoch,
        chosen_on=chosen_on,
        val=best.key[0],
        trials=tuple(Trial(f"base lr {one.base_lr:g}", one.key[0], one.last, one.epoch) for one in heads),
        tests=at_best,
        last=at_last,
    )
