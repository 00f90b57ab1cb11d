"""Where the pictures of a run come from: folders, or data sets of the Hub.

    source = load_source(path="photos")                         # pictures and their metadata.jsonl
    source = load_source(path="photos", prompt="a sks dog")     # pictures alone
    source = load_source(hub="someone/pokemon", text_column="caption")

Nothing is decoded here: a picture is its name, its captions and a way to read its bytes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sdtune.data.folder import folder_pictures
from sdtune.data.hub import hub_pictures
from sdtune.data.picture import Picture

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
) -> Source:
    """Finds the pictures of one entry of a recipe's `data` and their captions.

    Args:
        path: a local folder, read by the rules of datasets' imagefolder.
        hub: id of a data set on the Hub; give this or `path`.
        split: part of the data set; of a folder, its sub-folder of that name.
        image_column, text_column: where pictures and captions are.
        prompt: caption of every picture; captions of its own are then not needed, nor used.
        role, repeats, weight: kept in the Source.
        key: where the entry stands in the recipe, for the commands that faults name.

    Raises:
        DataError: no such folder, no pictures, a row without picture, a picture without caption, no such column.
        HubError: the data set could not be fetched.
    """
    if (path is None) == (hub is None):
        raise ValueError(f"expected either path or hub, got path={path!r} and hub={hub!r}")
    if path is not None:
        pictures = folder_pictures(Path(path), split, image_column, text_column, prompt, key)
    else:
        pictures = hub_pictures(str(hub), split, image_column, text_column, prompt, key)
    return Source(tuple(pictures), role, repeats, weight)
