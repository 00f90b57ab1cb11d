"""Broken pictures, found before a run begins: a run that comes upon one at its last step has lost hours.

    broken(source.pictures)         # [("photos/a.jpg", "image file is truncated (12 bytes not processed)")]

`refuse_broken` tells of them in one paragraph; a run calls it before its folder is made.
"""

import os
from collections.abc import Iterable, Sequence
from io import BytesIO

from sdtune import distributed
from sdtune.data.picture import Picture
from sdtune.data.sources import Source
from sdtune.errors import DataError

FEW = 500  # pictures that are decoded whole; of more only the beginning and the end is read
NAMED = 5  # pictures that a fault names
ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}  # last bytes of a file that was not cut off


def refuse_broken(sources: Sequence[Source]) -> None:
    """Looks at every picture of the sources; among several processes the main one does.

    Raises:
        DataError: pictures cannot be read; names the first five.
    """
    found = broken(picture for source in sources for picture in source.pictures) if distributed.is_main() else []
    if found:
        some = ", ".join(f"{name} ({reason})" for name, reason in found[:NAMED])
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        count, them = ("1 picture", "it") if len(found) == 1 else (f"{len(found)} pictures", "them")
        raise DataError(
            f"{count} cannot be read: {some}{more}; replace {them}, or take {them} and the rows in the metadata away. "
            "Nothing was begun."
        )


def broken(pictures: Iterable[Picture]) -> list[tuple[str, str]]:
    """The pictures that cannot be read, under a progress bar.

    Up to 500 are decoded whole. Of more, headers and ends are read of JPEG and PNG files, and what looks cut off and
    other formats are decoded: 100,000 take a minute.

    Returns:
        (name, reason) of each: the path of its file, or where it stands in its data set.
    """
    from PIL import Image
    from tqdm.contrib.concurrent import thread_map

    unique = list({(picture.origin, picture.name): picture for picture in pictures}.values())
    whole = len(unique) <= FEW
    Image.init()  # not safe when several threads do it on their way

    def look(picture: Picture) -> tuple[str, str] | None:
        return _look(picture, whole)

    found = thread_map(look, unique, desc="looking at the pictures", unit="picture", delay=1)
    return [fault for fault in found if fault is not None]


def _look(picture: Picture, whole: bool) -> tuple[str, str] | None:
    """Name and reason of a broken picture; None for a good one."""
    from PIL import Image, UnidentifiedImageError

    name = f"{picture.origin}: {picture.name}"
    try:
        content = picture.read()
        name = content if isinstance(content, str) else name
        with Image.open(BytesIO(content) if isinstance(content, bytes) else content) as opened:
            if whole or not _ends_well(content, opened.format):
                opened.load()
    except UnidentifiedImageError:
        return name, "not a picture"
    except Exception as error:  # Pillow's readers raise whatever the broken bytes lead them to
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return name, " ".join(reason.split())
    return None


def _ends_well(content: str | bytes, kind: str | None) -> bool:
    """Whether a file, or what was read of one, ends as its format wants it; False where that cannot be told cheaply."""
    end = ENDS.get(kind or "")
    if end is None:
        return False
    if isinstance(content, bytes):
        return content[-64:].rstrip(b"\0").endswith(end)
    with open(content, "rb") as file:
        file.seek(-min(64, os.path.getsize(content)), os.SEEK_END)
        return file.read().rstrip(b"\0").endswith(end)
