"""Pictures and captions of a local folder: the imagefolder layout of HF `datasets`, or `.txt` files beside pictures.

No picture is looked at, so that a folder of 100,000 loads in seconds. `datasets` reads metadata.csv and .parquet; what
it lets pass (rows without picture, pictures without row) is checked here. metadata.jsonl is read line by line:
`datasets` wants all cells of a column alike, and one picture may have a caption and the next a list of them.
"""

import glob
import math
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from sdtune.data.captions import PROMPT, captions_of, setting, some
from sdtune.data.metadata import METADATA, METADATA_FILES, is_picture, leads_out, list_files, read_rows
from sdtune.data.picture import MASK, Picture
from sdtune.data.sidecars import sidecar_captions
from sdtune.data.splits import splits_of
from sdtune.errors import DataError


def folder_pictures(
    folder: Path,
    split: str,
    image_column: str,
    text_column: str,
    prompt: str | None,
    key: str,
    without: Collection[str] = (),
) -> list[Picture]:
    """The pictures of a folder, those of the metadata first and in its order.

    With a prompt, pictures that no row names count too; without one each picture needs a row with a caption.

    Raises:
        DataError: as `load_source`.
    """
    folder = _split_folder(folder, split, key, without)
    files = list_files(folder, without)
    metadata = [file for file in files if os.path.basename(file) in METADATA_FILES]
    pictures = [file for file in files if is_picture(file)]
    if not pictures and not metadata:
        raise DataError(
            f"{folder} holds no pictures; expected files such as .jpg, .png or .webp. Put some in, or give another "
            "folder" + (f" with: {setting(key, 'path', 'FOLDER')}" if key else "")
        )
    if not metadata and prompt is not None:
        return [picture_of(folder, name, (prompt,)) for name in pictures]
    if not metadata:
        captions = sidecar_captions(folder, pictures, set(files))
        without = [name for name in pictures if not captions[name]]
        if len(without) == len(pictures):
            what = f"{folder} has neither {METADATA} nor .txt files, so its pictures have no captions"
            raise DataError(_no_captions(folder, what, key))
        if without:
            raise DataError(_no_captions(folder, f"{folder}: {some(without)} without caption in a .txt file", key))
        return [picture_of(folder, name, captions[name]) for name in pictures]

    table = _Rows(folder, metadata, image_column, text_column if prompt is None else None, key)
    _refuse_missing(folder, table.captions, set(files))
    unlisted = [name for name in pictures if name not in table.captions and name not in table.other_files]
    if prompt is not None:
        names = [*table.captions, *unlisted]
        return [table.picture(name, (prompt,)) for name in names]
    without = [name for name, captions in table.captions.items() if not captions] + unlisted
    if without:
        raise DataError(_no_captions(folder, f"{folder}: {some(without)} without caption", key))
    return [table.picture(name, tuple(captions)) for name, captions in table.captions.items()]


class _Rows:
    """What the metadata files of a folder say.

    Attributes:
        captions: for each picture's name its captions, without blank ones; empty if captions are not asked for.
        weights: for the names whose rows give a weight.
        masks: for the names whose rows give a mask, the mask's name.
        other_files: names of masks and other files that rows mention beside the picture.
    """

    def __init__(self, folder: Path, files: list[str], image_column: str, text_column: str | None, key: str) -> None:
        self.folder = folder
        self.captions: dict[str, list[str]] = {}
        self.weights: dict[str, float] = {}
        self.masks: dict[str, str] = {}
        self.other_files: set[str] = set()
        columns, image_columns = _read_columns(folder, files, image_column)
        for column in [image_column, *([text_column] if text_column is not None else [])]:
            if column not in columns:
                raise DataError(_no_column(folder / files[0], column, text_column, list(columns), key))
        for column in image_columns - {image_column}:
            self.other_files.update(name for name in _names(folder, columns[column]) if name is not None)
        none = [None] * len(columns[image_column])
        texts = columns[text_column] if text_column is not None else none
        weights = columns.get("weight", none)
        masks = list(_names(folder, columns[MASK])) if MASK in image_columns - {image_column} else none
        for number, name in enumerate(_names(folder, columns[image_column])):
            if name is None:
                raise DataError(f"{folder / files[0]}, row {number + 1} names no picture; give it a file_name.")
            self.captions.setdefault(name, []).extend(captions_of(texts[number]))
            weight, mask = weights[number], masks[number]
            if weight is not None and not _is_weight(weight):
                raise DataError(
                    f"{folder / files[0]}, row {number + 1}: the weight of {name} is {weight!r}; expected a number of "
                    "at least 0, such as 1.0"
                )
            if weight is not None and self.weights.setdefault(name, float(weight)) != weight:
                raise _two_values(folder / files[0], name, "weight", self.weights[name], float(weight))
            if mask is not None and self.masks.setdefault(name, mask) != mask:
                raise _two_values(folder / files[0], name, "mask", self.masks[name], mask)

    def picture(self, name: str, captions: tuple[str, ...]) -> Picture:
        """The picture of that name; one that no row names has weight 1 and no mask."""
        return picture_of(self.folder, name, captions, self.weights.get(name, 1.0), self.masks.get(name))


def _is_weight(value: object) -> bool:
    return isinstance(value, (int, float)) and 0 <= value < math.inf


def _read_columns(folder: Path, files: list[str], image_column: str) -> tuple[dict[str, list[Any]], set[str]]:
    """The columns of all metadata files, and which of them hold paths of pictures, {"path": path} or None each."""
    if all(file.endswith(".jsonl") for file in files):
        return _read_lines(folder, files, "file_name" if image_column == "image" else None)
    return _read_tables(folder, files)


def _read_lines(folder: Path, files: list[str], key: str | None) -> tuple[dict[str, list[Any]], set[str]]:
    """Of metadata.jsonl files. file_name becomes the column image and mask_file_name mask, as `datasets` has them."""
    rows, images = list[dict[str, Any]](), set[str]()
    for file in files:
        some = read_rows(folder / file, key)
        if not some:
            raise DataError(f"{folder / file} is empty; write a row for each picture, or take the file away.")
        place = os.path.join(os.path.abspath(folder), os.path.dirname(file))
        for row in some:
            rows.append({})
            for name, value in row.items():
                if name.endswith("file_name"):
                    name = name.removesuffix("file_name").rstrip("_") or "image"
                    images.add(name)
                    if isinstance(value, str) and leads_out(value):
                        raise _leading_out(folder / file, value)
                    value = {"path": os.path.join(place, value)} if isinstance(value, str) and value else None
                rows[-1][name] = value
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(chain.from_iterable(rows))}, images


def _read_tables(folder: Path, files: list[str]) -> tuple[dict[str, list[Any]], set[str]]:
    """Of metadata files of any kind.

    The builder is used as such: `load_dataset` would ask the network, guess splits from file names, and keep a cache.
    """
    import datasets
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    root = os.path.abspath(folder)
    data_files = {"train": [os.path.join(glob.escape(root), *glob.escape(file).split("/")) for file in files]}
    with tempfile.TemporaryDirectory(prefix="sdtune-", ignore_cleanup_errors=True) as cache, _no_progress_bars():
        try:
            builder = ImageFolder(data_files=data_files, cache_dir=cache, drop_labels=True)
            builder.download_and_prepare()
            table = builder.as_dataset("train", in_memory=True)
        except Exception as error:  # datasets passes on whatever its readers raise
            raise _unreadable(folder, files, error) from error
        images = {name for name, feature in table.features.items() if isinstance(feature, datasets.Image)}
        for name in images:
            table = table.cast_column(name, datasets.Image(decode=False))
        return {name: table[name][:] for name in table.column_names}, images


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    import datasets

    shown = datasets.utils.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _unreadable(folder: Path, files: list[str], error: Exception) -> DataError:
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    what = " ".join(str(error).split())
    return DataError(f"{folder / files[0]} cannot be read as the metadata of an image folder: {what}")


def _names(folder: Path, cells: Iterable[dict[str, Any] | None]) -> Iterator[str | None]:
    """Paths of pictures -> names relative to the folder."""
    root, known = os.path.abspath(folder), dict[str, str]()
    for cell in cells:
        path = (cell or {}).get("path")
        if path is None or path.endswith("/."):  # how `datasets` has an empty cell
            yield None
            continue
        if path not in known:
            known[path] = os.path.relpath(path, root).replace(os.sep, "/")
        yield known[path]


def picture_of(
    folder: Path, name: str, captions: tuple[str, ...], weight: float = 1.0, mask: str | None = None
) -> Picture:
    """A picture of a folder; it and its mask are named relative to it."""

    def reader(name: str) -> partial[str]:
        return partial(str, os.path.join(folder, *name.split("/")))

    origin = os.path.abspath(folder)
    return Picture(name, captions, weight, reader(name), origin, None if mask is None else reader(mask))


def _split_folder(folder: Path, split: str, key: str, without: Collection[str]) -> Path:
    """The folder itself, or its sub-folder for `split` where it is laid out as train/, test/ ..."""
    if not folder.exists():
        raise DataError(f"{folder} does not exist; make it with: sdtune caption PHOTOS --out {folder}")
    if not folder.is_dir():
        what = f"{folder} is a file; expected a folder of pictures, .tar shards or .parquet files"
        raise DataError(what + (f". Give it with: {setting(key, 'path', 'FOLDER')}" if key else ""))
    splits = splits_of(folder, without)
    if split in splits:
        return folder / split
    if split != "train":
        raise DataError(f"{folder} has no split {split!r}; it has: {', '.join(splits) or 'none, only train'}.")
    return folder


def _refuse_missing(folder: Path, names: Iterable[str], files: set[str]) -> None:
    missing = [name for name in names if name not in files and not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{folder}: {some(missing)} named in its metadata but not there; put the files back, or take their rows "
            "away."
        )


def _leading_out(file: Path, name: str) -> DataError:
    return DataError(
        f"{file} names '{name}', which leads out of its folder; put the file into the folder, and name it as seen from "
        "there."
    )


def _two_values(file: Path, name: str, what: str, first: object, second: object) -> DataError:
    return DataError(
        f"{file} gives {name} the {what}s {first} and {second}; expected one {what} a picture: make them equal in all "
        "its rows."
    )


def _no_captions(folder: Path, what: str, key: str) -> str:
    return (
        f"{what}; write a row for each into {folder / METADATA}, let them be written with: sdtune caption {folder} "
        f"--out {folder}-captioned, or give all pictures one caption with: {setting(key, 'prompt', PROMPT)}"
    )


def _no_column(file: Path, column: str, text_column: str | None, known: list[str], key: str) -> str:
    others = [name for name in known if name != "image"]
    which = "text_column" if column == text_column else "image_column"
    return (
        f"{file} has no key {column!r}; it has: {', '.join(others) or 'only file_name'}. Name the right one with: "
        + setting(key, which, "KEY")
        + (f", or give all pictures one caption with: {setting(key, 'prompt', PROMPT)}" if text_column else "")
    )
