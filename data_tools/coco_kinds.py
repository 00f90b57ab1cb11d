"""Which of COCO's kinds of json a file is, told by the keys of its first annotations."""

from pathlib import Path
from typing import Any, Literal

import msgspec

from data_tools.coco_json import Broken, CocoJson, describe
from sdtune.errors import DataError, UsageError

LOOK_AT = 100  # annotations: a few may lack a key

_KINDS = {  # the first that fits is what the file is called
    "caption": "captions",
    "segments_info": "panoptic segments",
    "keypoints": "keypoints",
    "category_id": "instances",
}
_OPTIONS = {"captions": "--captions captions_X.json", "instances": "--instances instances_X.json"}


def open_coco(path: str | Path, wanted: Literal["captions", "instances"]) -> CocoJson:
    """A file of that kind; keypoints, which are instances too, are taken for such.

    Raises:
        DataError: it cannot be read, or is of another kind; says what it holds and what was expected.
    """
    source: CocoJson = CocoJson(Path(path))
    missing = [key for key in ("images", "annotations") if key not in source.keys]
    if missing:
        only = " (pictures without annotations, as image_info_test)" if missing == ["annotations"] else ""
        raise _other_kind(source, f"an object with the keys {', '.join(source.keys[:8]) or 'none'}{only}", wanted)
    first = next(source.objects("annotations", dict[str, msgspec.Raw], _pass_over), [])[:LOOK_AT]
    keys = {key for entry in first for key in entry}
    key = "caption" if wanted == "captions" else "category_id"
    if first and key not in keys:
        found = next((kind for key, kind in _KINDS.items() if key in keys), None)
        what = f"{found or 'annotations'} with the keys {', '.join(list(first[0])[:8])}"
        raise _other_kind(source, what, wanted, found)
    return source


def _other_kind(source: CocoJson, what: str, wanted: str, found: str | None = None) -> DataError:
    if found in _OPTIONS and found != wanted:
        hint = f"Give this one with {_OPTIONS[found].split()[0]}, and the other with: {_OPTIONS[wanted]}"
    else:
        hint = f"Name the file with: {_OPTIONS[wanted]}"
    key = "'caption'" if wanted == "captions" else "'category_id'"
    return DataError(
        f"{source.path} holds {what}; expected {wanted}: an object with 'images', and 'annotations' that have {key}. "
        f"{hint}"
    )


def _pass_over(entry: Broken) -> None:
    """Counted when the annotations are read in earnest."""


def licence_ids(source: CocoJson, wanted: list[str]) -> set[Any]:
    """Ids of licences given by number or name.

    Raises:
        UsageError: the file has no such licence; lists those it has.
    """
    table = source.value("licenses")
    table = [entry for entry in table if isinstance(entry, dict)] if isinstance(table, list) else []
    found: set[Any] = set()
    for want in wanted:
        ids = {
            entry.get("id")
            for entry in table
            if want.strip().lower() in (str(entry.get("id")), str(entry.get("name")).lower())
        }
        if not ids:
            known = "; ".join(f"{entry.get('id')} {entry.get('name')}" for entry in table) or describe(table)
            raise UsageError(f"--license: {source.path} has no licence {want!r}; expected one of: {known}")
        found |= ids
    return found
