"""Where the pictures of a run come from: folders, archives, or data sets of the Hub.

    source = load_source(path="photos")                         # pictures and their metadata.jsonl
    source = load_source(path="photos", prompt="a sks dog")     # pictures alone
    source = load_source(path="shards")                         # WebDataset tar files, or parquet files: not unpacked
    source = load_source(hub="someone/pokemon", text_column="caption")

Nothing is decoded here: a picture is its name, its captions and a way to read its bytes.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from glob import has_magic
from hashlib import blake2b
from pathlib import Path
from typing import Literal

from sdtune.data.captions import setting
from sdtune.data.folder import folder_pictures
from sdtune.data.hub import hub_pictures
from sdtune.data.layouts import PARQUET, archives
from sdtune.data.metadata import is_run
from sdtune.data.parquet import parquet_pictures
from sdtune.data.picture import Picture
from sdtune.data.shards import shard_pictures
from sdtune.errors import DataError, HubError
from sdtune.hub_access import looks_like_hub_id

Role = Literal["instance", "class", "validation"]


@dataclass(frozen=True)
class Source:
    """Pictures that are used in the same way.

    Attributes:
        pictures: all of them.
        role: "instance" (learnt), "class" (prior preservation, drawn beside the instances) or "validation" (held out).
        repeats: how often each picture comes in an epoch.
        weight: weight of their loss, times that of the picture.
    """

    pictures: tuple[Picture, ...]
    role: Role = "instance"
    repeats: int = 1
    weight: float = 1.0


def load_source(
    path: str | Path | None = None,
    hub: str | None = None,
    *,
    split: str = "train",
    image_column: str = "image",
    text_column: str = "text",
    prompt: str | None = None,
    role: Role = "instance",
    repeats: int = 1,
    weight: float = 1.0,
    key: str = "data.0",
    without: Collection[str] = (),
) -> Source:
    """Finds the pictures of one entry of a recipe's `data` and their captions.

    Args:
        path: a local folder: pictures with a metadata.jsonl, .csv or .parquet (datasets' imagefolder), with .txt files
            beside them, or alone; a folder, file or pattern of WebDataset shards (.tar) or parquet files. What is
            not there and has the form of a hub id is taken as one.
        hub: id of a data set on the Hub; give this or `path`.
        split: part of the data set; of a folder, its sub-folder or files of that name.
        image_column, text_column: where pictures and captions are.
        prompt: caption of every picture; captions of its own are then not needed, nor used.
        role, repeats, weight: kept in the Source.
        key: where the entry stands in the recipe, for the commands that faults name.
        without: real paths of folders in `path` that are no part of it.

    Raises:
        DataError: no such folder, or that of a run, no pictures, a row without picture, a picture without caption, no
            such column.
        HubError: the data set could not be fetched.
    """
    if (path is None) == (hub is None):
        raise ValueError(f"expected either path or hub, got path={path!r} and hub={hub!r}")
    if path is None:
        pictures = hub_pictures(str(hub), split, image_column, text_column, prompt, key)
    elif is_run(path):
        raise DataError(
            f"{path} is the folder of a run, and its pictures are what the model drew; expected pictures to learn from"
            + (f". Give their folder with: {setting(key, 'path', 'FOLDER')}" if key else ": sdtune check FOLDER")
        )
    elif not Path(path).exists() and not has_magic(str(path)) and looks_like_hub_id(str(path)):
        try:
            pictures = hub_pictures(str(path), split, image_column, text_column, prompt, key)
        except HubError as fault:
            raise HubError(f"'{path}' is no folder here, and taken as an id of the Hub: {fault}") from fault
    elif not (files := archives(Path(path), split, without)):
        pictures = folder_pictures(Path(path), split, image_column, text_column, prompt, key, without)
    elif files[0].suffix.lower() == PARQUET:
        pictures = parquet_pictures(files, image_column, text_column, prompt, key)
    else:
        pictures = shard_pictures(files, text_column, prompt, key)
    return Source(tuple(pictures), role, repeats, weight)


def fingerprint(sources: Sequence[Source]) -> str:
    """How many pictures there are, and a hash of their names, captions and weights, in order."""
    digest, count = blake2b(digest_size=6), 0
    for source in sources:
        for picture in source.pictures:
            count += 1
            digest.update(repr((source.role, picture.name, picture.captions, picture.weight)).encode())
    return f"{count} ({digest.hexdigest()})"
