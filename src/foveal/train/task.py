"""One training step of a classifier: mix, guide, forward, loss; and what is measured on the way.

    loss = mixer's loss on mixed images (W Y as targets) + sum of the guides' losses

A task composes the rooms: the mixer chooses images and labels, then the guides look at the same forward.
"""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.chance import generator, reseed
from foveal.data.batches import Batch
from foveal.train.measured import Task
from foveal.train.optimise import Average, parameter_groups
from foveal.train.settings import Settings


class Classify(Task):
    """Training a timm model on class labels.

    model: the only submodule but for what the mixer learns itself, so checkpoints and gradient buckets hold nothing
    else; the mixer, the guide (or None) and the running average of the weights (or None) live beside it.
    classes: number of classes C. sizes, parts: as for Task.
    """

    validates = ("loss", "accuracy", "balanced_accuracy")

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        *,
        classes: int,
        sizes: list[int],
        parts: int,
        mixer: Any,
        guide: Any,
        average: Average | None = None,
    ) -> None:
        guided = () if guide is None else (settings.guide,)
        super().__init__(
            model,
            settings,
            columns=("loss", "accuracy", *mixer.terms, *guided, *mixer.measures),
            measured=len(mixer.measures),
            sizes=sizes,
            parts=parts,
            average=average,
        )
        self.classes = classes
        self._beside = (mixer, guide)  # in a tuple, so that a module among them is not registered
        self.mixing = mixer.learned(model, classes)  # registered: optimised, checkpointed, never exported
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self.best |= {"accuracy": -1.0, "loss": float("inf")}

    @property
    def lr(self) -> float:
        """Peak learning rate of the last layers."""
        return float(self.settings.lr)

    @property
    def mixer(self) -> Any:
        """The mixer."""
        return self._beside[0]

    # -- training

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """A group per block; the rates are set at every step."""
        s = self.settings
        groups = parameter_groups(self.model, s.weight_decay, s.layer_decay, s.head_lr_factor)
        if self.mixing is not None:
            groups.append({"params": list(self.mixing.parameters()), "lr_scale": 1.0, "name": "mixing"})
            groups[-1]["weight_decay"] = 0.0
        if s.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=s.lr, momentum=0.9, nesterov=True)
        return torch.optim.AdamW(groups, lr=s.lr, fused=self.device.type in ("cpu", "cuda"))

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """The loss of a micro-batch, weighted so that micro-batches average to the mean over samples."""
        s, epoch, step = self.settings, self.current_epoch, self.set_step(batch)
        reseed(s.seed, "step", epoch, batch.micro)
        losses, measures = self.forward_loss(batch, generator(s.seed, "mix", epoch, batch.micro))
        total = torch.stack(list(losses.values())).sum()
        told = {"loss": total} | measures | losses
        self.note(step, [told[name] for name in self.columns], batch.weight)
        return total * batch.weight

    def forward_loss(self, batch: Batch, rng: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One forward under the mixer and the guide: {"task": loss, the mixer's and the guide's...}, and measures.

        measures: the accuracy, which counts a prediction by the weight that the mixed label gives it, and the mixer's.
        """
        mixer, guide = self.mixer, self._beside[1]
        with mixer.on(
            self.model,
            batch.images,
            batch.labels,
            rng=rng,
            num_classes=self.classes,
            given=batch.masks,
            trusted=self.current_epoch >= self.settings.map_warmup,
        ) as step:
            with nullcontext() if guide is None else guide.on(self.model, step.images) as guided:
                logits = self.model(step.images).float()
            losses = step.losses(logits, smoothing=self.settings.smoothing)
            measures = {"accuracy": step.accuracy(logits).detach()} | step.measures()
        if guided is not None:
            losses |= guided.losses()
        return losses, measures

    # -- validation

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation."""
        self._seen = []

    def validation_step(self, batch: Batch, _: int) -> None:
        """Note loss and correctness of every image, with the averaged weights where there are such."""
        if self.average is None:
            logits = self.model(batch.images)
        else:
            logits = torch.func.functional_call(self.model, self.average.weights, (batch.images,))
        losses = F.cross_entropy(logits.float(), batch.labels, reduction="none")
        self._seen.append((losses, logits.argmax(-1) == batch.labels, batch.labels))

    def is_better(self, scores: dict[str, float]) -> bool:
        """More accurate, or as accurate with less loss."""
        return (scores["accuracy"], -scores["loss"]) > (self.best["accuracy"], -self.best["loss"])

    def validated(self) -> dict[str, float]:
        """Loss, accuracy and balanced accuracy (mean of the classes' recalls) over all processes' images."""
        own = [torch.cat(part).cpu() for part in zip(*self._seen, strict=True)]
        shares: list[list[Tensor]] = [own]
        if self.trainer.world_size > 1:
            shares = [[] for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather_object(shares, own)
        losses, right, labels = (torch.cat(part) for part in zip(*(s for s in shares if s), strict=True))
        seen = torch.bincount(labels, minlength=self.classes).double()
        hits = torch.bincount(labels[right], minlength=self.classes).double()
        recalls = (hits / seen)[seen > 0]
        values = losses.double().mean(), right.double().mean(), recalls.mean()
        return {name: float(value) for name, value in zip(self.validates, values, strict=True)}
