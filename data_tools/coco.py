"""`sdtune coco`: from COCO's json files to a folder that `load_dataset("imagefolder", ...)` and training take."""

import gc
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_tools.coco_captions import choose, draw, parse_rule, read_captions
from data_tools.coco_files import built_aside, refuse_existing
from data_tools.coco_folder import Selection, parse_splits, write_folder
from data_tools.coco_json import CocoJson
from data_tools.coco_kinds import licence_ids, open_coco
from data_tools.coco_objects import Wanted, categories_of, find_groups, read_categories
from data_tools.coco_pictures import REJECTED, Pictures, Rejected, join_same_files, locate, read_pictures
from sdtune.data.captions import counted
from sdtune.errors import DataError, UsageError


def command(
    *,
    captions: Path | None,
    images: Path | None,
    out: Path,
    captions_per_image: str = "all",
    instances: Path | None = None,
    categories: Sequence[str] = (),
    match: str = "any",
    min_area: float = 0.0,
    no_crowd: bool = False,
    licenses: Sequence[str] = (),
    limit: int | None = None,
    seed: int = 0,
    masks: bool = False,
    images_mode: str = "link",
    splits: Sequence[str] = (),
    prompt_from: str | None = None,
    as_json: bool = False,
) -> int:
    """Makes the folder and prints what is in it; returns the exit code.

    Args:
        captions: captions json; needed unless `prompt_from` is given.
        images: folder of the pictures; None only with `images_mode` "reference".
        out: the new folder.
        captions_per_image: "all", "first", "longest", "join" or "random:SEED".
        instances: instances json; pictures without an object that counts are left out.
        categories: names; an object of one of them counts. With `match` "all" a picture needs one of each.
        min_area: of an object, in square pixels.
        no_crowd: crowds do not count.
        licenses: ids or names; pictures under another one are left out.
        limit: how many pictures to draw, by `seed`.
        masks: write a mask a picture.
        images_mode: "copy", "link" (hard links, else copies) or "reference" (only their names are written).
        splits: such as ["val=0.05"]: shares of the pictures, drawn by `seed`; the others are "train".
        prompt_from: "category" makes a caption of each picture's largest category.
        as_json: print one JSON object instead of lines.

    Raises:
        SdtuneError: options that cannot work together, a json that cannot be used, no picture left, a full disk.
    """
    began = time.perf_counter()
    rule, shares = parse_rule(captions_per_image), parse_splits(splits)
    _check_options(captions, images, instances, categories, match, min_area, no_crowd, masks, images_mode, prompt_from)
    if shares and images_mode == "reference":
        raise UsageError(
            "--split puts pictures into folders of their own, and --images-mode reference moves none; leave one of "
            "them out"
        )
    refuse_existing(out)
    rejected = Rejected()
    with _no_collector():
        objects = open_coco(instances, "instances") if instances else None
        wanted = None
        if objects:
            names = read_categories(objects)
            groups = find_groups(names, list(categories))
            wanted = Wanted(names, groups, match == "all", min_area, crowds=not no_crowd)
        source = open_coco(captions, "captions") if captions else objects
        assert source is not None
        pictures = read_pictures(source, rejected)
        found = join_same_files(locate(pictures, images, rejected) if images else pictures.copy(), rejected)
        selection = _select(source, found, pictures, objects, wanted, licenses, prompt_from, rejected)
        _limit(selection, limit, seed)
        if masks and objects and wanted:
            from data_tools.masks import read_masks

            chosen = {picture.id: picture for picture in selection.pictures}
            aliases = {id_: picture for id_, picture in found.items() if picture.id in chosen}
            selection.masks = read_masks(objects, aliases, wanted, rejected)
        for picture in selection.pictures:
            selection.texts[picture.id] = choose(selection.texts[picture.id], *rule, picture.id)
        with built_aside(out) as folder:
            counts = write_folder(folder, selection, images, images_mode, shares, seed, rejected)
    summary = {
        "out": str(out),
        "pictures": sum(count["pictures"] for count in counts.values()),
        "rows": sum(count["rows"] for count in counts.values()),
        "splits": counts,
        "filtered": selection.filtered,
        "rejected": dict(rejected.counts),
        "seconds": round(time.perf_counter() - began, 2),
    }
    print(json.dumps(summary) if as_json else _in_words(summary))
    if images_mode == "reference":
        where = f"{images}" if images else "the folder that they are relative to"
        print(f"the rows' pictures are not in {out}: move its files into {where} to load them", file=sys.stderr)
    return 0


def _check_options(
    captions: Path | None,
    images: Path | None,
    instances: Path | None,
    categories: Sequence[str],
    match: str,
    min_area: float,
    no_crowd: bool,
    masks: bool,
    images_mode: str,
    prompt_from: str | None,
) -> None:
    """Raises UsageError for what cannot work together."""
    for option, got, known in (
        ("--match", match, ("any", "all")),
        ("--images-mode", images_mode, ("copy", "link", "reference")),
        ("--prompt-from", prompt_from, (None, "category")),
    ):
        if got not in known:
            raise UsageError(f"{option}: got {got!r}; expected {' or '.join(name for name in known if name)}")
    if captions is None and prompt_from is None:
        raise UsageError("no captions are given; name them with --captions captions_X.json")
    needing = {
        "--category": categories,
        "--min-area": min_area,
        "--no-crowd": no_crowd,
        "--masks": masks,
        "--prompt-from": prompt_from,
    }
    without = [option for option, given in needing.items() if given]
    if without and instances is None:
        raise UsageError(f"{', '.join(without)} needs objects; name their file with --instances instances_X.json")
    if match == "all" and not categories:
        raise UsageError("--match all needs categories; name them with --category cat --category dog")
    if images is None and images_mode != "reference":
        raise UsageError(
            f"--images-mode {images_mode} needs the pictures; name their folder with --images, or write names alone "
            "with --images-mode reference"
        )
    if images is not None and not images.is_dir():
        raise UsageError(f"--images: '{images}' is no folder; expected the one that holds the pictures")


def _select(
    source: CocoJson,
    found: Pictures,
    known: Pictures,
    objects: CocoJson | None,
    wanted: Wanted | None,
    licenses: Sequence[str],
    prompt_from: str | None,
    rejected: Rejected,
) -> Selection:
    """The pictures that pass the filters, with their captions."""
    selection = Selection()
    kept = found
    if licenses:
        ids = licence_ids(source, list(licenses))
        kept = {id_: picture for id_, picture in kept.items() if picture.license in ids}
        selection.filtered["license"] = _count(found) - _count(kept)
    if objects and wanted:
        before, present = _count(kept), categories_of(objects, kept, wanted, rejected)
        kept = {id_: picture for id_, picture in kept.items() if picture.id in present}
        selection.filtered["instances"] = before - _count(kept)
    if prompt_from and wanted:
        names = {id_: wanted.categories.get(max(areas, key=areas.__getitem__)) for id_, areas in present.items()}
        selection.texts = {id_: [f"a photo of a {name}"] for id_, name in names.items() if name}
    else:
        selection.texts = read_captions(source, kept, known, rejected)
    for id_, picture in kept.items():
        if picture.id != id_:
            continue
        if selection.texts.get(id_):
            selection.pictures.append(picture)
        else:
            reason = "category without name" if prompt_from else "picture without caption"
            rejected.add(reason, image_id=id_, file_name=picture.file_name)
    if not selection.pictures:
        raise _nothing_left(source, len(known), selection, rejected)
    return selection


def _limit(selection: Selection, limit: int | None, seed: int) -> None:
    """Draws `limit` of the pictures; they keep their order."""
    if limit is None:
        return
    order = sorted(selection.pictures, key=lambda picture: (draw(seed, "limit", picture.id), str(picture.id)))
    chosen = {picture.id for picture in order[:limit]}
    selection.filtered["limit"] = len(selection.pictures) - len(chosen)
    selection.pictures = [picture for picture in selection.pictures if picture.id in chosen]


def _count(pictures: Pictures) -> int:
    """How many pictures there are, each counted once though several ids may name it."""
    return sum(picture.id == id_ for id_, picture in pictures.items())


def _nothing_left(source: CocoJson, known: int, selection: Selection, rejected: Rejected) -> DataError:
    reasons = [f"{count} x {reason}" for reason, count in rejected.counts.items()]
    reasons += [f"{count} left out by --{name}" for name, count in selection.filtered.items() if count]
    example = f", such as {rejected.lines[0].decode()}" if rejected.lines else ""
    return DataError(
        f"{source.path} has {known} pictures and none of them is left: {'; '.join(reasons) or 'it is empty'}{example}. "
        "Expected at least one with its caption; give fewer filters, or files that belong together"
    )


def _in_words(summary: dict[str, Any]) -> str:
    lines = [f"{summary['out']}: {_captions_of(summary)}"]
    if len(summary["splits"]) > 1:
        splits = summary["splits"].items()
        lines += [f"  {name}: {_captions_of(count)}" for name, count in splits]
    lines += [f"  left out by --{name}: {counted(count, 'picture')}" for name, count in summary["filtered"].items()]
    lines += [f"  rejected, {reason}: {count:,}" for reason, count in summary["rejected"].items()]
    total = sum(summary["rejected"].values())
    where = f", listed in {Path(summary['out']) / REJECTED}" if total else ""
    lines.append(f"{total:,} rejected{where}")
    return "\n".join(lines)


def _captions_of(count: dict[str, int]) -> str:
    return f"{counted(count['rows'], 'caption')} of {counted(count['pictures'], 'picture')}"


@contextmanager
def _no_collector() -> Iterator[None]:
    """Without Python's cycle collector, which would look through millions of captions again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
