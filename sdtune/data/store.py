"""Rows of tensors in a folder, found by what they were made from.

    store = Store(Path("cache/latents-1f0c"), ("mean", "std"))
    store.write({"a picture, 64x64": (mean, std)})          # one more shard, whole or not at all
    mean, std = store.read("a picture, 64x64")

The folder holds safetensors shards. The header of each lists the keys of its rows, so there is no index beside them
that could say something else. Nothing is ever changed or removed: any number of processes may read and write at once,
and one that is killed leaves nothing but whole shards. Two that make the same row at the same time write it twice; the
shard that was written first counts, for all.

Floats of 32 bits are written with 16, as float16: half the room (docs/cache.md has what that does to a loss). They are
read as float32 again. What would not fit into float16 stays as it is.
"""

import json
import time
import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sdtune.data.atomic import replace_file
from sdtune.errors import DataError

Row = tuple[Tensor, ...]
FORMAT = "1"  # of the shards; another one is not read
OPEN = 64  # shards that are held open at a time
ABANDONED = 3600  # seconds after which a file that somebody began to write is a killed process's


class Store:
    """Rows by key, on disk.

    Args:
        folder: of the shards; it need not exist yet.
        columns: names of a row's tensors; all rows may lack the last ones.

    Raises:
        DataError: a shard is damaged.
    """

    def __init__(self, folder: Path, columns: Sequence[str]) -> None:
        self.folder, self.columns = folder, tuple(columns)
        self._places: dict[str, tuple[str, int]] = {}  # digest of a key -> shard, row
        self._notes: dict[str, list[int]] = {}
        self._known: set[str] = set()  # shards whose keys are in _places
        self._sweep()
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return digest(key) in self._places

    def __len__(self) -> int:
        return len(self._places)

    def refresh(self) -> None:
        """Learn of what others have written since. Raises DataError when a shard is damaged."""
        for shard in sorted({path.name for path in self.folder.glob("*.safetensors")} - self._known):
            try:
                facts = _open(str(self.folder / shard)).metadata() or {}
            except FileNotFoundError:  # somebody is clearing the folder
                continue
            except (OSError, SafetensorError) as error:
                raise self._damaged(shard, error) from error
            self._known.add(shard)
            if facts.get("format") == FORMAT:
                self._take(shard, json.loads(facts["keys"]), json.loads(facts["notes"]))

    def read(self, key: str) -> Row:
        """The row of a key that is `in` the store.

        Raises:
            KeyError: there is none. DataError: its shard is gone or damaged.
        """
        shard, row = self._places[digest(key)]
        try:
            opened = _open(str(self.folder / shard))
            return tuple(
                opened.get_slice(column)[row : row + 1][0].to(getattr(torch, dtype), copy=True)
                for column, dtype in json.loads(opened.metadata()["dtypes"]).items()
            )
        except (OSError, SafetensorError) as error:
            raise self._damaged(shard, error) from error

    def note(self, key: str) -> list[int] | None:
        """What was noted beside the row of a key; None where there is no such row."""
        return self._notes.get(digest(key))

    def write(self, rows: Mapping[str, Row], notes: Mapping[str, Sequence[int]] | None = None) -> None:
        """Add those of the rows that the store lacks, in one shard for each of their shapes and number formats.

        Args:
            rows: by key. notes: a few numbers for each key, kept in memory with the keys.

        Raises:
            DataError: the folder cannot be written, for instance because the disk is full.
        """
        self.refresh()
        alike: dict[tuple[tuple[torch.Size, torch.dtype], ...], list[str]] = defaultdict(list)
        for key, row in rows.items():
            if key not in self:
                alike[tuple((part.shape, part.dtype) for part in row)].append(key)
        for keys in alike.values():
            self._write_shard(keys, [rows[key] for key in keys], [list((notes or {}).get(key, ())) for key in keys])

    def _write_shard(self, keys: list[str], rows: list[Row], notes: list[list[int]]) -> None:
        stacked = (torch.stack(column).cpu() for column in zip(*rows, strict=True))
        columns = dict(zip(self.columns, stacked, strict=False))
        digests = [digest(key) for key in keys]
        content = save(
            {name: halved(column) for name, column in columns.items()},
            {
                "format": FORMAT,
                "keys": json.dumps(digests),
                "notes": json.dumps(notes),
                "dtypes": json.dumps({n: str(column.dtype).removeprefix("torch.") for n, column in columns.items()}),
            },
        )
        shard = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.safetensors"  # by name in the order of their making
        try:
            replace_file(self.folder / shard, content)
        except OSError as error:
            raise DataError(
                f"the cache '{self.folder.parent}' cannot be written: {error.strerror or error}; {len(content):,} "
                "bytes were to be added. What it holds already is whole and will be used. Make room, choose another "
                "folder with train.cache_dir=FOLDER, or keep nothing on disk with train.cache_dir=null; then run the "
                "same command again."
            ) from error
        self._known.add(shard)
        self._take(shard, digests, notes)

    def _take(self, shard: str, digests: Sequence[str], notes: Sequence[list[int]]) -> None:
        for row, (key, note) in enumerate(zip(digests, notes, strict=True)):
            if key not in self._places:
                self._places[key] = shard, row
                self._notes[key] = note

    def _sweep(self) -> None:
        """Remove what killed processes began to write."""
        for path in self.folder.glob(".*.part"):
            try:
                if time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()
            except OSError:  # another process was faster, or may not
                continue

    def _damaged(self, shard: str, error: Exception) -> DataError:
        return DataError(
            f"{self.folder / shard}, a part of the cache, cannot be read ({' '.join(str(error).split())}); remove it "
            "if it is there, and its rows are made again when the same command is run again."
        )


@dataclass(frozen=True)
class Stores:
    """What is kept on disk for a model: latents of pictures, (mean, deviation), and embeddings of captions."""

    latents: Store
    text: Store


def digest(key: str) -> str:
    """128 bits of a key."""
    return blake2b(key.encode(), digest_size=16).hexdigest()


def halved(x: Tensor) -> Tensor:
    """float32 as float16 where each number fits, anything else as it is."""
    if x.dtype != torch.float32:
        return x.contiguous()
    half = x.half()
    return half.contiguous() if half.isfinite().all() else x.contiguous()


def stored_bytes(row: Row) -> int:
    """How many bytes a row takes on disk."""
    return sum(part.numel() * (2 if part.dtype == torch.float32 else part.element_size()) for part in row)


@lru_cache(maxsize=OPEN)
def _open(path: str) -> Any:
    return safe_open(path, framework="pt")
