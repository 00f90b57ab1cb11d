"""Pictures inside of parquet files, as HF `datasets` and img2dataset write them.

The captions are read at once; of the pictures only the row group in which one stands, when it is asked for. Nothing is
copied to a cache. Files of many rows a group are slow that way: datasets writes about 100 pictures a group.
"""

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from sdtune.data.captions import captions_of, named_classes, no_captions, setting
from sdtune.data.picture import MASK, Picture
from sdtune.errors import DataError

KEPT = 4  # row groups that stay in memory


def parquet_pictures(
    files: Sequence[Path], image_column: str, text_column: str, prompt: str | None, key: str
) -> list[Picture]:
    """The pictures of the files, in the order of their rows, each with the mask in its column `mask`, if there is one.

    Args:
        files: parquet files of one kind.
        image_column: pictures: encoded bytes, or datasets' struct of bytes and path.
        text_column: captions; a cell with a list of texts holds several, one with a class number is its name.
        prompt: caption of every picture in place of their own. key: of the source in its recipe, for messages.

    Raises:
        DataError: a file is damaged, a column is missing, or a row has no caption.
    """
    pictures = [
        picture for file in files for picture in pictures_in_parquet(file, image_column, text_column, prompt, key)
    ]
    if not pictures:
        raise DataError(f"{files[0]} and the files beside it have no rows; expected one a picture")
    if without := [picture.name for picture in pictures if not picture.captions]:
        raise no_captions(str(files[0].parent), without, f"a text in the column {text_column!r}", key)
    return pictures


def pictures_in_parquet(
    file: Path, image_column: str, text_column: str, prompt: str | None, key: str
) -> Iterator[Picture]:
    """The pictures of one file, those without caption too. Arguments as of `parquet_pictures`.

    Raises:
        DataError: the file is damaged, or a column is missing.
    """
    opened, origin = _open(file), str(file.resolve().parent)
    _check_columns(file, opened, image_column, None if prompt is not None else text_column, key)
    for group in range(opened.num_row_groups):
        captions: list[tuple[str, ...]]
        if prompt is not None:
            captions = [(prompt,)] * opened.metadata.row_group(group).num_rows
        else:
            texts = _column(file, opened, group, text_column).to_pylist()
            captions = [tuple(captions_of(text)) for text in named_classes(texts, _feature(opened, text_column))]
        masked = _masked(file, opened, group)
        for row, some in enumerate(captions):
            read, mask = (partial(_cell, str(file), group, column, row) for column in (image_column, MASK))
            name = f"{file.name}/{group}-{row:06d}"
            yield Picture(name, some, 1.0, read, origin, mask if masked is not None and masked[row] else None)


def columns_of(file: Path) -> list[str]:
    """Names of a file's columns. Raises DataError where it is damaged."""
    return list(_open(file).schema_arrow.names)


def _open(file: Path) -> Any:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise _damaged(file, error) from error


def _column(file: Path, opened: Any, group: int, column: str) -> Any:
    """A column of a row group."""
    import pyarrow

    try:
        return opened.read_row_group(group, columns=[column]).column(0)
    except (OSError, pyarrow.ArrowException) as error:
        raise _damaged(file, error) from error


def _masked(file: Path, opened: Any, group: int) -> list[bool] | None:
    """Which rows of a group have a mask, told without its bytes; None where none has."""
    import pyarrow

    schema = opened.schema_arrow
    if MASK not in schema.names:
        return None
    kind = schema.field(MASK).type
    if pyarrow.types.is_struct(kind) and kind.get_field_index("path") >= 0:
        return list(_column(file, opened, group, f"{MASK}.path").is_valid().to_pylist())
    if pyarrow.types.is_struct(kind) or pyarrow.types.is_binary(kind):
        return list(_column(file, opened, group, MASK).is_valid().to_pylist())
    return None  # of another kind: whatever it is, it holds no pictures


def _feature(opened: Any, column: str) -> Any:
    """What `datasets` noted of a column in the file; None where it was not written by it."""
    if b"huggingface" not in (opened.schema_arrow.metadata or {}):
        return None
    from datasets import Features

    return Features.from_arrow_schema(opened.schema_arrow).get(column)


def _damaged(file: Path, error: Exception) -> DataError:
    what = " ".join(str(error).split())
    return DataError(f"{file} cannot be read as a parquet file ({what}); fetch or write it again")


def _check_columns(file: Path, opened: Any, image_column: str, text_column: str | None, key: str) -> None:
    known = opened.schema_arrow.names
    for which, column in (("image_column", image_column), ("text_column", text_column)):
        if column is not None and column not in known:
            raise DataError(
                f"{file} has no column {column!r}; it has: {', '.join(known)}. Name the right one with: "
                f"{setting(key, which, 'COLUMN')}"
            )


@lru_cache(maxsize=KEPT)
def _group(file: str, group: int, column: str) -> Any:
    return _column(Path(file), _open(Path(file)), group, column)


def _cell(file: str, group: int, column: str, row: int) -> bytes | str:
    cell = _group(file, group, column)[row].as_py()
    if isinstance(cell, dict):
        content, path = cell.get("bytes"), cell.get("path")
        cell = content or (path and os.path.join(os.path.dirname(file), path))
    if not isinstance(cell, (bytes, str)) or not cell:
        raise DataError(f"{file}, row {row} of group {group}: {column!r} holds no picture")
    return cell
