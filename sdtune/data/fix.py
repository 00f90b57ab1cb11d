"""A cleaned copy of a data set: hard links to the good pictures, and their rows. The source is never touched.

It is built beside its place and renamed when it is whole.
"""

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdtune.data.captions import captions_of
from sdtune.data.check import Report, Seen
from sdtune.data.check_reading import MASK_KEY, Reading, Row
from sdtune.data.metadata import is_picture, leads_out, write_rows
from sdtune.data.splits import unlike_splits
from sdtune.errors import DataError, UsageError

SUFFIXES = {"JPEG": ".jpg", "TIFF": ".tif", "MPO": ".jpg", "JPEG2000": ".jp2"}


def write_fixed(report: Report, out: Path) -> dict[str, int]:
    """A copy without what is broken, missing, without caption, or there twice.

    The captions of a copy that goes are added to those of the picture that stays.

    Returns:
        How many pictures were "kept" and "dropped".

    Raises:
        UsageError: `out` exists, or lies in the source.
        DataError: nothing is left, or it cannot be written.
    """
    drop = {i for i, each in enumerate(report.pictures) if each.look.fault or not each.picture.captions}
    more: dict[int, list[str]] = {}
    for group in report.equal:
        first, *others = sorted(group, key=lambda number: number in drop)
        drop.update(others)
        more[first] = [text for number in others for text in report.pictures[number].picture.captions]
    return write_copy(report, drop, out, more)


def write_copy(
    report: Report, drop: Collection[int], out: Path, more: Mapping[int, Sequence[str]] | None = None
) -> dict[str, int]:
    """A copy of all pictures but some, with their rows; of several splits each in its folder.

    Args:
        drop: numbers of the pictures that are left out.
        more: further captions by number of a picture.

    Returns, raises: as `write_fixed`.
    """
    _refuse(report.readings, out)
    kept = [number for number in range(len(report.pictures)) if number not in drop]
    if not kept:
        raise DataError(f"{out} is not written: no picture would be left in it. See what is wrong: sdtune check FOLDER")
    with _aside(out) as place:
        for reading in report.readings:
            folder = place / reading.entry.split if len(report.readings) > 1 else place
            rows = []
            for number in kept:
                if report.pictures[number].reading is reading:
                    rows += _copy(report.pictures[number], number, folder, (more or {}).get(number, ()))
            if rows:
                write_rows(folder, rows)
    return {"kept": len(kept), "dropped": len(report.pictures) - len(kept)}


def link_or_copy(source: str, target: Path) -> None:
    """A hard link to a file, behind symbolic links too; a copy where there can be none. Missing folders are made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source = os.path.realpath(source)
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without links
        shutil.copy2(source, target)


def _refuse(readings: Sequence[Reading], out: Path) -> None:
    if os.path.lexists(out):
        raise UsageError(f"'{out}' exists already and is not overwritten; name another folder")
    for reading in readings:
        if reading.folder is not None and out.resolve().is_relative_to(reading.folder.resolve()):
            raise UsageError(f"'{out}' lies in '{reading.folder}', which is not touched; name a folder elsewhere")


@contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that becomes it, unless an error takes it away."""
    place = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=f".{out.name}-", suffix=".part", dir=out.parent))
        inner = place / "data"  # with everyone's rights, which the temporary folder has not
        inner.mkdir()
        yield inner
        os.rename(inner, out)
    except OSError as error:
        raise DataError(
            f"{out} cannot be written: {error.strerror or error}; make room or choose another folder, then run the "
            "same command again."
        ) from error
    finally:
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)


def _copy(each: Seen, number: int, folder: Path, more: Sequence[str]) -> list[Row]:
    """Puts a picture into a folder; returns its rows."""
    name, content, entry = _file_name(each, number), each.picture.read(), each.reading.entry
    if (folder / name).exists():  # two names became one
        name = f"{number:06d}-{name.replace('/', '-')}"
    _put(content, folder / name)
    rows = [{**row, entry.file_key: name} for row in _own_rows(each.reading, each.picture.name, folder)]
    if not rows:
        facts: Row = {} if each.picture.weight == 1 else {"weight": each.picture.weight}
        if each.picture.mask is not None:
            facts[MASK_KEY] = f"masks/{name.rpartition('.')[0]}.png"
            _put(each.picture.mask(), folder / facts[MASK_KEY])
        rows = [{entry.file_key: name, entry.text_column: text, **facts} for text in each.picture.captions]
    known = {text for row in rows for text in captions_of(row.get(entry.text_column))}
    new = [text for text in dict.fromkeys(more) if text not in known]
    return rows + [_another(rows[0], entry.text_column, text) for text in new]


def _put(content: bytes | str, target: Path) -> None:
    """Writes a picture, or links to its file."""
    if isinstance(content, bytes):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    else:
        link_or_copy(content, target)


def _own_rows(reading: Reading, name: str, folder: Path) -> Iterator[Row]:
    """The rows of a picture as its metadata has them, but for blank ones; files beside it, as masks, come along."""
    rows = reading.rows.get(name, [])
    said = [row for row in rows if captions_of(row.get(reading.entry.text_column))]
    for row in said or rows:
        kept: dict[str, Any] = {}
        for key, value in row.items():
            if key.endswith("file_name") and isinstance(value, str) and key != reading.entry.file_key:
                if reading.folder is None or leads_out(value) or not (reading.folder / value).is_file():
                    continue
                source, value = reading.folder / value, _plain(value)
                if not (folder / value).exists():
                    link_or_copy(str(source), folder / value)
            kept[key] = value
        yield kept


def _another(row: Row, text_column: str, text: str) -> Row:
    """A further row for a row's picture."""
    return {**row, text_column: [text] if isinstance(row.get(text_column), list) else text}


def _file_name(each: Seen, number: int) -> str:
    """What a picture is called in the copy: as in its folder; out of a table or shard by its number."""
    if is_picture(each.picture.name):
        return _plain(each.picture.name)
    return f"{number:06d}" + SUFFIXES.get(each.look.format, f".{each.look.format.lower()}")


def _plain(name: str) -> str:
    """A name that metadata.jsonl can hold and `datasets` takes for no split."""
    return unlike_splits(name.encode("utf-8", "backslashreplace").decode().replace("\\", "-"))
