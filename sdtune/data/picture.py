"""One picture of a data set, not yet read."""

import os
from collections.abc import Callable
from dataclasses import dataclass

from sdtune.errors import DataError

MASK = "mask"  # the column of masks: of tables, of the Hub, and what `datasets` makes of mask_file_name


@dataclass(frozen=True)
class Picture:
    """One picture of a source, not yet read.

    Attributes:
        name: where it stands in its source, with forward slashes.
        captions: what it shows, in one or several ways.
        weight: weight of its loss.
        read: answers the path of its file, or its encoded bytes.
        origin: folder or data set that it is from; with `name` it tells it from every other picture.
        mask: as `read`, for the picture that shows where its subject is (white); None where there is none.
        size: height and width in pixels as a person sees it; None until `survey` has looked.
    """

    name: str
    captions: tuple[str, ...]
    weight: float
    read: Callable[[], bytes | str]
    origin: str = ""
    mask: Callable[[], bytes | str] | None = None
    size: tuple[int, int] | None = None


def refuse_pipe(path: str | os.PathLike[str]) -> None:
    """Raises DataError where a path is that of a pipe or device: whoever opens one may wait for ever."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise DataError("it is no file but a folder, pipe or device")
