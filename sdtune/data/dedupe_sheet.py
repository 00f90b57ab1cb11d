"""Pictures that look alike as one picture: a row for each group, the one that stays on the left."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sdtune.data.atomic import write_atomically
from sdtune.data.check import Seen
from sdtune.data.duplicates import apart
from sdtune.data.images import open_rgb
from sdtune.errors import UsageError

TILE, GAP, LABEL, LINE = 128, 8, 32, 14  # pixels
COLUMNS, ROWS = 6, 60  # most of a group, most groups
INK, KEPT = "#1d1f24", "#1a7f37"


def write_sheet(groups: Sequence[Sequence[Seen]], file: Path) -> None:
    """Draws the groups, at most 60 of them with 6 pictures each, into a new file.

    Raises:
        UsageError: the file exists, or Pillow does not write its kind. DataError: it cannot be written.
    """
    kind = Image.registered_extensions().get(file.suffix.lower())
    if os.path.lexists(file) or kind is None:
        why = "exists already and is not overwritten" if os.path.lexists(file) else "is no kind of picture"
        raise UsageError(f"--sheet: '{file}' {why}; name another file, such as alike.png")
    content = io.BytesIO()
    draw_sheet(groups).save(content, kind)
    write_atomically(file, content.getvalue())


def draw_sheet(groups: Sequence[Sequence[Seen]]) -> Image.Image:
    """RGB on white, a row for each group."""
    shown = groups[:ROWS]
    columns = max((min(len(group), COLUMNS) for group in shown), default=1)
    step = TILE + LABEL + GAP
    sheet = Image.new("RGB", (GAP + columns * (TILE + GAP), GAP + max(1, len(shown)) * step), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for row, group in enumerate(shown):
        for column, each in enumerate(group[:COLUMNS]):
            left, top = GAP + column * (TILE + GAP), GAP + row * step
            tile = open_rgb(each.picture.read())
            tile.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
            sheet.paste(tile, (left, top))
            words = f"{each.look.width} x {each.look.height}  {apart(each.look, group[0].look) if column else 'kept'}"
            for line, text in enumerate((each.name, words)):
                while font.getlength(text) > TILE:  # the end of a name tells more than its folder
                    text = f"…{text[2:]}"
                pen.text((left, top + TILE + 2 + line * LINE), text, fill=INK if column else KEPT, font=font)
    return sheet
