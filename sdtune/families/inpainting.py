"""Inpainting: a UNet that is told which part of the picture is hidden, and what the rest looks like.

Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 4.5.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdtune.errors import UsageError
from sdtune.families.base import Conditioning, Family

LATENT_CHANNELS = 4  # of every published model for inpainting; other pipelines would not open


def masked_channels(latent_channels: int) -> int:
    """What an inpainting UNet takes: noisy latents, a mask of one channel, the latents of the masked picture."""
    return 2 * latent_channels + 1


def hidden_and_rest(family: Family, pixels: Tensor, masks: Tensor, posterior: Tensor) -> Tensor:
    """What stands beside the noisy latents, as diffusers' inpainting pipelines prepare it: (B, 1 + C, h, w).

    Args:
        family: its VAE encodes the pictures, grey where they are hidden.
        pixels: pictures in [-1, 1], shape (B, 3, H, W).
        masks: uint8, white (128 and more) is hidden and to be painted, shape (B, 1, H, W).
        posterior: standard normal, (B, C, h, w): which latents stand for the rest of each picture.
    """
    hidden = (masks >= 128).float()  # (B, 1, H, W)
    mean, std = family.encode_images(pixels * (1 - hidden))
    return torch.cat([F.interpolate(hidden, mean.shape[-2:]), mean + std * posterior], dim=1)


def with_channels(x_t: Tensor, conditioning: Conditioning) -> Tensor:
    """What the UNet's first layer takes: the noisy latents, and what stands beside them; (B, C, h, w) or more."""
    return x_t if conditioning.beside is None else torch.cat([x_t, conditioning.beside.to(x_t.dtype)], dim=1)


def widen(unet: Any) -> None:
    """Make a UNet of text to image one for inpainting, which at first answers as if nothing of it had changed.

    The weights of the new input channels are zeros, as Stable Diffusion's own inpainting model began.

    Args:
        unet: changed in place; one that inpaints already stays as it is.

    Raises:
        UsageError: its latents are not those that diffusers' inpainting pipelines take.
    """
    old, channels = unet.conv_in, masked_channels(unet.config.out_channels)
    if old.in_channels == channels:
        return
    if unet.config.out_channels != LATENT_CHANNELS:
        raise UsageError(
            f"model.inpaint: the latents of this base have {unet.config.out_channels} channels, and diffusers' "
            f"inpainting pipelines take latents of {LATENT_CHANNELS}; expected a base such as "
            "stable-diffusion-v1-5/stable-diffusion-v1-5"
        )
    wide = nn.Conv2d(channels, old.out_channels, old.kernel_size, padding=old.padding)
    with torch.no_grad():
        wide.weight.zero_()
        wide.weight[:, : old.in_channels] = old.weight
        wide.bias = old.bias
    unet.conv_in = wide.to(old.weight).requires_grad_(old.weight.requires_grad)
    unet.register_to_config(in_channels=channels)
