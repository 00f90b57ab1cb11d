"""Filling a cache before training: pictures are decoded by threads ahead of the network, which encodes them in batches.

The pictures of one frame are cut into batches in the order of the data set, whatever of them is stored already, and the
processes of a run take the batches in turns. So a new cache is filled with the same numbers by any number of processes.
Of a batch only what is missing is encoded. Another run that fills the same folder is noticed whenever a shard is
written; each starts at a place of its own, so that they do not work side by side on the same batch.
"""

import secrets
import shutil
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from os import cpu_count
from types import TracebackType
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from sdtune import distributed
from sdtune.data.store import Row, Store, stored_bytes
from sdtune.data.views import View
from sdtune.errors import DataError

SHARD_BYTES = 64 * 2**20  # of rows that are written together
SHARD_SECONDS = 60  # of work that a kill can cost
PIXELS = 4 * 512 * 512  # of a batch for the VAE
MOST = 64  # pictures of a batch
CAPTIONS = 32  # of a batch
AHEAD = 3  # batches whose pictures are decoded meanwhile

Item = TypeVar("Item")


def fill_latents(store: Store, views: Iterable[View], encode: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    """Encode the views that the store lacks, and note the size of the whole picture beside each.

    Args:
        store: it has all of them afterwards, in every process.
        views: equal keys are encoded once.
        encode: pixels (B, 3, H, W), uint8 -> mean and deviation of the latents, (B, C, h, w) each.

    Raises:
        DataError: the disk has no room for them, or a picture cannot be read.
    """
    Image.init()  # not safe when several threads do it on their way
    frames: dict[tuple[int, int], list[View]] = defaultdict(list)
    for view in {view.key: view for view in views}.values():
        frames[view.frame].append(view)
    batches = []
    for (height, width), alike in frames.items():
        batches += cut(alike, max(1, min(MOST, PIXELS // (height * width))))

    def encode_read(read: Sequence[Any]) -> tuple[Tensor, ...]:
        return encode(torch.stack([pixels for pixels, _ in read]))  # (B, 3, H, W)

    _fill(
        *(store, batches, lambda view: view.key, View.read, encode_read),
        note=lambda read: read[1],
        words=("encoding the pictures", "picture"),
    )


def fill_text(store: Store, captions: Iterable[str], encode: Callable[[list[str]], tuple[Tensor, ...]]) -> None:
    """Encode the captions that the store lacks.

    Args:
        store: it has all of them afterwards, in every process.
        captions: equal ones are encoded once.
        encode: B captions -> tensors whose first dimension runs over them.

    Raises:
        DataError: the disk has no room for them.
    """

    def same(caption: Any) -> Any:
        return caption

    batches = cut(list(dict.fromkeys(captions)), CAPTIONS)
    _fill(store, batches, same, same, encode, note=lambda caption: (), words=("encoding the captions", "caption"))


def _fill(
    store: Store,
    batches: Sequence[Sequence[Item]],
    key: Callable[[Item], str],
    prepare: Callable[[Item], Any],
    encode: Callable[[list[Any]], tuple[Tensor, ...]],
    *,
    note: Callable[[Any], Sequence[int]],
    words: tuple[str, str],
) -> None:
    """Encode what is missing: this process's share, then what nobody made.

    Args:
        key: of an item. prepare: what threads do with it; encode and note take its answer.
        words: what is done, and to what, for the progress bar.
    """
    from tqdm import tqdm

    for first, step in ((distributed.rank(), distributed.world()), (0, 1)):
        share = batches[first::step]
        start = secrets.randbelow(len(share)) if share else 0
        share = [*share[start:], *share[:start]]
        total = sum(key(item) not in store for batch in share for item in batch)
        bar = tqdm(total=total, desc=words[0], unit=words[1], disable=not total or not distributed.is_main())
        with bar, Writer(store, total) as writer:
            fresh = ([item for item in batch if key(item) not in store] for batch in share)
            for items, prepared in ahead(prepare, filter(None, fresh)):
                columns = [column.detach().cpu() for column in encode(prepared)]
                for item, one, row in zip(items, prepared, zip(*columns, strict=True), strict=True):
                    writer.add(key(item), row, note(one))
                bar.update(len(items))
        distributed.barrier()
        store.refresh()


class Writer:
    """Within: rows are collected, and written when they are 64 MB, a minute old, or the last.

    Args:
        store: that they go to. total: how many are to come, for a look at the room on the disk.
    """

    def __init__(self, store: Store, total: int) -> None:
        self.store, self.total = store, total
        self.rows: dict[str, Row] = {}
        self.notes: dict[str, Sequence[int]] = {}
        self.bytes, self.began = 0, time.monotonic()

    def add(self, key: str, row: Row, note: Sequence[int]) -> None:
        """One more row. Raises DataError when there is no room."""
        size = stored_bytes(row)
        if self.total:
            self.require_room(size * self.total)
            self.total = 0
        self.rows[key], self.notes[key] = row, note
        self.bytes += size
        if self.bytes >= SHARD_BYTES or time.monotonic() - self.began >= SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is collected."""
        rows, self.rows = self.rows, {}
        if rows:
            self.store.write(rows, self.notes)
        self.notes, self.bytes, self.began = {}, 0, time.monotonic()

    def require_room(self, needed: int) -> None:
        """Raises DataError where so many bytes are not free."""
        self.store.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.store.folder).free
        if needed > free:
            raise DataError(
                f"the cache '{self.store.folder.parent}' needs {needed / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are "
                "free. Make room, choose a folder on another disk with train.cache_dir=FOLDER, or keep nothing on disk "
                "with train.cache_dir=null; then run the same command again."
            )

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()  # also after Ctrl-C or at a broken picture: what is done stays done


def ahead(prepare: Callable[[Item], Any], batches: Iterable[list[Item]]) -> Iterator[tuple[list[Item], list[Any]]]:
    """Batches with what threads made of each item, which work on the next ones meanwhile."""
    waiting: deque[tuple[list[Item], list[Future[Any]]]] = deque()
    pool = ThreadPoolExecutor(min(16, (cpu_count() or 1) + 2))
    try:
        for items in batches:
            waiting.append((items, [pool.submit(prepare, item) for item in items]))
            if len(waiting) > AHEAD:
                items, futures = waiting.popleft()
                yield items, [future.result() for future in futures]
        for items, futures in waiting:
            yield items, [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)


def cut(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Consecutive parts of `size` items, the last one perhaps shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]
