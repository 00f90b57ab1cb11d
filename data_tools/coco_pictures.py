"""The pictures of a COCO file: names that may be used, and where they lie on the disk."""

import os
import re
from collections import Counter, defaultdict
from pathlib import Path, PureWindowsPath
from typing import Any

import msgspec

from data_tools.coco_json import Broken, CocoJson, Picture, Scalar
from sdtune.data.metadata import is_picture, list_files
from sdtune.data.splits import is_split_like
from sdtune.errors import DataError

REJECTED = "rejected.jsonl"
Pictures = dict[Scalar, Picture]  # two ids that name one file have one Picture, whose id is the first

_PLAIN = re.compile(r"\w[\w-]*\.jpg", re.ASCII)  # such names need no closer look; nearly all are


class Rejected:
    """What was not used, and why: lines of `rejected.jsonl`, counted by reason."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.lines: list[bytes] = []

    def add(self, reason: str, **what: Any) -> None:
        """One thing that was not used. `reason` is one of few, so that it can be counted; `what` names the thing."""
        self.counts[reason] += 1
        self.lines.append(_encode({"reason": reason, **what}))

    def broken(self, entry: Broken) -> None:
        """An entry of a json file that is not what it should be."""
        self.add("broken entry", detail=entry.why, entry=entry.entry)


def read_pictures(source: CocoJson, rejected: Rejected) -> Pictures:
    """The `images` of a file by their ids, in its order. Their names have forward slashes and stay in their folder."""
    pictures: Pictures = {}
    for part in source.objects("images", Picture, rejected.broken):
        for picture in part:
            name = picture.file_name or ""
            if not _PLAIN.fullmatch(name):
                fault, picture.file_name = _checked(name)
                if fault:
                    rejected.add(fault, image_id=picture.id, file_name=_printable(name))
                    continue
            if picture.id is None:
                rejected.add("picture without id", file_name=name)
            elif pictures.setdefault(picture.id, picture) is not picture:
                rejected.add("duplicate picture id", image_id=picture.id, file_name=name)
    return pictures


def locate(pictures: Pictures, images: Path, rejected: Rejected) -> Pictures:
    """The pictures that lie under `images`, their names made relative to it.

    A picture is found too where the name's first folders are those that `images` ends in, or where the folder is one
    further down and no other file there has the name.

    Raises:
        DataError: none is there.
    """
    files = list_files(images)
    known, below = set(files), defaultdict[str, list[str]](list)
    found: Pictures = {}
    for id_, picture in pictures.items():
        name = picture.file_name or ""
        if name not in known:
            if not below:
                for file in files:
                    below[os.path.basename(file)].append(file)
            alike = [file for file in below.get(os.path.basename(name), ()) if _same_end(file, name)]
            if len(alike) != 1:
                more = {"files": alike[:5]} if alike else {}
                reason = "several pictures of that name on disk" if alike else "picture missing on disk"
                rejected.add(reason, image_id=id_, file_name=name, **more)
                continue
            picture.file_name = alike[0]
        found[id_] = picture
    if pictures and not found:
        example = next(iter(pictures.values())).file_name
        raise DataError(
            f"none of the {len(pictures)} pictures of the json is under {images}, which has {len(files)} files; "
            f"expected for instance {images / str(example)}. Name the folder with --images, or write names alone with: "
            "--images-mode reference"
        )
    named = {picture.file_name for picture in pictures.values()}
    folders = {os.path.dirname(picture.file_name or "") for picture in found.values()}
    for file in files:  # those in folders that the json does not know are of another set
        if file not in named and os.path.dirname(file) in folders and is_picture(file):
            rejected.add("picture not in the json", file_name=file)
    return found


def join_same_files(pictures: Pictures, rejected: Rejected) -> Pictures:
    """Ids that name one file are one picture: the first, which gets the captions of all."""
    first: dict[str | None, Picture] = {}
    for id_, picture in pictures.items():
        one = first.setdefault(picture.file_name, picture)
        if one is not picture:
            pictures[id_] = one
            rejected.add(
                "picture named twice", image_id=id_, file_name=picture.file_name, detail=f"taken as picture {one.id}"
            )
    return pictures


def names_for_folder(pictures: Pictures) -> tuple[dict[Scalar, str], bool]:
    """What the pictures are called in a folder for `load_dataset`, by their ids; and whether it needs `train/`.

    `datasets` takes `val2017/` and `COCO_val2014_1.jpg` for splits, and loses the captions then. So folders of such
    names are left out, and files of such names go into a folder `train/`, which counts before file names do.
    """
    names: dict[Scalar, str] = {}
    taken: set[str] = set()
    for id_, picture in pictures.items():
        if picture.id != id_:
            continue
        name = picture.file_name or ""
        *folders, base = name.split("/")
        if any(map(is_split_like, folders)):
            name = base if base not in taken else "-".join([*folders, base])
        while name in taken:
            name = f"{id_}-{name.replace('/', '-')}"
        taken.add(name)
        names[id_] = name
    return names, any(is_split_like(os.path.basename(name)) for name in taken)


def _checked(name: str) -> tuple[str | None, str]:
    """(what is wrong with a name, the name with forward slashes)."""
    name = name.replace("\\", "/")  # of a json made on Windows
    if not name:
        return "picture without file_name", name
    if name.startswith("/") or PureWindowsPath(name).drive or ".." in name.split("/"):
        return "file_name leaves the folder", name
    if not name.isprintable() or not is_picture(name):
        return "file_name is not one of a picture", name
    return None, "/".join(part for part in name.split("/") if part not in ("", "."))


def _same_end(one: str, other: str) -> bool:
    return f"/{one}".endswith(f"/{other}") or f"/{other}".endswith(f"/{one}")


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def _encode(row: dict[str, Any]) -> bytes:
    try:
        return msgspec.json.encode(row)
    except UnicodeEncodeError:  # half a surrogate pair, which a json may hold and UTF-8 may not
        return msgspec.json.encode({key: _printable(str(value)) for key, value in row.items()})
