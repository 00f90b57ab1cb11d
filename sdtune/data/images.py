"""From any picture file to the pixels that a model sees."""

import io
import struct
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sdtune.errors import DataError

Crop = Literal["center", "random"]
ORIENTATION, QUARTER_TURNS = 0x0112, (5, 6, 7, 8)  # of EXIF
DAMAGED_EXIF = (SyntaxError, ValueError, TypeError, KeyError, struct.error)


def open_rgb(source: str | Path | bytes, background: str = "white", name: str | None = None) -> Image.Image:
    """Opens a picture of any kind as 8 bit RGB, as a person would see it.

    Turns it as its EXIF says, lays transparent parts on `background`, spreads 16 bit grey to 8 bit, and takes
    the first frame of an animation.

    Args:
        source: path of a file, or its content.
        background: any colour that Pillow knows.
        name: what to call it in an error; the path by default.

    Raises:
        DataError: there is no such file, it is not a picture, or it is damaged.
    """
    name = name or ("a picture" if isinstance(source, bytes) else str(source))
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            picture.load()
            return _to_rgb(_upright(picture), background)
    except FileNotFoundError:
        raise DataError(f"{name} does not exist; put it back, or take its row out of metadata.jsonl.") from None
    except Exception as error:  # Pillow's readers raise whatever the broken bytes lead them to
        raise DataError(
            f"{name} cannot be read as a picture ({error}); replace it, or take it and its row in metadata.jsonl away."
        ) from error


def prepare(
    picture: Image.Image,
    height: int,
    width: int,
    crop: Crop = "center",
    flip: bool = False,
    offset: tuple[float, float] = (0.5, 0.5),
) -> Tensor:
    """Resizes until the picture just covers the frame, cuts the frame out, then mirrors it.

    Args:
        picture: RGB.
        height, width: of the frame, in pixels.
        crop: "center", or "random" for a frame at `offset`.
        flip: mirror left and right.
        offset: place of a random frame, (across, down), each in [0, 1).

    Returns:
        Pixels of shape (3, height, width), uint8.
    """
    pixels = cover(picture, height, width)
    top, left = place((pixels.shape[1], pixels.shape[2]), height, width, crop, offset)
    return cut(pixels, height, width, top, left, flip)


def cover(picture: Image.Image, height: int, width: int) -> Tensor:
    """Resizes (LANCZOS), keeping proportions, to the smallest size that covers the frame. (3, h, w), uint8."""
    high, wide = cover_size(picture.height, picture.width, height, width)
    if (wide, high) != picture.size:
        picture = picture.resize((wide, high), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()  # (h, w, 3) -> (3, h, w)


def cover_size(picture_height: int, picture_width: int, height: int, width: int) -> tuple[int, int]:
    """The smallest height and width of a picture, proportions kept, that covers the frame of `height` x `width`."""
    scale = max(height / picture_height, width / picture_width)
    return max(height, round(picture_height * scale)), max(width, round(picture_width * scale))


def read_mask(source: str | Path | bytes, height: int, width: int, name: str | None = None) -> Tensor:
    """A mask at the size that its picture was resized to, (1, height, width), uint8.

    Each value is the share of its area that is white: what is reduced is averaged, what is enlarged stays as hard as
    it was. Transparent parts are black. Arguments and errors as of `open_rgb`.
    """
    mask = open_rgb(source, "black", name).convert("L").resize((width, height), Image.Resampling.BOX)
    return torch.from_numpy(np.array(mask)).unsqueeze(0)  # (h, w) -> (1, h, w)


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """Height and width of an opened picture as a person sees it: turned as its EXIF says.

    Nothing is decoded for it, so that EXIF behind the pixels of a PNG, where it is rare, counts after `load` only.
    """
    try:
        turned = Image.Image.getexif(picture).get(ORIENTATION, 1) in QUARTER_TURNS
    except DAMAGED_EXIF:
        turned = False
    return (picture.width, picture.height) if turned else (picture.height, picture.width)


def place(
    size: tuple[int, int], height: int, width: int, crop: Crop, offset: tuple[float, float]
) -> tuple[int, int]:
    """Top and left of the frame in a picture of that height and width. Arguments as in `prepare`."""
    down, across = size[0] - height, size[1] - width
    if crop == "center":
        return down // 2, across // 2
    return int(offset[1] * (down + 1)), int(offset[0] * (across + 1))


def cut(pixels: Tensor, height: int, width: int, top: int, left: int, flip: bool) -> Tensor:
    """The frame out of (3, h, w), mirrored if asked: (3, height, width), with memory of its own."""
    frame = pixels[:, top : top + height, left : left + width]
    return frame.flip(-1) if flip else frame.clone()


def to_float(pixels: Tensor) -> Tensor:
    """uint8 in [0, 255] -> float32 in [-1, 1], of the same shape."""
    return pixels.float() / 127.5 - 1


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except DAMAGED_EXIF:
        return picture  # its EXIF is damaged; the pixels are not


def _to_rgb(picture: Image.Image, background: str) -> Image.Image:
    if picture.mode.startswith("I") or picture.mode == "F":
        picture = _to_8_bit(picture)
    if picture.mode == "La":  # premultiplied: has no way to RGBA but over LA
        picture = picture.convert("LA")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    canvas = Image.new("RGBA", picture.size, background)
    return Image.alpha_composite(canvas, picture).convert("RGB")


def _to_8_bit(picture: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits ("I;16", "I") or of floats ("F", taken to be in [0, 1] unless they go beyond)."""
    values = np.asarray(picture).astype(np.float64)  # (h, w)
    if picture.mode == "F":
        values = values * 255 if values.max() <= 1 else values
    elif picture.mode != "I" or values.max() > 255:
        values = values / 257  # 65535 -> 255
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
