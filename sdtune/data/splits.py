"""Splits of a folder, as HF `datasets` sees them: in the names of its folders and files.

`datasets` takes `val2017/` and `COCO_val2014_1.jpg` for validation pictures, and then it finds neither the metadata
file beside their folder nor the pictures of other names.
"""

import os
import re
from collections.abc import Collection
from pathlib import Path

from sdtune.data.metadata import METADATA_FILES, is_made_by_sdtune, is_picture

SPLITS = ("train", "training", "test", "testing", "eval", "evaluation", "val", "valid", "validation", "dev")
_WORD = re.compile(rf"(?<![^-._ 0-9/])(?=(?:{'|'.join(SPLITS)})(?![^-._ 0-9/]))")  # as its data_files.py has it


def splits_of(folder: str | Path, without: Collection[str] = ()) -> list[str]:
    """Names of the splits of a folder that is laid out as train/, test/ ... and nothing else; else none.

    Args:
        without: as `list_files` takes it.
    """
    with os.scandir(folder) as entries:
        inner = [entry for entry in entries if not entry.name.startswith(".") and _counts(entry, without)]
    splits = sorted(entry.name for entry in inner if entry.is_dir() and entry.name in SPLITS)
    return splits if len(splits) == len(inner) else []


def is_split_like(name: str) -> bool:
    """Whether `datasets` takes a file for part of a split by its name, or by that of a folder above it."""
    return _WORD.search(name) is not None


def unlike_splits(name: str) -> str:
    """The name with an x before each word that `datasets` would take for a split: test_1.png -> xtest_1.png."""
    return _WORD.sub("x", name)


def _counts(entry: os.DirEntry[str], without: Collection[str]) -> bool:
    if entry.is_dir():
        return os.path.realpath(entry.path) not in without and not is_made_by_sdtune(entry.path)
    return is_picture(entry.name) or entry.name in METADATA_FILES
