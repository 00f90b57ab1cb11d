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
    "textual-inversion": "sdtune.adapters.textual_inversion:TextualInversion",
}

FACTORS = ("rank", "alpha", "targets", "init_from")
NETWORKS = ("text_encoder", "text_encoder_until", "denoiser_from")  # which of them learn, and when
LOW_RANK = (*FACTORS, "tokens", *NETWORKS)
# The settings of a recipe's `adapter` that each kind reads.
SETTINGS: dict[str, tuple[str, ...]] = {
    "full": ("decoder_only", *NETWORKS),
    "lora": LOW_RANK,
    "rslora": LOW_RANK,
    "dora": LOW_RANK,
    "lokr": (*LOW_RANK, "factor"),
    "loha": LOW_RANK,
    "textual-inversion": ("tokens", "init_from"),
}


def adapter_class(kind: str) -> "Callable[..., Adapter]":
    """The class behind a name of `ADAPTERS`; its arguments have the names of settings."""
    module, _, attribute = ADAPTERS[kind].partition(":")
    return getattr(import_module(module), attribute)
