"""Pictures inside of tar files, in the WebDataset layout that img2dataset writes.

    00000.tar:  000000001.jpg  000000001.txt  000000001.json  000000001.mask.png  000000002.jpg ...

Members that share a name up to its first dot are one sample. The archives are gone through once, header by header; then
each picture is read from its place in its archive. Nothing is unpacked or copied.

Source: https://github.com/webdataset/webdataset, "The WebDataset Format".
"""

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sdtune.data.captions import captions_of, no_captions
from sdtune.data.metadata import is_picture
from sdtune.data.picture import MASK, Picture
from sdtune.errors import DataError

TEXTS = (".txt", ".json")


@dataclass
class Sample:
    """One sample of a shard: where its picture stands, and what stands beside it."""

    name: str
    place: tuple[int, int] | None = None  # offset and size of the picture, in bytes
    mask: tuple[int, int] | None = None  # those of its mask
    txt: str | None = None
    json: dict[str, Any] = field(default_factory=dict)

    def captions(self, column: str) -> tuple[str, ...]:
        """The key `column` of the .json; for "text" that of the .txt, else of the .json's text, else of its caption."""
        if column != "text":
            return tuple(captions_of(self.json.get(column)))
        places = (self.txt, self.json.get("text"), self.json.get("caption"))
        return next((tuple(found) for place in places if (found := captions_of(place))), ())


def shard_pictures(shards: Sequence[Path], text_column: str, prompt: str | None, key: str) -> list[Picture]:
    """The pictures of the shards, in the order in which they stand there.

    Args:
        shards: tar files, not compressed.
        text_column: "text" for the .txt files (or their .json's text or caption), else a key of the .json files.
        prompt: caption of every picture in place of their own. key: of the source in its recipe, for messages.

    Raises:
        DataError: a shard is damaged or compressed, there are no pictures, or pictures without caption.
    """
    pictures = [picture for shard in shards for picture in pictures_in_shard(shard, text_column, prompt)]
    if not pictures:
        raise DataError(f"{shards[0]} and the shards beside it hold no pictures; expected members such as 0001.jpg")
    if without := [picture.name for picture in pictures if not picture.captions]:
        raise no_captions(str(shards[0].parent), without, f"a member .txt, or {text_column!r} in a .json", key)
    return pictures


def pictures_in_shard(shard: Path, text_column: str, prompt: str | None) -> Iterator[Picture]:
    """The pictures of one shard, those without caption too. Arguments as of `shard_pictures`.

    Raises:
        DataError: when it comes to where the shard is damaged.
    """
    origin = str(shard.resolve().parent)
    for sample in read_shard(shard):
        if sample.place is not None:
            captions = (prompt,) if prompt is not None else sample.captions(text_column)
            read, mask = (place and partial(_slice, str(shard), *place) for place in (sample.place, sample.mask))
            assert read is not None
            yield Picture(f"{shard.name}/{sample.name}", captions, 1.0, read, origin, mask)


def read_shard(shard: Path) -> Iterator[Sample]:
    """The samples of a tar file; texts are read, pictures only located.

    Raises:
        DataError: when it comes to where the file is damaged; the samples before have been given out.
    """
    sample: Sample | None = None
    try:
        length = shard.stat().st_size
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                folder, _, base = member.name.rpartition("/")
                stem, _, rest = base.partition(".")
                if not member.isfile() or not stem:  # a hidden file has no stem
                    continue
                name = f"{folder}/{stem}" if folder else stem
                if sample is None or sample.name != name:
                    if sample is not None:
                        yield sample
                    sample = Sample(name)
                if member.offset_data + member.size > length:  # tarfile takes a file that was cut off for its end
                    raise tarfile.ReadError(f"cut off in {member.name}")
                _take(sample, archive, member, f".{rest.lower()}")
        if sample is not None:
            yield sample
        _refuse_no_end(shard)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(
            f"{shard} cannot be read as a WebDataset shard ({error}); expected a whole and uncompressed tar file. "
            "Fetch it again, or unpack it if it is compressed"
        ) from error


def _take(sample: Sample, archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> None:
    """Note what a member adds to its sample."""
    if is_picture(f"x{suffix}") and suffix.rpartition(".")[0] == f".{MASK}":
        sample.mask = member.offset_data, member.size
    elif is_picture(f"x{suffix}"):
        if sample.place is None or "." not in suffix[1:]:  # x.png rather than x.seg.png
            sample.place = member.offset_data, member.size
    elif suffix in TEXTS:
        opened = archive.extractfile(member)
        content = opened.read().decode("utf-8-sig") if opened else ""
        if suffix == ".txt":
            sample.txt = content
        else:
            sample.json = _object(member.name, content)


def _refuse_no_end(shard: Path) -> None:
    """Raises ReadError where a tar file does not end in zeros, as tar files do."""
    with open(shard, "rb") as file:
        file.seek(max(0, file.seek(0, 2) - tarfile.BLOCKSIZE))
        if file.read().strip(b"\0"):
            raise tarfile.ReadError("its end is missing")


def _object(name: str, content: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} holds {content.strip()[:40]}, expected a JSON object")
    return value


def _slice(file: str, offset: int, size: int) -> bytes:
    with open(file, "rb") as handle:
        handle.seek(offset)
        return handle.read(size)
