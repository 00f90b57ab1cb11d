"""Adapters: which parameters of a model learn. Adding one is a file here and a line in `ADAPTERS`."""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdtune.adapters.base import Adapter

ADAPTERS = {
    "full": "sdtune.adapters.full:Full",
    "lora": "sdtune.adapters.lora:Lora",
}


def adapter_class(kind: str) -> "Callable[..., Adapter]":
    """The class behind a name of `ADAPTERS`; each takes settings of its own."""
    module, _, attribute = ADAPTERS[kind].partition(":")
    return getattr(import_module(module), attribute)
