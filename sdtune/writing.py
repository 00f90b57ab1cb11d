"""Files and folders of a run, written whole or not at all; torch is not imported for it."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sdtune.data.atomic import flush, replace_file
from sdtune.errors import RunError


def write_json(path: Path, value: Any) -> None:
    """Write a small JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A folder to write to, which takes `target`'s place when the block ends well and vanishes when it does not.

    Raises:
        RunError: the disk is full or the folder cannot be written.
    """
    aside, old = (target.with_name(f".{target.name}.{what}") for what in ("partial", "old"))
    shutil.rmtree(aside, ignore_errors=True)
    if old.exists() and not target.exists():  # a kill between the two renames
        os.replace(old, target)
    try:
        aside.mkdir(parents=True)
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                flush(file)
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            os.replace(target, old)
        os.replace(aside, target)
    except Exception as fault:
        if not could_not_write(fault):
            raise
        raise RunError(
            f"'{target}' could not be written ({getattr(fault, 'strerror', None) or fault}); nothing half-written is "
            "left. Free some disk space, then go on with the same command and --resume"
        ) from fault
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if old.exists() and not target.exists():
            os.replace(old, target)
        shutil.rmtree(old, ignore_errors=True)


def could_not_write(fault: Exception) -> bool:
    """Whether the disk is the reason; safetensors and tokenizers tell of a full one in exceptions of their own."""
    return isinstance(fault, (OSError, SafetensorError)) or "os error" in str(fault)


def write_text(path: Path, text: str) -> None:
    """Write a small file, whole or not at all. Raises RunError."""
    try:
        replace_file(path, text.encode())
    except OSError as fault:
        raise RunError(
            f"'{path}' could not be written ({fault.strerror or fault}); free some disk space or choose another place"
        ) from fault
