"""One picture as the model sees it."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sdtune.data import images
from sdtune.data.picture import Picture


@dataclass(frozen=True)
class Example:
    """One picture as the model sees it.

    Attributes:
        pixels: shape (3, H, W), uint8; None where the latents are known to a cache.
        caption: "" where it was dropped.
        weight: weight of its loss.
        instance: whether it is an instance picture, not a class picture.
        number: the number of its sample in the run.
        key: equal for equal pixels (same picture, crop and flip), else different; caches stand on it.
        size: height and width of the picture before it was resized, then top and left of its crop after.
        frame: height and width of `pixels`, whether they are there or not.
        mask: cut exactly as the pixels, shape (1, H, W), uint8, 255 for the subject; None where there is none.
    """

    pixels: Tensor | None
    caption: str
    weight: float
    instance: bool
    number: int
    key: str
    size: tuple[int, int, int, int]
    frame: tuple[int, int]
    mask: Tensor | None = None


@dataclass(frozen=True)
class KnownView:
    """A picture in one frame, mirrored or not, whose latents a cache has.

    Attributes:
        key: as of `Example`.
        original: height and width of the picture before it was resized.
    """

    key: str
    original: tuple[int, int]


# (picture, frame, mirrored) -> what stands for its pixels, or None where the picture must be read.
Known = Callable[[Picture, tuple[int, int], bool], KnownView | None]


def nothing_known(picture: Picture, frame: tuple[int, int], flip: bool) -> None:
    """The `Known` of a run that keeps nothing on disk."""


def read_resized(picture: Picture, height: int, width: int, background: str) -> tuple[Tensor, tuple[int, int]]:
    """The whole picture, resized to cover the frame, (3, h, w), uint8; and its height and width before that.

    Raises:
        DataError: it cannot be read.
    """
    content = picture.read()
    name = f"{picture.origin}: {picture.name}" if isinstance(content, bytes) else None
    rgb = images.open_rgb(content, background, name)
    return images.cover(rgb, height, width), (rgb.height, rgb.width)


def read_mask(picture: Picture, height: int, width: int) -> Tensor | None:
    """The whole mask of a picture, at the size that it was resized to, (1, height, width), uint8; None without one.

    Raises:
        DataError: it cannot be read.
    """
    if picture.mask is None:
        return None
    content = picture.mask()
    name = f"{picture.origin}: mask of {picture.name}" if isinstance(content, bytes) else None
    return images.read_mask(content, height, width, name)


def pixel_key(picture: Picture, height: int, width: int, top: int, left: int, flip: bool) -> str:
    """Equal for equal pixels, else different."""
    return f"{picture.origin}|{picture.name}|{height}x{width}+{top}+{left}|{'mirrored' if flip else 'upright'}"
