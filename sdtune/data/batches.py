"""From samples to batches: which numbers a step takes, and a loader that yields them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sdtune.data.examples import Example
from sdtune.diffusion import draws
from sdtune.errors import SdtuneError


class Samples(Protocol):
    """What batches are made of: `TrainingSet`."""

    def __getitem__(self, number: int, /) -> list[Example]: ...


@dataclass(frozen=True)
class Batch:
    """Pictures of one forward pass: all instance pictures first, then the class pictures.

    Attributes:
        pixels: shape (B, 3, H, W), uint8; None where the latents of all are known to a cache.
        captions: B texts.
        weights: of the losses, shape (B,), float32.
        instances: how many of the B are instance pictures; the loss of a step is divided by their number.
        numbers: the sample number of each; an instance picture and the class picture beside it share one.
        keys: as `Example.key`.
        sizes: as `Example.size`.
        frame: height and width of all of them; always there.
        masks: shape (B, 1, H, W), uint8, all 255 for those without one; None where none has one.
    """

    pixels: Tensor | None
    captions: list[str]
    weights: Tensor
    instances: int
    numbers: list[int]
    keys: list[str]
    sizes: list[tuple[int, int, int, int]]
    frame: tuple[int, int]
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            pixels=None if self.pixels is None else self.pixels.to(device),
            weights=self.weights.to(device),
            masks=None if self.masks is None else self.masks.to(device),
        )


def collate(samples: Sequence[Sequence[Example]]) -> Batch:
    """Joins samples, (instance) or (instance, class) each, to one batch.

    Their frames are equal. Pixels are left out where the latents of all are known.
    """
    examples = [example for sample in samples for example in sample]
    examples.sort(key=lambda example: not example.instance)  # stable: instances first, each part in order of number
    return Batch(
        pixels=_stacked([example.pixels for example in examples]),  # (B, 3, H, W)
        captions=[example.caption for example in examples],
        weights=torch.tensor([example.weight for example in examples], dtype=torch.float32),  # (B,)
        instances=sum(example.instance for example in examples),
        numbers=[example.number for example in examples],
        keys=[example.key for example in examples],
        sizes=[example.size for example in examples],
        frame=examples[0].frame,
        masks=_masks(examples),
    )


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    """All of them as one tensor; None where one is missing."""
    there = [part for part in parts if part is not None]
    return torch.stack(there) if len(there) == len(parts) else None


def _masks(examples: Sequence[Example]) -> Tensor | None:
    """(B, 1, H, W), uint8; an example without a mask is subject all over."""
    if all(example.mask is None for example in examples):
        return None
    subject = torch.full((1, *examples[0].frame), 255, dtype=torch.uint8)
    return torch.stack([subject if example.mask is None else example.mask for example in examples])


def sample_numbers(step: int, micro: int, rank: int, *, batch_size: int, accumulate: int, world: int) -> range:
    """The samples of one micro-batch of one process.

    A step takes the next batch_size * accumulate * world numbers. So one process with batch 2B, two processes with
    batch B, and two accumulated batches of B see the same samples in the same step.

    Args:
        step: optimizer step, from 0.
        micro: micro-batch within the step, in [0, accumulate).
        rank: of the process, in [0, world).
    """
    first = step * batch_size * accumulate * world + micro * batch_size * world + rank * batch_size
    return range(first, first + batch_size)


def batches(
    training_set: Samples,
    *,
    batch_size: int,
    start: int = 0,
    stop: int | None = None,
    accumulate: int = 1,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """The micro-batches of this process, step by step: `accumulate` of them for each step.

    Args:
        training_set: what they are taken from.
        batch_size: samples of a micro-batch; with class pictures it holds twice as many pictures.
        start, stop: steps [start, stop); without stop it never ends.
        accumulate, rank, world: as in `sample_numbers`.
        workers: processes that read pictures ahead; the batches do not depend on it.

    Raises:
        DataError: a picture cannot be read.
    """
    steps = count(start) if stop is None else range(start, stop)
    numbers = (
        sample_numbers(step, micro, rank, batch_size=batch_size, accumulate=accumulate, world=world)
        for step in steps
        for micro in range(accumulate)
    )
    if workers == 0:
        yield from (collate([training_set[number] for number in batch]) for batch in numbers)
        return
    loader: DataLoader[Any] = DataLoader(
        _Batches(training_set),  # type: ignore[arg-type]
        sampler=numbers,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        generator=draws.generator(0, "loader"),  # else it would draw from the global one
    )
    for batch in loader:
        if isinstance(batch, SdtuneError):
            raise batch
        yield batch


class _Batches:
    """A data set whose elements are batches.

    Faults are answered instead of raised, since a worker would wrap a traceback around them.
    """

    def __init__(self, training_set: Samples) -> None:
        self.training_set = training_set

    def __getitem__(self, numbers: Iterable[int]) -> Batch | SdtuneError:
        try:
            return collate([self.training_set[number] for number in numbers])
        except SdtuneError as error:
            return error


def _as_it_is(batch: Any) -> Any:
    return batch
