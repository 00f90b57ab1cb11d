"""Captions in `.txt` files beside the pictures: `rex.jpg` and `rex.txt`, as many captioners write them."""

from collections.abc import Iterable
from pathlib import Path

from sdtune.errors import DataError

SUFFIX = ".txt"


def sidecar(name: str) -> str:
    """Name of the text file beside a picture."""
    return name.rpartition(".")[0] + SUFFIX


def sidecar_captions(folder: Path, pictures: Iterable[str], files: set[str]) -> dict[str, tuple[str, ...]]:
    """For each picture the lines of its text file: each is a caption; none where the file is missing or blank.

    Args:
        folder: of the names. pictures: names. files: all names that there are.

    Raises:
        DataError: a text file is not UTF-8.
    """
    return {name: _lines(folder / sidecar(name)) if sidecar(name) in files else () for name in pictures}


def _lines(file: Path) -> tuple[str, ...]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}; expected the captions of a picture, in UTF-8.") from error
    return tuple(line.strip() for line in text.splitlines() if line.strip())
