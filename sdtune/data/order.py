"""Which row of a data set each sample of a run shows: a pure function of the sample's number.

Shuffled(7, seed=0, purpose="instance order")[23]       # the row of sample 23, in its fourth epoch
InBuckets(frames, together=4, seed=0)[23]               # the same, where samples 20 to 23 are of one size
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

from sdtune.data.buckets import Size
from sdtune.diffusion import draws


class Shuffled:
    """An epoch after the other, each with all rows in its own order.

    Args:
        rows: how many there are. seed: of the run. purpose: of the draw, as `sdtune.diffusion.draws` has it.
    """

    def __init__(self, rows: int, seed: int, purpose: str) -> None:
        self.rows, self.seed, self.purpose = rows, seed, purpose

    def __getitem__(self, number: int) -> int:
        """The row of sample `number`."""
        epoch, position = divmod(number, self.rows)
        return _permutation(self.rows, self.seed, self.purpose, epoch)[position]


class InBuckets:
    """All samples of an optimizer step are of one size, and no row is seen more often than others.

    The rows of a size are an endless stream, in a new order each time they begin again; `together` neighbours of it
    make a step. Epoch e takes the steps floor(e n / together) to floor((e + 1) n / together) of each size with n rows,
    shuffled.

    Args:
        frames: the size of each row.
        together: samples of a step, of all processes and micro-batches; sample `number` is of step number // together.
        seed: of the run.
    """

    def __init__(self, frames: Sequence[Size], together: int, seed: int) -> None:
        rows: dict[Size, list[int]] = {}
        for row, frame in enumerate(frames):
            rows.setdefault(frame, []).append(row)
        self.buckets = sorted(rows.items())
        self.counts = tuple(len(members) for _, members in self.buckets)
        self.together, self.seed = together, seed

    def __getitem__(self, number: int) -> int:
        """The row of sample `number`."""
        step, place = divmod(number, self.together)
        epoch = self._epoch(step)
        order = _steps_of_epoch(self.counts, self.together, self.seed, epoch)
        bucket, group = order[step - self._steps_before(epoch)]
        (height, width), rows = self.buckets[bucket]
        again, position = divmod(group * self.together + place, len(rows))
        return rows[_permutation(len(rows), self.seed, f"order of {height} x {width}", again)[position]]

    def _epoch(self, step: int) -> int:
        """The epoch that a step is in: the last one that begins at it or before."""
        rows, sizes = sum(self.counts), len(self.counts)
        later = (step + sizes + 1) * self.together // rows + 1  # begins after the step, for each size is rounded once
        return bisect_right(range(later + 1), step, key=self._steps_before) - 1

    def _steps_before(self, epoch: int) -> int:
        return sum(epoch * count // self.together for count in self.counts)


@lru_cache(maxsize=4)
def _steps_of_epoch(counts: tuple[int, ...], together: int, seed: int, epoch: int) -> list[tuple[int, int]]:
    """(bucket, group) of each step of an epoch."""
    steps = [
        (bucket, group)
        for bucket, count in enumerate(counts)
        for group in range(epoch * count // together, (epoch + 1) * count // together)
    ]
    return [steps[i] for i in draws.permutation(len(steps), seed, "order of buckets", epoch)]


@lru_cache(maxsize=64)
def _permutation(rows: int, seed: int, purpose: str, epoch: int) -> list[int]:
    return draws.permutation(rows, seed, purpose, epoch)
