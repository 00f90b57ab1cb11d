"""`sdtune dedupe`: pictures that look alike, beside each other; and a copy with the largest of each."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from sdtune.data.captions import counted, first_of
from sdtune.data.check import Seen, check, families
from sdtune.data.check_entries import data_set_entries
from sdtune.data.check_report import megabytes
from sdtune.data.check_sizes import Frame
from sdtune.data.check_watch import watch
from sdtune.data.duplicates import ALIKE, MOST_BITS, apart
from sdtune.data.fix import write_copy
from sdtune.errors import DataError, UsageError

ANY_FRAME = Frame(8, 8)  # sizes are not asked for here
SHOWN = 50  # groups in the table


def command(
    target: str,
    *,
    prompt: str | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    threshold: int = ALIKE,
    out: Path | None = None,
    sheet: Path | None = None,
    as_json: bool = False,
) -> int:
    """`sdtune dedupe`; returns the exit code.

    Args:
        target: folder or other path of pictures, with or without captions, or id of a data set on the Hub.
        prompt, image_column, text_column: as `load_source` takes them.
        threshold: bits of the perceptual hash that may differ, of 64.
        out: new folder for what is kept: the largest picture of each group and all others.
        sheet: file for a contact sheet of the groups.
        as_json: print one JSON object instead of the table.

    Raises:
        UsageError: `out` exists, or the threshold is out of range. DataError: there are no pictures.
    """
    if not 0 <= threshold <= MOST_BITS:
        raise UsageError(f"--threshold: got {threshold}, expected a number of bits from 0 to {MOST_BITS}")
    entries = data_set_entries(target, prompt, image_column, text_column)
    report = check(entries, ANY_FRAME, threshold=threshold, watch=watch)
    if not report.pictures:
        raise DataError(report.readings[0].refusal or f"{target} holds no pictures.")
    broken = [number for number, each in enumerate(report.pictures) if each.look.fault]
    groups = [_largest_first(group, report.pictures) for group in families(report.equal, report.alike)]
    groups.sort(key=lambda group: (-len(group), group[0]))
    drop = {number for group in groups for number in group[1:]}
    if broken:
        names = first_of([report.pictures[number].name for number in broken], 3)
        print(f"{counted(len(broken), 'picture')} cannot be read, left out: {names}", file=sys.stderr)
    if sheet is not None:
        from sdtune.data.dedupe_sheet import write_sheet

        write_sheet([[report.pictures[number] for number in group] for group in groups], sheet)
    written = write_copy(report, drop.union(broken), out) if out is not None else None
    if not as_json:
        print(_table([[report.pictures[number] for number in group] for group in groups], len(report.pictures)))
        if written is not None:
            print(f"{out}: {counted(written['kept'], 'picture')}")
        if out is not None and report.alike and sheet is None:
            print("pictures that only look alike are left out too: see whether they are, with --sheet alike.png")
    else:
        values = {
            "pictures": len(report.pictures),
            "broken": [report.pictures[number].name for number in broken],
            "groups": [[report.pictures[number].name for number in group] for group in groups],
            "dropped": len(drop),
            "out": str(out) if out is not None else None,
        }
        print(json.dumps(values, ensure_ascii=False))
    return 0


def _largest_first(group: Sequence[int], pictures: Sequence[Seen]) -> list[int]:
    def size(number: int) -> tuple[int, int, int]:
        look = pictures[number].look
        return -look.width * look.height, -look.size, number

    return sorted(group, key=size)


def _table(groups: Sequence[Sequence[Seen]], total: int) -> str:
    """A line for each picture of a group, the one that stays first."""
    lines = []
    for group in groups[:SHOWN]:
        for number, each in enumerate(group):
            look = each.look
            size = f"{look.width} x {look.height}"
            lines.append(f"{'keep' if number == 0 else '':<6}{size:>13}  {megabytes(look.size):>8}  {each.name}")
            lines[-1] += f"  ({apart(look, group[0].look)})" if number else ""
        lines.append("")
    if len(groups) > SHOWN:
        lines += [f"and {len(groups) - SHOWN} more groups; --json names them all", ""]
    more = sum(len(group) - 1 for group in groups)
    found = f"{counted(len(groups), 'group')} of pictures that look alike, {counted(more, 'picture')} could go"
    return "\n".join([*lines, f"{counted(total, 'picture')}: {found}"])
