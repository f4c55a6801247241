"""Chance: every draw of ours is made on the CPU from a generator keyed by what it is for.

    state = blake2b(seed, purpose, key...)

The same key gives the same stream in any process, on any machine, for any number of ranks and workers, so
there is no random state to save or to pass along. Purposes in use: "order" (epoch), "augment" (epoch, sample
index), "mix" and "step" (epoch, micro-batch), "split", "subset", "scenes", "init" (2: LoRA's), "bootstrap",
"occlusion", "mask" (epoch, micro-batch), "mask_val" (sample index), "source" (a guide's, where it is random),
"co_tuning" (what its table is fitted on).
"""

import operator
import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import numpy as np
import torch


def generator(seed: int, purpose: str, *key: int) -> torch.Generator:
    """A CPU generator whose stream depends on (seed, purpose, *key) and on nothing else.

    seed and key: integers of any size (also numpy's). purpose: what the draws are for, as a short word.
    Raises TypeError for a seed or key that is not an integer.
    """
    return torch.Generator().manual_seed(_state(seed, purpose, key))


@contextmanager
def seeded(seed: int, purpose: str, *key: int) -> Iterator[None]:
    """Third-party chance from a key: torch's, numpy's and Python's global state, put back afterwards.

    For code that takes no generator (torchvision's transforms, a model's initialisation). Only the CPU
    generator of torch is set: draws made on an accelerator inside the block are not governed by the key.
    """
    kept = (torch.random.get_rng_state(), np.random.get_state(), random.getstate())  # noqa: NPY002
    state = _state(seed, purpose, key)
    try:
        torch.default_generator.manual_seed(state)
        _seed_others(state)
        yield
    finally:
        torch.random.set_rng_state(kept[0])
        np.random.set_state(kept[1])  # noqa: NPY002  the global state is the point here
        random.setstate(kept[2])


def reseed(seed: int, purpose: str, *key: int) -> None:
    """Set the global state of torch (all devices), numpy and Python from a key and leave it set.

    Called at each training step: drop path and dropout then depend on the step and not on what ran before.
    """
    state = _state(seed, purpose, key)
    torch.manual_seed(state)
    _seed_others(state)


def _state(seed: int, purpose: str, key: tuple[int, ...]) -> int:
    if not purpose:
        raise ValueError('a draw needs a purpose, such as "augment" or "mix"')
    words = [str(operator.index(seed)), purpose, *(str(operator.index(part)) for part in key)]
    return int.from_bytes(blake2b("\n".join(words).encode(), digest_size=8).digest(), "little")


def _seed_others(state: int) -> None:
    np.random.seed(state % 2**32)  # noqa: NPY002  for third-party code that draws from the global state
    random.seed(state)
