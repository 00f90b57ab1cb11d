"""Stable Diffusion XL: two text encoders, and a UNet that is told of the picture's sizes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdtune.families.base import Conditioning
from sdtune.families.stable_diffusion import StableDiffusion, quiet

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline


class StableDiffusionXL(StableDiffusion):
    """Family `sdxl`: text of two encoders side by side, a pooled embedding, sizes and crops.

    Source: Podell et al. 2023, "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis".
    """

    text_encoders = ("text_encoder", "text_encoder_2")
    parts = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    pipeline_names = ("StableDiffusionXLPipeline",)

    @classmethod
    def assemble(cls, opened: Mapping[str, Any], clip_skip: int, max_tokens: int) -> "StableDiffusionXL":
        """As for Stable Diffusion, with the second tokenizer."""
        family = super().assemble(opened, clip_skip, max_tokens)
        assert isinstance(family, cls)
        if "tokenizer_2" in opened:
            family.tokenizers["tokenizer_2"] = opened["tokenizer_2"]
        return family

    @classmethod
    def network_class(cls, part: str) -> Any:
        """The second text encoder has a projection."""
        if part == "text_encoder_2":
            from transformers import CLIPTextModelWithProjection

            return CLIPTextModelWithProjection
        return super().network_class(part)

    def text_width(self, text: Any) -> int:
        """The two encoders' embeddings stand side by side."""
        return text.hidden_size + self.modules["text_encoder_2"].config.hidden_size

    def hidden(self, network: Any, answer: Any) -> Tensor:
        """The layer before the last (and `clip_skip` more before it), not normalised: (B, 77, D)."""
        return answer.hidden_states[-2 - self.clip_skip]

    def encode_text(self, captions: Sequence[str]) -> Conditioning:
        """Token embeddings (B, L, D1 + D2) and the second encoder's pooled embedding (B, P)."""
        first, _ = self.embed("text_encoder", "tokenizer", captions)
        second, answer = self.embed("text_encoder_2", "tokenizer_2", captions)
        return Conditioning(torch.cat([first, second], dim=-1), pooled=answer.text_embeds)

    def with_sizes(self, conditioning: Conditioning, sizes: Sequence[Sequence[int]]) -> Conditioning:
        """Add `time_ids`, (B, 6)."""
        return replace(conditioning, time_ids=torch.tensor(sizes, device=conditioning.text.device))

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The UNet's answer, (B, C, h, w)."""
        added = {"text_embeds": conditioning.pooled, "time_ids": conditioning.time_ids}
        return self.modules["unet"](
            x_t, t, encoder_hidden_states=conditioning.text, added_cond_kwargs=added, return_dict=False
        )[0]

    def pipeline(self) -> "StableDiffusionXLPipeline":  # type: ignore[override]
        """A diffusers pipeline over these networks."""
        from diffusers import StableDiffusionXLPipeline

        return quiet(StableDiffusionXLPipeline)(
            **self.modules, **self.tokenizers, scheduler=self.sampler(), add_watermarker=False
        )
