"""The networks: diffusers' UNet and VAE, written to be read.

Importing this package is cheap; torch and diffusers are imported when a class is first asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdtune.models.unet import UNet2DConditionModel
    from sdtune.models.vae import AutoencoderKL

__all__ = ["AutoencoderKL", "UNet2DConditionModel"]

_HOMES = {"AutoencoderKL": "sdtune.models.vae", "UNet2DConditionModel": "sdtune.models.unet"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
