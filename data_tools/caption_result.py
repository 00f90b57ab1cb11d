"""What comes out of a captioning: captions, links to the pictures, what was rejected, and how it was made."""

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_tools.caption_folder import REPORT, Folder, Row, leaves, lines_of, other_files, sidecar_of, texts_of
from data_tools.caption_journal import PLACE, Journal
from data_tools.caption_places import Places
from data_tools.caption_settings import FORMATS, Settings
from sdtune import distributed
from sdtune.data.atomic import write_atomically
from sdtune.data.metadata import write_rows
from sdtune.errors import DataError

REJECTED = "rejected.jsonl"


def finish(
    source: Folder, whole: Folder, place: Path, where: Places, kind: str, wanted: Settings, journal: Journal
) -> dict[str, Any]:
    """Makes the result from the journals. Whatever stops it, the same again makes the same result.

    Args:
        source: the pictures. whole: with the captions of earlier results too.
        place: where it goes; the folder of the pictures itself for captions beside them.
        where: in it, for each picture.

    Returns:
        What `sdtune caption --json` prints.
    """
    captions, reasons = journal.finished()
    there = set(source.pictures)
    captions = {name: texts for name, texts in captions.items() if name in there}
    kept = {name for name in (*whole.rows, *whole.sidecars) if whole.texts(name)} - captions.keys()
    rejected = {name: why for name, why in reasons.items() if name in there and (wanted.overwrite or name not in kept)}
    rejected |= _missing(whole, place) | source.bad_names
    beside = place == source.path
    rows = merge(whole, captions, rows_stay=beside)
    if not beside:
        rows = {name: some for name, some in rows.items() if name not in rejected}
        link_files(source.path, place, rows, where)
    if rows:
        write_result(place, kind, rows, where, beside)
    write_rejected(place, rejected)
    if captions or not (beside or (place / REPORT).is_file()):  # a result in a folder of its own always has one
        run = _report(wanted, kind, journal.job["started"], len(captions), len(rejected))
        add_report(place, run, alone=wanted.overwrite)
    journal.remove()
    return {
        "captioned": len(captions),
        "kept": len(kept - rejected.keys()),
        "rejected": len(rejected),
        "out": str(place / where.files(kind)[0]) if len(where.folders) == 1 else str(place),
        "rejected_file": str(place / REJECTED) if rejected else None,
        "model": wanted.model,
    }


def merge(source: Folder, captioned: dict[str, list[str]], *, rows_stay: bool) -> dict[str, list[Row]]:
    """The rows of each picture in the result: those named in metadata first and in its order, then by name.

    Args:
        captioned: new captions; other keys of the picture's first row stay with them.
        rows_stay: keep the rows of pictures that have no caption.
    """
    merged: dict[str, list[Row]] = {}
    for name in dict.fromkeys((*source.rows, *source.pictures)):
        rows = source.rows.get(name, [])
        texts = captioned.get(name) or source.texts(name)
        with_text = [row for row in rows if texts_of(row)]
        if name not in captioned and with_text:
            merged[name] = with_text
        elif texts:
            others = {key: value for key, value in (rows or [{}])[0].items() if key not in ("file_name", "text")}
            merged[name] = [{"file_name": name, "text": text, **others} for text in texts]
        elif rows_stay and rows:
            merged[name] = rows
    return merged


def write_result(out: Path, kind: str, rows: dict[str, list[Row]], where: Places, beside: bool) -> None:
    """Writes the captions.

    Args:
        kind: "jsonl", "parquet" or "txt".
        where: in `out`, for the rows of each picture.
        beside: the captions go beside the pictures: a .txt that says the same already is left alone.
    """
    if kind == "txt":
        for name, some in rows.items():
            content = "".join(f"{text}\n" for row in some for text in texts_of(row))
            file = out / sidecar_of(name)
            if content and not (beside and file.is_file() and lines_of(file) == content.splitlines()):
                write_atomically(file, content.encode("utf-8"))
        return
    of_folder = defaultdict[str, list[Row]](list)
    for name, some in rows.items():
        of_folder[where.folder(name)] += map(where.row, some)
    for folder, some in of_folder.items():
        if kind == "jsonl":
            write_rows(out / folder, some)
        else:
            write_atomically(out / folder / FORMATS[kind], _as_parquet(some))


def link_files(pictures: Path, out: Path, rows: dict[str, list[Row]], where: Places) -> None:
    """Puts each picture, and what else its rows name (masks), into `out`: hard links, else copies.

    Raises:
        DataError: `out` cannot be written.
    """
    wanted = dict.fromkeys(
        name for picture, some in rows.items() for name in (picture, *(n for row in some for _, n in other_files(row)))
    )
    for name in wanted:
        source, target = pictures / name, out / where.name(name)
        if leaves(name) or not source.is_file() or _same_file(source, target):
            continue
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _put(os.path.realpath(source), target, out / PLACE / "part")
        except OSError as error:
            raise DataError(
                f"'{target}' cannot be written ({error.strerror or error}); make room or choose another folder, then "
                "run the same command again: it goes on where it stopped"
            ) from error


def write_rejected(out: Path, rejected: dict[str, str]) -> None:
    """`rejected.jsonl`: file and reason of each, sorted; no file when there is none."""
    if not rejected:
        (out / REJECTED).unlink(missing_ok=True)
        return
    lines = [json.dumps({"file_name": name, "reason": rejected[name]}, ensure_ascii=False) for name in sorted(rejected)]
    write_atomically(out / REJECTED, ("\n".join(lines) + "\n").encode("utf-8"))


def add_report(out: Path, run: dict[str, Any], *, alone: bool) -> None:
    """Adds what made these captions to the runs in `captions.json`; a run that is in it already is replaced.

    Args:
        run: with the key `started`, by which it is known.
        alone: nothing of earlier runs is left.
    """
    earlier = [] if alone else _runs(out)
    runs = [*(one for one in earlier if one.get("started") != run["started"]), run]
    write_atomically(out / REPORT, (json.dumps({"runs": runs}, ensure_ascii=False, indent=1) + "\n").encode("utf-8"))


def _as_parquet(rows: Sequence[Row]) -> bytes:
    import io

    import pyarrow
    import pyarrow.parquet

    columns = dict.fromkeys(key for row in rows for key in row)
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({key: [row.get(key) for row in rows] for key in columns}), buffer)
    return buffer.getvalue()


def changed_settings(out: Path, wanted: Settings) -> list[str]:
    """Where the last run that wrote captions here had other settings, in words; nothing where all are written anew."""
    runs = [] if wanted.overwrite else _runs(out)
    if not runs:
        return []
    mine = asdict(wanted)
    says_the_same = {name: mine[name] for name in ("overwrite", "allow_pickle", "precision")}
    if runs[-1].get("num_beams") == wanted.beams:  # it has what they were, and not what was asked for
        says_the_same["num_beams"] = wanted.num_beams
    return wanted.differences(runs[-1] | says_the_same)


def _runs(out: Path) -> list[dict[str, Any]]:
    """What `captions.json` says of the runs before."""
    file = out / REPORT
    if not file.is_file():
        return []
    try:
        return [dict(run) for run in json.loads(file.read_text(encoding="utf-8"))["runs"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"'{file}' cannot be read ({error}); move it away, then run the same command") from error


def _missing(whole: Folder, place: Path) -> dict[str, str]:
    """Pictures that metadata names and that are not there, and why that is so."""
    missing = {}
    for name in whole.rows.keys() - set(whole.pictures):
        if leaves(name):
            missing[name] = "its name in the metadata leads out of the folder"
        elif not (whole.path / name).is_file() and not (place / name).is_file():
            missing[name] = "the metadata names it, and it is not there"
    return missing


def _report(wanted: Settings, kind: str, started: str, captioned: int, rejected: int) -> dict[str, Any]:
    """Where the captions come from."""
    from data_tools.captioner import choose_device, commit_of, precision_on

    device = choose_device()
    return {
        "started": started,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **asdict(wanted),
        "num_beams": wanted.beams,
        "commit": commit_of(wanted.model, wanted.revision),
        "precision": precision_on(device, wanted.precision),
        "device": device.type,
        "format": kind,
        "captioned": captioned,
        "rejected": rejected,
        "processes": distributed.world(),
        "versions": {name: version(name) for name in ("sdtune", "torch", "transformers", "pillow")},
    }


def _same_file(source: Path, target: Path) -> bool:
    """Whether the target is the source, or a copy of it."""
    try:
        here, there = source.stat(), target.stat()
    except FileNotFoundError:
        return False
    same = os.path.samestat(here, there)
    return same or (here.st_size, here.st_mtime_ns) == (there.st_size, there.st_mtime_ns)


def _put(source: str, target: Path, aside: Path) -> None:
    """A hard link, else a copy that is there whole or not at all."""
    aside.unlink(missing_ok=True)
    try:
        os.link(source, aside)
    except OSError:  # another disk, or a file system or owner that allows no links
        shutil.copy2(source, aside)
    os.replace(aside, target)
    aside.unlink(missing_ok=True)  # where both are links to one file, the rename leaves it
