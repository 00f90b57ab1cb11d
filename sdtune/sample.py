"""Pictures from a model, through diffusers pipelines."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdtune.diffusion import draws
from sdtune.families.base import Conditioning, Family

if TYPE_CHECKING:
    from PIL.Image import Image


def initial_noise(family: Family, seeds: Sequence[int], height: int, width: int) -> Tensor:
    """Where sampling starts, one pure function of each seed: (N, C, h, w), standard normal."""
    shape = family.latent_shape(height, width)
    return torch.stack([draws.normal(shape, seed, "initial sample noise") for seed in seeds])


@torch.no_grad()
def draw_pictures(
    family: Family,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    height: int,
    width: int,
    steps: int = 25,
    guidance: float = 7.5,
    negative_prompt: str = "",
    batch_size: int = 16,
) -> Iterator["Image"]:
    """One picture for each prompt and seed, in order, drawn in batches.

    Args:
        family: the model; its networks are used as they are, adapters and all.
        prompts, seeds: of equal length; a picture depends on its own prompt and seed alone.
        height, width: in pixels, multiples of what the VAE divides by.
        steps: denoising steps. guidance: classifier-free guidance scale; 1 or less is off.
        negative_prompt: what guidance leads away from.
        batch_size: pictures at a time.
    """
    pipeline = family.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    device = family.modules[family.denoiser].device
    with evaluating(family):
        for start in range(0, len(prompts), batch_size):
            some = list(prompts[start : start + batch_size])
            noise = initial_noise(family, seeds[start : start + batch_size], height, width)
            words = pipeline_words(family, some, "")
            if guidance > 1:
                words |= pipeline_words(family, [negative_prompt] * len(some), "negative_")
            yield from pipeline(
                **words,
                latents=noise.to(device=device, dtype=family.modules[family.denoiser].dtype),
                num_inference_steps=steps,
                guidance_scale=guidance,
                height=height,
                width=width,
            ).images


def pipeline_words(family: Family, prompts: list[str], kind: str) -> dict[str, Tensor]:
    """Prompts as a pipeline's keyword arguments, encoded exactly as in training."""
    conditioning: Conditioning = family.encode_text(prompts)
    dtype = family.modules[family.denoiser].dtype
    words = {f"{kind}prompt_embeds": conditioning.text.to(dtype)}
    if conditioning.pooled is not None:
        words[f"{kind}pooled_prompt_embeds"] = conditioning.pooled.to(dtype)
    return words


@contextlib.contextmanager
def evaluating(family: Family) -> Iterator[None]:
    """Every network in evaluation mode; afterwards as before."""
    training = {name: network.training for name, network in family.modules.items()}
    try:
        for network in family.modules.values():
            network.eval()
        yield
    finally:
        for name, network in family.modules.items():
            network.train(training[name])
