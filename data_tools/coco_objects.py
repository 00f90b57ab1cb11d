"""Objects of a COCO instances file: which pictures have those that are asked for."""

import difflib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from data_tools.coco_json import CocoJson, Instance, Scalar, Shape
from data_tools.coco_pictures import Pictures, Rejected
from sdtune.errors import UsageError

Kind = TypeVar("Kind", Instance, Shape)


@dataclass(frozen=True)
class Wanted:
    """Which objects count.

    Attributes:
        categories: their ids with their names.
        groups: the ids of each category that was asked for; empty if none was.
        every: a picture needs one of each group, not only one of any.
        min_area: in square pixels, as the file gives the object's area.
        crowds: whether crowds, which are many objects in one shape, count.
    """

    categories: dict[Scalar, str]
    groups: list[set[Scalar]]
    every: bool = False
    min_area: float = 0.0
    crowds: bool = True

    def counts(self, item: Instance) -> bool:
        """Whether an object counts."""
        if self.groups and not any(item.category_id in group for group in self.groups):
            return False
        return area(item) >= self.min_area and (self.crowds or not item.iscrowd)

    def fits(self, present: Any) -> bool:
        """Whether a picture with these categories (a collection of ids) is taken."""
        matches = [any(id_ in group for id_ in present) for group in self.groups] or [bool(present)]
        return all(matches) if self.every else any(matches)


def read_categories(source: CocoJson) -> dict[Scalar, str]:
    """Names of the categories by their ids."""
    entries = source.value("categories")
    entries = entries if isinstance(entries, list) else []
    return {
        entry["id"]: str(entry["name"])
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("id"), Scalar) and entry.get("name")
    }


def find_groups(categories: dict[Scalar, str], names: list[str]) -> list[set[Scalar]]:
    """The ids of each named category. Raises UsageError with the nearest name."""
    groups = []
    for name in names:
        ids = {id_ for id_, known in categories.items() if known.lower() == name.strip().lower()}
        if not ids:
            known = sorted(set(categories.values()))
            close = difflib.get_close_matches(name.lower(), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has: {', '.join(known) or 'none'}"
            raise UsageError(f"--category: the instances file has no category {name!r}; {hint}")
        groups.append(ids)
    return groups


def objects_of(
    source: CocoJson, kind: type[Kind], pictures: Pictures, wanted: Wanted, rejected: Rejected
) -> Iterator[tuple[Scalar, Kind]]:
    """Each object that counts with the id of its picture, for `pictures` alone."""
    for part in source.objects("annotations", kind, rejected.broken):
        for item in part:
            picture = pictures.get(item.image_id)
            if picture is not None and wanted.counts(item):
                yield picture.id, item


def categories_of(
    source: CocoJson, pictures: Pictures, wanted: Wanted, rejected: Rejected
) -> dict[Scalar, dict[Scalar, float]]:
    """For each picture that is taken its categories, each with the area of its objects, in square pixels."""
    present: dict[Scalar, dict[Scalar, float]] = defaultdict(dict)
    for id_, item in objects_of(source, Instance, pictures, wanted, rejected):
        areas = present[id_]
        areas[item.category_id] = areas.get(item.category_id, 0.0) + area(item)
    return {id_: areas for id_, areas in present.items() if wanted.fits(areas)}


def area(item: Instance | Shape) -> float:
    """Of an object in square pixels; that of its box where the file does not say."""
    if item.area is not None:
        return item.area
    return item.bbox[2] * item.bbox[3] if item.bbox and len(item.bbox) == 4 else 0.0
