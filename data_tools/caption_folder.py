"""The pictures of a captioning and the captions that they have already."""

import csv
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_tools.caption_journal import PLACE
from sdtune.data.captions import captions_of
from sdtune.data.metadata import METADATA_FILES, PICTURE_SUFFIXES, bad_name, is_picture, list_files, read_rows
from sdtune.errors import DataError, UsageError

REPORT = "captions.json"
Row = dict[str, Any]


@dataclass
class Folder:
    """A folder of pictures as it stands.

    Attributes:
        path: the folder.
        pictures: their names, sorted, relative to it, with forward slashes.
        metadata: names of the files that describe them.
        rows: what those say, by picture, in their order.
        masks: names of what rows name beside a picture.
        sidecars: the lines of each picture's .txt, of those that have one.
        bad_names: pictures that cannot be named in metadata.jsonl, and why.
    """

    path: Path
    pictures: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    rows: dict[str, list[Row]] = field(default_factory=dict)
    masks: list[str] = field(default_factory=list)
    sidecars: dict[str, list[str]] = field(default_factory=dict)
    bad_names: dict[str, str] = field(default_factory=dict)

    def texts(self, name: str) -> list[str]:
        """The captions that a picture has: of its rows, else of its .txt."""
        texts = [text for row in self.rows.get(name, []) for text in texts_of(row)]
        return texts or self.sidecars.get(name, [])


def read_folder(path: Path) -> Folder:
    """Looks through a folder; only its captions are read, no picture.

    Raises:
        DataError: a metadata file is damaged.
    """
    folder = Folder(path)
    files = list_files(path) if path.is_dir() else []
    there = set(files)
    folder.metadata = [name for name in files if name.rpartition("/")[2] in METADATA_FILES]
    for file in folder.metadata:
        for row in _rows_of(path, file):
            folder.rows.setdefault(row["file_name"], []).append(row)
    others = {value for rows in folder.rows.values() for row in rows for _, value in other_files(row)}
    for name in files:
        if name in others:
            folder.masks.append(name)
        if not is_picture(name) or name in others:
            continue
        if reason := bad_name(name):
            folder.bad_names[name.encode("utf-8", "backslashreplace").decode()] = reason
            continue
        folder.pictures.append(name)
        if (sidecar := sidecar_of(name)) in there:
            folder.sidecars[name] = lines_of(path / sidecar)
    return folder


def check_place(source: Folder, target: Folder, kind: str, files: Sequence[str]) -> None:
    """Whether the result can be written where it is wanted.

    Args:
        source: the pictures. target: where the captions go, the same object if they stay beside the pictures.
        kind: format of the captions. files: names of those that will hold them.

    Raises:
        UsageError: there is metadata of another kind, or a folder with other things.
        DataError: two pictures would share one .txt.
    """
    out = target.path
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out: '{out}' is a file; expected a folder")
    ours = target is source or (out / REPORT).is_file() or (out / PLACE).is_dir()
    if not ours and out.is_dir() and any(out.iterdir()):
        raise UsageError(
            f"--out: '{out}' has things in it that do not come from sdtune caption; expected a new or empty folder, or "
            "the result of an earlier run"
        )
    if others := [name for name in target.metadata if name not in files]:
        raise UsageError(
            f"'{out / others[0]}' has captions already, and a second kind of file beside it would be taken for more "
            "pictures; name a new folder with --out: it will hold those captions too"
        )
    if kind == "txt":
        taken: dict[str, str] = {}
        for name in source.pictures:
            other = taken.setdefault(sidecar_of(name), name)
            if other != name:
                raise DataError(
                    f"'{other}' and '{name}' would share {sidecar_of(name)}; rename one, or leave --format txt out"
                )


def joined(source: Folder, target: Folder, renamed: Mapping[str, str]) -> Folder:
    """The pictures of `source` with the captions of both; those of `target`, an earlier result, count first.

    Args:
        renamed: pictures that have another name in `target`, with that name.
    """
    if target is source:
        return source
    there = {new: name for name, new in renamed.items()}
    earlier = {there.get(name, name): rows for name, rows in target.rows.items() if target.texts(name)}
    return replace(source, rows=source.rows | earlier, sidecars=source.sidecars | target.sidecars)


def no_pictures(folder: Path) -> DataError:
    """What to say when there are none."""
    kinds = ", ".join(PICTURE_SUFFIXES)
    return DataError(f"'{folder}' holds no pictures; expected files that end in {kinds}, in it or in its sub-folders")


def leaves(name: str) -> bool:
    """Whether a name leads out of its folder."""
    return os.path.isabs(name) or bool(os.path.splitdrive(name)[0]) or ".." in name.split("/")


def sidecar_of(name: str) -> str:
    """dogs/rex.jpg -> dogs/rex.txt"""
    return os.path.splitext(name)[0] + ".txt"


def texts_of(row: Row) -> list[str]:
    """The captions in a row: a list holds several."""
    return captions_of(row.get("text"))


def _rows_of(folder: Path, file: str) -> Iterator[Row]:
    """Rows of one metadata file, named relative to `folder`."""
    prefix = file.rpartition("/")[0]
    for row in _read(folder / file):
        if not isinstance(row.get("file_name"), str):
            raise DataError(f"'{folder / file}' has a row without file_name: {row}; mend it, or move the file away")
        here = {key: f"{prefix}/{value}" for key, value in [("file_name", row["file_name"]), *other_files(row)]}
        yield row | here if prefix else row


def _read(file: Path) -> Iterable[Row]:
    if file.suffix == ".jsonl":
        return read_rows(file)
    try:
        if file.suffix == ".csv":
            with open(file, encoding="utf-8-sig", newline="") as lines:
                return [_from_csv(row) for row in csv.DictReader(lines)]
        import pyarrow.parquet

        return pyarrow.parquet.read_table(file).to_pylist()
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"'{file}' cannot be read ({error}); mend it, or move it away") from error


def _from_csv(row: dict[str, Any]) -> Row:
    """Without empty cells, and with the weight as a number."""
    cells = {key: value for key, value in row.items() if value not in ("", None)}
    return cells | {"weight": float(cells["weight"])} if "weight" in cells else cells


def other_files(row: Row) -> list[tuple[str, str]]:
    """Keys and names of what a row names beside its picture, such as a mask."""
    return [(k, v) for k, v in row.items() if k.endswith("_file_name") and k != "file_name" and isinstance(v, str)]


def lines_of(file: Path) -> list[str]:
    text = file.read_text(encoding="utf-8-sig", errors="replace")
    return [line.strip() for line in text.splitlines() if line.strip()]
