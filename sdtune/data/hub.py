"""Pictures and captions of a data set of the Hub, through HF `datasets` and its cache."""

from functools import partial
from pathlib import Path
from typing import Any

from sdtune.data.captions import PROMPT, captions_of, named_classes, setting
from sdtune.data.picture import MASK, Picture
from sdtune.errors import DataError, HubError
from sdtune.hub_access import hub_fault


def hub_pictures(
    hub: str, split: str, image_column: str, text_column: str, prompt: str | None, key: str
) -> list[Picture]:
    """One picture a row; a cell with a list of texts holds several captions, one in the column `mask` its mask.

    A class number is the caption that is its name.

    Raises:
        HubError: no network, or no such data set.
        DataError: no such split or column, a row without picture or caption.
    """
    import datasets

    table = _load(hub, split, key)
    wanted = [image_column] if prompt is not None else [image_column, text_column]
    for column in wanted:
        if column not in table.column_names:
            which = "image_column" if column == image_column else "text_column"
            raise DataError(
                f"{hub} ({split}) has no column {column!r}; it has: {', '.join(table.column_names)}. Name the right "
                f"one with: {setting(key, which, 'COLUMN')}"
            )
    try:
        images = table.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    except (TypeError, ValueError) as error:
        raise DataError(f"{hub} ({split}): the column {image_column!r} holds no pictures ({error}).") from error
    masks = None
    if isinstance(table.features.get(MASK), datasets.Image):
        masks = table.select_columns([MASK]).cast_column(MASK, datasets.Image(decode=False))
    if prompt is not None:
        captions: list[tuple[str, ...]] = [(prompt,)] * len(table)
    else:
        texts = named_classes(table[text_column][:], table.features[text_column])
        captions = [tuple(captions_of(text)) for text in texts]
        without = [index for index, texts in enumerate(captions) if not texts]
        if without:
            raise DataError(
                f"{hub} ({split}): {len(without)} rows have no caption in {text_column!r}, the first is row "
                f"{without[0]}; give all pictures one caption with: {setting(key, 'prompt', PROMPT)}, or choose "
                "another column."
            )
    origin = f"{hub}:{split}"
    masked = [False] * len(table) if masks is None else _filled(masks)
    return [
        Picture(
            f"{index:08d}",
            texts,
            1.0,
            partial(_content, images, index, image_column),
            origin,
            partial(_content, masks, index, MASK) if masked[index] else None,
        )
        for index, texts in enumerate(captions)
    ]


def _filled(masks: Any) -> list[bool]:
    """Which rows have a mask; no bytes are read."""
    batches = masks.with_format("arrow").iter(1000)
    return [valid for batch in batches for valid in batch[MASK].is_valid().to_pylist()]


def _load(hub: str, split: str, key: str) -> Any:
    import datasets

    if not Path(hub).exists() and hub_fault(hub, "dataset"):
        raise _no_network(hub, key)
    try:
        return datasets.load_dataset(hub, split=split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise HubError(
            f"the data set {hub!r} is not on the Hub, or not open to you; check the name at https://huggingface.co/"
            "datasets, and log in with: hf auth login"
        ) from error
    except ConnectionError as error:
        raise _no_network(hub, key) from error
    except Exception as error:  # datasets passes on whatever its readers raise
        what = " ".join(str(error).split())
        raise DataError(f"the data set {hub!r} ({split}) cannot be loaded: {what}") from error


def _no_network(hub: str, key: str) -> HubError:
    return HubError(
        f"the data set {hub!r} is not in the cache and the Hub cannot be reached; check the network, or give a local "
        "folder" + (f" with: {key}.hub=null {key}.path=FOLDER" if key else "")
    )


def _content(images: Any, index: int, column: str) -> bytes | str:
    cell = images[index][column] or {}
    content = cell.get("bytes") or cell.get("path")
    if not content:
        raise DataError(f"row {index} of the data set has no picture in {column!r}.")
    return content
