"""How a path holds its data set: a folder of pictures, tar shards, or parquet files."""

import re
from collections.abc import Collection
from glob import glob, has_magic
from pathlib import Path

from sdtune.data.metadata import METADATA_FILES, is_picture, list_files
from sdtune.data.splits import SPLITS
from sdtune.errors import DataError

TAR, PARQUET = ".tar", ".parquet"


def archives(path: Path, split: str, without: Collection[str] = ()) -> list[Path]:
    """The tar shards or the parquet files that a path stands for; none where it is a folder of pictures.

    Args:
        path: one such file, a pattern such as shards/*.tar, or a folder. A folder with pictures or metadata is taken
            as such; shards go before parquet files, which img2dataset writes beside them. Raises DataError where
            there are splits, but not this one, and where a pattern matches nothing.
        split: of files that carry the names of splits, as those of the Hub do, the ones of this split.
        without: as `list_files` takes it.
    """
    if path.is_file():
        return [path] if path.suffix.lower() in (TAR, PARQUET) else []
    if not path.exists() and has_magic(str(path)):
        matching = [Path(file) for file in sorted(glob(str(path))) if Path(file).suffix.lower() in (TAR, PARQUET)]
        if not matching:
            raise DataError(f"no .tar or .parquet file matches '{path}'; expected a pattern such as 'shards/*.tar'")
        return matching
    if not path.is_dir():
        return []
    names = list_files(path, without)
    if any(is_picture(name) or name.rpartition("/")[2] in METADATA_FILES for name in names):
        return []
    for suffix in (TAR, PARQUET):
        found = [name for name in names if name.lower().endswith(suffix)]
        if found:
            return [path / name for name in _of_split(path, found, split)]
    return []


def _of_split(folder: Path, names: list[str], split: str) -> list[str]:
    """Those whose file or folder is named after the split; all where no name tells of one."""
    splits = {name: _split(name) for name in names}
    known = sorted({found for found in splits.values() if found})
    if known and split not in known:
        raise DataError(f"{folder} has no split {split!r}; it has: {', '.join(known)}.")
    return [name for name in names if splits[name] == split] if known else names


def _split(name: str) -> str | None:
    for part in name.split("/")[:-1]:
        if part in SPLITS:
            return part
    word = re.split(r"[-_.]", name.rpartition("/")[2])[0]  # train-00000-of-00002.parquet
    return word if word in SPLITS else None
