"""One training step of a classifier: mix, guide, forward, loss; and what is measured on the way.

    loss = mixer's loss on mixed images (W Y as targets) + relax(step) * weight * the guide's term

A task composes the rooms: the mixer chooses images and labels, then the guide looks at the same forward.
"""

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.attention import read
from foveal.chance import generator, reseed
from foveal.data.batches import Batch
from foveal.train.drift import Drift
from foveal.train.measured import Task
from foveal.train.optimise import Average, parameter_groups
from foveal.train.settings import Settings
from foveal.transfer import Guide

SCALE = 1024.0  # of losses whose gradients are compared


class Classify(Task):
    """Training a timm model on class labels.

    model: the only submodule but for what the mixer and the guide learn themselves, so checkpoints and gradient buckets
    hold nothing else; the mixer, the guide (or None) and the running average of the weights (or None) live beside it.
    classes: number of classes C. sizes, parts: as for Task. watches: at validation the model's attention is
    compared with that of a source, which `watch` hands over before training.
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
        watches: bool = False,
    ) -> None:
        guided = () if guide is None else (guide.name,)
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
        self.guiding = None if guide is None else guide.learned()
        self.extras = (*(("drift",) if watches else ()), *(("gradient_ratio",) if guide is not None else ()))
        self._drift: list[Drift] = []  # in a list, for the same reason
        self._ratio: Tensor | None = None
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

    @property
    def guide(self) -> Guide | None:
        """The guide."""
        found: Guide | None = self._beside[1]
        return found

    @property
    def drift(self) -> Drift | None:
        """What the model's attention is compared with at validation."""
        return self._drift[0] if self._drift else None

    def watch(self, drift: Drift | None) -> None:
        """Compare with this at every validation from now on."""
        self._drift = [] if drift is None else [drift]

    # -- training

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """A group per block; the rates are set at every step."""
        s = self.settings
        decay = 0.0 if self.guide is not None and self.guide.replaces_decay else s.weight_decay
        groups = parameter_groups(self.model, decay, s.layer_decay, s.head_lr_factor)
        for name, learned in (("mixing", self.mixing), ("guiding", self.guiding)):
            if learned is not None:
                groups.append({"params": list(learned.parameters()), "lr_scale": 1.0, "name": name})
                groups[-1]["weight_decay"] = 0.0
        if s.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=s.lr, momentum=0.9, nesterov=True)
        return torch.optim.AdamW(groups, lr=s.lr, fused=self.device.type in ("cpu", "cuda"))

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """The loss of a micro-batch, weighted so that micro-batches average to the mean over samples."""
        s, epoch, step = self.settings, self.current_epoch, self.set_step(batch)
        reseed(s.seed, "step", epoch, batch.micro)
        relax = self.relax(epoch * self.steps + step)
        losses, measures = self.forward_loss(batch, generator(s.seed, "mix", epoch, batch.micro), relax)
        if self.guide is not None and self._ratio is None and step == self.steps - 1:
            self._ratio = gradient_ratio(losses, self.guide.name, self.model)
        total = torch.stack(list(losses.values())).sum()
        told = {"loss": total} | measures | losses
        if self.guide is not None:
            told.setdefault(self.guide.name, total.new_zeros(()))  # off at the end of its schedule
        self.note(step, [told[name] for name in self.columns], batch.weight)
        return total * batch.weight

    def relax(self, step: int) -> float:
        """Share of the guide's weight at an optimiser step of the whole run."""
        return relaxed(self.settings.guide_schedule, step, self.settings.epochs * self.steps)

    def on_train_epoch_start(self) -> None:
        """A fresh curve; the epoch's last step tells how strong the guide's gradient is (in the first it may be 0)."""
        super().on_train_epoch_start()
        self._ratio = None

    def after_step(self, step: int) -> None:
        """What the guide does to the weights itself, with the share of its weight in the step's loss."""
        if self.guide is not None:
            self.guide.after_step(self.model, self.optimizers(use_pl_optimizer=False), self.relax(step))

    def forward_loss(
        self, batch: Batch, rng: torch.Generator, relax: float = 1.0
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One forward under the mixer and the guide: {"task": loss, the mixer's and the guide's...}, and measures.

        relax: share of the guide's weight.
        measures: the accuracy, which counts a prediction by the weight that the mixed label gives it, and the mixer's.
        """
        mixer, guide = self.mixer, self.guide
        with mixer.on(
            self.model,
            batch.images,
            batch.labels,
            rng=rng,
            num_classes=self.classes,
            given=batch.masks,
            trusted=self.current_epoch >= self.settings.map_warmup,
        ) as step:
            with nullcontext() if guide is None else guide.on(self.model, step.images, batch.labels, relax) as guided:
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
        if self.drift is not None:
            self.drift.begin()

    def validation_step(self, batch: Batch, number: int) -> None:
        """Note loss and correctness of every image, with the averaged weights where there are such, and the drift."""
        drift = self.drift if self.drift is not None and self.drift.covers(number) else None
        with nullcontext() if drift is None else read(self.model, "all", drift.what) as seen:
            if self.average is None:
                logits = self.model(batch.images)
            else:
                logits = torch.func.functional_call(self.model, self.average.weights, (batch.images,))
        if drift is not None and seen is not None:
            drift.add(number, seen.look)
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

    def extra(self) -> dict[str, float | None]:
        """Drift of the last validation and gradient ratio of the epoch, the same on all processes."""
        told: dict[str, float | None] = {}
        reduce = self.trainer.strategy.reduce
        if self.drift is not None:
            gap, images = torch.as_tensor(reduce(self.drift.total(self.curve), reduce_op="sum")).tolist()
            told["drift"] = gap / images if images else None
        if self.guide is not None:
            ratio = self.curve.new_full((), float("nan")) if self._ratio is None else self._ratio
            value = float(reduce(ratio, reduce_op="mean"))
            told["gradient_ratio"] = value if math.isfinite(value) else None
        return told


def relaxed(schedule: str, step: int, steps: int) -> float:
    """Share of the guide's weight at optimiser step `step` of `steps`: 1 at the first, nearing 0 but for constant."""
    if schedule == "constant":
        return 1.0
    done = step / steps
    return 1.0 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def gradient_ratio(losses: dict[str, Tensor], guide: str, model: nn.Module) -> Tensor:
    """Norm of the gradient of the guide's term over that of all other terms, with respect to what is trained.

    A float32 scalar on the device; NaN where the guide is off or nothing else has a gradient. Gradients are left alone.
    Both losses go backward times SCALE, as a gradient scaler would, so that float16 does not round small ones to zero.
    """
    others = [loss for name, loss in losses.items() if name != guide]
    if guide not in losses or not others or not losses[guide].requires_grad:
        return next(iter(losses.values())).detach().float().new_full((), float("nan"))
    trained = [p for p in model.parameters() if p.requires_grad]

    def norm(loss: Tensor) -> Tensor:
        found = torch.autograd.grad(SCALE * loss, trained, retain_graph=True, allow_unused=True)
        norms = [g.float().norm() for g in found if g is not None] or [loss.detach().new_zeros(())]
        return torch.stack(norms).square().sum().sqrt()

    return norm(losses[guide]) / norm(torch.stack(others).sum())
