"""What TransMix costs: its training step over a CutMix step and over a plain one.

    python benchmarks/transmix.py [--rounds 20] [--device cuda] [--dtype bfloat16] [--threads 2] [--clock cpu]

Forward, loss, backward and an AdamW step, on random images and weights. CutMix and TransMix get the same boxes, so they
differ in reading the class row and in the labels only. Every variant runs once per round, in a shuffled order, in one
process; a ratio is taken within a round; median and quartiles over rounds are printed. To reach: 1.03 over CutMix.
On a machine that does other things `--clock cpu --threads 1` counts the processor time of this process alone.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import random
import statistics
import time
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

import foveal
from foveal import chance
from foveal.mix import CutMix, Mixer, NoMix, TransMix

CASES = {
    "ViT-S/16, 224 px": (16, {"img_size": 224, "patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}),
    "tiny ViT of the demo, 32 px": (64, {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2}),
}
CLASSES = 100


class Trainer:
    """A model, its optimizer, one batch; `step(mixer)` trains once."""

    def __init__(self, settings: dict[str, int], batch: int, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = timm.models.VisionTransformer(num_classes=CLASSES, **settings).to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        size = settings["img_size"]
        self.images = torch.randn(batch, 3, size, size, device=device)
        self.labels = torch.randint(CLASSES, (batch,), device=device)
        self.device, self.dtype = device, dtype

    def step(self, mixer: Mixer, number: int) -> Tensor:
        self.optimizer.zero_grad()
        key = chance.generator(0, "mix", number)
        with mixer.on(self.model, self.images, self.labels, rng=key) as step:
            with self.autocast():
                logits = self.model(step.images)
            loss = step.loss(logits, smoothing=0.1)
        loss.backward()
        self.optimizer.step()
        return loss

    def plain(self, number: int) -> Tensor:
        self.optimizer.zero_grad()
        with self.autocast():
            logits = self.model(self.images)
        loss = nn.functional.cross_entropy(logits.float(), self.labels, label_smoothing=0.1)
        loss.backward()
        self.optimizer.step()
        return loss

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def compare(name: str, rounds: int, device: torch.device, dtype: torch.dtype, clock: Callable[[], float]) -> None:
    batch, settings = CASES[name]
    print(f"\n{name}, batch {batch}, {dtype}, {rounds} rounds")
    bare, held = (Trainer(settings, batch, device, dtype) for _ in range(2))
    none, cutmix, transmix = NoMix(), CutMix(), TransMix()
    variants: dict[str, Callable[[int], object]] = {
        "plain step": bare.plain,
        "none, as a mixer": lambda i: bare.step(none, i),
        "CutMix": lambda i: bare.step(cutmix, i),
        "TransMix": lambda i: bare.step(transmix, i),
        "TransMix, hooks attached once": lambda i: held.step(transmix, i),
    }
    with foveal.attach(held.model):
        times = interleaved(variants, rounds, device, clock)
    print(f"  {'':32s} {'median':>9s}   {'over plain':>22s}   {'over CutMix':>22s}")
    for variant, taken in times.items():
        over = [spread(taken, times[base]) for base in ("plain step", "CutMix")]
        print(f"  {variant:32s} {statistics.median(taken) * 1e3:6.1f} ms   {over[0]:>22s}   {over[1]:>22s}")


def interleaved(
    variants: dict[str, Callable[[int], object]], rounds: int, device: torch.device, clock: Callable[[], float]
) -> dict[str, list[float]]:
    for run in variants.values():
        run(0)  # warm-up
        run(1)
    times: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    for number in range(rounds):
        random.Random(number).shuffle(order)
        for name in order:
            times[name].append(timed(variants[name], number, device, clock))
    return times


def timed(run: Callable[[int], object], number: int, device: torch.device, clock: Callable[[], float]) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = clock()
    run(number)
    wait()
    return clock() - start


def spread(taken: list[float], base: list[float]) -> str:
    low, mid, high = statistics.quantiles([t / b for t, b in zip(taken, base, strict=True)], n=4)
    return f"x {mid:.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=20, help="rounds of the large model; the tiny one runs 10 times more"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16: autocast")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    where = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{processor()}, {torch.get_num_threads()} threads"
    )
    print(f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}")
    print(f"foveal {foveal.__version__}, {where}, {options.clock} clock")
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    large, tiny = CASES
    compare(large, options.rounds, device, getattr(torch, options.dtype), clock)
    compare(tiny, options.rounds * 10, device, getattr(torch, options.dtype), clock)


def processor() -> str:
    """The CPU's name; platform.processor() is empty on many Linux machines."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
