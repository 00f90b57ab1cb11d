"""A recipe as it may be shown to anyone: without the names of files and folders on this machine."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sdtune.config.recipe import Recipe
from sdtune.config.shipped import ASSET_PREFIX, TINY
from sdtune.hub_access import looks_like_hub_id

# Which settings may name a file or folder (a test sees to it that each setting is here or in TEXTS).
MODELS = r"model\.(base|vae|from_config\.\w+)"
PLACES = r"data\.\d+\.(path|prompts)|adapter\.init_from|train\.cache_dir"
TEXTS = (
    r"task|(objective|images|optimizer)\..*|model\.(family|variant|revision|quantize)|adapter\.(kind|targets|tokens\..*)"
    r"|data\.\d+\.(hub|split|image_column|text_column|prompt|role)|train\.(precision|attention)|output\.\w+"
    r"|validate\.samples\.(prompts|sampler)"
)
PLACEHOLDERS = re.compile(r"^\w+\.(?=\D)|\.path$")  # model.base becomes path/to/base, data.0.path path/to/data-0
LOCAL = re.compile(r"(/|~|\.\.?[/\\]|[A-Za-z]:[/\\]|\\\\)")  # how a path begins, on one system or another


def shareable(recipe: Recipe, name: str) -> Recipe:
    """The recipe with places on this machine replaced by ones such as path/to/base, and written to runs/`name`."""
    values = _cleaned(recipe.model_dump(by_alias=True), "")
    values["output"] |= {"dir": f"runs/{name}", "push_to_hub": None, "private": False}
    return Recipe.model_validate(values)


def shareable_notes(notes: Mapping[str, Any]) -> dict[str, Any]:
    """The same for the notes beside weights, which have a recipe's `model` settings at their top."""
    return {key: _cleaned(value, f"model.{key}") for key, value in notes.items()}


def is_local(name: str) -> bool:
    """Whether a model's name is a place on this machine, and not tiny, an asset, a web address or a hub id."""
    if name == TINY or name.startswith(ASSET_PREFIX) or "://" in name:
        return False
    return Path(name).exists() or not looks_like_hub_id(name)


def _cleaned(value: Any, key: str) -> Any:
    """A value, or a section of values, whose dotted key is `key`."""
    if isinstance(value, Mapping):
        return {name: _cleaned(part, f"{key}.{name}".lstrip(".")) for name, part in value.items()}
    if isinstance(value, list):
        return [_cleaned(part, f"{key}.{number}") for number, part in enumerate(value)]
    if not isinstance(value, str):
        return value
    if re.fullmatch(MODELS, key):
        if "://" in value:
            address = urlsplit(value)
            return f"{address.scheme}://{address.hostname}{address.path}"  # a password may stand in the rest
        local = is_local(value)
    elif re.fullmatch(PLACES, key):
        local = not value.startswith(ASSET_PREFIX)
    else:
        local = bool(LOCAL.match(value)) or str(Path.home()) in value
    return f"path/to/{PLACEHOLDERS.sub('', key).replace('.', '-')}" if local else value
