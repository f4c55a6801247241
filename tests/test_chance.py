"""Keyed chance: a stream depends on its key and on nothing else."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from foveal.chance import generator, reseed, seeded


def global_draws() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), random.random()  # noqa: NPY002


def test_same_key_same_stream():
    torch.manual_seed(1)
    first = torch.rand(5, generator=generator(7, "augment", 3, 11))
    torch.manual_seed(2)
    assert torch.equal(first, torch.rand(5, generator=generator(7, "augment", 3, 11)))


def test_stream_is_the_same_in_another_process():
    code = "from foveal.chance import generator; print(generator(7, 'mix', 1).initial_seed())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(said) == generator(7, "mix", 1).initial_seed()


def test_each_part_of_the_key_counts():
    keys = [(0, "mix"), (1, "mix"), (0, "step"), (0, "mix", 0), (0, "mix", 1), (0, "mix", 0, 1), (0, "mix", 1, 0)]
    keys += [(0, "mix", 11), (0, "mix", 1, 1), (-1, "mix"), (2**70, "mix")]
    assert len({generator(*key).initial_seed() for key in keys}) == len(keys)


def test_keys_next_to_each_other_are_unrelated():
    draws = torch.stack([torch.rand(1, generator=generator(0, "order", i))[0] for i in range(2000)])
    # mean and lag-one correlation of independent uniforms, 5 standard errors of 1/sqrt(12 n) and 1/sqrt(n)
    assert abs(float(draws.mean()) - 0.5) < 5 / (12 * 2000) ** 0.5
    assert abs(float(torch.corrcoef(torch.stack([draws[1:], draws[:-1]]))[0, 1])) < 5 / 2000**0.5


def test_numpy_integers_are_keys_and_floats_are_not():
    assert generator(np.int64(3), "mix", np.int32(2)).initial_seed() == generator(3, "mix", 2).initial_seed()
    with pytest.raises(TypeError):
        generator(0.5, "mix")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="purpose"):
        generator(0, "")


def test_seeded_sets_three_states_and_puts_them_back():
    torch.manual_seed(0), np.random.seed(0), random.seed(0)  # noqa: NPY002
    expected = global_draws()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)  # noqa: NPY002
    with seeded(5, "init"):
        inside = global_draws()
    assert global_draws() == expected
    with seeded(5, "init"):
        assert global_draws() == inside
    with seeded(6, "init"):
        assert all(a != b for a, b in zip(global_draws(), inside, strict=True))


def test_seeded_puts_back_after_an_exception():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    with pytest.raises(KeyError), seeded(1, "init"):
        raise KeyError(torch.rand(3))
    assert torch.equal(before, torch.random.get_rng_state())


def test_reseed_stays_set_and_agrees_with_seeded():
    with seeded(3, "step", 1, 2):
        expected = global_draws()
    reseed(3, "step", 1, 2)
    assert global_draws() == expected
    assert global_draws() != expected
