"""COCO's json files, read in parts: what is held at a time is one slice, not the file as Python objects.

A file is one object whose `images` and `annotations` are long arrays. One pass over the mapped file finds where each
of its values begins and ends; then an array is cut into slices, each ending between two objects, and each is decoded
alone. Where a slice may end is guessed from the characters `},{` and proved by decoding: a slice that ends inside a
string or a nested value is no complete array. What this does not fit (`NaN`, UTF-16) is decoded whole.
"""

import json
import mmap
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from sdtune.errors import DataError

SLICE = 1 << 18  # bytes; small enough for a processor's cache
GUESSES = 8  # places tried as the end of a slice before it grows
BETWEEN = re.compile(rb"\}\s*,\s*\{")

Scalar = int | float | str | None  # ids are whole numbers in COCO, but texts in some files made after it
T = TypeVar("T")


class Picture(msgspec.Struct, gc=False):
    """An entry of `images`."""

    id: Scalar = None
    file_name: str | None = None
    width: Scalar = None
    height: Scalar = None
    license: Scalar = None


class Caption(msgspec.Struct, gc=False):
    """An entry of `annotations` in a captions file."""

    id: Scalar = None
    image_id: Scalar = None
    caption: str | None = None


class Instance(msgspec.Struct, gc=False):
    """An entry of `annotations` in an instances file, without its shape."""

    id: Scalar = None
    image_id: Scalar = None
    category_id: Scalar = None
    area: float | None = None
    bbox: list[float] | None = None
    iscrowd: bool | int | None = None


class Shape(Instance, gc=False):
    """The same with its shape: polygons, or run lengths, not decoded."""

    segmentation: msgspec.Raw = msgspec.Raw(b"null")


class Broken(msgspec.Struct):
    """An entry that is not of the expected kind: `why`, and its beginning."""

    why: str
    entry: str


class CocoJson(Generic[T]):
    """A COCO json file.

    Args:
        path: the file.

    Raises:
        DataError: there is no such file, it is cut off or no JSON, or not an object.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = None
        self._values: dict[str, Any] = self._open()

    @property
    def keys(self) -> list[str]:
        """The names of its values."""
        return list(self._values)

    def value(self, key: str) -> Any:
        """A short value, such as `categories`, decoded; None if there is none."""
        value = self._values.get(key)
        return json.loads(bytes(value)) if isinstance(value, msgspec.Raw) else value

    def objects(self, key: str, kind: type[T], broken: Callable[[Broken], None]) -> Iterator[list[T]]:
        """The entries of an array, in order, some thousands at a time.

        Args:
            key: the array's name.
            kind: a struct of this module; other keys of an entry are passed over.
            broken: called with each entry that is no such struct.

        Raises:
            DataError: it is not an array.
        """
        value = self._values.get(key)
        if isinstance(value, msgspec.Raw):
            view = memoryview(value)
            if bytes(view[:1]) == b"[":
                yield from self._slices(view, kind, broken)
                return
            value = json.loads(bytes(view))
        if not isinstance(value, list):
            raise DataError(
                f"{self.path}: {key!r} is {describe(value)}; expected a list of objects, as in the files of "
                "https://cocodataset.org/#download"
            )
        for start in range(0, len(value), 4096):
            yield _convert(value[start : start + 4096], kind, broken)

    def _open(self) -> dict[str, Any]:
        try:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise DataError(
                f"{self.path} does not exist; it comes in annotations_trainval2017.zip of "
                "https://cocodataset.org/#download"
            ) from None
        except ValueError:  # nothing to map
            raise DataError(f"{self.path} is empty; download it again.") from None
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}; expected a json file.") from error
        _refuse_other_files(self.path, self._map)
        bom = 3 if self._map[:3] == b"\xef\xbb\xbf" else 0
        try:
            values = msgspec.json.decode(memoryview(self._map)[bom:], type=dict[str, msgspec.Raw])
        except msgspec.DecodeError:  # also what only Python reads, such as NaN: it decides
            return _decode_whole(self.path, self._map[bom:])
        self._let_go()
        return values

    def _slices(self, view: memoryview, kind: type[T], broken: Callable[[Broken], None]) -> Iterator[list[T]]:
        decoder = msgspec.json.Decoder(list[kind])  # type: ignore[valid-type]
        place, end, size, count = 1, len(view) - 1, SLICE, 0
        while place < end:
            piece = bytes(view[place : min(place + size, end)])
            found, after = None, 0
            for length, following in _ends(piece, last=place + size >= end):
                found, after = _decode(b"[%b]" % piece[:length], decoder, kind, broken), following
                if found is not None:
                    break
            if found is None:  # an object longer than the slice, or full of others
                size *= 2
                if place + size // 2 >= end:  # the whole rest is no JSON: UTF-8 is checked only here
                    raise DataError(f"{self.path} is damaged: it is not in UTF-8; download it again.")
                continue
            yield found
            place, size, count = place + after, SLICE, count + 1
            if count % 32 == 0:
                self._let_go()

    def _let_go(self) -> None:
        """Pages of the mapped file that were read count as memory of the process until they are given back."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def describe(value: Any) -> str:
    """What a JSON value is, in words."""
    if isinstance(value, dict):
        keys = ", ".join(map(str, list(value)[:8]))
        return f"an object with the keys {keys}" if keys else "an empty object"
    if isinstance(value, list):
        return f"a list of {len(value)}, the first of which is {describe(value[0])}" if value else "an empty list"
    return json.dumps(value)[:60]


def _ends(piece: bytes, last: bool) -> Iterator[tuple[int, int]]:
    """Where a slice may end: (its length, where the next one begins), the longest first."""
    if last:
        yield len(piece), len(piece)
        return
    place, guesses = len(piece), 0
    while guesses < GUESSES and (place := piece.rfind(b"}", 0, place)) >= 0:
        if between := BETWEEN.match(piece, place):
            guesses += 1
            yield place + 1, between.end() - 1


def _decode(text: bytes, decoder: Any, kind: type[T], broken: Callable[[Broken], None]) -> list[T] | None:
    """The entries of a slice; None if it is no complete array."""
    try:
        return decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        try:
            values = json.loads(text)
        except ValueError:
            return None
        return _convert(values, kind, broken)


def _convert(values: list[Any], kind: type[T], broken: Callable[[Broken], None]) -> list[T]:
    """Entry by entry, so that a broken one does not take others with it."""
    entries = []
    for value in values:
        try:
            if "segmentation" in getattr(kind, "__struct_fields__", ()) and isinstance(value, dict):
                value = value | {"segmentation": msgspec.Raw(json.dumps(value.get("segmentation")).encode())}
            entries.append(msgspec.convert(value, kind))
        except msgspec.ValidationError as error:
            broken(Broken(str(error), json.dumps(value)[:200]))
    return entries


def _decode_whole(path: Path, content: bytes) -> dict[str, Any]:
    """All of the file, by Python's own reader, which takes UTF-16 and NaN."""
    try:
        found = json.loads(content)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is damaged: it is not in UTF-8 ({error.reason}); download it again.") from None
    except json.JSONDecodeError as error:
        if error.msg.startswith("Unterminated string") or error.pos >= len(error.doc.rstrip()) - 8:
            raise _cut_off(path, len(content)) from None
        raise DataError(
            f"{path} is no JSON ({error.msg}, line {error.lineno}, column {error.colno}); expected a COCO captions or "
            "instances file. Download it again."
        ) from None
    if not isinstance(found, dict):
        raise DataError(
            f"{path} holds {describe(found)}; expected a COCO file: an object with 'images' and 'annotations'. Results "
            "of a captioner are such lists: put them as 'annotations' beside the 'images' of the file they are for."
        )
    return found


def _refuse_other_files(path: Path, content: mmap.mmap) -> None:
    """Told by the first and last bytes, before anything is decoded."""
    archive = {b"PK\x03\x04": "a zip archive", b"\x1f\x8b": "gzip-compressed"}
    for head, what in archive.items():
        if content[: len(head)] == head:
            raise DataError(f"{path} is {what}; expected the json file in it: unpack it and give that one.")
    if content[:1] in b"{[" and content[-64:].rstrip(b" \t\r\n")[-1:] not in (b"}", b"]", b""):
        raise _cut_off(path, len(content))


def _cut_off(path: Path, size: int) -> DataError:
    return DataError(
        f"{path} is cut off: after its {size:,} bytes the JSON is not complete. Expected a whole file; nothing was "
        "written. Download it again, then run the same command."
    )
