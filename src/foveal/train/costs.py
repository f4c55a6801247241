"""What a training step of each arm costs, beside a step of its baseline.

    ratio = (time of a step of the arm) / (time of a step of the baseline), within a round

A step is mixing, guidance, forward, backward and the optimiser. All arms take turns, step by step, in one process and
on the same real batch, so that what else the machine does meets all alike. A round has several steps, numbered alike
for all arms: the number keys the mixer's draws, and one that does something dear now and then is averaged over them. On
a CPU the processor time of one thread is counted, on a GPU the time between two events. What is reported are the median
and the quartiles of the rounds.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from foveal.attention import attach, supported
from foveal.chance import generator, seeded
from foveal.data import Data
from foveal.data.batches import Batch, Batches
from foveal.train.errors import RunError
from foveal.train.files import write_text
from foveal.train.machine import device_of
from foveal.train.models import Built, build, versions
from foveal.train.optimise import Average
from foveal.train.precision import choose
from foveal.train.run import read_json
from foveal.train.settings import Settings
from foveal.train.tuning import choose_trained

STEPS = 8  # of a round: a mixer that takes turns shows both sides
ROUNDS = (3, 7)  # fewest, most
MODEL = ("model", "model_args", "image_size", "init", "tune", "tune_args")  # arms that agree in these share a model
GUIDING = ("guide", "guide_weight", "guide_args", "guide_source", "token_mix", "token_mix_args")
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ELSEWHERE = (
    "seed",
    "out",
    "name",
    "label_fraction",
    "per_class",
    "data_seed",
    "epochs",
    "map_warmup",
    "head_start",
)  # no cost


@dataclass(frozen=True)
class Cost:
    """A training step of an arm. seconds: median of the rounds.  ratio: to the baseline, with its quartiles.

    A baseline has no ratio; with too few rounds there are no quartiles.
    """

    seconds: float
    ratio: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Costs:
    """What steps cost by arm; conditions: of the measurement, in words and numbers; failed: why, of other arms."""

    arms: Mapping[str, Cost]
    conditions: Mapping[str, Any]
    failed: Mapping[str, str]

    def told(self) -> str:
        """What was measured under which conditions, as a clause."""
        said = self.conditions
        threads = f", {said['threads']} thread" if said.get("threads") else ""
        return (
            f"time of a training step over that of the baseline, median of {said.get('rounds')} rounds of"
            f" {said.get('steps')} steps in turns, batch {said.get('batch_size')}, {said.get('precision')} on"
            f" {said.get('device')}{threads}"
        )


def measure_costs(arms: Mapping[str, Settings], baseline_of: Mapping[str, str], seconds: float = 60.0) -> Costs:
    """Measure a step of each arm in about `seconds`, or a little more than it takes to do each a few times.

    Large batches are cut so that there is time for all arms; `conditions` has the size used. An arm whose step cannot
    be made is left out, with the reason. Arms that differ only in how much they train on are measured once.
    """
    from foveal.train.fitting import load_data

    groups: dict[str, list[str]] = {}
    for arm, settings in arms.items():
        groups.setdefault(_key(settings), []).append(arm)
    chosen = {names[0]: arms[names[0]] for names in groups.values()}
    first = next(iter(arms.values()))
    device = device_of(first.device)
    failed: dict[str, str] = {}
    with seeded(first.seed, "step"), _one_thread(device):
        data = load_data(first)
        benches: dict[str, _Bench] = {}
        made: dict[str, Step] = {}
        with contextlib.ExitStack() as stack:
            for arm, settings in chosen.items():
                try:
                    of_model = json.dumps({n: v for n, v in settings.as_dict().items() if n in MODEL})
                    if of_model not in benches:
                        benches[of_model] = _Bench(settings, data, device)
                        stack.enter_context(benches[of_model].attached())
                    made[arm] = benches[of_model].step(settings)
                    made[arm](-1, 2)
                except Exception as error:
                    made.pop(arm, None)
                    failed[arm] = " ".join(str(error).split())
            bench = next(iter(benches.values()), None)
            times, size, rounds = _fitted(made, bench.size if bench else 0, seconds, device)
    everyone = {arm: times[names[0]] for names in groups.values() for arm in names if names[0] in times}
    conditions = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": None if device.type == "cuda" else 1,
        "precision": bench.precision if bench else first.precision,
        "batch_size": size,
        "steps": STEPS,
        "rounds": rounds,
        "versions": versions(),
    }
    left_out = {arm: failed[names[0]] for names in groups.values() for arm in names if names[0] in failed}
    return Costs(costs_of(everyone, baseline_of), conditions, left_out)


Step = Callable[[int, int], object]  # (number, which keys its draws; images) -> anything
Clock = Callable[[Callable[[], object]], float]  # what to time -> seconds


def interleaved(
    steps: Mapping[str, Step], size: int, rounds: int, clock: Clock, until: float
) -> dict[str, list[float]]:
    """Mean seconds of a step in each round, by arm: in every round each takes STEPS steps, in turns.

    clock(f): seconds that f takes.  until: time.monotonic() after which no further round begins, but for the first.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        if number and time.monotonic() > until:
            break
        total = dict.fromkeys(steps, 0.0)
        for step in range(number * STEPS, (number + 1) * STEPS):
            for name, run in steps.items():
                total[name] += clock(lambda run=run, step=step: run(step, size))  # type: ignore[misc]
        for name, taken in total.items():
            times[name].append(taken / STEPS)
    return times


def costs_of(times: Mapping[str, Sequence[float]], baseline_of: Mapping[str, str]) -> dict[str, Cost]:
    """Costs by arm, of the seconds in each round. An arm whose baseline was not measured has no ratio."""
    found = {}
    for arm, taken in times.items():
        base = times.get(baseline_of.get(arm, ""))
        ratios = [] if base is None else [own / other for own, other in zip(taken, base, strict=True)]
        low, high = statistics.quantiles(ratios, n=4)[::2] if len(ratios) >= ROUNDS[0] else (None, None)
        found[arm] = Cost(statistics.median(taken), statistics.median(ratios) if ratios else None, low, high)
    return found


def costs(folder: Path, arms: Mapping[str, Settings], baseline_of: Mapping[str, str], seconds: float = 60.0) -> Costs:
    """As `measure_costs`, kept in costs.json of a comparison's folder: measured again only if it is of other arms."""
    about = {"of": {arm: _key(settings) for arm, settings in arms.items()}, "baseline_of": dict(baseline_of)}
    with contextlib.suppress(RunError, KeyError, TypeError):
        kept = read_json(folder / "costs.json")
        if all(kept[name] == value for name, value in about.items()):
            return _read(kept)
    found = measure_costs(arms, baseline_of, seconds)
    write_text(folder / "costs.json", json.dumps(about | asdict(found), indent=1, ensure_ascii=False) + "\n")
    return found


def read_costs(folder: Path) -> Costs | None:
    """What costs.json of a comparison's folder says; None where there is none."""
    try:
        return _read(read_json(folder / "costs.json"))
    except (RunError, KeyError, TypeError):
        return None


def _read(kept: Mapping[str, Any]) -> Costs:
    return Costs({arm: Cost(**cost) for arm, cost in kept["arms"].items()}, kept["conditions"], kept["failed"])


class _Bench:
    """A model, its optimiser and one real batch, which arms share: what they do to the weights has no effect.

    The learning rate is 0, so that the optimiser works but nothing moves.
    """

    def __init__(self, settings: Settings, data: Data, device: torch.device) -> None:
        self.data, self.device = data, device
        self.built: Built = build(settings, len(data.classes))
        choose_trained(settings, self.built)
        self.built.model.to(device).train()
        self.precision = choose(settings.precision, device, self.built.model)
        batches = Batches(
            data.train,
            self.built.image,
            settings.batch_size,
            train=True,
            seed=settings.seed,
            flip=data.flip if settings.flip is None else settings.flip,
            crop_scale=settings.crop_scale,
            randaugment=settings.randaugment,
            device=device,
        )
        self.batch: Batch = next(iter(batches))
        self.size = len(self.batch)
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.guides: dict[str, Any] = {}

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks once for all steps, as training has them."""
        with attach(self.built.model) if supported(self.built.model) else contextlib.nullcontext():
            yield

    def step(self, settings: Settings) -> Step:
        """A training step of an arm: on the first images of the batch, with the draws of a number."""
        from foveal.train.fitting import mixer_of
        from foveal.train.guiding import guide_of
        from foveal.train.task import Classify

        settings = settings.replace(map_warmup=0)  # what a step costs once the map is trusted
        model = self.built.model
        average = Average(model, settings.ema) if settings.ema else None
        mixer = mixer_of(settings, self.built, self.data, average)
        guide = json.dumps({name: value for name, value in settings.as_dict().items() if name in GUIDING})
        if guide not in self.guides:
            self.guides[guide] = guide_of(settings, self.built, self.data, mixer, self.device)
        task = Classify(
            model,
            settings,
            classes=len(self.data.classes),
            sizes=[self.size],
            parts=1,
            mixer=mixer,
            guide=self.guides[guide],
            average=average,
        )
        task.to(self.device)
        # a token mixer may have parameters of its own
        kind = json.dumps([settings.optimizer, settings.token_mix, settings.token_mix_args, settings.guide])
        optimizer = self.optimizers.get(kind)
        if optimizer is None:
            optimizer = self.optimizers[kind] = task.configure_optimizers()
            for group in optimizer.param_groups:
                group["lr"] = 0.0

        def run(number: int, images: int) -> None:
            batch = _first(self.batch, images)
            with self.autocast():
                losses, _ = task.forward_loss(batch, generator(settings.seed, "mix", 0, max(number, 0)))
                total = torch.stack(list(losses.values())).sum()
            total.backward()
            optimizer.step()
            if task.guide is not None:
                task.guide.after_step(model, optimizer)
            optimizer.zero_grad(set_to_none=True)

        return run

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.precision not in TYPES:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, TYPES[self.precision])


def _first(batch: Batch, n: int) -> Batch:
    masks = None if batch.masks is None else batch.masks[:n]
    return replace(batch, images=batch.images[:n], labels=batch.labels[:n], index=batch.index[:n], masks=masks)


def _fitted(
    steps: Mapping[str, Step], most: int, seconds: float, device: torch.device
) -> tuple[dict[str, list[float]], int, int]:
    """Times of the rounds that fit into `seconds`, with the batch size for which they do: (times, size, rounds)."""
    if not steps:
        return {}, 0, 0
    until, clock = time.monotonic() + 2 * seconds, _clock(device)
    size = min(most, 4)
    once = _once(steps, size, clock)
    while size < most and 2 * once * STEPS * ROUNDS[0] < seconds:  # twice the images take at most twice the time
        size = min(2 * size, most)
        once = _once(steps, size, clock)
    rounds = min(max(int(seconds / (once * STEPS)), ROUNDS[0]), ROUNDS[1])
    times = interleaved(steps, size, rounds, clock, until)
    return times, size, len(next(iter(times.values())))


def _once(steps: Mapping[str, Step], size: int, clock: Clock) -> float:
    """Seconds that a step of every arm takes together, after one to warm up for this size."""
    for run in steps.values():
        run(0, size)
    return sum(clock(lambda run=run: run(1, size)) for run in steps.values())  # type: ignore[misc]


def _clock(device: torch.device) -> Clock:
    if device.type == "cuda":
        return _on_cuda
    return _by_processor if device.type == "cpu" else _by_wall


def _by_processor(run: Callable[[], object]) -> float:
    begun = time.process_time()
    run()
    return time.process_time() - begun


def _on_cuda(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1000


def _by_wall(run: Callable[[], object]) -> float:
    torch.mps.synchronize()
    begun = time.perf_counter()
    run()
    torch.mps.synchronize()
    return time.perf_counter() - begun


@contextlib.contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """Compute on one thread of the CPU: the processor time of several counts how they wait for each other."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _key(settings: Settings) -> str:
    """What decides a step's cost, as text."""
    return json.dumps({name: value for name, value in settings.as_dict().items() if name not in ELSEWHERE})
