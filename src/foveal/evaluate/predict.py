"""Run a model over a set of images: its logits, where it looked, and how much of that was on the object."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foveal.attention import read, supported
from foveal.data.batches import Batches
from foveal.data.config import ImageConfig
from foveal.data.images import Images
from foveal.evaluate.accuracy import accuracy, balanced_accuracy, correct
from foveal.evaluate.pointing import energy_share
from foveal.evaluate.running import autocasting, class_logits, device_of, evaluating

# attention_kind -> what is read: the class row, else how much attention each patch receives
KINDS = {"class": "class_logits", "received": "received"}


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model made of N images, on the CPU, in the order of the set.

    logits: (N, C) float32.  labels, index: (N,) int64.
    attention: (N, h, w) float32, mean over the heads of the last self-attention block, as shares of all tokens'
    attention (prefix tokens left out, so a map may sum to less than 1).  attention_kind: "class" (the class
    token's row) or "received" (mean over all queries: models without class token).  Both are None if the
    model's attention was not or cannot be read; attention_note says why it is not the class row, or nothing.
    pointing: (N,) float32, share of the attention on the object, NaN for an image without object; None
    without masks or attention.
    """

    logits: Tensor
    labels: Tensor
    index: Tensor
    pointing: Tensor | None
    attention: Tensor | None
    attention_kind: str | None = None
    attention_note: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def correct(self) -> Tensor:
        """(N,) bool."""
        return correct(self.logits, self.labels)

    @property
    def accuracy(self) -> float:
        """In [0, 1]."""
        return accuracy(self.logits, self.labels)

    @property
    def balanced_accuracy(self) -> float:
        """In [0, 1]: the mean of the accuracies within each class."""
        return balanced_accuracy(self.logits, self.labels)

    @property
    def mean_pointing(self) -> float | None:
        """In [0, 1], over the images that have an object; None if there are none."""
        if self.pointing is None or bool(self.pointing.isnan().all()):
            return None
        return float(self.pointing.double().nanmean())


def predict(
    model: nn.Module,
    images: Images,
    config: ImageConfig,
    *,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    workers: int = 0,
    attention: bool = True,
) -> Predictions:
    """Predictions of `model`, evaluated (no dropout, no gradient) and left as it was, its mode included.

    device: where the model is (None: asked from its parameters).  autocast: torch.bfloat16 or None.
    attention: also read where the model looks; a model that cannot be read gives None, with the reason.
    Raises ValueError if the model has not one output for each class, DataError for unreadable images.
    """
    where = device_of(model, device)
    batches = Batches(images, config, batch_size, train=False, workers=workers, device=where)
    source = attention_source(model) if attention else "attention was not asked for"
    logits: list[Tensor] = []
    maps: list[Tensor] = []
    with evaluating(model), torch.no_grad(), autocasting(where, autocast):
        for batch in batches:
            if isinstance(source, str):
                out = model(batch.images)
            else:
                with read(model, layers=source.layer, what=KINDS[source.kind]) as seen:
                    out = model(batch.images)
                rows = seen.class_attention() if source.kind == "class" else seen.received()
                grid = seen.to_grid(rows.float())
                maps.append((torch.stack(grid) if isinstance(grid, list) else grid).cpu())
            logits.append(class_logits(out, len(images.classes)).float().cpu())
    found = torch.cat(maps) if maps else None
    return Predictions(
        logits=torch.cat(logits),
        labels=images.labels.cpu(),
        index=torch.arange(len(images)),
        pointing=None if found is None or images.masks is None else _pointing(found, images.masks.cpu()),
        attention=found,
        attention_kind=None if isinstance(source, str) else source.kind,
        attention_note=source if isinstance(source, str) else source.note,
    )


@dataclass(frozen=True)
class Source:
    """Where a model's map is read: layer as foveal.read takes it, kind a key of KINDS; note: why no class row."""

    layer: int | str
    kind: str
    note: str


def attention_source(model: nn.Module) -> Source | str:
    """The class row of the last self-attention block; else what its patches receive; else the last layer there
    is (CaiT's class attention). If nothing can be read: the reason."""
    support = supported(model)
    if not support:
        return support.reason
    note = ""
    for layer in (-1, support.layers[-1]):
        for kind, what in KINDS.items():
            try:
                read(model, layers=layer, what=what)
            except ValueError as error:  # no class token, no such layer
                note = note or str(error)
            else:
                return Source(layer, kind, note)
    return note


def _pointing(attention: Tensor, masks: Tensor) -> Tensor:
    share = energy_share(attention, masks)
    return torch.where(masks.flatten(1).any(1), share, torch.nan)
