"""What every training task shares: a curve measured on the device, learning rates per step, a checkpoint that goes on.

What a step measures stays on the device in `curve` and is fetched once per epoch. A task says what it measures
(`columns`), what its validation gives (`validates`), and whether an epoch is the best so far (`is_better`).
"""

from abc import abstractmethod
from typing import Any, ClassVar

import lightning
import torch
from torch import Tensor, nn

from foveal.data.batches import Batch
from foveal.train.errors import DivergedError, RunError
from foveal.train.optimise import Average, set_rates, shape
from foveal.train.plain import Plain

CHECK_EVERY = 50  # steps between two looks at a loss that lives on an accelerator; on the CPU every step


class Task(lightning.LightningModule):  # type: ignore[misc]  # Lightning is not typed for mypy here
    """A training of `model`, step by step.

    columns: what each step measures, "loss" first; the last `measured` of them may have nothing to measure in a step.
    sizes: images in each optimiser step of an epoch. parts: micro-batches of a step on all processes together.
    lr: peak learning rate. warmup_epochs: of linear warm-up before the cosine. average: running average of the weights.
    """

    validates: ClassVar[tuple[str, ...]]  # names of the validation's scores, in order
    extras: tuple[str, ...] = ()  # what an epoch tells besides, see extra

    def __init__(
        self,
        model: nn.Module,
        settings: Plain,
        *,
        columns: tuple[str, ...],
        measured: int,
        sizes: list[int],
        parts: int,
        average: Average | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.settings: Any = settings
        self.columns, self.measured, self.parts = columns, measured, parts
        self.sizes, self.steps = torch.tensor(sizes), len(sizes)
        self.average = average
        self.curve, self.weighed = self._no_curve()
        self.best: dict[str, Any] = {"epoch": -1}
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer validation images than processes

    @property
    @abstractmethod
    def lr(self) -> float:
        """Peak learning rate."""

    @abstractmethod
    def validated(self) -> dict[str, float]:
        """Scores by `validates` over all processes' images, the same for any number of processes."""

    def extra(self) -> dict[str, float | None]:
        """What else is known of the finished epoch, by `extras`, the same for any number of processes."""
        return {}

    @abstractmethod
    def is_better(self, scores: dict[str, float]) -> bool:
        """Whether an epoch with these scores is the best so far."""

    # -- training

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

    def set_step(self, batch: Batch) -> int:
        """The optimiser step of this epoch that a micro-batch belongs to, with the learning rates set for it."""
        step = batch.micro // self.parts
        rate = self.rate(self.current_epoch * self.steps + step)
        set_rates(self.optimizers(use_pl_optimizer=False), self.lr, rate)
        return step

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at a step of the whole run."""
        s = self.settings
        warmup_epochs = s.epochs / 20 if s.warmup_epochs is None else s.warmup_epochs
        return shape(step, s.epochs * self.steps, round(warmup_epochs * self.steps))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, correct it, then move the averaged weights."""
        super().optimizer_step(*args, **kwargs)
        self.after_step(self.global_step)  # counted when this method has ended
        if self.average is not None:
            self.average.update(self.model)

    def after_step(self, step: int) -> None:
        """What a task does to the weights itself after optimiser step `step` of the whole run."""
        return None

    def note(self, step: int, values: list[Tensor], weight: float) -> None:
        """Take down what a micro-batch of a step measured, by `columns`."""
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
                f" of {self.steps}. Try a lower lr (now {self.lr:g}), more warmup_epochs, or"
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
