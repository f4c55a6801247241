"""What mixing costs: a training step with each mixer over the plain step.

    python benchmarks/mixing.py [--rounds 8] [--device cuda] [--dtype bfloat16] [--threads 1] [--clock cpu] [--only N]

Forward, loss, backward and an AdamW step, on random images and weights. Every variant runs once per round, in a
shuffled order, in one process; a ratio is taken within a round; median and quartiles over rounds are printed. Mixers
that switch between a guided step and Mixup are timed apart in both and averaged over the switch of 0.5 round by round.

Named baselines: the plain step; torchvision's CutMix; and TdAttenMix written naively: one forward for the map with
attention computed in the open, another for the logits of the consistency loss, windows moved by unfold and fold.

To reach, on ViT-S: TransMix 1.03, TdAttenMix with head_cosine 1.20 on average (its release: 2.7), each mixer that runs
no forward or backward of its own 1.03. On a machine that does other things `--clock cpu --threads 1` counts the
processor time of this process alone.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import random
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from clock import clock_of, interleaved, processor, spread
from torch import Tensor, nn
from torchvision.transforms import v2

import foveal
from foveal import chance
from foveal.mix import MIXERS, Mixer

CASES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "ViT-S/16, 224 px": (
        {"cpu": 16, "cuda": 256},
        {"img_size": 224, "patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6},
    ),
    "tiny ViT, 32 px": (
        {"cpu": 128, "cuda": 1024},
        {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2},
    ),
}
CLASSES = 100
SWITCHING = ("tdattenmix", "smmix")  # half of their steps are Mixup
SOURCES = (
    "head_cosine",
    "label_biased",
    "class_attention",
    "received_attention",
    "centre_surround",
    "spectral_residual",
)
Step = Callable[[int], object]


class Trainer:
    """A model, its optimizer, one batch; each method trains once."""

    def __init__(self, settings: dict[str, Any], batch: int, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = timm.models.VisionTransformer(num_classes=CLASSES, **settings).to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        size = settings["img_size"]
        self.images = torch.randn(batch, 3, size, size, device=device)
        self.labels = torch.randint(CLASSES, (batch,), device=device)
        self.device, self.dtype = device, dtype
        self.cutmix = v2.CutMix(num_classes=CLASSES)

    def mixed(self, mixer: Mixer[Any], number: int) -> None:
        rng = chance.generator(0, "mix", number)
        with self.autocast(), mixer.on(self.model, self.images, self.labels, rng=rng) as step:
            loss = step.loss(self.model(step.images), smoothing=0.1)
        self.learn(loss)

    def plain(self, number: int) -> None:
        with self.autocast():
            logits = self.model(self.images)
        self.learn(F.cross_entropy(logits.float(), self.labels, label_smoothing=0.1))

    def torchvision(self, number: int) -> None:
        torch.manual_seed(number)
        images, targets = self.cutmix(self.images, self.labels)
        with self.autocast():
            logits = self.model(images)
        self.learn(F.cross_entropy(logits.float(), targets, label_smoothing=0.1))

    def naive(self, number: int) -> None:
        """TdAttenMix as one would write it first."""
        model: Any = self.model
        with torch.no_grad(), self.autocast():
            model.eval()
            for block in model.blocks:
                block.attn.fused_attn = False
            tokens = model.forward_features(self.images)[:, model.num_prefix_tokens :].float()
            for block in model.blocks:
                block.attn.fused_attn = True
            clean = model(self.images).float()
            model.train()
        rows = model.head.weight[self.labels].float()
        map = F.cosine_similarity(tokens, rows[:, None], dim=-1).clamp(0, 1).detach()
        map = (map - 0.7 * map.amax(1, keepdim=True) - 0.3 * map.amin(1, keepdim=True)).clamp_min(0)
        h, w = model.patch_embed.grid_size
        images, lam = moved_by_fold(self.images, map.unflatten(1, (h, w)), model.patch_embed.patch_size[0], number)
        with self.autocast():
            logits = model(images)
        logits = logits.float()
        targets = F.one_hot(self.labels, CLASSES) * 0.9 + 0.1 / CLASSES
        targets = lam[:, None] * targets + (1 - lam[:, None]) * targets.flip(0)
        soft = (lam[:, None] * clean + (1 - lam[:, None]) * clean.flip(0)).softmax(-1)
        loss = F.cross_entropy(logits, targets) + F.kl_div(logits.log_softmax(-1), soft, reduction="batchmean")
        self.learn(loss)

    def learn(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def moved_by_fold(images: Tensor, map: Tensor, patch: int, number: int) -> tuple[Tensor, Tensor]:
    """Windows cut and pasted as patches of an unfolded batch, with boolean masks; and the weights of the labels."""
    B, h, w = map.shape
    k = random.Random(number).randint(h // 4, 3 * h // 4)
    sums = F.unfold(map[:, None], k).sum(1)  # (B, windows)
    across = w - k + 1
    to, at = sums.argmin(1), sums.argmax(1).flip(0)
    patches = F.unfold(images, patch, stride=patch).transpose(1, 2)
    own, partner = torch.zeros(B, h, w, dtype=torch.bool), torch.zeros(B, h, w, dtype=torch.bool)
    for i in range(B):
        r, c, y, x = int(to[i]) // across, int(to[i]) % across, int(at[i]) // across, int(at[i]) % across
        own[i, r : r + k, c : c + k] = True
        partner[i, y : y + k, x : x + k] = True
    own, partner = own.flatten(1).to(images.device), partner.flatten(1).to(images.device)
    mixed = patches.clone()
    mixed[own] = patches.flip(0)[partner]
    attention = map.flatten(1)
    t, s = (attention * ~own).sum(1), (attention.flip(0) * partner).sum(1)
    area = 1 - k * k / (h * w)
    lam = 0.5 * area + 0.5 * torch.where(t + s > 0, t / (t + s), area)
    return F.fold(mixed.transpose(1, 2), images.shape[-2:], patch, stride=patch), lam


def variants(trainer: Trainer, only: list[str]) -> tuple[dict[str, Step], dict[str, tuple[str, str]]]:
    """The steps to time, and which two of them each average is over."""
    steps: dict[str, Step] = {"plain": trainer.plain, "torchvision CutMix": trainer.torchvision}
    averages: dict[str, tuple[str, str]] = {}
    for name, kind in MIXERS.items():
        if name in SWITCHING:
            continue
        steps[name] = partial(trainer.mixed, kind())
    guided: dict[str, Mixer[Any]] = {
        f"tdattenmix {source}": MIXERS["tdattenmix"](map=source, switch_prob=1.0) for source in SOURCES
    }
    guided["tdattenmix head_cosine, no consistency"] = MIXERS["tdattenmix"](switch_prob=1.0, consistency=0.0)
    guided["smmix"] = MIXERS["smmix"](switch_prob=1.0)
    steps |= {f"{name}, each step": partial(trainer.mixed, mixer) for name, mixer in guided.items()}
    steps["tdattenmix naive, each step"] = trainer.naive
    for name in [*guided, "tdattenmix naive"]:
        averages[f"{name}, switch 0.5"] = (f"{name}, each step", "mixup")
    if only:
        steps = {n: s for n, s in steps.items() if n in ("plain", "mixup") or any(part in n for part in only)}
        averages = {n: pair for n, pair in averages.items() if pair[0] in steps}
    return steps, averages


def compare(
    name: str, rounds: int, device: torch.device, dtype: torch.dtype, clock: Callable[[], float], only: list[str]
) -> None:
    batches, settings = CASES[name]
    batch = batches[device.type]
    print(f"\n{name}, batch {batch}, {dtype}, {rounds} rounds")
    trainer = Trainer(settings, batch, device, dtype)
    steps, averages = variants(trainer, only)
    with foveal.attach(trainer.model):
        times = interleaved(steps, rounds, device, clock)
    for average, (one, other) in averages.items():
        times[average] = [(a + b) / 2 for a, b in zip(times[one], times[other], strict=True)]
    print(f"  {'':48s} {'median':>10s}   {'over plain':>22s}")
    for variant, taken in times.items():
        print(f"  {variant:48s} {statistics.median(taken) * 1e3:7.1f} ms   {spread(taken, times['plain']):>22s}")
    if device.type == "cuda":
        print(f"  most memory held: {torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=8, help="rounds of the large model; the tiny one runs 10 times more"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16: autocast")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    parser.add_argument("--only", nargs="*", default=[], help="variants whose name contains one of these")
    parser.add_argument("--case", nargs="*", default=list(CASES), choices=list(CASES))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    where = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{processor()}, {torch.get_num_threads()} threads"
    )
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}", end=""
    )
    print(f", timm {timm.__version__}, foveal {foveal.__version__}, {where}, {options.clock} clock")
    clock = clock_of(options.clock)
    for name in options.case:
        rounds = options.rounds if name == next(iter(CASES)) else options.rounds * 10
        compare(name, rounds, device, getattr(torch, options.dtype), clock, options.only)


if __name__ == "__main__":
    main()
