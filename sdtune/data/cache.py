"""Keep what a frozen network answers, row by row, so that each picture and caption is encoded once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sdtune.data.store import Row, Store


class RowCache:
    """Rows by key: those of a store on disk, where there is one; others are computed and kept in memory.

    Args:
        store: filled before; nothing is added to it here.
        limit: bytes kept in memory at most; past it rows are computed each time.
    """

    def __init__(self, store: Store | None = None, limit: int = 2 * 2**30) -> None:
        self.store, self.limit, self.used = store, limit, 0
        self.rows: dict[str, Row] = {}

    def get(
        self, keys: Sequence[str], compute: Callable[[list[int]], tuple[Tensor, ...]], device: torch.device
    ) -> tuple[Tensor, ...]:
        """Stacked rows for `keys`.

        Args:
            keys: one a row; the same key means the same row.
            compute: given positions in `keys`, returns tensors whose first dimension runs over them.
            device: where the answer is wanted.

        Raises:
            DataError: a row of the store cannot be read.
        """
        found: dict[str, Row] = {}
        for i, key in enumerate(keys):
            row = found.get(key) or self.known(key)
            if row is None:
                # One at a time: beside others a row is rounded otherwise, and a resumed run would differ.
                row = tuple(column[0].detach().cpu() for column in compute([i]))
                self.keep(key, row)
            found[key] = row
        picked = [found[key] for key in keys]
        return tuple(torch.stack(column).to(device) for column in zip(*picked, strict=True))

    def known(self, key: str) -> Row | None:
        """The row of a key, if it need not be computed."""
        return self.store.read(key) if self.store is not None and key in self.store else self.rows.get(key)

    def keep(self, key: str, row: Row) -> None:
        """Remember a row while there is room."""
        size = sum(part.numel() * part.element_size() for part in row)
        if self.used + size <= self.limit:
            self.rows[key] = tuple(part.clone() for part in row)  # a view would hold the whole batch
            self.used += size
