"""Before and after as one picture, for a README or a slide."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from sdtune.report import Case, Comparison, percent

TILE, GAP, MARGIN, LABEL = 112, 6, 24, 84  # pixels
COLUMNS = 8
INK, SOFT = "#1d1f24", "#6a707c"


def contact_sheet(comparisons: Sequence[Comparison], most: Sequence[int] = (16, 8)) -> Image.Image:
    """Each thing as drawn before and after training, below each other; in the first comparison below what was taught.

    Args:
        comparisons: what to show, from top to bottom.
        most: how many cases to show of each.

    Returns:
        RGB on white, 8 things wide.
    """
    rows = ("taught", "before", "after")
    blocks = [
        block(each, most[min(i, len(most) - 1)], rows if i == 0 else rows[1:]) for i, each in enumerate(comparisons)
    ]
    height = sum(part.height for part in blocks) + GAP * (len(blocks) - 1)
    sheet = Image.new("RGB", (blocks[0].width, height), "white")
    top = 0
    for part in blocks:
        sheet.paste(part, (0, top))
        top += part.height + GAP
    return sheet


def block(comparison: Comparison, most: int, rows: Sequence[str]) -> Image.Image:
    """One comparison: a heading, then bands of `COLUMNS` things; `rows` says which pictures of each."""
    cases = list(comparison.cases)[:most]
    bands = [cases[i : i + COLUMNS] for i in range(0, len(cases), COLUMNS)]
    head, name = 46, 26
    band_height = name + len(rows) * (TILE + GAP) + GAP
    width = 2 * MARGIN + LABEL + COLUMNS * (TILE + GAP) - GAP
    picture = Image.new("RGB", (width, MARGIN // 2 + head + len(bands) * band_height + MARGIN // 2), "white")
    pen = ImageDraw.Draw(picture)
    before, after = percent(comparison.share_before), percent(comparison.share_after)
    words = f"{comparison.title}: {before} right before, {after} after training"
    pen.text((MARGIN, MARGIN // 2 + 8), words, fill=INK, font=ImageFont.load_default(24))
    for number, band in enumerate(bands):
        draw_band(picture, pen, band, rows, MARGIN // 2 + head + number * band_height + name)
    return picture


def draw_band(
    picture: Image.Image, pen: ImageDraw.ImageDraw, cases: Sequence[Case], rows: Sequence[str], top: int
) -> None:
    """Rows of pictures from `top` on, and the names above them."""
    font = ImageFont.load_default(15)
    for row, label in enumerate(rows):
        middle = top + row * (TILE + GAP) + TILE // 2
        pen.text((MARGIN, middle), label, fill=SOFT, font=ImageFont.load_default(18), anchor="lm")
    for column, case in enumerate(cases):
        left = MARGIN + LABEL + column * (TILE + GAP)
        pen.text((left + TILE // 2, top - 8), fitting(case.name, font), fill=INK, font=font, anchor="ms")
        pictures = {"taught": case.truth, "before": case.before, "after": case.after}
        for row, label in enumerate(rows):
            tile = pictures[label].convert("RGB").resize((TILE, TILE), Image.Resampling.LANCZOS)
            picture.paste(tile, (left, top + row * (TILE + GAP)))


def fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text, cut where it is wider than a tile."""
    if font.getlength(text) <= TILE:
        return text
    while text and font.getlength(text + "…") > TILE:
        text = text[:-1]
    return text.rstrip() + "…"
