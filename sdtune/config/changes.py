"""What differs between two recipes, and what of it a run that goes on can bear."""

from typing import Any

from sdtune.config.recipe import Recipe

# What may change between two parts of a run: how long, how it is watched and where it is computed, but not what is
# learned. (That batch_size * accumulate * processes stays the same is checked where the checkpoint is read.)
FREE = ("train.steps", "train.workers", "train.cache", "train.cache_dir", "train.gradient_checkpointing",
        "train.compile",
        "train.batch_size", "train.accumulate", "validate.every", "validate.count", "validate.samples",
        "output")  # fmt: skip


def changes(before: Recipe, after: Recipe) -> list[tuple[str, Any, Any]]:
    """Settings that a run cannot change on its way.

    Returns:
        (dotted key, value before, value after) of each that differs.
    """
    old, new = _flat(before.model_dump(by_alias=True)), _flat(after.model_dump(by_alias=True))
    keys = [*old, *(key for key in new if key not in old)]
    return [(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key) and not _is_free(key)]


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(free + ".") for free in FREE)


def _flat(section: Any, key: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys; lists of settings are numbered from 0."""
    if isinstance(section, list) and any(isinstance(value, dict) for value in section):
        section = dict(enumerate(section))
    if not isinstance(section, dict):
        return {key: section}
    parts = [_flat(value, f"{key}.{name}" if key else str(name)) for name, value in section.items()]
    return {name: value for part in parts for name, value in part.items()}
