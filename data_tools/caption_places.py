"""Where the pictures and rows of a result stand, so that HF `datasets` finds the picture of each row."""

import posixpath
from dataclasses import dataclass, field

from data_tools.caption_folder import Folder, Row, other_files
from data_tools.caption_settings import FORMATS
from sdtune.data.splits import SPLITS, is_split_like, splits_of, unlike_splits
from sdtune.errors import DataError


@dataclass
class Places:
    """Where things stand in the folder of a result.

    Attributes:
        folders: those with a file of rows, relative to the result; "" is the result itself.
        renamed: pictures and masks of the source that have another name in the result, with that name.
        unseen: pictures that `datasets` will not find rows for.
    """

    folders: list[str]
    renamed: dict[str, str] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)

    def name(self, name: str) -> str:
        """What a picture or mask of the source is called in the result."""
        return self.renamed.get(name, name)

    def folder(self, name: str) -> str:
        """The folder that has the rows of a picture: the innermost above it."""
        above = [folder for folder in self.folders if self.name(name).startswith(f"{folder}/")]
        return max(above, key=len, default="")

    def files(self, kind: str) -> list[str]:
        """Names of the files with rows."""
        return [posixpath.join(folder, FORMATS[kind]) for folder in self.folders]

    def row(self, row: Row) -> Row:
        """A row as it stands in its file: with the names of the result, relative to the file's folder."""
        folder = self.folder(row["file_name"])
        names = {key: self.name(name) for key, name in [("file_name", row["file_name"]), *other_files(row)]}
        return row | ({key: posixpath.relpath(name, folder) for key, name in names.items()} if folder else names)


def places(source: Folder, target: Folder, kind: str) -> Places:
    """Where a result stands.

    Each split of a folder of splits has rows of its own. In a new folder no other name looks like that of a split;
    beside the pictures nothing is renamed, and sub-folders with rows of their own keep them.

    Args:
        source: the pictures. target: where the result goes, the same object if it stays beside the pictures.
        kind: format of the captions.

    Raises:
        DataError: two pictures would have one name in the result.
    """
    if kind == "txt":
        return Places([])
    if target is source:
        own = {
            folder for folder, _, base in (file.rpartition("/") for file in source.metadata) if base == FORMATS[kind]
        }
        splits = splits_of(source.path)
        unseen = [] if splits else [name for name in source.pictures if is_split_like(name)]
        return Places(sorted({*(splits or [""]), *own}), unseen=unseen)
    names = [*source.pictures, *source.masks]
    splits = sorted({name.partition("/")[0] for name in names})
    if not set(splits) <= set(SPLITS):
        return Places([""], _renamed({name: unlike_splits(name) for name in names}))
    inner = {name: name.partition("/") for name in names}
    return Places(
        splits, _renamed({name: f"{split}/{unlike_splits(rest)}" for name, (split, _, rest) in inner.items()})
    )


def _renamed(names: dict[str, str]) -> dict[str, str]:
    """Those that change."""
    taken: dict[str, str] = {}
    for name, new in names.items():
        if taken.setdefault(new, name) != name:
            raise DataError(f"'{taken[new]}' and '{name}' would both be called '{new}' in the result; rename one")
    return {name: new for name, new in names.items() if name != new}
