"""The networks: diffusers' UNet and VAE, written to be read, and small denoisers for pixels.

Importing this package is cheap; torch and diffusers are imported when a class is first asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdtune.models.unet import UNet2DConditionModel
    from sdtune.models.vae import AutoencoderKL

__all__ = ["DENOISERS", "AutoencoderKL", "UNet2DConditionModel", "denoiser_class"]

# What `model.from_config.denoiser.kind` of family pixel names. Each is made of its settings, among them `size`,
# `channels` and `classes`, and called as
# forward(x_t (B, C, H, W), t (B,) in [0, 1], labels (B,) int64 or None) -> (B, C, H, W).
DENOISERS = {
    "score_concat": "sdtune.models.score:ScoreConcat",
    "score_add": "sdtune.models.score:ScoreAdd",
    "score_attention": "sdtune.models.score_attention:ScoreAttention",
    "resnet_decoder": "sdtune.models.resnet:ResNetDecoder",
    "segnet": "sdtune.models.segnet:SegNet",
    "unet": "sdtune.models.pixel_unet:PixelUNet",
}

_HOMES = {"AutoencoderKL": "sdtune.models.vae", "UNet2DConditionModel": "sdtune.models.unet"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def denoiser_class(name: str) -> Any:
    """The class behind a name of `DENOISERS`."""
    from importlib import import_module

    module, _, attribute = DENOISERS[name].partition(":")
    return getattr(import_module(module), attribute)
