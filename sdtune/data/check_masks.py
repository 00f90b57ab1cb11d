"""Masks that are not there, cannot be read, or do not fit their pictures."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from sdtune.data.check_findings import Finding, Level, about
from sdtune.data.check_scan import Look
from sdtune.data.picture import Picture
from sdtune.data.survey import same_shape


@dataclass(frozen=True)
class Masked:
    """A picture whose row names a mask, with what the two turned out to be."""

    name: str
    picture: Picture
    look: Look
    mask: Look

    @property
    def is_missing(self) -> bool:
        """Whether the mask's file is not there."""
        path = self.picture.mask() if self.mask.fault and self.picture.mask is not None else None
        return isinstance(path, str) and not os.path.exists(path)


def mask_of(picture: Picture) -> Picture:
    """The mask as a picture that can be looked at."""
    assert picture.mask is not None
    return Picture(f"mask of {picture.name}", (), 1.0, picture.mask, picture.origin)


def mask_findings(masked: Sequence[Masked], without: Sequence[str], used: bool) -> list[Finding]:
    """Findings about masks.

    Args:
        masked: pictures with a mask. without: names of those that have none.
        used: whether training reads masks; else nothing about them is fatal.
    """
    level: Level = "fatal" if used else "warning"
    missing = [each.name for each in masked if each.is_missing]
    broken = [f"{each.name} ({each.mask.fault})" for each in masked if each.mask.fault and not each.is_missing]
    good = [each for each in masked if not each.mask.fault and not each.look.fault]
    misfits = [
        f"{each.name} (mask {each.mask.width} x {each.mask.height}, picture {each.look.width} x {each.look.height})"
        for each in good
        if not same_shape((each.mask.height, each.mask.width), (each.look.height, each.look.width))
    ]
    return [
        *about(
            level,
            "mask missing",
            missing,
            "pictures whose mask is not there",
            "put the masks back, or leave them out of a copy with --fix OUT",
        ),
        *about(level, "mask broken", broken, "pictures whose mask cannot be read", "replace the masks"),
        *about(
            level,
            "mask shape",
            misfits,
            "masks of another shape than their picture",
            "draw them at the size of the picture, or at one of the same proportions",
        ),
        *about(
            "note",
            "no mask",
            without if masked or used else [],
            "pictures without a mask, which count as subject all over",
            "name one in their rows (mask_file_name) where only a part of them is meant",
        ),
    ]
