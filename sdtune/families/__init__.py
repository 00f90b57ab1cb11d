"""Families: which model a run trains. Adding one is a file here and a line in `FAMILIES`."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdtune.families.base import Family

FAMILIES = {
    "stable-diffusion": "sdtune.families.stable_diffusion:StableDiffusion",
    "sdxl": "sdtune.families.sdxl:StableDiffusionXL",
}


def family_class(name: str) -> "type[Family]":
    """The class behind a name of `FAMILIES`."""
    module, _, attribute = FAMILIES[name].partition(":")
    return getattr(import_module(module), attribute)
