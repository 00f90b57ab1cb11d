"""What a VAE makes of pictures: each beside its reconstruction, and how near the two are."""

import math
from collections.abc import Iterable, Iterator

import torch
from PIL import Image
from torch import Tensor

from sdtune.data.images import to_float
from sdtune.families.base import Family


@torch.no_grad()
def reconstructions(family: Family, pictures: Iterable[Tensor]) -> Iterator[tuple[Image.Image, float]]:
    """Each picture on the left and what the VAE decodes of its latents' mean on the right, and the PSNR in dB.

    Args:
        pictures: uint8, (3, H, W) each, in sizes that the VAE divides.
    """
    vae = family.modules["vae"]
    for pixels in pictures:
        mean, _ = family.encode_images(to_float(pixels[None].to(vae.device)))  # (1, C, h, w)
        decoded = family.decode_images(mean)[0]  # (3, H, W)
        back = ((decoded + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8)
        both = torch.cat([pixels, back], dim=2)  # (3, H, 2 W)
        yield Image.fromarray(both.permute(1, 2, 0).numpy()), psnr(pixels, back)


def psnr(picture: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures of 8 bits; infinite where they are equal."""
    error = (picture.double() - other.double()).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else math.inf
