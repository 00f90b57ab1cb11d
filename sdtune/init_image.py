"""Drawing that begins with a picture: `sdtune sample --init-image P`, and with a mask of what is painted anew."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdtune.data.images import cover_size, cut, open_rgb, place, prepare, read_mask
from sdtune.errors import DataError, UsageError
from sdtune.families.base import Family

STRENGTH = 0.8  # without a mask; with one, what is hidden is drawn from noise alone


def check_options(picture: Path | None, strength: float | None, mask: Path | None) -> None:
    """What can be told before a model is opened. Raises UsageError."""
    if picture is None:
        for name, value in (("--mask", mask), ("--strength", strength)):
            if value is not None:
                raise UsageError(f"{name}: there is no picture that it is for; name one with --init-image P")
    for name, path in (("--init-image", picture), ("--mask", mask)):
        if path is not None and not path.is_file():
            raise UsageError(f"{name}: '{path}' does not exist; expected a picture's file")
    if strength is not None and not 0 < strength <= 1:
        raise UsageError(f"--strength: got {strength}, expected more than 0 and at most 1; {STRENGTH} is usual")


def read(
    family: Family,
    picture: Path | None,
    strength: float | None,
    mask: Path | None,
    height: int,
    width: int,
    count: int,
) -> dict[str, Any]:
    """What `draw_pictures` is given, as its keyword arguments, to begin each of `count` pictures with one.

    Args:
        family: which model will draw.
        picture: file of the picture; resized until it just covers height x width, and cut to it, as in training.
        strength: see `draw_pictures`; None: 0.8, with a mask 1.
        mask: file of the mask, resized and cut as its picture; white is painted anew.

    Raises:
        UsageError: a file that is no picture, or a mask for a model that does not inpaint.
    """
    if picture is None:
        return {}
    if mask is not None and not family.inpaints:
        raise UsageError(
            "--mask: this model cannot inpaint, for it is not shown what is around the hole; expected one that does: "
            "sdtune sample stable-diffusion-v1-5/stable-diffusion-inpainting, or your own, made by: "
            "sdtune train inpainting_full_sd15"
        )
    pixels, hidden = read_pictures(picture, mask, height, width)
    pixels = pixels.expand(count, -1, -1, -1)
    strength = strength or (STRENGTH if hidden is None else 1.0)
    values: dict[str, Any] = {"begun": pixels, "strength": strength} if hidden is None or strength < 1 else {}
    return values if hidden is None else values | {"shown": (pixels, hidden.expand(count, -1, -1, -1))}


def read_pictures(picture: Path, mask: Path | None, height: int, width: int) -> tuple[Tensor, Tensor | None]:
    """The picture, uint8 (1, 3, height, width), and its mask, (1, 1, height, width). Raises UsageError."""
    try:
        opened = open_rgb(picture)
        pixels = prepare(opened, height, width)  # (3, height, width)
        if mask is None:
            return pixels[None], None
        covering = cover_size(opened.height, opened.width, height, width)
        top, left = place(covering, height, width, "center", (0, 0))
        hidden = cut(read_mask(mask, *covering), height, width, top, left, flip=False)  # (1, height, width)
    except DataError as fault:
        raise UsageError(f"--init-image, --mask: {str(fault).partition(';')[0]}; expected a picture") from fault
    if not bool(torch.any(hidden >= 128)):
        raise UsageError(f"--mask: '{mask}' has no white in what is used of it, so that nothing is to be painted")
    return pixels[None], hidden[None]
