"""Every random number of a run, as a pure function of (seed, purpose, numbers).

    draws.normal((4, 64, 64), seed, "noise", step, sample)      # the same tensor, always and everywhere

Nothing is carried from one draw to the next, and the global random state is neither read nor changed. So a run does
not depend on the number of processes or workers, and a stopped run goes on exactly, without any saved state.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def key(seed: int, purpose: str, *numbers: int) -> int:
    """A 64 bit number from the names of a draw: equal names give equal numbers, others unrelated ones.

    Args:
        seed: the seed of the run.
        purpose: what is drawn, such as "noise" or "crop"; keeps draws of one sample apart.
        numbers: which one it is: step, sample number, position ...
    """
    name = repr((int(seed), purpose, *map(int, numbers)))
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def generator(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """A fresh CPU generator for this draw alone."""
    return torch.Generator().manual_seed(key(seed, purpose, *numbers))


def normal(shape: Sequence[int], seed: int, purpose: str, *numbers: int) -> Tensor:
    """Standard normal numbers of `shape`, float32, on the CPU."""
    return torch.randn(tuple(shape), generator=generator(seed, purpose, *numbers))


def uniform(seed: int, purpose: str, *numbers: int) -> float:
    """A number in [0, 1), of 53 random bits."""
    return (key(seed, purpose, *numbers) >> 11) / 2**53


def integer(high: int, seed: int, purpose: str, *numbers: int) -> int:
    """A whole number in [0, high).

    Raises:
        ValueError: `high` is not at least 1.
    """
    if high < 1:
        raise ValueError(f"an integer below {high} was asked for; expected at least 1")
    return key(seed, purpose, *numbers) * high >> 64


def permutation(n: int, seed: int, purpose: str, *numbers: int) -> list[int]:
    """The numbers 0 to n - 1 in random order."""
    return torch.randperm(n, generator=generator(seed, purpose, *numbers)).tolist()


@contextmanager
def seeded_globals(seed: int, purpose: str, *numbers: int) -> Iterator[None]:
    """For libraries that read torch's global generators (dropout, text generation): seeds them for this block.

    Covers the CPU and the current CUDA device; both are afterwards as they were before.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(key(seed, purpose, *numbers))
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(key(seed, purpose, *numbers))
        yield
