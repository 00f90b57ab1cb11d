"""The journal of a captioning: what is finished, safe against a stop at any moment.

    FOLDER/.caption/job.json         the settings, and when it began
    FOLDER/.caption/done-0.jsonl     one line for each finished picture of process 0
    FOLDER/.caption/lock             held by the one command that writes here

A line counts once it ends in a newline. Half a line, of a process that was killed, counts for nothing.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from data_tools.caption_settings import Settings
from sdtune.data.atomic import write_atomically
from sdtune.errors import DataError, UsageError

PLACE = ".caption"


class Journal:
    """The journal in a folder. One process prepares it, all read it, and each then appends to its own file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.place = folder / PLACE
        self.job: dict[str, Any] = {}
        self._lock = FileLock(self.place / "lock", timeout=0)

    def prepare(self, settings: dict[str, Any], wanted: Settings) -> None:
        """Begins, or goes on with what is there. For the main process alone.

        Args:
            settings: to be compared with those of the run that was stopped, and kept.
            wanted: the same as an object; with `overwrite` a run of other settings is thrown away.

        Raises:
            UsageError: the run that was stopped had other settings.
            DataError: another command writes here now, or the folder cannot be written.
        """
        try:
            self.place.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout:
            raise DataError(
                f"another command captions into '{self.folder}' at this moment; wait for its end, or stop it"
            ) from None
        except OSError as error:
            raise DataError(
                f"'{self.folder}' cannot be written ({error.strerror or error}); name another folder with --out"
            ) from error
        job = self._job()
        if job and job["settings"] != settings:
            if not wanted.overwrite and self.finished()[0]:
                self._lock.release()
                raise UsageError(self._other_settings(job["settings"], settings, wanted))
            for file in self._files():
                file.unlink()
            job = {}
        if not job:
            job = {"settings": settings, "started": datetime.now(timezone.utc).isoformat(timespec="microseconds")}
            write_atomically(self.place / "job.json", json.dumps(job, ensure_ascii=False).encode("utf-8"))
        self.job = job

    def finished(self) -> tuple[dict[str, list[str]], dict[str, str]]:
        """The captions of each finished picture, and for each bad one why it is bad; all processes', all starts'."""
        captions: dict[str, list[str]] = {}
        reasons: dict[str, str] = {}
        for file in self._files():
            for line in _whole_lines(file):
                if "reason" in line:
                    reasons[line["file_name"]] = line["reason"]
                else:
                    captions[line["file_name"]] = line["captions"]
        return captions, {name: reason for name, reason in reasons.items() if name not in captions}

    def writer(self, rank: int) -> "Writer":
        """Where process `rank` notes what it has finished."""
        return Writer(self.place / f"done-{rank}.jsonl")

    def remove(self) -> None:
        """Takes the journal away: what it held stands in the result."""
        self._lock.release()
        shutil.rmtree(self.place)

    def release(self) -> None:
        """Lets other commands write here; takes the journal away while nothing stands in it."""
        self._lock.release()
        if self.place.is_dir() and not self.finished()[0]:
            self.remove()
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    def _job(self) -> dict[str, Any]:
        try:
            job = json.loads((self.place / "job.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise DataError(
                f"'{self.place / 'job.json'}' cannot be read ({error}); delete the folder '{self.place}' to begin anew"
            ) from error
        return job if isinstance(job, dict) and isinstance(job.get("settings"), dict) else {}

    def _files(self) -> list[Path]:
        return sorted(self.place.glob("done-*.jsonl"))

    def _other_settings(self, before: dict[str, Any], now: dict[str, Any], wanted: Settings) -> str:
        differences = wanted.differences(before)
        differences += [f"{name}: {before.get(name)!r} before, {now[name]!r} now" for name in now
                        if name not in vars(wanted) and before.get(name) != now[name]]
        return (
            f"'{self.folder}' holds {len(self.finished()[0])} captions of a run that was stopped and had other "
            f"settings ({'; '.join(differences)}). With those settings it goes on; with --overwrite all begins anew"
        )


class Writer:
    """Appends lines that stay, even if the machine stops right after."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "ab")  # noqa: SIM115 - closed by __exit__
        half = path.read_bytes().rpartition(b"\n")[2]
        self._file.truncate(path.stat().st_size - len(half))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, lines: Iterable[dict[str, Any]]) -> None:
        """Writes one JSON object a line and waits until the disk has them.

        Raises:
            DataError: the disk is full.
        """
        try:
            self._file.write("".join(json.dumps(line) + "\n" for line in lines).encode("ascii"))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise DataError(
                f"{self._file.name} cannot be written: {error.strerror or error}; make room, then run the same command "
                "again: it goes on where it stopped."
            ) from error


def _whole_lines(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_bytes().split(b"\n")[:-1]:  # what follows the last newline is half a line
        try:
            value = json.loads(line)
        except ValueError:
            continue  # a machine that lost its power leaves zeros: that picture is captioned again
        if isinstance(value, dict) and "file_name" in value:
            yield value
