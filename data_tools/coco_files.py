"""A folder that is built aside and then renamed, so that a half one never stands; files, links and copies in it."""

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from sdtune.errors import DataError, UsageError

COPIERS = 8
Item = TypeVar("Item")
Result = TypeVar("Result")


def refuse_existing(out: Path) -> None:
    """Raises UsageError if `out` is a file, or a folder with something in it."""
    if out.is_dir() and next(out.iterdir(), None) is None:
        return
    if out.exists() or out.is_symlink():
        what = "is there already and has files" if out.is_dir() else "is no folder"
        raise UsageError(f"--out: '{out}' {what}, and is not overwritten; expected a new or empty folder: name another")


@contextmanager
def built_aside(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, which becomes `out` when the block ends well, and is deleted when it does not.

    What runs that were killed have left is deleted first.

    Raises:
        DataError: it cannot be written.
    """
    out = Path(os.path.abspath(out))
    aside = out.parent / f".{out.name}-{os.getpid()}.part"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _delete_left(out)
        aside.mkdir()
        yield aside
        if out.exists():
            out.rmdir()
        os.rename(aside, out)
    except OSError as error:
        raise DataError(
            f"{out} cannot be written: {error.strerror or error}; make room or name another folder with --out, then "
            "run the same command again."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[Callable[[bytes], object]]:
    """Writes a file that is on the disk when the block ends; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        yield file.write
        file.flush()
        os.fsync(file.fileno())


def place(source: Path, target: Path, mode: str) -> str | None:
    """Puts a picture in its place by a hard link ("link"), where there can be one, or a copy. Returns why it cannot.

    Raises:
        OSError: the target cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if mode == "link":
        with contextlib.suppress(OSError):  # another disk, or one without links
            os.link(os.path.realpath(source), target)
            return None
    try:
        content = source.open("rb")
    except OSError as error:
        return error.strerror or str(error)
    with content, new_file(target) as write:
        shutil.copyfileobj(content, _Writer(write))
    return None


def in_threads(work: Callable[[Item], Result], items: list[Item], what: str) -> Iterator[Result]:
    """`work` of each item, in order, with a progress bar where a person watches."""
    from tqdm import tqdm

    with ThreadPoolExecutor(COPIERS) as pool, tqdm(
        total=len(items), desc=what, unit="", disable=not sys.stderr.isatty(), leave=False
    ) as bar:
        for start in range(0, len(items), 1024):  # a few at a time, so that results do not pile up
            for result in pool.map(work, items[start : start + 1024]):
                bar.update()
                yield result


class _Writer:
    """The one method of a file that `copyfileobj` needs."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self.write = write


def _delete_left(out: Path) -> None:
    name = re.compile(re.escape(f".{out.name}-") + r"(\d+)\.part")
    with os.scandir(out.parent) as entries:
        left = [(Path(entry.path), int(found[1])) for entry in entries if (found := name.fullmatch(entry.name))]
    if left:
        import psutil

        for folder, process in left:
            if process == os.getpid() or not psutil.pid_exists(process):
                shutil.rmtree(folder, ignore_errors=True)
