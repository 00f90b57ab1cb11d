"""Aspect-ratio buckets: training pictures of about one area in several shapes, so that little is cut away.

    buckets = Buckets(512, 512, step=64)
    buckets.sizes                       # (640, 384), (576, 448), (512, 512) ...: height and width
    buckets.size_for((480, 640))        # (448, 576)

Source: NovelAI 2022, https://github.com/NovelAI/novelai-aspect-ratio-bucketing; small pictures as in kohya's
`bucket_no_upscale`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

Size = tuple[int, int]  # height and width, in pixels
STEPS = (64, 32, 16, 8)


@dataclass(frozen=True)
class Buckets:
    """The sizes that pictures may have in training.

    Attributes:
        height, width: of the resolution; no size has a larger area. Multiples of `step`.
        step: both sides of every size are multiples of it.
        aspect: the longer side is at most so many times the shorter one; of the resolution too.
        upscale: whether pictures are enlarged to the area of the resolution. Else one that is too small for it has a
            size of its own, no larger than itself; but a side shorter than a step becomes a step.
    """

    height: int
    width: int
    step: int
    aspect: float = 2.0
    upscale: bool = False

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """The sizes with the area of the resolution, or as little below it as the step allows; the tallest first."""
        area, step = self.height * self.width, self.step
        longest = int((area * self.aspect) ** 0.5)
        heights = {width: area // width // step * step for width in range(step, longest + 1, step)}
        found = {size for width, height in heights.items() for size in ((height, width), (width, height))}
        found = {size for size in found if 0 < max(size) <= self.aspect * min(size)}
        return tuple(sorted((size for size in found if not _is_within_another(size, found)), reverse=True))

    def size_for(self, picture: Size) -> Size:
        """The size in which a picture is trained: the one that cuts least away, where the picture is large enough."""
        nearest = min(self.sizes, key=lambda size: (cut_away(picture, size), -size[0] * size[1]))
        return nearest if self.upscale or scale(picture, nearest) <= 1 else self._own(picture)

    def _own(self, picture: Size) -> Size:
        """The largest size that fits into a small picture."""
        step = self.step
        height, width = (max(step, side // step * step) for side in picture)
        found = []
        for across in range(step, width + 1, step):
            most = min(height, self.height * self.width // across, int(across * self.aspect))
            down = most // step * step
            if 0 < across <= down * self.aspect:
                found.append((down, across))
        return max(found, key=lambda size: (size[0] * size[1], -cut_away(picture, size)))


@dataclass(frozen=True)
class Bucket:
    """What a run has of one size.

    Attributes:
        height, width: of the size. pictures: how many have it. cut_away: share of them that is lost, on average.
        enlarged: how many are enlarged to it.
    """

    height: int
    width: int
    pictures: int
    cut_away: float
    enlarged: int


def default_step(height: int, width: int, factor: int) -> int:
    """64 for pictures of 512 px and more, as usual; for smaller ones about an eighth of their shorter side.

    Args:
        height, width: of the resolution. factor: how many pixels lie along the side of a latent.
    """
    fits = [step for step in STEPS if 8 * step <= min(height, width) and not height % step and not width % step]
    return next((step for step in fits if step % factor == 0), max(STEPS[-1], factor))


def scale(picture: Size, size: Size) -> float:
    """What a picture is enlarged by until it covers a size; below 1 it is reduced."""
    return max(size[0] / picture[0], size[1] / picture[1])


def cut_away(picture: Size, size: Size) -> float:
    """Share of a picture that is lost when it is resized until it covers a size and cut to it, in [0, 1)."""
    return max(0.0, 1 - size[0] * size[1] / (picture[0] * picture[1] * scale(picture, size) ** 2))


def _is_within_another(size: Size, others: Iterable[Size]) -> bool:
    return any(other != size and other[0] >= size[0] and other[1] >= size[1] for other in others)


def bucket_table(buckets: Buckets, pictures: Iterable[Size]) -> list[Bucket]:
    """The sizes that pictures, given by their own sizes, are trained in; the tallest first."""
    members: dict[Size, list[Size]] = {}
    for picture in pictures:
        members.setdefault(buckets.size_for(picture), []).append(picture)
    return [
        Bucket(
            *size,
            pictures=len(some),
            cut_away=fmean(cut_away(picture, size) for picture in some),
            enlarged=sum(scale(picture, size) > 1 for picture in some),
        )
        for size, some in sorted(members.items(), reverse=True)
    ]


def table_lines(table: Sequence[Bucket]) -> list[str]:
    """The table for people, a line a size."""
    lines = ["width x height  pictures  cut away"]
    for each in table:
        enlarged = f"  {each.enlarged} enlarged" if each.enlarged else ""
        lines.append(f"{each.width:>5} x {each.height:<6}{each.pictures:>10}{each.cut_away:>10.1%}{enlarged}")
    return lines
