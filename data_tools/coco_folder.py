"""What `sdtune coco` writes: splits, each with its pictures, masks and `metadata.jsonl`."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec

from data_tools.coco_captions import draw
from data_tools.coco_files import in_threads, new_file, place
from data_tools.coco_json import Picture, Scalar
from data_tools.coco_pictures import REJECTED, Rejected, names_for_folder
from sdtune.data.metadata import METADATA
from sdtune.errors import DataError, UsageError

BATCH = 1 << 20  # bytes written at a time
SPLIT_NAMES = ("val", "validation", "test")

_encode = msgspec.json.Encoder().encode


@dataclass
class Selection:
    """What will stand in the folder.

    Attributes:
        pictures: in the json's order.
        texts: the captions of each, by its id.
        masks: of each, by its id, in compressed run lengths; None where none are asked for.
        filtered: how many pictures each filter has left out.
    """

    pictures: list[Picture] = field(default_factory=list)
    texts: dict[Scalar, list[str]] = field(default_factory=dict)
    masks: dict[Scalar, dict] | None = None
    filtered: dict[str, int] = field(default_factory=dict)


def parse_splits(splits: Iterable[str]) -> dict[str, float]:
    """["val=0.05"] -> {"val": 0.05}. Raises UsageError."""
    shares: dict[str, float] = {}
    for split in splits:
        name, _, text = split.partition("=")
        try:
            share = float(text)
        except ValueError:
            share = 0.0
        if name not in SPLIT_NAMES or not 0 < share < 1 or name in shares:
            raise UsageError(
                f"--split: got {split!r}; expected one of {', '.join(SPLIT_NAMES)}, each once, and a share between 0 "
                "and 1, such as --split val=0.05"
            )
        shares[name] = share
    if len({name[:3] for name in shares}) < len(shares):
        raise UsageError("--split: val and validation are two names of one split; give one of them")
    if sum(shares.values()) >= 1:
        raise UsageError(f"--split: got shares of {sum(shares.values()):g} in all, which leaves none for train")
    return shares


def write_folder(
    folder: Path,
    selection: Selection,
    images: Path | None,
    mode: str,
    shares: dict[str, float],
    seed: int,
    rejected: Rejected,
) -> dict[str, dict[str, int]]:
    """Fills the folder; returns how many pictures and rows each split has. Arguments as of `sdtune coco`.

    Raises:
        DataError: a split has no picture.
        OSError: the folder cannot be written.
    """
    everything = {picture.id: picture for picture in selection.pictures}
    if mode == "reference":
        names, in_train = {id_: picture.file_name or "" for id_, picture in everything.items()}, False
    else:
        names, in_train = names_for_folder(everything)
    of_split: dict[str, list[Picture]] = {"train": [], **{name: [] for name in shares}}
    for picture in selection.pictures:
        of_split[_split_of(picture.id, shares, seed)].append(picture)
    counts = {}
    for split, pictures in of_split.items():
        inner = folder / split if shares or in_train else folder
        masks: dict[Scalar, str] = {}
        if selection.masks is not None:
            masks = _write_masks(inner, pictures, names, selection.masks, images, rejected)
            pictures = [picture for picture in pictures if picture.id in masks]
        if images is not None and mode != "reference":
            pictures = _place_all(inner, pictures, names, images, mode, rejected)
        if not pictures:
            why = ", ".join(f"{count} x {reason}" for reason, count in rejected.counts.items())
            raise DataError(
                f"no picture is left for {split} of {len(everything)} that were chosen{f' ({why})' if why else ''}; "
                "take a larger share with --split, other pictures with --seed, or mend what is listed"
            )
        rows = ((names[picture.id], masks.get(picture.id), selection.texts[picture.id]) for picture in pictures)
        counts[split] = {"pictures": len(pictures), "rows": write_rows(inner, rows)}
    if rejected.lines:
        with new_file(folder / REJECTED) as write:
            write(b"\n".join([*rejected.lines, b""]))
    return counts


def write_rows(folder: Path, rows: Iterable[tuple[str, str | None, list[str]]]) -> int:
    """Writes `metadata.jsonl` from each picture's (name, mask's name, texts); returns how many rows that made.

    Rows are put together from encoded parts: that is three times as fast as an object a row.
    """
    count, size = 0, 0
    parts: list[bytes] = []
    with new_file(folder / METADATA) as write:
        for name, mask, texts in rows:
            head = b'{"file_name":%b,"text":' % _encode(name)
            tail = b',"mask_file_name":%b}\n' % _encode(mask) if mask is not None else b"}\n"
            part = head + (tail + head).join(map(_encode, texts)) + tail
            parts.append(part)
            count, size = count + len(texts), size + len(part)
            if size > BATCH:
                write(b"".join(parts))
                parts, size = [], 0
        write(b"".join(parts))
    return count


def _split_of(picture: Scalar, shares: dict[str, float], seed: int) -> str:
    """The split that a picture is in: it does not depend on what other pictures there are."""
    if not shares:
        return "train"
    place, upto = draw(seed, "split", picture), 0.0
    for name, share in shares.items():
        upto += share
        if place < upto:
            return name
    return "train"


def _write_masks(
    folder: Path,
    pictures: list[Picture],
    names: dict[Scalar, str],
    masks: dict[Scalar, dict],
    images: Path | None,
    rejected: Rejected,
) -> dict[Scalar, str]:
    """Writes the masks of pictures and returns their names by the pictures' ids; pictures without one are rejected."""
    taken = set(names.values())

    def mask_name(picture: Picture) -> str:
        name = names[picture.id]
        short = f"masks/{name.rpartition('.')[0]}.png"
        unique = short not in taken
        taken.add(short)
        return short if unique else f"masks/{name}.png"

    wanted = [(picture, mask_name(picture)) for picture in pictures]
    write_one = partial(_write_mask, folder, masks, images)
    written: dict[Scalar, str] = {}
    for (picture, name), fault in zip(wanted, in_threads(write_one, wanted, "masks"), strict=True):
        if fault:
            rejected.add("picture without mask", image_id=picture.id, file_name=picture.file_name, detail=fault)
        else:
            written[picture.id] = name
    return written


def _write_mask(
    folder: Path, masks: dict[Scalar, dict], images: Path | None, item: tuple[Picture, str]
) -> str | None:
    from data_tools.masks import as_png

    picture, name = item
    if picture.id not in masks:
        return "none of its shapes can be drawn"
    try:
        content = as_png(masks[picture.id], images / (picture.file_name or "") if images else None)
    except ValueError as error:
        return str(error)
    with new_file(folder / name) as write:
        write(content)
    return None


def _place_all(
    folder: Path, pictures: list[Picture], names: dict[Scalar, str], images: Path, mode: str, rejected: Rejected
) -> list[Picture]:
    """Puts the pictures into the folder and returns those that are there; the others are rejected."""

    def place_one(picture: Picture) -> str | None:
        return place(images / (picture.file_name or ""), folder / names[picture.id], mode)

    there = []
    for picture, fault in zip(pictures, in_threads(place_one, pictures, "pictures"), strict=True):
        if fault:
            reason = "picture cannot be read"
            rejected.add(reason, image_id=picture.id, file_name=picture.file_name, detail=fault)
        else:
            there.append(picture)
    return there
