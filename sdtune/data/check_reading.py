"""Reads a data set with all its faults, where `load_source` stops at the first.

What training would do is asked of `load_source` itself. Where it refuses a folder, the folder is read here row by row,
so that every fault is told at once and all pictures are looked at all the same.
"""

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sdtune.data.captions import captions_of
from sdtune.data.check_entries import Entry
from sdtune.data.folder import picture_of
from sdtune.data.layouts import PARQUET, archives
from sdtune.data.metadata import METADATA_FILES, bad_name, is_picture, is_run, leads_out, list_files
from sdtune.data.parquet import columns_of, pictures_in_parquet
from sdtune.data.picture import Picture
from sdtune.data.shards import pictures_in_shard
from sdtune.data.sidecars import SUFFIX, sidecar, sidecar_captions
from sdtune.data.sources import Source
from sdtune.data.splits import splits_of
from sdtune.errors import DataError, SdtuneError

Row = dict[str, Any]
MASK_KEY = "mask_file_name"


@dataclass
class Reading:
    """What one data set holds, and what is wrong with it before any picture is opened.

    Attributes:
        pictures: all that are there, as training takes them, or as they were found where it refuses them.
        source: what training takes them as; None where it refuses them.
        refusal: why; "" where it takes them.
        folder: where the names of its pictures begin; None for a data set of the Hub.
        rows: of the metadata for each name, `file_name` relative to `folder`; empty where there is no metadata.
        bad_rows: what is wrong with each row that cannot be read.
        bad_files: what is wrong with each shard or parquet file that cannot be read.
        no_column: metadata and parquet files without the column of the captions, and what they have.
        missing: names of rows without a picture.
        leaving: names of rows that lead out of the folder; these pictures are not opened.
        links: names of pictures that are symbolic links to a place outside of the folder.
        unreferenced: pictures in the folder that no row names and training does not use.
        blank: names with a blank caption beside others.
        loose_texts: names of .txt files without a picture, where others have one.
    """

    entry: Entry
    pictures: list[Picture] = field(default_factory=list)
    source: Source | None = None
    refusal: str = ""
    folder: Path | None = None
    rows: dict[str, list[Row]] = field(default_factory=dict)
    bad_rows: list[str] = field(default_factory=list)
    bad_files: list[str] = field(default_factory=list)
    no_column: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    leaving: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    unreferenced: list[str] = field(default_factory=list)
    blank: list[str] = field(default_factory=list)
    loose_texts: list[str] = field(default_factory=list)

    @property
    def bad_names(self) -> list[str]:
        """Names of the pictures that metadata.jsonl cannot hold."""
        return [each.name for each in self.pictures if bad_name(each.name)]

    @property
    def without_caption(self) -> list[str]:
        """Names of the pictures that have no caption in its column, and are referenced or need not be."""
        if self.no_column:
            return []
        unreferenced = set(self.unreferenced)
        return [each.name for each in self.pictures if not each.captions and each.name not in unreferenced]


def read(entry: Entry) -> Reading:
    """Load a data set as training does, and look for what is wrong with it."""
    reading = Reading(entry)
    try:
        reading.source = entry.load()
        reading.pictures = list(reading.source.pictures)
    except SdtuneError as fault:
        reading.refusal = str(fault)
        _read_archives(reading)
    if entry.path is not None and entry.path.is_dir() and not is_run(entry.path):
        in_split = entry.split in splits_of(entry.path, entry.without)
        reading.folder = entry.path / entry.split if in_split else entry.path
        _read_folder(reading, loaded=reading.source is not None)
    return reading


def _read_archives(reading: Reading) -> None:
    """All pictures of shards and parquet files that can be read, with or without captions."""
    entry = reading.entry
    try:
        files = archives(entry.path, entry.split, entry.without) if entry.path is not None else []
    except DataError:  # the refusal says it
        return
    for file in files:
        try:
            reading.pictures += _in_archive(file, entry, reading.no_column)
        except DataError as fault:
            reading.bad_files.append(str(fault))


def _in_archive(file: Path, entry: Entry, no_column: list[str]) -> Iterator[Picture]:
    if file.suffix.lower() != PARQUET:
        return pictures_in_shard(file, entry.text_column, entry.prompt)
    known, prompt = columns_of(file), entry.prompt
    if prompt is None and entry.text_column not in known:
        no_column.append(f"{file.name} has: {', '.join(known)}")
        pictures = pictures_in_parquet(file, entry.image_column, entry.text_column, "", "")
        return (replace(picture, captions=()) for picture in pictures)
    return pictures_in_parquet(file, entry.image_column, entry.text_column, prompt, "")


def _read_folder(reading: Reading, loaded: bool) -> None:
    assert reading.folder is not None
    entry, folder = reading.entry, reading.folder
    files = list_files(folder, entry.without)
    key = entry.file_key
    others: set[str] = set()  # masks and the like
    for file in (name for name in files if os.path.basename(name) in METADATA_FILES):
        inner, known, faults = os.path.dirname(file), dict[str, None](), len(reading.bad_rows)
        for number, row in _rows(folder / file, reading.bad_rows):
            known |= dict.fromkeys(row)
            if not isinstance(row.get(key), str) or not row[key]:
                reading.bad_rows.append(f"{file}, row {number}: names no picture in {key!r}")
                continue
            row = _relative_to_top(row, inner)
            reading.rows.setdefault(row[key], []).append(row)
            others.update(name for other, name in row.items() if other != key and _is_name(other, name))
        if loaded or len(reading.bad_rows) > faults:
            continue
        if not known:
            reading.bad_rows.append(f"{file}: it has no rows; write one for each picture, or take the file away")
        elif entry.prompt is None and entry.text_column not in known:
            reading.no_column.append(f"{file} has: {', '.join(known)}")
    there = set(files)
    for name, rows in reading.rows.items():
        if leads_out(name):
            reading.leaving.append(name)
        elif name not in there and not (folder / name).is_file():
            reading.missing.append(name)
        if entry.prompt is None and not loaded:
            reading.pictures += _found(reading, name, rows, there)
    blank = ((name, [_texts(row, entry.text_column) for row in rows]) for name, rows in reading.rows.items())
    if entry.prompt is None:
        reading.blank = [name for name, texts in blank if any(texts) and not all(texts)]
    pictures = [name for name in files if is_picture(name)]
    if not loaded:
        listed = reading.rows.keys() if entry.prompt is None else set()
        loose = [name for name in pictures if name not in listed and name not in others]
        reading.pictures += [picture_of(folder, name, _loose_captions(reading, name, there)) for name in loose]
        reading.unreferenced = loose if reading.rows and entry.prompt is None else []
    elif reading.pictures and all(each.name in there for each in reading.pictures):  # not in shards or tables
        used = {each.name for each in reading.pictures}
        reading.unreferenced = [name for name in pictures if name not in used and name not in others]
    reading.links = _links_out(folder, pictures)
    if not reading.rows and entry.prompt is None:
        texts, used_texts = {name for name in files if name.endswith(SUFFIX)}, set(map(sidecar, pictures))
        reading.loose_texts = sorted(texts - used_texts) if texts & used_texts else []


def _loose_captions(reading: Reading, name: str, there: set[str]) -> tuple[str, ...]:
    """Of a picture that no row names: the prompt, or its .txt file where there is no metadata."""
    assert reading.folder is not None
    if reading.entry.prompt is not None or reading.rows:
        return () if reading.entry.prompt is None else (reading.entry.prompt,)
    try:
        return sidecar_captions(reading.folder, [name], there)[name]
    except DataError as fault:
        reading.bad_rows.append(str(fault))
        return ()


def _found(reading: Reading, name: str, rows: list[Row], there: set[str]) -> list[Picture]:
    """The picture of some rows, if it is there."""
    assert reading.folder is not None
    if leads_out(name) or not (name in there or (reading.folder / name).is_file()):
        return []
    captions = [text for row in rows for text in _texts(row, reading.entry.text_column)]
    masks = [row[MASK_KEY] for row in rows if _is_name(MASK_KEY, row.get(MASK_KEY))]
    return [picture_of(reading.folder, name, tuple(captions), mask=masks[0] if masks else None)]


def _texts(row: Row, text_column: str) -> list[str]:
    return captions_of(row.get(text_column))


def _rows(file: Path, faults: list[str]) -> Iterator[tuple[int, Row]]:
    """Numbers, from 1, and rows of a metadata file of any kind; what cannot be read goes to `faults`."""
    try:
        if file.suffix == ".jsonl":
            yield from _json_rows(file, faults)
        elif file.suffix == ".csv":
            with file.open(encoding="utf-8-sig", newline="") as lines:
                yield from enumerate(csv.DictReader(lines), start=1)
        else:
            import pyarrow.parquet

            yield from enumerate(pyarrow.parquet.read_table(file).to_pylist(), start=1)
    except (OSError, ValueError, csv.Error) as error:  # ArrowInvalid and UnicodeDecodeError are ValueErrors
        faults.append(f"{file.name}: cannot be read ({' '.join(str(error).split())})")


def _json_rows(file: Path, faults: list[str]) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            faults.append(f"{file.name}, line {number}: not JSON ({error})")
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            faults.append(f"{file.name}, line {number}: not an object")


def _is_name(key: str, value: Any) -> bool:
    return isinstance(value, str) and bool(value) and key.endswith("file_name")


def _relative_to_top(row: Row, inner: str) -> Row:
    """A row of a sub-folder's metadata with its names as seen from the top."""

    def moved(name: str) -> str:
        name = name.replace("\\", "/")
        return name if not inner or leads_out(name) else f"{inner}/{name}"

    return {key: moved(value) if _is_name(key, value) else value for key, value in row.items()}


def _links_out(folder: Path, names: list[str]) -> list[str]:
    """Pictures that a symbolic link, of the file or of a folder above it, takes from outside."""
    root = os.path.realpath(folder)
    real: dict[str, str] = {}  # of each folder, looked up once
    found = []
    for name in names:
        inner, base = os.path.split(name)
        place = real.setdefault(inner, os.path.realpath(os.path.join(root, inner)))
        path = os.path.join(place, base)
        if os.path.islink(path):
            path = os.path.realpath(path)
        if not path.startswith(os.path.join(root, "")):
            found.append(name)
    return found
