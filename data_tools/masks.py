"""One mask a picture: white where the chosen objects are, black elsewhere."""

import io
import json
from pathlib import Path
from typing import Any

from data_tools.coco_json import CocoJson, Picture, Scalar, Shape
from data_tools.coco_objects import Wanted, objects_of
from data_tools.coco_pictures import Pictures, Rejected

ORIENTATION = 0x0112  # EXIF's tag for how a camera was held


def read_masks(source: CocoJson, pictures: Pictures, wanted: Wanted, rejected: Rejected) -> dict[Scalar, dict]:
    """For each picture all its objects that count as one mask, in pycocotools' compressed run lengths.

    Shapes that cannot be drawn are rejected; a picture that has no other gets no mask.
    """
    from pycocotools import mask

    masks: dict[Scalar, dict] = {}
    for id_, item in objects_of(source, Shape, pictures, wanted, rejected):
        try:
            lengths = run_lengths(json.loads(bytes(item.segmentation)), *_size(pictures[id_]))
        except (ValueError, TypeError) as error:
            rejected.add("shape that cannot be drawn", id=item.id, image_id=id_, detail=str(error))
            continue
        masks[id_] = mask.merge([masks[id_], lengths]) if id_ in masks else lengths
    return masks


def run_lengths(shape: Any, height: int, width: int) -> dict[str, Any]:
    """A shape of COCO in pycocotools' compressed run lengths.

    Args:
        shape: polygons (lists of x, y, x, y, ... in pixels), or an object with `counts` (numbers, or compressed as
            text) and `size` (height, width).

    Raises:
        ValueError: it is none of these, or of another size than (height, width).
    """
    from pycocotools import mask

    if isinstance(shape, dict):
        if shape.get("size") != [height, width]:
            raise ValueError(f"its size is {shape.get('size')}, its picture's {[height, width]}")
        counts = shape.get("counts")
        if isinstance(counts, str):
            counts = uncompressed(counts)
        if not isinstance(counts, list) or any(type(count) is not int or count < 0 for count in counts):
            raise ValueError("its counts are no list of whole numbers")
        if sum(counts) != height * width:  # pycocotools would leave the other pixels as the memory happens to be
            raise ValueError(f"its counts are of {sum(counts)} pixels, its picture has {height * width}")
        return mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    if not isinstance(shape, list) or not shape:
        raise ValueError("it has neither polygons nor run lengths")
    for polygon in shape:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError("a polygon has less than 3 corners, or half a corner")
        if any(isinstance(value, bool) or not isinstance(value, int | float) for value in polygon):
            raise ValueError("a polygon's corners are no numbers")
        if any(not abs(value) < 1e6 for value in polygon):  # NaN too
            raise ValueError("a polygon has a corner far from any picture")
    return mask.merge(mask.frPyObjects(shape, height, width))


def uncompressed(text: str) -> list[int]:
    """Run lengths out of COCO's text: 5 bits a character, the lowest first; from the fourth on as differences.

    Raises:
        ValueError: it ends within a number, or has other characters.

    Source: rleFrString in pycocotools' maskApi.c.
    """
    counts: list[int] = []
    value = bits = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64:
            raise ValueError(f"its counts hold the character {character!r}")
        value, bits = value | (code & 31) << bits, bits + 5
        if code & 32:  # more of this number follows
            continue
        value -= (code & 16) << (bits - 4)  # the sign
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = bits = 0
    if bits:
        raise ValueError("its counts end within a number")
    return counts


def as_png(lengths: dict[str, Any], file: Path | None) -> bytes:
    """A mask as a greyscale PNG of 0 and 255, turned as the picture in `file` will be by its EXIF.

    Raises:
        ValueError: the picture cannot be opened or has another size.
    """
    from PIL import Image, ImageOps
    from pycocotools import mask

    drawn: Image.Image = Image.fromarray(mask.decode(lengths) * 255)  # (h, w) uint8
    if file is not None:
        size, orientation = _look(file)
        if size != drawn.size:
            raise ValueError(f"the picture is of {size}, in the json of {drawn.size} pixels")
        if orientation != 1:
            drawn.getexif()[ORIENTATION] = orientation
            drawn = ImageOps.exif_transpose(drawn)
    content = io.BytesIO()
    drawn.save(content, "PNG", exif=b"")
    return content.getvalue()


def _look(file: Path) -> tuple[tuple[int, int], int]:
    """Width and height of a picture as stored, and its EXIF orientation (1 is upright)."""
    from PIL import Image

    try:
        with Image.open(file) as picture:
            size = picture.size
            try:
                return size, int(picture.getexif().get(ORIENTATION, 1))
            except (SyntaxError, ValueError, TypeError, KeyError):
                return size, 1  # its EXIF is damaged; the pixels are not
    except (OSError, SyntaxError) as error:
        raise ValueError(f"the picture cannot be opened: {error}") from error


def _size(picture: Picture) -> tuple[int, int]:
    height, width = picture.height, picture.width
    if not isinstance(height, int) or not isinstance(width, int) or not 0 < height * width < 1 << 28:
        raise ValueError(f"the json gives its picture the size {width} x {height}")
    return height, width
