"""What the bytes of pictures are: a digest of each, so that a picture which was changed under its old name is noticed.

All bytes of all pictures are read once. Of files the digest is then noted together with size, times and number of the
file; as long as those stay, the file is not read again. (Its time of change in the file system moves on with each
write, also where a program sets the older modification time back.) Pictures in archives are read each time.
"""

import json
import os
import time
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path

from sdtune import distributed
from sdtune.data.atomic import write_atomically
from sdtune.data.picture import Picture
from sdtune.errors import DataError

Identity = tuple[str, str]  # origin and name of a picture
YOUNG = 3.0  # seconds; a file that was changed so recently could change again without showing it in its times


def content_digests(pictures: Iterable[Picture], notes: Path) -> dict[Identity, str]:
    """The digest of each picture's bytes, under a progress bar; among several processes the main one reads.

    Args:
        pictures: any number, read by several threads.
        notes: folder where the digests of files are kept.

    Raises:
        DataError: a picture cannot be read, or the notes cannot be written.
    """
    unique = {(picture.origin, picture.name): picture for picture in pictures}
    found = _read_all(list(unique.values()), notes) if distributed.is_main() else []
    return dict(zip(unique, distributed.from_main(found), strict=True))


def _read_all(pictures: Sequence[Picture], notes: Path) -> list[str]:
    from tqdm.contrib.concurrent import thread_map

    books = {origin: Notebook(notes, origin) for origin in {picture.origin for picture in pictures}}

    def look(picture: Picture) -> str:
        content = picture_content(picture)
        return content_digest(content) if isinstance(content, bytes) else books[picture.origin].digest(content)

    found = thread_map(look, pictures, desc="reading the pictures", unit="picture", delay=1)
    for book in books.values():
        book.save()
    return list(found)


def picture_content(picture: Picture) -> bytes | str:
    """The bytes of a picture in an archive, or the path of its file. Raises DataError."""
    try:
        return picture.read()
    except OSError as error:
        raise DataError(f"{picture.origin}: {picture.name} cannot be read ({error}); put it back.") from error


def content_digest(content: bytes) -> str:
    """128 bits of a picture's bytes."""
    return blake2b(content, digest_size=16).hexdigest()


class Notebook:
    """Digests of the files of one data set, each with what the file system said of the file.

    Args:
        folder: of the notebooks. origin: of the pictures.
    """

    def __init__(self, folder: Path, origin: str) -> None:
        self.file = folder / f"{content_digest(origin.encode())}.json"
        try:
            self.noted: dict[str, list[str | int]] = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none yet
            self.noted = {}
        self.seen: dict[str, list[str | int]] = {}

    def digest(self, path: str) -> str:
        """Of a file; it is read where it is not known, or looks changed. Raises DataError."""
        try:
            facts = _facts(path)
            one, *known = self.noted.get(path, [""])
            if known != facts:
                with open(path, "rb") as file:
                    one = content_digest(file.read())
            if time.time() - max(facts[1], facts[2]) / 1e9 > YOUNG:
                self.seen[path] = [one, *facts]
        except OSError as error:
            raise DataError(
                f"{path} cannot be read ({error.strerror or error}); put it back, or take its row out of the metadata."
            ) from error
        return str(one)

    def save(self) -> None:
        """Write what was seen, where that is news. Raises DataError."""
        if not self.seen.items() <= self.noted.items():
            write_atomically(self.file, json.dumps(self.noted | self.seen).encode())


def _facts(path: str) -> list[int]:
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
