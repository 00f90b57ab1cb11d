"""Masks for learning to inpaint: rectangles and strokes of a thick brush, at random."""

import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from sdtune.diffusion import draws

EVERYTHING = 0.25  # share of masks that hide the whole picture: so the model still draws from text alone
RECTANGLES, STROKES = 4, 5  # at most so many in a mask
SIDE = 0.06, 0.6  # of a rectangle, as shares of the picture's
CORNERS, LENGTH, WIDTH = 5, 0.5, 0.3  # of a stroke: corners at most, length between two and width as shares likewise

Number = Callable[[float, float], float]


def random_mask(height: int, width: int, seed: int, purpose: str, *numbers: int) -> Tensor:
    """One mask, a pure function of its names (see `draws`): (1, height, width), uint8, 255 where hidden.

    A quarter hides everything; of the others half are rectangles, half strokes.

    Source: Suvorov et al. 2022, "Resolution-robust Large Mask Inpainting with Fourier Convolutions", section 2.3 (its
    thick masks); the quarter is that of Stable Diffusion's inpainting model.
    """
    kind = draws.uniform(seed, f"{purpose} kind", *numbers)
    if kind < EVERYTHING:
        return torch.full((1, height, width), 255, dtype=torch.uint8)
    generator = draws.generator(seed, purpose, *numbers)

    def number(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    picture = Image.new("L", (width, height))
    paint = rectangles if kind < (1 + EVERYTHING) / 2 else strokes
    paint(ImageDraw.Draw(picture), height, width, number)
    return torch.from_numpy(np.array(picture))[None]  # (1, H, W)


def rectangles(draw: ImageDraw.ImageDraw, height: int, width: int, number: Number) -> None:
    """One to four rectangles."""
    for _ in range(1 + int(number(0, RECTANGLES))):
        across, down = number(*SIDE) * width, number(*SIDE) * height
        left, top = number(0, width - across), number(0, height - down)
        draw.rectangle((left, top, left + across, top + down), fill=255)


def strokes(draw: ImageDraw.ImageDraw, height: int, width: int, number: Number) -> None:
    """One to five strokes with corners, round at their ends."""
    side = min(height, width)
    for _ in range(1 + int(number(0, STROKES))):
        x, y = number(0, width), number(0, height)
        for _ in range(1 + int(number(0, CORNERS))):
            angle, length, brush = number(0, 2 * math.pi), number(0.02, LENGTH) * side, number(0.02, WIDTH) * side
            end_x = min(max(x + length * math.cos(angle), 0), width)
            end_y = min(max(y + length * math.sin(angle), 0), height)
            draw.line((x, y, end_x, end_y), fill=255, width=max(1, round(brush)))
            for at_x, at_y in ((x, y), (end_x, end_y)):
                draw.ellipse((at_x - brush / 2, at_y - brush / 2, at_x + brush / 2, at_y + brush / 2), fill=255)
            x, y = end_x, end_y
