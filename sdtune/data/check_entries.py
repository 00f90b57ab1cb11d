"""What there is to check of a data set: one entry, or one for each of its splits."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from glob import has_magic
from pathlib import Path

from sdtune.config import resolve_asset
from sdtune.data.sources import Role, Source, load_source
from sdtune.data.splits import splits_of
from sdtune.errors import UsageError
from sdtune.hub_access import looks_like_hub_id


@dataclass(frozen=True)
class Entry:
    """One data set to check.

    Attributes:
        load: what training would call for it.
        label: tells it from the others in a report; "" where it is the only one.
        path: its folder on this machine; None for a data set of the Hub.
        split, image_column, text_column, prompt, role, without, key: as `load_source` takes them; key is "" for a data
            set without a recipe.
    """

    load: Callable[[], Source]
    label: str = ""
    path: Path | None = None
    split: str = "train"
    image_column: str = "image"
    text_column: str = "text"
    prompt: str | None = None
    role: Role = "instance"
    without: Collection[str] = ()
    key: str = ""

    @property
    def file_key(self) -> str:
        """The key of a metadata row that names the picture."""
        return "file_name" if self.image_column == "image" else f"{self.image_column}_file_name"


def data_set_entries(
    target: str, prompt: str | None = None, image_column: str | None = None, text_column: str | None = None
) -> list[Entry]:
    """What to check of a data set: a folder of splits has one entry for each. Raises UsageError.

    Args:
        target: folder or other path, or id of a data set on the Hub.
        prompt, image_column, text_column: as `load_source` takes them; columns are "image" and "text" unless told.
    """
    columns = {"prompt": prompt, "image_column": image_column or "image", "text_column": text_column or "text"}
    path = Path(resolve_asset(target))
    if not path.exists() and not has_magic(target) and not looks_like_hub_id(target):
        raise UsageError(
            f"'{target}' does not exist; expected a folder of pictures, shards or parquet files, a data set of the Hub "
            "(user/name), or a recipe: a YAML file or a name of `sdtune recipes ls`"
        )
    splits = splits_of(path) if path.is_dir() else []
    entries = []
    for split in sorted(splits, key=lambda name: name not in ("train", "training")) or ["train"]:
        role: Role = "instance" if split in ("train", "training") or len(splits) < 2 else "validation"
        load_split = partial(load_source, path=path, split=split, role=role, key="", **columns)  # type: ignore[arg-type]
        label = split if len(splits) > 1 else ""
        entries.append(Entry(load_split, label, path, split, role=role, **columns))  # type: ignore[arg-type]
    return entries
