"""Stable Diffusion XL: two text encoders, and a UNet that is told of the picture's sizes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdtune.families import PARTS, fingerprints, text_encoders
from sdtune.families.base import Conditioning
from sdtune.families.inpainting import with_channels
from sdtune.families.stable_diffusion import StableDiffusion

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class StableDiffusionXL(StableDiffusion):
    """Family `sdxl`: text of two encoders side by side, a pooled embedding, sizes and crops.

    Source: Podell et al. 2023, "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis".
    """

    text_encoders = ("text_encoder", "text_encoder_2")
    text_kinds = {"text_encoder": ("CLIPTextModel",), "text_encoder_2": ("CLIPTextModelWithProjection",)}
    parts = PARTS["sdxl"]
    pipeline_names = ("StableDiffusionXLPipeline", "StableDiffusionXLInpaintPipeline")

    zero_empty = True  # whether an empty prompt is all zeros: `force_zeros_for_empty_prompt` of model_index.json

    @classmethod
    def assemble(
        cls, opened: Mapping[str, Any], index: Mapping[str, Any], clip_skip: int, max_tokens: int
    ) -> "StableDiffusionXL":
        """As for Stable Diffusion, with the second tokenizer."""
        family = super().assemble(opened, index, clip_skip, max_tokens)
        assert isinstance(family, cls)
        if "tokenizer_2" in opened:
            family.tokenizers["tokenizer_2"] = opened["tokenizer_2"]
        family.zero_empty = index.get("force_zeros_for_empty_prompt", True)
        return family

    def latent_scale(self) -> tuple[Tensor | float, Tensor | float]:
        """See `StableDiffusion.latent_scale`; some VAEs have a mean and deviation for each channel."""
        vae = self.modules["vae"]
        mean, std, scale = vae.config.latents_mean, vae.config.latents_std, vae.config.scaling_factor
        if mean is None or std is None:
            return 0.0, scale
        shape = (1, -1, 1, 1)
        shift, deviation = (torch.tensor(values, device=vae.device).view(shape) for values in (mean, std))
        return shift, scale / deviation

    def unread(self, name: str) -> tuple[str, ...]:
        """See `Family.unread`: of the first text encoder the last layer. (Of the second all is pooled.)"""
        if name == "text_encoder":
            return (*text_encoders.unread(self.modules[name], 1 + self.clip_skip), "final_layer_norm.")
        return () if name == "text_encoder_2" else super().unread(name)

    def hidden(self, network: Any, answer: Any) -> Tensor:
        """The layer before the last (and `clip_skip` more before it), not normalised: (B, 77, D)."""
        return answer.hidden_states[-2 - self.clip_skip]

    def encode_text(self, captions: Sequence[str]) -> Conditioning:
        """Token embeddings (B, L, D1 + D2) and the second encoder's pooled embedding (B, P).

        An empty caption is all zeros, as the pipeline has it for a missing negative prompt: what is dropped in training
        is what guidance leads away from.
        """
        first, _ = self.embed("text_encoder", "tokenizer", captions)
        second, answer = self.embed("text_encoder_2", "tokenizer_2", captions)
        text, pooled = torch.cat([first, second], dim=-1), answer.text_embeds
        if self.zero_empty:
            keep = torch.tensor([float(caption != "") for caption in captions], dtype=text.dtype, device=text.device)
            text, pooled = text * keep[:, None, None], pooled * keep[:, None]
        return Conditioning(text, pooled)

    def text_fingerprint(self) -> str:
        """See `Family.text_fingerprint`."""
        return fingerprints.fingerprint(super().text_fingerprint(), self.zero_empty)

    def with_sizes(self, conditioning: Conditioning, sizes: Sequence[Sequence[int]]) -> Conditioning:
        """Add `time_ids`, (B, 6)."""
        return replace(conditioning, time_ids=torch.tensor(sizes, device=conditioning.text.device))

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The UNet's answer, (B, C, h, w)."""
        added = {"text_embeds": conditioning.pooled, "time_ids": conditioning.time_ids}
        return self.modules["unet"](
            with_channels(x_t, conditioning),
            t,
            encoder_hidden_states=conditioning.text,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    def pipeline(self) -> "DiffusionPipeline":
        """A diffusers pipeline over these networks."""
        return self.pipeline_class()(
            **self.modules,
            **self.tokenizers,
            scheduler=self.sampler(),
            force_zeros_for_empty_prompt=self.zero_empty,
            add_watermarker=False,
        )
