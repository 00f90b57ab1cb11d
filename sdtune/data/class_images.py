"""Class pictures for prior preservation, drawn by the base model itself.

Picture i of a folder has the prompt `prompts[i % len(prompts)]` and the name `class-00000i.png`, and `draw` makes it
from its number alone. So a run that was stopped goes on with the numbers that are missing, and ends with the pictures
that it would have made without the stop.

Source: Ruiz et al. 2022, "DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation".
"""

import io
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sdtune.data.atomic import write_atomically
from sdtune.data.metadata import DRAWN_BY, METADATA, is_picture, list_files, read_rows, write_rows
from sdtune.errors import DataError

Draw = Callable[[list[str], list[int]], list[Image.Image]]
NAME = re.compile(r"class-\d{6,}\.png")


@dataclass(frozen=True)
class ClassFolder:
    """What a folder of class pictures holds, and what it lacks.

    Attributes:
        there: names of all its pictures.
        drawn: the rows of those that were drawn, by name. others: rows of those that a person put there.
        missing: numbers of the pictures that are to be drawn, some of them perhaps again.
    """

    there: set[str]
    drawn: dict[str, dict[str, Any]]
    others: list[dict[str, Any]]
    missing: list[int]

    @property
    def is_readable(self) -> bool:
        """Whether it has pictures, and none without its row that is drawn again, nor a row without its picture."""
        return bool(self.there) and not any(_name(n) in self.there or _name(n) in self.drawn for n in self.missing)


def look_into(
    folder: str | Path,
    prompts: Sequence[str],
    count: int,
    *,
    made_by: Mapping[str, Any] | None = None,
    key: str = "data.1",
    without: Collection[str] = (),
) -> ClassFolder:
    """What is there of class pictures, before any is drawn. Arguments as of `fill_class_folder`.

    Raises:
        DataError: there are no prompts, or the folder holds pictures drawn for other prompts or otherwise.
    """
    if not prompts:
        raise DataError(f"there are no prompts to draw class pictures for; give {key}.prompt, or lines in its file.")
    folder = Path(folder)
    rows = read_rows(folder) if (folder / METADATA).exists() else []
    others = [row for row in rows if not NAME.fullmatch(row["file_name"])]  # of pictures that a person put there
    drawn = {row["file_name"]: row for row in rows if NAME.fullmatch(row["file_name"])}
    _refuse_other_prompts(folder, drawn, prompts, key)
    if drawn:
        _refuse_drawn_otherwise(folder / DRAWN_BY, json.loads(json.dumps(made_by or {})), key)
    there = {name for name in list_files(folder, without) if is_picture(name)}
    wanted = range(max(0, count - sum(not NAME.fullmatch(name) for name in there)))
    missing = [number for number in wanted if _name(number) not in there or _name(number) not in drawn]
    return ClassFolder(there, drawn, others, missing)


def fill_class_folder(
    folder: str | Path,
    prompts: Sequence[str],
    count: int,
    draw: Draw,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
    *,
    made_by: Mapping[str, Any] | None = None,
    key: str = "data.1",
    without: Collection[str] = (),
) -> int:
    """Draws pictures until the folder holds `count`; those that are there, drawn or put there by a person, count.

    A picture is written whole, then its row in `metadata.jsonl`; one without the other is drawn again.

    Args:
        folder: where they go; made if missing.
        prompts: drawn in turn.
        count: how many pictures the folder shall hold.
        draw: (prompts, numbers) -> pictures; each must depend on its prompt and number only.
        batch_size: how many are drawn at once.
        progress: called with (pictures there, count) after each batch.
        made_by: what the pictures depend on beside prompt and number (model, size, steps ...), noted in drawn_by.json.
        key: of the entry in its recipe, for the commands that faults name.
        without: real paths of folders in it that are no part of it.

    Returns:
        How many were drawn.

    Raises:
        DataError: the folder holds pictures drawn for other prompts or otherwise, or cannot be written.
    """
    folder = Path(folder)
    state = look_into(folder, prompts, count, made_by=made_by, key=key, without=without)
    drawn, missing = state.drawn, state.missing
    if missing and made_by:
        write_atomically(folder / DRAWN_BY, (json.dumps(made_by, indent=2) + "\n").encode())
    for first in range(0, len(missing), batch_size):
        numbers = missing[first : first + batch_size]
        texts = [prompts[number % len(prompts)] for number in numbers]
        for number, text, picture in zip(numbers, texts, draw(texts, numbers), strict=True):
            write_atomically(folder / _name(number), _png(picture))
            drawn[_name(number)] = {"file_name": _name(number), "text": text}
        write_rows(folder, state.others + [drawn[name] for name in sorted(drawn)])
        if progress is not None:
            progress(count - len(missing) + first + len(numbers), count)
    return len(missing)


def _name(number: int) -> str:
    return f"class-{number:06d}.png"


def _png(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


def _refuse_drawn_otherwise(file: Path, made_by: dict[str, Any], key: str) -> None:
    """Pictures of another model, size or guidance are neither mixed in nor taken for the base's own."""
    if not file.exists():
        return
    before = _read_notes(file)
    told = [f"{name} was {before.get(name)} and is {now}" for name, now in made_by.items() if before.get(name) != now]
    if told:
        raise DataError(
            f"the class pictures in {file.parent} were drawn otherwise: {'; '.join(told)}. Give an empty folder with: "
            f"{key}.path=FOLDER, or take the pictures as they are with: {key}.generate=null {key}.drawing=null"
        )


def _read_notes(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{file} cannot be read: {error}; remove the folder {file.parent} to draw anew") from error


def _refuse_other_prompts(folder: Path, drawn: dict[str, dict[str, Any]], prompts: Sequence[str], key: str) -> None:
    for name, row in drawn.items():
        prompt = prompts[int(name.removeprefix("class-").removesuffix(".png")) % len(prompts)]
        if row.get("text") != prompt:
            raise DataError(
                f"{folder / name} was drawn for {row.get('text')!r}, but now {prompt!r} is asked for; give an empty "
                f"folder with: {key}.path=FOLDER, or the prompts of before."
            )
