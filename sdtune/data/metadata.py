"""`metadata.jsonl`: one JSON object a line, beside the pictures (the imagefolder layout).

    {"file_name": "dogs/rex.jpg", "text": "a dog on a beach", "weight": 1.0, "mask_file_name": "masks/rex.png"}

`file_name` is relative to the folder, with forward slashes. Several rows with one `file_name` are several captions of
one picture. `text`, `weight` and `mask_file_name` are optional, and all other keys are kept.
"""

import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from sdtune.data.atomic import write_atomically
from sdtune.errors import DataError

METADATA = "metadata.jsonl"
A_ROW = 'a row such as {"file_name": "rex.jpg", "text": "a dog on a beach"}'
METADATA_FILES = (METADATA, "metadata.csv", "metadata.parquet")
DRAWN_BY = "drawn_by.json"  # beside class pictures that a run drew
OF_A_RUN = ("run.yaml", "environment.json")  # files by which its folder is known
PICTURE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pgm", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)


def read_rows(path: str | Path, key: str | None = "file_name") -> list[dict[str, Any]]:
    """The rows of a folder's `metadata.jsonl`, in the order of the file. Empty lines are passed over.

    Backslashes in names, as Windows has them, become slashes.

    Args:
        path: the folder, or the file itself.
        key: names the picture in each row; None where a row need not name one.

    Raises:
        DataError: there is no such file, or a line is not a JSON object with that key; names the line.
    """
    file = _file(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(
            f"{file} does not exist; make it with: sdtune caption {file.parent} --out {file.parent}-captioned"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}; expected a text file in UTF-8.") from error
    lines = enumerate(text.split("\n"), start=1)  # not splitlines(): captions may hold other line separators
    return [_row(file, number, line, key) for number, line in lines if line.strip()]


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes `metadata.jsonl` in one go: it is there whole or as it was before.

    Args:
        path: the folder, or the file itself.
        rows: one mapping a line, each with `file_name`; backslashes in names become slashes.

    Raises:
        DataError: the file cannot be written.
    """
    lines = [json.dumps(_with_slashes(row), ensure_ascii=False) + "\n" for row in rows]
    write_atomically(_file(path), "".join(lines).encode("utf-8"))


def list_files(folder: str | Path, without: Collection[str] = ()) -> list[str]:
    """All files under `folder`, sorted, relative to it, with forward slashes.

    Hidden files and folders are passed over, and so are folders that start with two underscores, as `datasets` does,
    and folders of runs and of class pictures that lie in it. Links to folders are followed, but for those to a folder
    above them.

    Args:
        without: further folders in it that are passed over; their real paths.
    """
    folder, found = str(folder), []
    above: dict[str, tuple[str, ...]] = {folder: (os.path.realpath(folder),)}  # of each: those above and itself
    for here, folders, files in os.walk(folder, followlinks=True):
        real = above.pop(here)
        for name in folders:
            path = os.path.join(here, name)
            above[path] = (*real, os.path.realpath(path) if os.path.islink(path) else os.path.join(real[-1], name))
        folders[:] = [
            name
            for name in folders
            if not name.startswith((".", "__"))
            and above[os.path.join(here, name)][-1] not in (*real, *without)
            and not is_made_by_sdtune(os.path.join(here, name))
        ]
        inner = os.path.relpath(here, folder).replace(os.sep, "/")
        prefix = "" if inner == "." else inner + "/"
        found += [prefix + name for name in files if not name.startswith(".")]
    return sorted(found)


def is_made_by_sdtune(folder: str) -> bool:
    """Whether a folder is that of a run or of drawn class pictures: no part of a data set that lies around it."""
    return is_run(folder) or os.path.isfile(os.path.join(folder, DRAWN_BY))


def is_run(folder: str | Path) -> bool:
    """Whether a folder is that of a run."""
    return all(os.path.isfile(os.path.join(folder, name)) for name in OF_A_RUN)


def is_picture(name: str) -> bool:
    """Whether a file's name ends like one of a picture."""
    return os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES


def leads_out(name: str) -> bool:
    """Whether a `file_name` is absolute, on any system, or climbs out of its folder."""
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or PureWindowsPath(name).root:
        return True
    return os.path.normpath(name.replace("\\", "/")).replace(os.sep, "/").split("/")[0] == ".."


def bad_name(name: str) -> str:
    """Why a file's name cannot stand in metadata.jsonl; empty when it can."""
    if "\\" in name:
        return "its name has a backslash, which metadata.jsonl takes for a folder; rename it"
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return "its name is not UTF-8; rename it"
    return ""


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".jsonl" else path / METADATA


def _row(file: Path, number: int, line: str, key: str | None) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(
            f"{file}, line {number} is not JSON ({error}); got: {line.strip()[:80]}; expected {A_ROW}. Mend the line, "
            "or take it away"
        ) from error
    if not isinstance(row, dict) or (key is not None and not isinstance(row.get(key), str)):
        raise DataError(f"{file}, line {number} names no picture; got: {line.strip()[:80]}; expected {A_ROW}")
    return _with_slashes(row)


def _with_slashes(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value.replace("\\", "/") if key.endswith("file_name") and isinstance(value, str) else value
        for key, value in row.items()
    }
