"""Opens, decodes and hashes every picture once, on all cores.

    looks = list(look_at_all(pictures))
    looks[0].width, looks[0].fault                      # 640, ""

A JPEG is decoded as a draft at an eighth of its size: libjpeg reads and unpacks its whole data for that, so whatever
is damaged is found as in a full decode, and only the last step, which cannot fail, is made for fewer pixels. The
perceptual hash is made of that reduced copy, since hashing the whole picture takes longer than decoding it.
"""

import io
import multiprocessing
import os
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import imagehash
import numpy as np
import xxhash
from PIL import Image, UnidentifiedImageError

from sdtune.data.picture import Picture, refuse_pipe
from sdtune.errors import DataError, SdtuneError

REDUCED = 64  # pixels of the shorter side that the hash is made of, at least
CHUNK = 32  # pictures that a process gets at a time
WORTH_A_PROCESS = 250  # pictures; starting one takes as long as looking at so many
MOST_PROCESSES = 62  # Windows can wait for 61 others
PLAIN = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
ORIENTATION = 0x0112  # EXIF
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Look:
    """What one picture turned out to be. With a fault all else but `size` and `digest` is empty.

    Attributes:
        fault: why it cannot be used; "" where it can.
        width, height: in pixels, as a person sees it (turned as its EXIF says).
        mode: Pillow's, of the file.
        format: Pillow's, such as JPEG.
        size: of the file, in bytes.
        digest: of its content: equal for equal files.
        hash: perceptual, 64 bits: a DCT of its brightness; few bits differ between pictures that look alike.
        tint: 4 x 4 pixels of RGB, 48 bytes: tells drawings of one shape in several colours apart.
    """

    fault: str = ""
    width: int = 0
    height: int = 0
    mode: str = ""
    format: str = ""
    size: int = 0
    digest: bytes = b""
    hash: int = 0
    tint: bytes = b""


@contextmanager
def looking(files: Sequence[str] = (), processes: int | None = None) -> Iterator[Callable[..., Iterator[Look]]]:
    """Within: a function as `look_at_all`. The other processes look at `files` from now on, before it is called.

    Args:
        files: paths that will most likely be asked for.
        processes: as in `look_at_all`.

    Raises:
        DataError: a process was ended from outside.
    """
    processes = _how_many(len(files)) if processes is None else processes
    if processes < 2 or not files:
        yield look_at_all
        return
    with _pool(processes - 1) as pool:
        early = _Early(pool, files)

        def look(pictures: Sequence[Picture]) -> Iterator[Look]:
            for content in map(_content, pictures):
                yield early.look(content) if content in early.places else _look_at_chunk([content])[0]

        yield look


def look_at_all(pictures: Sequence[Picture], processes: int | None = None) -> Iterator[Look]:
    """One look for each picture, in order. Pictures that cannot be read are no error, but a Look with a fault.

    Args:
        pictures: files are read by the processes, other pictures (streams) here.
        processes: how many, this one among them; by default one a core where there is work for them.

    Raises:
        DataError: a process was ended from outside.
    """
    chunks = (pictures[first : first + CHUNK] for first in range(0, len(pictures), CHUNK))
    contents = ([_content(picture) for picture in chunk] for chunk in chunks)
    processes = _how_many(len(pictures)) if processes is None else processes
    if processes < 2:
        for chunk in contents:
            yield from _look_at_chunk(chunk)
        return
    with _pool(processes - 1) as pool:
        yield from _in_order(pool, contents, ahead=4 * (processes - 1))


class _Early:
    """Files in chunks that the processes of a pool take one after the other, and this one from the end."""

    def __init__(self, pool: ProcessPoolExecutor, files: Sequence[str]) -> None:
        self.chunks = [files[first : first + CHUNK] for first in range(0, len(files), CHUNK)]
        self.places = {file: divmod(number, CHUNK) for number, file in enumerate(files)}
        self.theirs = [pool.submit(_look_at_chunk, chunk) for chunk in self.chunks]
        self.own: dict[int, list[Look]] = {}
        self.last = len(self.chunks) - 1  # this process has looked no further from the end

    def look(self, file: bytes | str | Look) -> Look:
        """The look of one of the files; while others have it in hand, this process does some of the rest."""
        chunk, position = self.places[file]  # type: ignore[index]
        while chunk not in self.own and not self.theirs[chunk].done() and self._help():
            pass
        return (self.own[chunk] if chunk in self.own else self.theirs[chunk].result())[position]

    def _help(self) -> bool:
        """Does the last chunk that nobody has begun; False where there is none."""
        while self.last >= 0:
            number, self.last = self.last, self.last - 1
            if self.theirs[number].cancel():
                self.own[number] = _look_at_chunk(self.chunks[number])
                return True
        return False


@contextmanager
def _pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of threads that are not there
    with ProcessPoolExecutor(processes, context, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            yield pool
        except BrokenProcessPool as error:
            raise DataError(
                "a process that decoded pictures was ended from outside, most likely because the memory is full; close "
                "other programs, then run the same command again."
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _how_many(pictures: int) -> int:
    return min(cores(), pictures // WORTH_A_PROCESS, MOST_PROCESSES)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def look_at(content: bytes | str) -> Look:
    """Decodes one picture: the path of its file, or its encoded bytes."""
    try:
        encoded = content if isinstance(content, bytes) else _read(content)
    except OSError as error:
        return Look(fault=error.strerror or str(error))
    except DataError as error:
        return Look(fault=str(error))
    if not encoded:
        return Look(fault="the file is empty")
    digest = xxhash.xxh3_128_digest(encoded)  # a cryptographic hash takes a twentieth of the decoding time
    try:
        return _decoded(encoded, digest)
    except UnidentifiedImageError:
        fault = "not a picture"
    except Exception as error:  # Pillow's readers raise whatever the broken bytes lead them to
        fault = " ".join(str(error).split()) or type(error).__name__
    return Look(fault=fault, size=len(encoded), digest=digest)


def _read(path: str) -> bytes:
    refuse_pipe(path)
    return Path(path).read_bytes()


def _decoded(encoded: bytes, digest: bytes) -> Look:
    with Image.open(io.BytesIO(encoded)) as picture:
        (width, height), mode, kind = picture.size, picture.mode, picture.format or ""
        if kind in ("JPEG", "MPO"):
            picture.draft("RGB", (REDUCED, REDUCED))
        picture.load()
        turned = UPRIGHT.get(_orientation(picture))
        small = _reduced(picture) if mode in PLAIN else _reduced(_opened_as_for_training(encoded))
    if turned is not None and mode in PLAIN:
        small = small.transpose(turned)
    if turned in (Image.Transpose.TRANSPOSE, Image.Transpose.TRANSVERSE) or turned in _QUARTERS:
        width, height = height, width
    bits = np.packbits(imagehash.phash(small).hash)  # (8,), uint8
    tint = small.resize((4, 4), Image.Resampling.BOX).tobytes()
    return Look("", width, height, mode, kind, len(encoded), digest, int.from_bytes(bits.tobytes(), "big"), tint)


_QUARTERS = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270)


def _orientation(picture: Image.Image) -> int:
    try:
        return int(picture.getexif().get(ORIENTATION, 1))
    except Exception:  # its EXIF is damaged in one of many ways; the pixels are not
        return 1


def _reduced(picture: Image.Image) -> Image.Image:
    """RGB on white, the shorter side at least `REDUCED` pixels where it was."""
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
    elif picture.mode in ("1", "P"):
        picture = picture.convert("RGB")
    factor = min(picture.size) // REDUCED
    if factor > 1:
        picture = picture.reduce(factor)
    if picture.mode == "RGBA":
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def _opened_as_for_training(encoded: bytes) -> Image.Image:
    """Rare modes, such as 16 bit grey: what training cannot turn into RGB fails here too."""
    from sdtune.data.images import open_rgb  # imports torch

    return open_rgb(encoded)


def _content(picture: Picture) -> bytes | str | Look:
    try:
        return picture.read()
    except (SdtuneError, OSError) as error:
        return Look(fault=str(error))


def _look_at_chunk(contents: Iterable[bytes | str | Look]) -> list[Look]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of EXIF and palettes, and of large pictures that training takes
        return [content if isinstance(content, Look) else look_at(content) for content in contents]


def _in_order(pool: ProcessPoolExecutor, contents: Iterable[list[bytes | str | Look]], ahead: int) -> Iterator[Look]:
    """The looks of all chunks. When the other processes have `ahead` of them to do, this one does the next."""
    waiting: deque[Future[list[Look]]] = deque()
    for chunk in contents:
        while waiting and waiting[0].done():
            yield from waiting.popleft().result()
        if sum(not each.done() for each in waiting) < ahead:  # the bytes of a stream fill the memory
            waiting.append(pool.submit(_look_at_chunk, chunk))
        else:
            own: Future[list[Look]] = Future()
            own.set_result(_look_at_chunk(chunk))
            waiting.append(own)
    while waiting:
        yield from waiting.popleft().result()
