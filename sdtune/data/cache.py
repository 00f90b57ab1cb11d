"""Keep what a frozen network answers, row by row, so that each picture and caption is encoded once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Row = tuple[Tensor, ...]


class MemoryCache:
    """Rows by key, in CPU memory, up to a limit; past it rows are computed each time.

    Args:
        limit: bytes kept at most.
    """

    def __init__(self, limit: int = 2 * 2**30) -> None:
        self.limit, self.used = limit, 0
        self.rows: dict[str, Row] = {}

    def get(
        self, keys: Sequence[str], compute: Callable[[list[int]], tuple[Tensor, ...]], device: torch.device
    ) -> tuple[Tensor, ...]:
        """Stacked rows for `keys`.

        Args:
            keys: one a row; the same key means the same row.
            compute: given positions in `keys`, returns tensors whose first dimension runs over them.
            device: where the answer is wanted.
        """
        fresh = {key: i for i, key in enumerate(keys) if key not in self.rows}
        found: dict[str, Row] = {}
        if fresh:
            for key, i in fresh.items():
                # One at a time: beside others a row is rounded otherwise, and a resumed run would differ.
                found[key] = tuple(column[0].detach().cpu() for column in compute([i]))
                self.keep(key, found[key])
        picked = [found[key] if key in found else self.rows[key] for key in keys]
        return tuple(torch.stack(column).to(device) for column in zip(*picked, strict=True))

    def keep(self, key: str, row: Row) -> None:
        """Remember a row while there is room."""
        size = sum(part.numel() * part.element_size() for part in row)
        if self.used + size <= self.limit:
            self.rows[key] = tuple(part.clone() for part in row)  # a view would hold the whole batch
            self.used += size
