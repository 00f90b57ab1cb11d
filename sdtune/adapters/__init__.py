"""Adapters: which parameters of a model learn. One is a file here, a line in `ADAPTERS`, one in `SETTINGS`."""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdtune.adapters.base import Adapter

ADAPTERS = {
    "full": "sdtune.adapters.full:Full",
    "lora": "sdtune.adapters.lora:Lora",
    "rslora": "sdtune.adapters.lora:RsLora",
    "dora": "sdtune.adapters.lora:Dora",
    "lokr": "sdtune.adapters.lokr:LoKr",
    "loha": "sdtune.adapters.loha:LoHa",
}

LOW_RANK = ("rank", "alpha", "targets", "init_from")
# The settings of a recipe's `adapter` that each kind is made from.
SETTINGS: dict[str, tuple[str, ...]] = {
    "full": ("decoder_only",),
    "lora": LOW_RANK,
    "rslora": LOW_RANK,
    "dora": LOW_RANK,
    "lokr": (*LOW_RANK, "factor"),
    "loha": LOW_RANK,
}


def adapter_class(kind: str) -> "Callable[..., Adapter]":
    """The class behind a name of `ADAPTERS`; its arguments are named in `SETTINGS`."""
    module, _, attribute = ADAPTERS[kind].partition(":")
    return getattr(import_module(module), attribute)
