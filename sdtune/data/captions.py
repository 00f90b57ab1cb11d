"""Captions as they stand in a cell of a table, and the fault when there are none."""

from collections.abc import Sequence
from typing import Any

from sdtune.errors import DataError

PROMPT = "'a photo of sks dog'"  # an example


def captions_of(text: Any) -> list[str]:
    """The captions in one cell: a text, a list of texts, or nothing. Stray spaces go, and blank captions with them."""
    texts = text if isinstance(text, (list, tuple)) else [text]
    return [str(caption).strip() for caption in texts if caption is not None and str(caption).strip()]


def named_classes(values: Sequence[Any], feature: Any) -> list[Any]:
    """The cells of a column; class numbers become the names that they stand for, and -1, for none, becomes None.

    Args:
        feature: what HF `datasets` knows of the column, None where it knows nothing.
    """
    names = getattr(feature, "names", None)  # of a ClassLabel
    if names is None:
        return list(values)
    return [names[value] if isinstance(value, int) and value >= 0 else None for value in values]


def counted(number: int, noun: str) -> str:
    """1 picture, 1,200 pictures."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def setting(key: str, name: str, value: str) -> str:
    """What to type to set something of a data set: an option of a command, or with a key that of its recipe."""
    return f"{key}.{name}={value}" if key else f"--{name.replace('_', '-')} {value}"


def no_captions(where: str, names: Sequence[str], expected: str, key: str) -> DataError:
    """Pictures without caption; `expected` says where one would stand."""
    return DataError(
        f"{where}: {some(names)} without caption; expected {expected}. Give all pictures one caption with: "
        f"{setting(key, 'prompt', PROMPT)}, or write a copy without them: sdtune check {where} --fix OUT"
    )


def some(names: Sequence[str]) -> str:
    """The first five of the names, and how many there are."""
    return f"{counted(len(names), 'picture')}, {first_of(names)}, {'is' if len(names) == 1 else 'are'}"


def first_of(names: Sequence[str], most: int = 5) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
