"""Which sample goes into which micro-batch, alike for any number of processes and accumulation steps.

    epoch's permutation -> global steps of world * accumulate * batch_size samples
                        -> M = world * accumulate micro-batches each, contiguous; rank r has a * world + r
    weight of a micro-batch = n_m M / n_step

so that the mean over a step's micro-batches of weight * (mean over the micro-batch) is the mean over the
step's samples. Nothing is padded or dropped: the last step has what is left, split as evenly as possible.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.chance import generator
from foveal.data.errors import DataError, counted


@dataclass(frozen=True, eq=False)
class Micro:
    """index: (n,) int64 positions of the samples.  micro: number of the micro-batch within the epoch.
    weight: of its mean in the mean over the step, 1 in a full step."""

    index: Tensor
    micro: int
    weight: float


def permutation(n: int, seed: int, epoch: int) -> Tensor:
    """The epoch's order of n samples: (n,) int64, keyed by ("order", epoch)."""
    return torch.randperm(n, generator=generator(seed, "order", epoch))


def step_sizes(n: int, batch_size: int, world: int, accumulate: int) -> list[int]:
    """Samples in each global step of an epoch of n.

    A remainder too small to give every micro-batch of a step a sample joins the step before it, whose
    micro-batches then hold at most one sample more than batch_size.
    Raises DataError if n cannot give every micro-batch of a single step a sample.
    """
    parts, full = world * accumulate, world * accumulate * batch_size
    if n < parts:
        raise DataError(
            f"{counted(n, 'training image')} for {world} processes x {accumulate} accumulation steps:"
            f" some would get none; use at most {n} in all"
        )
    sizes = [full] * (n // full)
    rest = n % full
    if rest >= parts or not sizes:
        sizes.append(rest)
    else:
        sizes[-1] += rest
    return sizes


def training_plan(order: Tensor, batch_size: int, *, rank: int = 0, world: int = 1, accumulate: int = 1) -> list[Micro]:
    """The micro-batches of one rank in an epoch, in turn. order: (N,) the epoch's permutation."""
    parts = world * accumulate
    plan = []
    start = 0
    for step, size in enumerate(step_sizes(len(order), batch_size, world, accumulate)):
        bounds = [start + min(m, size % parts) + m * (size // parts) for m in range(parts + 1)]
        for a in range(accumulate):
            m = a * world + rank
            index = order[bounds[m] : bounds[m + 1]]
            plan.append(Micro(index, step * parts + m, len(index) * parts / size))
        start += size
    return plan


def evaluation_plan(n: int, batch_size: int, *, rank: int = 0, world: int = 1) -> list[Micro]:
    """The batches of one rank when each of n samples is seen once, in order: rank r has a contiguous share.

    Shares differ by at most one sample and may be empty. weight = samples in the batch / batch_size.
    """
    first, last = n * rank // world, n * (rank + 1) // world
    starts = range(first, last, batch_size)
    slices = [torch.arange(start, min(start + batch_size, last)) for start in starts]
    return [Micro(index, micro, len(index) / batch_size) for micro, index in enumerate(slices)]
