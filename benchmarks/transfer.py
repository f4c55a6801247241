"""What a fine-tuning step costs with each way of keeping to the pre-trained model, over the plain step.

    python benchmarks/transfer.py [--arms gta l2-sp ...] [--model vit_small_patch16_224] [--batch 16] [--rounds 9]
                                  [--device cuda] [--dtype bfloat16] [--threads 1] [--clock cpu]

Forward, loss, backward and an AdamW step at learning rate 0, so that every round does the same work, on random images;
random weights, moved a little away from the source's. Every arm is the step of `foveal train` with that guide, and has
a model, an optimiser and a source of its own. GTA done naively: fused attention off in model and source, the logits of
all blocks kept whole in both, then sliced. Co-Tuning has a source with 1000 classes and a table that is made up.

Every arm runs once per round, in a shuffled order, in one process; a ratio is taken within a round; median and
quartiles over rounds are printed. On a machine that does other things `--clock cpu --threads 1` counts the processor
time of this process alone. Memory is the most bytes of tensors alive at once, with weights, gradients, optimiser and
source, from an arm's building to the end of its second step: on a CPU by the profiler's list of all allocations, on
CUDA by the allocator's own count. The parts that a guide adds are timed in isolation too, where a share of a percent of
the step can be told.

To reach, ViT-S/16 at 224, batch 16: GTA 1.34 of the plain step and 180 MiB more, rows and loss 1 % of the plain step;
penalties without a source's forward (L2-SP, BSS, Co-Tuning) 1.03.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import gc
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from clock import clock_of, interleaved, processor, spread
from torch import Tensor, nn

import foveal
from foveal.attention.rows import query_row
from foveal.transfer import (
    BSS,
    DELTA,
    GTA,
    L2SP,
    AttentionTransfer,
    CoTuning,
    Guide,
    Guided,
    co_tuning_loss,
    freeze,
    gta_loss,
    inject,
)
from foveal.transfer.bss import bss

CLASSES, SOURCE_CLASSES = 100, 1000
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """What all arms share."""

    name: str
    images: Tensor  # (B, 3, H, W)
    labels: Tensor  # (B,)
    dtype: torch.dtype

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.images.device.type, self.dtype)


class Naive(Guide):
    """GTA as one would write it first."""

    name = "gta"

    def __init__(self, model: nn.Module, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.source = copy.deepcopy(model).eval().requires_grad_(False)
        self.prefix = int(model.num_prefix_tokens)  # type: ignore[arg-type]
        self.of_source, self.of_target = unfused(self.source), unfused(model)

    def on(self, model: nn.Module, images: Tensor, labels: Tensor | None = None, relax: float = 1.0) -> Guided:
        return NaiveStep(self, images, self.weight * relax)

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, relax: float = 1.0) -> None:
        self.of_source.clear()
        self.of_target.clear()


class NaiveStep(Guided):
    def __init__(self, guide: Naive, images: Tensor, strength: float) -> None:
        super().__init__(guide.name, strength)
        self.guide, self.images = guide, images

    def open(self) -> None:
        with torch.no_grad():
            self.guide.source(self.images)

    def term(self) -> Tensor:
        losses = []
        for target, source in zip(self.guide.of_target, self.guide.of_source, strict=True):
            t, s = (logits[:, :, 0, self.guide.prefix :].float() for logits in (target, source))
            losses.append((t - s).square().mean())
        return torch.stack(losses).mean()


def unfused(model: nn.Module) -> list[Tensor]:
    """Have every block write its attention out, and keep the logits (B, H, T, T) in the list."""
    kept: list[Tensor] = []
    for block in model.blocks:  # type: ignore[union-attr]
        block.attn.forward = functools.partial(written_out, block.attn, kept)
    return kept


def written_out(a: Any, kept: list[Tensor], x: Tensor, **ignored: object) -> Tensor:
    """The forward of timm's attention `a` with fused_attn off."""
    B, T, _ = x.shape
    q, k, v = a.qkv(x).reshape(B, T, 3, a.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    logits = (a.q_norm(q) * a.scale) @ a.k_norm(k).transpose(-2, -1)
    kept.append(logits)
    attn = a.attn_drop(logits.softmax(-1))
    out: Tensor = a.proj_drop(a.proj(a.norm((attn @ v).transpose(1, 2).reshape(B, T, -1))))
    return out


def co_tuning(model: nn.Module) -> Guide:
    """A table that is made up, for a source's classifier of random weights."""
    table = torch.rand(CLASSES, SOURCE_CLASSES, generator=torch.Generator().manual_seed(0))
    device = next(model.parameters()).device
    head = nn.Linear(int(model.num_features), SOURCE_CLASSES)  # type: ignore[arg-type]
    return CoTuning((table / table.sum(1, keepdim=True)).to(device), head.to(device))


ARMS: dict[str, Callable[[nn.Module], Guide | None]] = {  # the guide, from the model before it is tuned
    "plain": lambda model: None,
    "gta": GTA,
    "gta-naive": Naive,
    "attention-transfer": AttentionTransfer,
    "l2-sp": L2SP,
    "l2-sp-decoupled": lambda model: L2SP(model, decoupled=True),
    "bss": lambda model: BSS(),
    "delta": DELTA,
    "co-tuning": co_tuning,
    "attention-only": lambda model: None,
    "lora": lambda model: None,
    "lora+gta": lambda model: GTA(None),
}
TUNED = {"attention-only": "attention", "lora": "lora", "lora+gta": "lora"}
SPACE = {"gta": "180 MiB"}  # asked, above plain
TIME = {"gta": "1.34", "l2-sp": "1.03", "l2-sp-decoupled": "1.03", "bss": "1.03", "co-tuning": "1.03"}


class Step:
    """The training step of an arm, with all that it holds."""

    def __init__(self, case: Case, arm: str) -> None:
        torch.manual_seed(0)
        self.case, device = case, case.images.device
        self.model: nn.Module = timm.create_model(case.name, num_classes=CLASSES).to(device).train()
        tune = TUNED.get(arm, "all")
        if tune == "lora":
            inject(self.model)
        else:
            freeze(self.model, tune)
        self.guide = ARMS[arm](self.model)
        learned = None if self.guide is None else self.guide.learned()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        with torch.no_grad():
            for p in trained:
                p.add_(torch.randn_like(p), alpha=1e-3)
        self.optimizer = torch.optim.AdamW([*trained, *(learned.parameters() if learned else ())], lr=0.0)
        self.door = foveal.attach(self.model)  # as a whole training does

    def __call__(self, number: int) -> None:
        case, guide = self.case, self.guide
        self.optimizer.zero_grad()
        with case.autocast():
            if guide is None:
                loss = self.task(self.model(case.images))
            else:
                with guide.on(self.model, case.images, case.labels) as guided:
                    logits = self.model(case.images)
                loss = self.task(logits) + sum(guided.losses().values())
        loss.backward()
        self.optimizer.step()
        if guide is not None:
            guide.after_step(self.model, self.optimizer)

    def task(self, logits: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.float(), self.case.labels)


def parts(steps: dict[str, Step]) -> dict[str, Callable[[int], object]]:
    """What the guides of these arms add, each alone, by name."""
    found: dict[str, Callable[[int], object]] = {}
    if "gta" in steps:
        found |= parts_of_gta(steps["gta"])
    for name in [name for name in ("l2-sp", "bss", "co-tuning") if name in steps]:
        found[f"{name}: term and its gradient"] = term_alone(name, steps[name])
    if "l2-sp-decoupled" in steps:
        step = steps["l2-sp-decoupled"]
        found["l2-sp-decoupled: the pull"] = lambda i: step.guide.after_step(step.model, step.optimizer)  # type: ignore[union-attr]
    return found


def parts_of_gta(step: Step) -> dict[str, Callable[[int], object]]:
    """The source's forward; its class rows and the model's from the queries and keys that attention has, their
    distance, and its gradient added to that which queries and keys have."""
    case, guide = step.case, step.guide
    assert isinstance(guide, GTA)
    assert guide.source is not None
    with case.autocast(), foveal.read(step.model, "all", "factors") as seen:
        step.model(case.images)
    source = guide.frozen.look(case.images, "all", "factors").factors()
    first, prefix = seen.layout.class_index, seen.layout.prefix
    assert first is not None
    pairs = [(leaf(f.q), leaf(f.k), f.scale) for f in seen.factors()]
    scale = pairs[0][2]

    def rows(qk: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        return [query_row(q[:, :, first], k, scale)[..., prefix:] for q, k in qk]

    def rows_and_loss(number: int) -> None:
        with torch.no_grad():
            kept = rows([(f.q, f.k) for f in source])
        gta_loss(rows([(q, k) for q, k, _ in pairs]), kept).backward()

    def look(number: int) -> object:
        with case.autocast():
            return guide.frozen.look(case.images, guide.layers, guide.read, step.model)

    @torch.no_grad()
    def whole(number: int) -> object:
        with case.autocast():
            return guide.source(case.images)  # type: ignore[misc]

    return {
        "gta: source, to the last row": look,
        "gta: source, to its end, unread": whole,
        "gta: rows and loss": rows_and_loss,
    }


def term_alone(name: str, step: Step) -> Callable[[int], object]:
    """A penalty and its gradient, added to those that are there."""
    case, guide = step.case, step.guide
    width = int(step.model.num_features)  # type: ignore[arg-type]
    features = leaf(torch.randn(len(case.images), width, device=case.images.device))
    if isinstance(guide, BSS):
        return lambda number: (guide.weight * bss(features, guide.k)).backward()

    def of_head(number: int) -> None:
        assert isinstance(guide, CoTuning)
        with case.autocast():
            loss = guide.weight * co_tuning_loss(guide.head(features), case.labels, guide.table)
        loss.backward()

    def of_weights(number: int) -> None:
        assert guide is not None
        with guide.on(step.model, case.images) as guided:
            pass
        guided.losses()[guide.name].backward()

    return of_head if name == "co-tuning" else of_weights


def leaf(x: Tensor) -> Tensor:
    """A copy that a gradient is added to."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    x.grad = torch.zeros_like(x)
    return x


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors alive at once inside `run`, of those that it made."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return int(torch.cuda.max_memory_allocated()) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells of every start and stop
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    alive: dict[int, int] = {}
    total = peak = 0
    for event in sorted(events, key=lambda e: e["args"]["Ev Idx"]):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        change = size if size > 0 else -alive.get(address, 0)  # what was there before `run` does not count
        alive[address] = max(size, 0)
        total += change
        peak = max(peak, total)
    return peak


def begin(steps: dict[str, Step], case: Case, arm: str) -> None:
    """Build an arm, and step twice: the second time the optimiser's averages are there."""
    steps[arm] = step = Step(case, arm)
    step(0)
    step(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, help="beside the plain step")
    parser.add_argument("--model", default="vit_small_patch16_224", help="of timm, with class token and a classifier")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16: autocast")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: of this process alone")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("quartiles need two rounds or more")
    if options.threads:
        torch.set_num_threads(options.threads)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    arms = list(dict.fromkeys(["plain", *options.arms]))
    where = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{processor()}, {torch.get_num_threads()} threads"
    )
    print(f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}")
    print(f"foveal {foveal.__version__}, {where}, {options.clock} clock")

    config = timm.get_pretrained_cfg(options.model)
    size = (3, 224, 224) if config is None else config.input_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(options.batch, *size, generator=generator).to(device)
    labels = torch.randint(CLASSES, (options.batch,), generator=generator).to(device)
    case = Case(options.model, images, labels, dtype)
    print(f"{case.name}, {size[1]} x {size[2]}, batch {options.batch}, {dtype}, {options.rounds} rounds\n", flush=True)

    Step(case, "plain")(0)  # what libraries keep for themselves from the first call on is no arm's
    steps: dict[str, Step] = {}
    peaks = {arm: peak_bytes(functools.partial(begin, steps, case, arm), device) for arm in arms}
    print(f"{'memory':32s} {'peak':>11s}   {'above plain':>23s}   at most")
    for arm in arms:
        more = (peaks[arm] - peaks["plain"]) / MIB
        print(f"{arm:32s} {peaks[arm] / MIB:7.0f} MiB   {more:+19.1f} MiB   {SPACE.get(arm, '')}".rstrip(), flush=True)

    alone = parts(steps)
    times = interleaved({**steps, **alone}, options.rounds, device, clock_of(options.clock))
    base = times["plain"]

    print(f"\n{'time':32s} {'median':>11s}   {'over plain':>23s}   at most")
    for arm in arms:
        taken = times[arm]
        print(f"{arm:32s} {statistics.median(taken) * 1e3:8.1f} ms   {spread(taken, base):>23s}", end="")
        print(f"   {TIME.get(arm, '')}".rstrip())
    if not alone:
        return
    print(f"\n{'alone':32s} {'median':>11s}   {'of the plain step':>23s}")
    for part in alone:
        shares = statistics.quantiles([t / b for t, b in zip(times[part], base, strict=True)], n=4)
        low, mid, high = (f"{share:.2%}" for share in shares)
        print(f"{part:32s} {statistics.median(times[part]) * 1e3:8.2f} ms   {mid} [{low}, {high}]".rstrip())


if __name__ == "__main__":
    main()
