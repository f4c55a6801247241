"""One training step of a classifier: mix, guide, forward, loss; and what is measured on the way.

    loss = mixer's loss on mixed images (W Y as targets) + sum of the guides' losses

A task composes the rooms: the mixer chooses images and labels, then the guides look at the same forward. What a
step measures stays on the device in `curve` and is fetched once per epoch.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.chance import generator, reseed
from foveal.data.batches import Batch
from foveal.train.errors import DivergedError, RunError
from foveal.train.optimise import Average, parameter_groups, set_rates, shape
from foveal.train.settings import Settings

CHECK_EVERY = 50  # steps between two looks at a loss that lives on an accelerator; on the CPU every step


@dataclass(frozen=True)
class Validation:
    """Scores on the validation images. accuracy, balanced_accuracy (mean of the classes' recalls): in [0, 1]."""

    loss: float
    accuracy: float
    balanced_accuracy: float


class Classify(lightning.LightningModule):  # type: ignore[misc]  # Lightning is not typed for mypy here
    """Training a timm model on class labels.

    model: the only submodule but for what the mixer learns itself, so checkpoints and gradient buckets hold nothing
    else; the mixer, the guide (or None)
    and the running average of the weights (or None) live beside it. classes: number of classes C. sizes: images in each
    optimiser step of an epoch. parts: micro-batches of a step on all processes together.
    """

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
        super().__init__()
        self.model = model
        self.settings, self.classes, self.parts = settings, classes, parts
        self.sizes, self.steps = torch.tensor(sizes), len(sizes)
        self._beside = (mixer, guide)  # in a tuple, so that a module among them is not registered
        self.mixing = mixer.learned(model, classes)  # registered: optimised, checkpointed, never exported
        self.average = average
        guided = () if guide is None else (settings.guide,)
        self.columns = ("loss", "accuracy", *mixer.terms, *guided, *mixer.measures)
        self.measured = len(mixer.measures)  # the last columns; a step may have nothing to measure
        self.curve, self.weighed = self._no_curve()
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self.best: dict[str, Any] = {"epoch": -1, "accuracy": -1.0, "loss": float("inf")}
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer validation images than processes

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

    def on_train_epoch_start(self) -> None:
        """A fresh curve, on the device."""
        self.curve, self.weighed = self._no_curve()

    def _no_curve(self) -> tuple[Tensor, Tensor]:
        """Sums of what the steps measured, and of the weights of the measurements there were: (steps, columns)."""
        zero = torch.zeros(self.steps, len(self.columns), device=self.device)
        return zero, zero.clone()

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """As it is: batches are made on the device."""
        return batch

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """The loss of a micro-batch, weighted so that micro-batches average to the mean over samples."""
        s, epoch, step = self.settings, self.current_epoch, batch.micro // self.parts
        set_rates(self.optimizers(use_pl_optimizer=False), s.lr, self.rate(epoch * self.steps + step))
        reseed(s.seed, "step", epoch, batch.micro)
        losses, measures = self.forward_loss(batch, generator(s.seed, "mix", epoch, batch.micro))
        total = torch.stack(list(losses.values())).sum()
        told = {"loss": total} | measures | losses
        self._note(step, [told[name] for name in self.columns], batch.weight)
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

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then move the averaged weights."""
        super().optimizer_step(*args, **kwargs)
        if self.average is not None:
            self.average.update(self.model)

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at a step of the whole run."""
        s = self.settings
        warmup_epochs = s.epochs / 20 if s.warmup_epochs is None else s.warmup_epochs
        return shape(step, s.epochs * self.steps, round(warmup_epochs * self.steps))

    def _note(self, step: int, values: list[Tensor], weight: float) -> None:
        row = torch.stack([v.detach().float() for v in values])
        there = torch.ones_like(row)
        if self.measured:  # NaN says that there was nothing to measure
            there[-self.measured :] = row[-self.measured :].isfinite()
            row[-self.measured :].nan_to_num_()
        self.curve[step] += row * (weight / self.parts)
        self.weighed[step] += there * (weight / self.parts)
        if self.device.type == "cpu" or step % CHECK_EVERY == CHECK_EVERY - 1:
            self._check(step)

    def _check(self, last: int) -> None:
        """Stop at once when the loss is no longer a number, rather than train on it."""
        lost = (~torch.isfinite(self.curve[: last + 1, 0])).nonzero()
        if len(lost):
            raise DivergedError(
                f"training diverged: the loss was not finite at epoch {self.current_epoch + 1}, step {int(lost[0]) + 1}"
                f" of {self.steps}. Try a lower lr (now {self.settings.lr:g}), more warmup_epochs, or"
                " precision float32"
            )

    def epoch_curve(self) -> Tensor:
        """What each step of the finished epoch measured, over all processes: (steps, columns) on the CPU.

        NaN where a step had nothing to measure.
        """
        self._check(self.steps - 1)
        curve, weighed = (
            torch.as_tensor(self.trainer.strategy.reduce(part, reduce_op="sum")).cpu()
            for part in (self.curve, self.weighed)
        )
        if self.measured:  # means over the micro-batches that measured; the other columns have weights of 1
            curve[:, -self.measured :] /= weighed[:, -self.measured :]
        return curve

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

    def validated(self) -> Validation:
        """Scores over all processes' images, in the order of the set: the same for any number of processes."""
        own = [torch.cat(part).cpu() for part in zip(*self._seen, strict=True)]
        shares: list[list[Tensor]] = [own]
        if self.trainer.world_size > 1:
            shares = [[] for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather_object(shares, own)
        losses, right, labels = (torch.cat(part) for part in zip(*(s for s in shares if s), strict=True))
        seen = torch.bincount(labels, minlength=self.classes).double()
        hits = torch.bincount(labels[right], minlength=self.classes).double()
        recalls = (hits / seen)[seen > 0]
        return Validation(float(losses.double().mean()), float(right.double().mean()), float(recalls.mean()))

    # -- checkpoints

    def weights(self) -> dict[str, Tensor]:
        """The weights that are validated and saved: averaged where asked for."""
        return self.model.state_dict() if self.average is None else self.average.weights

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Beside Lightning's state: the averaged weights and which epoch was best."""
        checkpoint["foveal"] = {
            "average": None if self.average is None else self.average.state(),
            "best": dict(self.best),
            "parts": self.parts,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from on_save_checkpoint's state."""
        state = checkpoint["foveal"]
        if state["parts"] != self.parts:
            raise RunError(
                f"the run was begun with {state['parts']} micro-batches per step (processes x accumulate) and cannot"
                f" continue with {self.parts}"
            )
        self.best = dict(state["best"])
        if self.average is not None:
            self.average.restore(state["average"])
