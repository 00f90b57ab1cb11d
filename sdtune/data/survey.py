"""Every picture of a run, looked at once before it begins: its size, and whether it can be read.

    sources = survey(sources)                       # refuses broken pictures
    sources[0].pictures[0].size                     # (480, 640)

A run that comes upon a broken picture at its last step has lost hours; so all are told of in one paragraph, before the
folder of the run is made.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO

from sdtune import distributed
from sdtune.data.captions import first_of
from sdtune.data.picture import Picture, refuse_pipe
from sdtune.data.sources import Source
from sdtune.errors import DataError

FEW = 500  # pictures that are decoded whole; of more only the beginning and the end is read
ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}  # last bytes of a file that was not cut off
UNKNOWN = (0, 0)

Size = tuple[int, int]  # height and width


@dataclass(frozen=True)
class Surveyed:
    """What a picture and its mask turned out to be.

    Attributes:
        size: height and width as a person sees it.
        broken: (name, reason) of each of the two that cannot be read.
        misfit: how a mask of another shape than its picture differs; "" where it fits.
    """

    size: Size
    broken: tuple[tuple[str, str], ...] = ()
    misfit: str = ""


def survey(sources: Sequence[Source], masks: bool = False) -> list[Source]:
    """The same sources with the size of each picture; among several processes the main one looks.

    Args:
        masks: look at the masks too.

    Raises:
        DataError: pictures or masks cannot be read, or masks are of another shape than their picture; names the first
            five.
    """
    pictures = [picture for source in sources for picture in source.pictures]
    looks = survey_all(pictures, masks) if distributed.is_main() else []
    refuse_broken([fault for look in looks for fault in look.broken])
    refuse_misfits([look.misfit for look in looks if look.misfit])
    unique = list(dict.fromkeys((picture.origin, picture.name) for picture in pictures))
    sizes: dict[tuple[str, str], Size] = dict(
        zip(unique, distributed.from_main([look.size for look in looks]), strict=True)
    )
    return [
        replace(source, pictures=tuple(replace(p, size=sizes[p.origin, p.name]) for p in source.pictures))
        for source in sources
    ]


def refuse_broken(found: Sequence[tuple[str, str]]) -> None:
    """Raises DataError where there are broken pictures, (name, reason) each."""
    if found:
        some = first_of([f"{name} ({reason})" for name, reason in found])
        count, them = ("1 picture", "it") if len(found) == 1 else (f"{len(found)} pictures", "them")
        raise DataError(
            f"{count} cannot be read: {some}; replace {them}, or take {them} and the rows in the metadata away. "
            "Nothing was begun."
        )


def refuse_misfits(found: Sequence[str]) -> None:
    """Raises DataError where there are masks of another shape than their picture."""
    if found:
        count = "1 mask is" if len(found) == 1 else f"{len(found)} masks are"
        raise DataError(
            f"{count} of another shape than the picture: {first_of(found)}; expected the size of the picture, or one "
            "of the same proportions. Draw them anew, or take their mask_file_name out of the metadata. Nothing was "
            "begun."
        )


def survey_all(pictures: Iterable[Picture], masks: bool = False) -> list[Surveyed]:
    """A look at each picture, at those that come again once, under a progress bar.

    Up to 500 are decoded whole. Of more, headers and ends are read of JPEG and PNG files, and what looks cut off and
    other formats are decoded: 100,000 take a minute.

    Args:
        masks: look at the masks too.
    """
    from PIL import Image
    from tqdm.contrib.concurrent import thread_map

    unique = list({(picture.origin, picture.name): picture for picture in pictures}.values())
    whole = len(unique) <= FEW
    Image.init()  # not safe when several threads do it on their way

    def look(picture: Picture) -> Surveyed:
        return _look(picture, whole, masks)

    return list(thread_map(look, unique, desc="looking at the pictures", unit="picture", delay=1))


def _look(picture: Picture, whole: bool, masks: bool) -> Surveyed:
    name, size, fault = _open(picture.read, f"{picture.origin}: {picture.name}", whole)
    broken = [(name, fault)] if fault else []
    if not masks or picture.mask is None:
        return Surveyed(size, tuple(broken))
    mask_name, mask_size, mask_fault = _open(picture.mask, f"{picture.origin}: mask of {picture.name}", whole)
    broken += [(mask_name, mask_fault)] if mask_fault else []
    if broken or same_shape(mask_size, size):
        return Surveyed(size, tuple(broken))
    (height, width), (mask_height, mask_width) = size, mask_size
    return Surveyed(size, (), f"{mask_name} is {mask_width} x {mask_height}, its picture {width} x {height}")


def same_shape(mask: Size, picture: Size) -> bool:
    """Whether a mask has the proportions of its picture, to a pixel of its shorter side."""
    short, long = (0, 1) if picture[0] <= picture[1] else (1, 0)
    return abs(mask[short] - mask[long] * picture[short] / picture[long]) <= 1


def _open(read: Callable[[], str | bytes], name: str, whole: bool) -> tuple[str, Size, str]:
    """Name (its path where it is a file), size, and what is wrong: "" for a good one."""
    from PIL import Image, UnidentifiedImageError

    from sdtune.data.images import upright_size

    try:
        content = read()
        if isinstance(content, str):
            name = content
            refuse_pipe(content)
        with Image.open(BytesIO(content) if isinstance(content, bytes) else content) as opened:
            if whole or not _ends_well(content, opened.format):
                opened.load()
            return name, upright_size(opened), ""
    except UnidentifiedImageError:
        return name, UNKNOWN, "not a picture"
    except Exception as error:  # Pillow's readers raise whatever the broken bytes lead them to
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return name, UNKNOWN, " ".join(reason.split())


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
