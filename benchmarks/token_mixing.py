"""What TokenMixup costs: its training step over a plain one, and its parts one by one.

    python benchmarks/token_mixing.py [--case cct] [--batch 128] [--rounds 9] [--parts steps] [--device cuda]
                                      [--dtype bfloat16] [--threads 1] [--clock cpu]

Forward, loss, backward and an AdamW step at learning rate 0, so that every round does the same work, on random images.
The weights are random with large queries and keys: tokens exceed rho, and `half easy` has tau at the median difficulty.
Beside ours stands the released procedure, written down plainly: a second full attention pass for the map, a tensor of
(easy, B, N) for the scores, masks as wide as tokens, boolean indexing and a reordered batch. Every variant runs once
per round, in a shuffled order, in one process; a ratio is taken within a round; median and quartiles over rounds are
printed. On a machine that does other things `--clock cpu --threads 1` counts the processor time of this process alone.

To reach over the plain step: horizontal 1.03 (released: 1.09), vertical at kappa 5 1.02, memory 1.02; attention
saliency 40 times cheaper than the gradient's; scores at B = 512 10 times faster than the cube; assignment no bottleneck
up to B = 1024.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import statistics
from collections.abc import Callable

import timm
import torch
from clock import Clock, clock_of, interleaved, processor, spread
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import foveal
import foveal.models
from foveal import chance
from foveal.attention.blocks import Blocks
from foveal.attention.edit import Visit, edit
from foveal.mix import NoMix, TokenMixup, label_rows, soft_cross_entropy
from foveal.mix.assignment import assign, pair_scores
from foveal.mix.saliency import attention_saliency, by_class, gradient_saliency

CASES = {  # name -> model, image side, batch, block, rho
    "cct": ("cct_7_3x1_32", 32, 128, 2, 0.005),
    "vit": ("vit_small_patch16_224", 224, 128, 3, 0.01),
}
CLASSES = 100


class Trainer:
    """A model, its optimiser, one batch; `step(mixer)` trains once."""

    def __init__(self, case: str, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        name, size, _, self.block, self.rho = CASES[case]
        torch.manual_seed(0)
        self.model: nn.Module = timm.create_model(name, num_classes=CLASSES).to(device).train()
        with torch.no_grad():
            for parameter, p in self.model.named_parameters():
                if "qkv.weight" in parameter:
                    p[: 2 * p.shape[0] // 3] *= 8.0
        self.images = torch.randn(batch, 3, size, size, device=device)
        self.labels = torch.randint(CLASSES, (batch,), device=device)
        self.device, self.dtype = device, dtype
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)

    def mixer(self, **settings: object) -> TokenMixup:
        mixer = TokenMixup(**{"horizontal": self.block, "rho": self.rho, **settings})  # type: ignore[arg-type]
        learned = mixer.learned(self.model, CLASSES)
        if learned is not None:
            self.optimizer.add_param_group({"params": list(learned.parameters())})
        return mixer

    def step(self, mixer: NoMix | TokenMixup, number: int) -> Tensor:
        self.optimizer.zero_grad()
        key = chance.generator(0, "mix", number)
        with mixer.on(self.model, self.images, self.labels, rng=key, num_classes=CLASSES) as step:
            with self.autocast():
                logits = self.model(step.images)
            loss = step.loss(logits)
        loss.backward()
        self.optimizer.step()
        return loss

    def plain(self, number: int) -> Tensor:
        self.optimizer.zero_grad()
        with self.autocast():
            logits = self.model(self.images)
        loss = nn.functional.cross_entropy(logits.float(), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def exchange(self, mixer: TokenMixup) -> tuple[float, float, Tensor]:
        """Share of easy images, share of replaced tokens, and difficulties of a step."""
        with mixer.on(self.model, self.images, self.labels, num_classes=CLASSES) as step, torch.no_grad():
            self.model(step.images)
        done = step.exchanges[self.block]
        assert done.difficulty is not None
        return float(done.easy.float().mean()), float(done.replaced.float().mean()), done.difficulty


class Released:
    """Horizontal mixing as the released experiments do it, from its description; every image is easy."""

    def __init__(self, trainer: Trainer, score: nn.Module) -> None:
        self.trainer, self.score = trainer, score
        self.prefix = int(trainer.model.num_prefix_tokens)  # type: ignore[arg-type]

    def step(self, number: int) -> Tensor:
        t = self.trainer
        t.optimizer.zero_grad()
        self.targets = label_rows(t.labels, CLASSES)
        block = t.model.get_submodule(f"blocks.{t.block}")
        handle = block.register_forward_pre_hook(self._mix)
        with t.autocast():
            logits = t.model(t.images)
        handle.remove()
        loss = soft_cross_entropy(logits, self.targets) + 0.001 * self.own_loss
        loss.backward()
        t.optimizer.step()
        return loss

    def _mix(self, block: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, rho, P = args[0], self.trainer.rho, self.prefix
        logits = self.score(x).float()
        difficulty = -(self.targets * logits.log_softmax(-1)).sum(-1)
        self.own_loss = difficulty.mean()
        attn = self._map(block, x)
        saliency = (attn[:, :, 0, P:].mean(1) if P else attn.mean((1, 2))).detach().float()
        easy = difficulty.detach() < float("inf")
        own, b = saliency[easy], len(saliency)
        difference = saliency[None].repeat(len(own), 1, 1) - own[:, None].repeat(1, b, 1) - rho  # (easy, B, N)
        scores = difference.clamp_min(0).sum(-1)
        rows, columns = linear_sum_assignment(-scores.cpu().numpy())
        partner = torch.as_tensor(columns, device=x.device)
        mask = difference[torch.as_tensor(rows, device=x.device), partner] > 0  # (easy, N)
        wide = mask[..., None].expand(-1, -1, x.shape[-1]).to(x.dtype)
        patches = x[easy][:, P:] * (1 - wide) + x[partner][:, P:] * wide
        kept, gained = (own * ~mask).sum(-1), (saliency[partner] * mask).sum(-1)
        weight = (kept / (kept + gained))[:, None]
        mixed = weight * self.targets[easy] + (1 - weight) * self.targets[partner]
        self.targets = torch.cat([mixed, self.targets[~easy]])
        return (torch.cat([torch.cat([x[easy][:, :P], patches], 1), x[~easy]]),)

    def _map(self, block: nn.Module, x: Tensor) -> Tensor:
        """A whole attention pass with gradient, for its map."""
        attention = block.attn
        B, T, D = x.shape
        qkv = attention.qkv(block.norm1(x)).reshape(B, T, 3, attention.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attn = (q @ k.transpose(-1, -2) * attention.scale).softmax(-1)
        attention.proj((attention.attn_drop(attn) @ v).transpose(1, 2).reshape(B, T, D))
        return attn


def steps(case: str, batch: int, rounds: int, device: torch.device, dtype: torch.dtype, clock: Clock) -> None:
    t = Trainer(case, batch, device, dtype)
    print(f"\n{CASES[case][0]}, batch {batch}, {dtype}, horizontal at block {t.block}, {rounds} rounds")
    every = t.mixer(tau=1e9)
    share, replaced, difficulty = t.exchange(every)
    half = t.mixer(tau=float(difficulty.median()))
    mixers = {
        "horizontal, nothing easy": t.mixer(tau=-1.0),
        "horizontal, half easy": half,
        "horizontal, all easy": every,
        "horizontal, all easy, detached": t.mixer(tau=1e9, score_detached=True),
        "vertical at block 1, kappa 5": t.mixer(horizontal=None, vertical=1, kappa=5),
        "vertical at block 2, kappa 80": t.mixer(horizontal=None, vertical=2, kappa=80),
        "both, kappa 3": t.mixer(tau=1e9, vertical=t.block + 1, kappa=3),
        "horizontal, gradient saliency": t.mixer(tau=1e9, saliency="gradient"),
    }
    for name, mixer in (("all easy", every), ("half easy", half)):
        share, replaced, _ = t.exchange(mixer)
        print(f"  {name}: {share:.2f} of images easy, {replaced:.2f} of tokens replaced")
    assert every._scores is not None
    released = Released(t, every._scores[str(t.block)])
    variants: dict[str, Callable[[int], object]] = {
        "plain step": t.plain,
        "none, as a mixer": lambda i: t.step(NoMix(), i),
    }
    variants |= {name: lambda i, mixer=mixer: t.step(mixer, i) for name, mixer in mixers.items()}  # type: ignore[misc]
    variants["released procedure, all easy"] = released.step
    with foveal.attach(t.model):
        kept = {name: kept_bytes(run, device) for name, run in variants.items()}
        times = interleaved(variants, rounds, device, clock)
    what = "peak memory" if device.type == "cuda" else "kept for backward"
    print(f"  {'':34s} {'median':>10s}   {'over plain':>22s}   {what:>18s}")
    for name, taken in times.items():
        ratio, memory = spread(taken, times["plain step"]), kept[name] / kept["plain step"]
        print(f"  {name:34s} {statistics.median(taken) * 1e3:7.1f} ms   {ratio:>22s}   {'x':>11s} {memory:.4f}")


def saliencies(case: str, batch: int, rounds: int, device: torch.device, dtype: torch.dtype, clock: Clock) -> None:
    t = Trainer(case, batch, device, dtype)
    visits: list[Visit] = []

    def look(visit: Visit) -> Tensor:
        visits.append(visit)
        return visit.tokens

    with t.autocast(), edit(Blocks(t.model), change={t.block: look}):
        t.model(t.images)
    (visit,) = visits
    row = by_class(visit.layout, "auto")

    def attention(number: int) -> None:
        with t.autocast():
            attention_saliency(visit.peek(by_class=row))

    def gradient(number: int) -> None:
        with t.autocast():
            gradient_saliency(t.model, t.images, t.labels)

    times = interleaved({"attention": attention, "gradient": gradient}, rounds, device, clock)
    print(f"\nsaliency, {CASES[case][0]}, batch {batch}, {'class row' if row else 'column mean'}")
    for name, taken in times.items():
        print(f"  {name:34s} {statistics.median(taken) * 1e3:9.2f} ms")
    print(f"  gradient over attention            {spread(times['gradient'], times['attention'])}")


def scores(rounds: int, device: torch.device, clock: Clock) -> None:
    print("\nscores of all pairs, N = 256")
    for B in (128, 512):
        S = blobs(B, device)

        def cube(number: int, S: Tensor = S) -> Tensor:
            B = len(S)
            return (S[None].repeat(B, 1, 1) - S[:, None].repeat(1, B, 1) - 0.005).clamp_min(0).sum(-1)

        def ours(number: int, S: Tensor = S) -> Tensor:
            return pair_scores(S, 0.005)

        times = interleaved({"ours": ours, "cube": cube}, rounds, device, clock)
        ratio, differ = spread(times["cube"], times["ours"]), float((cube(0) - ours(0)).abs().max())
        mib, least = B * B * 256 * 4 / 2**20, B * B * 4 / 2**20
        print(f"  B = {B:5d}: {statistics.median(times['ours']) * 1e3:8.2f} ms, cube over it {ratio};", end=" ")
        print(f"tensors of {mib:.0f} MiB against {least:.2f}; largest difference {differ:.0e}")


def assignments(rounds: int, device: torch.device, clock: Clock) -> None:
    print("\nexact assignment (scipy on prepared scores), transfers included")
    for B in (64, 128, 256, 512, 1024):
        C = pair_scores(blobs(B, device), 0.005)
        for share in (1.0, 0.5):
            easy = torch.arange(B, device=device) < share * B
            host = C[easy].cpu().double().numpy()
            variants = {
                "ours": lambda i, C=C, easy=easy: assign(C, easy),
                "scipy": lambda i, host=host: linear_sum_assignment(host, maximize=True),
            }
            times = interleaved(variants, max(3, rounds // 2), device, clock)  # type: ignore[arg-type]
            partner, _ = assign(C, easy)
            rows, columns = linear_sum_assignment(host, maximize=True)
            total, best = float(C[easy].gather(1, partner[easy, None]).double().sum()), host[rows, columns].sum()
            own, scipy = (statistics.median(times[name]) * 1e3 for name in ("ours", "scipy"))
            print(f"  B = {B:5d}, {share:4.0%} easy: {own:8.2f} ms; scipy alone {scipy:8.2f} ms;", end=" ")
            print(f"total {total / best:.9f} of the best")


def blobs(B: int, device: torch.device) -> Tensor:
    """Saliency with smooth peaks on a 16 x 16 grid: (B, 256)."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.randn(B, 1, 8, 8, generator=g)
    fine = nn.functional.interpolate(coarse, size=(16, 16), mode="bilinear").flatten(1)
    return (fine + 0.3 * torch.randn(B, 256, generator=g)).softmax(-1).to(device)


def kept_bytes(run: Callable[[int], object], device: torch.device) -> int:
    """Peak memory of a step on CUDA; elsewhere the bytes of the storages that its graph keeps for the backward."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run(0)
        return int(torch.cuda.max_memory_allocated())
    kept: dict[int, int] = {}
    held: list[Tensor] = []  # so that no address is used twice

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in kept:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run(0)
    return sum(kept.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="cct", choices=CASES)
    parser.add_argument("--batch", type=int, default=0, help="0: 128")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--parts", default="steps saliency scores assignment", help="which of these to run")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16: autocast")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: of this process alone")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    batch = options.batch or CASES[options.case][2]
    where = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{processor()}, {torch.get_num_threads()} threads"
    )
    print(f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}")
    print(f"foveal {foveal.__version__}, {where}, {options.clock} clock")
    clock = clock_of(options.clock)
    parts: dict[str, Callable[[], None]] = {
        "steps": lambda: steps(options.case, batch, options.rounds, device, dtype, clock),
        "saliency": lambda: saliencies(options.case, batch, options.rounds, device, dtype, clock),
        "scores": lambda: scores(options.rounds, device, clock),
        "assignment": lambda: assignments(options.rounds, device, clock),
    }
    for part in options.parts.split():
        parts[part]()


if __name__ == "__main__":
    main()
