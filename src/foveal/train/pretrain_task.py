"""One step of masked pre-training: hide patches at random, predict them, weigh the errors by the map.

    loss = guided reconstruction;    plain = MAE's loss of the same predictions      Sick et al., 2025; He et al., 2022

What is hidden is drawn from ("mask", epoch, micro-batch), in validation from ("mask_val", image): there it is the same
in every epoch and for any number of processes.
"""

from typing import Any, cast

import torch
from torch import Tensor

from foveal.chance import generator, reseed
from foveal.data.batches import Batch
from foveal.maps import MapStore
from foveal.pretrain import (
    MaskedAutoencoder,
    guided_reconstruction,
    mae_rate,
    mask_by_map,
    parameter_groups,
    peak_rate,
    temperature_at,
)
from foveal.train.measured import Task
from foveal.train.pretrain_settings import PretrainSettings


class Pretrain(Task):
    """Training a masked autoencoder.

    model: the only submodule.  store: maps of the training images, beside it; None for plain MAE.  guided: whether
    there will be one when training begins.  sizes, parts: as for Task.
    """

    validates = ("loss",)

    def __init__(
        self,
        model: MaskedAutoencoder,
        settings: PretrainSettings,
        *,
        store: MapStore | None = None,
        guided: bool = False,
        sizes: list[int],
        parts: int,
    ) -> None:
        measures = ("map_missing", "map_blank") if guided or store is not None else ()
        columns = ("loss", "plain", *measures)
        super().__init__(model, settings, columns=columns, measured=len(measures), sizes=sizes, parts=parts)
        self.store = store
        self._seen: list[Tensor] = []
        self.best |= {"loss": float("inf")}

    @property
    def autoencoder(self) -> MaskedAutoencoder:
        """The model."""
        return cast(MaskedAutoencoder, self.model)

    @property
    def lr(self) -> float:
        """Peak learning rate: base_lr for 256 images, scaled to those of a step."""
        return peak_rate(self.settings.base_lr, self.settings.batch_size * self.parts)

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at a step of the whole run; MAE's schedule, from 0."""
        s = self.settings
        warmup = s.epochs / 20 if s.warmup_epochs is None else s.warmup_epochs
        return mae_rate(step / self.steps, s.epochs, warmup, 1.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """MAE's: AdamW with betas (0.9, 0.95)."""
        groups = [group | {"lr_scale": 1.0} for group in parameter_groups(self.model, self.settings.weight_decay)]
        fused = self.device.type in ("cpu", "cuda")
        return torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95), fused=fused)

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """The loss of a micro-batch, weighted so that micro-batches average to the mean over samples."""
        s, epoch, step = self.settings, self.current_epoch, self.set_step(batch)
        reseed(s.seed, "step", epoch, batch.micro)
        losses = self.forward_loss(batch, generator(s.seed, "mask", epoch, batch.micro), epoch + step / self.steps)
        self.note(step, [losses[name] for name in self.columns], batch.weight)
        return losses["loss"] * batch.weight

    def forward_loss(self, batch: Batch, rng: torch.Generator, epoch: float = 0.0) -> dict[str, Tensor]:
        """{"loss": to train on, "plain": MAE's, "map_missing", "map_blank": shares of the images}."""
        s, model = self.settings, self.autoencoder
        noise = torch.rand(len(batch), model.grid[0] * model.grid[1], generator=rng)
        map, told = None, dict[str, Tensor]()
        if self.store is not None:
            boxes, flip = (None, None) if batch.view is None else (batch.view.boxes, batch.view.flip)
            map, missing = self.store.sample(batch.index, boxes, flip, model.grid, self.device)
            told = {"map_missing": missing.float().mean(), "map_blank": (map.amax((1, 2)) == 0).float().mean()}
            if s.guide == "mask":
                noise, map = mask_by_map(map, noise.to(self.device)), None
        out = model(batch.images, noise)
        end = s.temperature if s.temperature_end is None else s.temperature_end
        guided = guided_reconstruction(
            out.prediction,
            model.target(batch.images),
            out.removed,
            map,
            temperature_at(epoch, s.epochs, s.temperature, end),
            1.0 if map is None else s.gamma,
            s.normalise,
            scaled=True,
        )
        return {"loss": guided.loss, "plain": guided.plain} | told

    # -- validation

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation."""
        self._seen = []

    def validation_step(self, batch: Batch, _: int) -> None:
        """Note MAE's loss of every image, each with patches of its own hidden, the same in every epoch."""
        model, seed = self.autoencoder, self.settings.seed
        cells = model.grid[0] * model.grid[1]
        noise = torch.stack([torch.rand(cells, generator=generator(seed, "mask_val", i)) for i in batch.index.tolist()])
        out = model(batch.images, noise)
        error = (out.prediction.float() - model.target(batch.images)).square().mean(-1)  # (B, N)
        self._seen.append((error * out.removed).sum(1) / out.removed.sum(1).clamp_min(1))

    def validated(self) -> dict[str, float]:
        """MAE's loss over all processes' validation images."""
        own = torch.cat([part.cpu() for part in self._seen]) if self._seen else torch.zeros(0)
        shares: list[Any] = [own]
        if self.trainer.world_size > 1:
            shares = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(shares, own)
        return {"loss": float(torch.cat(shares).double().mean())}

    def is_better(self, scores: dict[str, float]) -> bool:
        """Never: the last epoch's weights are kept, as MAE does."""
        return False
