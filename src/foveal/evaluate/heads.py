"""Linear layers trained side by side on the same frozen features, as MAE trains its probe.

    logits = W BatchNorm(features) + b           BatchNorm without affine, eps 1e-6; W normal 0.01, b = 0
    g <- g * 0.001 |W| / |g| (LARS; b's as it is),  mu <- 0.9 mu + g,  (W, b) <- (W, b) - lr mu
    lr(e) = base_lr * batch / 256 * (e / 10 for e < 10, then a half cosine to 0 at e = 90), at each step
                                                                                           He et al., 2022

LARS moves the weights by base_lr x images seen: MAE's 0.1, made for 115 million, hardly leaves the start on a small
set. So several rates are trained at once, as iBOT does, and one is chosen on validation. What limits them is b, which
LARS leaves alone: above a learning rate of about 7 it swings, so small sets take smaller steps, and more of them.

n images, b of them in a step, D width, C classes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from timm.optim import Lars
from torch import Tensor, nn

from foveal.chance import generator
from foveal.evaluate.features import Features
from foveal.evaluate.knn import matched
from foveal.evaluate.probe import accuracy_and_loss

Pieces = Iterable[tuple[Tensor, Tensor]]  # features (b, D), labels (b,)
Tell = Callable[[int, int, float], None]  # epoch, epochs, best validation accuracy so far

ROWS = 4096  # images whose logits are held at a time


@dataclass(frozen=True)
class Recipe:
    """How the linear layer is trained.

    base_lr: one or several, for 256 images per step.  warmup_epochs: None is a ninth of the epochs, as 10 of 90.
    batch: images per step; None is MAE's 16384, or less so that an epoch has 64 steps, but not below 64.
    crop_scale: share of the image that a crop keeps.  seed: of the start, the order and the crops.
    """

    base_lr: Sequence[float] = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
    epochs: int = 90
    warmup_epochs: float | None = None
    batch: int | None = None
    crop_scale: tuple[float, float] = (0.08, 1.0)
    seed: int = 0

    def __post_init__(self) -> None:
        rates = (self.base_lr,) if isinstance(self.base_lr, int | float) else tuple(self.base_lr)
        object.__setattr__(self, "base_lr", rates)
        if not rates or not all(math.isfinite(rate) and rate > 0 for rate in rates):
            raise ValueError(f"base_lr={rates}: give one or several above 0")
        if self.epochs < 1 or (self.batch is not None and self.batch < 2):
            raise ValueError(f"epochs={self.epochs} must be 1 or more, batch={self.batch} 2 or more")
        if not 0 <= self.warmup < self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup:g} must be in [0, {self.epochs}), below epochs")

    @property
    def warmup(self) -> float:
        return self.epochs / 9 if self.warmup_epochs is None else self.warmup_epochs

    def images(self, n: int) -> int:
        """Images per step of a set of n."""
        return min(n, self.batch or min(16384, max(64, n // 64)))

    def told(self, n: int) -> str:
        """In words, for a set of n."""
        return (
            f"BatchNorm without affine, LARS, {self.epochs} epochs with {self.warmup:.3g} of warm-up,"
            f" {self.images(n):,} images per step, seed {self.seed}"
        )


def probe_head(width: int, classes: int, rng: torch.Generator) -> nn.Sequential:
    """BatchNorm without affine, and a linear layer with weights normal 0.01 (cut at 2, as MAE's) and zero bias."""
    linear = nn.utils.skip_init(nn.Linear, width, classes)  # its own start would draw from the global state
    nn.init.trunc_normal_(linear.weight, std=0.01, generator=rng)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(width, affine=False, eps=1e-6), linear)


def lars(parameters: Iterable[nn.Parameter], lr: float = 0.0) -> Lars:
    """MAE's LARS: momentum 0.9, no decay, trust 0.001 for matrices; vectors get their gradient as it is."""
    every = list(parameters)
    groups = [
        {"params": [p for p in every if p.ndim > 1], "always_adapt": True},  # without decay timm's would not adapt
        {"params": [p for p in every if p.ndim <= 1], "always_adapt": False},
    ]
    return Lars([g for g in groups if g["params"]], lr=lr, momentum=0.9, weight_decay=0.0, trust_coeff=0.001, eps=0.0)


def share_of_peak(epoch: float, epochs: int, warmup: float) -> float:
    """The learning rate at a time in epochs, as a share of its peak: linear from 0, then a half cosine to 0."""
    if epoch < warmup:
        return epoch / warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


@dataclass
class Head:
    """A head in training at one base learning rate, with its best and its last epoch on validation."""

    base_lr: float
    head: nn.Sequential
    optimizer: Lars
    best: nn.Sequential
    epoch: int = 0
    key: tuple[float, float] = (-1.0, 0.0)  # accuracy, then less loss
    last: float = 0.0

    def step(self, x: Tensor, y: Tensor, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.head(x), y).backward()
        self.optimizer.step()

    def judge(self, val: Tensor, labels: Tensor, epoch: int) -> None:
        self.last, loss = accuracy_and_loss(logits_of(self.head, val), labels)
        if (self.last, -loss) > self.key:
            self.key, self.epoch, self.best = (self.last, -loss), epoch, copy.deepcopy(self.head)


def fit_heads(
    pieces: Callable[[int], Pieces],
    n: int,
    classes: tuple[str, ...],
    val: Features,
    recipe: Recipe,
    device: torch.device,
    progress: Tell | None = None,
) -> list[Head]:
    """Train a head for each learning rate on the same features. pieces(epoch): those of n images, in any portions."""
    val.checked("val")
    labels = matched(val.labels, val.classes, classes)
    batch = recipe.images(n)
    steps = max(1, round(n / batch))
    sizes = [n * (s + 1) // steps - n * s // steps for s in range(steps)]
    heads: list[Head] = []
    for rate in recipe.base_lr:
        head = probe_head(val.values.shape[1], len(classes), generator(recipe.seed, "init")).to(device)
        heads.append(Head(rate, head, lars(head.parameters()), head))
    with torch.enable_grad():
        for epoch in range(recipe.epochs):
            for step, (x, y) in enumerate(portions(pieces(epoch), sizes)):
                share = share_of_peak(epoch + step / steps, recipe.epochs, recipe.warmup)
                for one in heads:
                    one.head.train()
                    one.step(x, y, one.base_lr * batch / 256 * share)
            for one in heads:
                one.judge(val.values, labels, epoch + 1)
            if progress is not None:
                progress(epoch + 1, recipe.epochs, max(one.key[0] for one in heads))
    return heads


def portions(pieces: Pieces, sizes: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """What comes in any portions, in portions of `sizes`."""
    held: list[tuple[Tensor, Tensor]] = []
    wanted = iter(sizes)
    size = next(wanted)
    for piece in pieces:
        held.append(piece)
        while sum(len(y) for _, y in held) >= size > 0:
            x, y = torch.cat([x for x, _ in held]), torch.cat([y for _, y in held])
            yield x[:size], y[:size]
            held, size = [(x[size:], y[size:])], next(wanted, 0)


@torch.no_grad()
def logits_of(head: nn.Module, values: Tensor) -> Tensor:
    """(N, C) on the CPU, of a head in evaluation."""
    head.eval()
    device = next(head.parameters()).device
    return torch.cat([head(rows.to(device)).cpu() for rows in values.split(ROWS)])
