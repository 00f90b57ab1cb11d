"""Files that are there whole or not at all."""

import os
import tempfile
from pathlib import Path

from sdtune.errors import DataError


def write_atomically(path: str | Path, content: bytes) -> None:
    """Writes beside `path`, flushes, then renames: a reader or a killed run never sees half a file.

    Missing folders are made.

    Raises:
        DataError: the file cannot be written, for instance because the disk is full.
    """
    path = Path(path)
    try:
        replace_file(path, content)
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error.strerror or error}; make room or choose another folder, then run the "
            "same command again."
        ) from error


def replace_file(path: Path, content: bytes) -> None:
    """As `write_atomically`, for callers with words of their own. Raises OSError; nothing half-written is left."""
    aside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".part", delete=False) as file:
            aside = Path(file.name)
            file.write(content)
        flush(aside)
        os.replace(aside, path)
    except OSError:
        if aside is not None:
            aside.unlink(missing_ok=True)
        raise


def flush(file: Path) -> None:
    """Hand a file's bytes to the disk, readable for those who may read new files here."""
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)  # temporary files, and those that safetensors writes, are for their owner alone
    with open(file, "rb+") as handle:
        os.fsync(handle.fileno())
