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
    aside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".part", delete=False) as file:
            aside = file.name
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o666 & ~_umask())  # temporary files are made for their owner alone
        os.replace(aside, path)
    except OSError as error:
        if aside is not None:
            Path(aside).unlink(missing_ok=True)
        raise DataError(
            f"{path} cannot be written: {error.strerror or error}; make room or choose another folder, then run the "
            "same command again."
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
