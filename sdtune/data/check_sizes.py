"""How large pictures are, and what resizing to the training frame will do to them."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdtune.data.buckets import Buckets, Size, cut_away, scale
from sdtune.data.check_findings import Finding, about
from sdtune.data.check_scan import Look

SIDES = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048)  # bounds of the table, in pixels
ASPECTS = {"1:2": 0.5, "9:16": 9 / 16, "2:3": 2 / 3, "3:4": 0.75, "1:1": 1.0, "4:3": 4 / 3, "3:2": 1.5, "16:9": 16 / 9}
ASPECTS |= {"2:1": 2.0}
TOO_SMALL = 2.0  # times that a picture is enlarged
MUCH = 0.4  # of a picture that is cropped away; a 16:9 picture in a square loses 0.44, a 3:2 picture 0.33


@dataclass(frozen=True)
class Frame:
    """Size of the training pictures, in pixels; with `buckets` each has its own."""

    height: int
    width: int
    buckets: Buckets | None = None

    def of(self, look: Look) -> Size:
        """Height and width of one picture in training."""
        return self.buckets.size_for((look.height, look.width)) if self.buckets else (self.height, self.width)

    def scale(self, look: Look) -> float:
        """By how much a picture is enlarged until it covers its frame; below 1 it is reduced."""
        return scale((look.height, look.width), self.of(look))

    def lost(self, look: Look) -> float:
        """Share of a picture that is cropped away, in [0, 1)."""
        return cut_away((look.height, look.width), self.of(look))

    @property
    def name(self) -> str:
        """For people."""
        return "the sizes of their buckets" if self.buckets else f"{self.width} x {self.height} px"


def size_findings(pictures: Sequence[tuple[str, Look]], frame: Frame) -> list[Finding]:
    """Findings about names and sizes."""
    small = sorted(((frame.scale(look), name, look) for name, look in pictures), reverse=True, key=lambda each: each[0])
    cropped = sorted(((frame.lost(look), name) for name, look in pictures), reverse=True)
    return [
        *about(
            "warning",
            "too small",
            [f"{name} ({look.width} x {look.height})" for scale, name, look in small if scale > TOO_SMALL],
            f"pictures that are enlarged more than {TOO_SMALL:g} times, and so blurred",
            "take larger ones, or train at a smaller images.resolution",
        ),
        *about(
            "note",
            "enlarged",
            [f"{name} ({look.width} x {look.height})" for scale, name, look in small if 1 < scale <= TOO_SMALL],
            f"pictures that are enlarged to {frame.name}",
            "take larger ones where you have them",
        ),
        *about(
            "note",
            "cropped",
            [f"{name} ({lost:.0%})" for lost, name in cropped if lost > MUCH],
            f"pictures that lose more than {MUCH:.0%} to the crop",
            "see that what the caption tells is in the middle, or crop them yourself",
        ),
    ]


def size_tables(looks: Sequence[Look], frame: Frame) -> dict[str, Any]:
    """Sizes, aspects and what resizing does, in numbers."""
    if not looks:
        return {}
    short = [min(look.width, look.height) for look in looks]
    scales = [frame.scale(look) for look in looks]
    return {
        "shorter_side": {"least": min(short), "median": round(statistics.median(short)), "most": max(short)},
        "sides": _counted([_side(side) for side in short], [_side(side) for side in (0, *SIDES)]),
        "aspects": _counted([_aspect(look.width / look.height) for look in looks], _ASPECT_NAMES),
        "modes": dict(Counter(look.mode for look in looks).most_common()),
        "formats": dict(Counter(look.format for look in looks).most_common()),
        "resize": {
            "height": frame.height,
            "width": frame.width,
            "enlarged": sum(scale > 1 for scale in scales),
            "reduced": sum(scale < 1 for scale in scales),
            "cropped_mean": round(statistics.fmean(frame.lost(look) for look in looks), 3),
        },
    }


_ASPECT_NAMES = ["taller", *ASPECTS, "wider"]


def _side(side: int) -> str:
    """The class of a side: 512-767."""
    above = next((i for i, bound in enumerate(SIDES) if side < bound), len(SIDES))
    if above == 0:
        return f"below {SIDES[0]}"
    return f"{SIDES[above - 1]}-{SIDES[above] - 1}" if above < len(SIDES) else f"{SIDES[-1]} and more"


def _aspect(aspect: float) -> str:
    """The nearest common aspect, by ratio."""
    if aspect < 0.45:
        return "taller"
    if aspect > 1 / 0.45:
        return "wider"
    return min(ASPECTS, key=lambda name: max(aspect / ASPECTS[name], ASPECTS[name] / aspect))


def _counted(found: Sequence[str], order: Sequence[str]) -> dict[str, int]:
    numbers = Counter(found)
    return {name: numbers[name] for name in order if numbers[name]}
