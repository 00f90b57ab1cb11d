"""The denoising network of Stable Diffusion 1.x, 2.x and SDXL.

Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 3.2;
Podell et al. 2023, "SDXL", section 2, for the sizes as further conditions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.peft_utils import apply_lora_scale
from torch import Tensor, nn
from torch.nn import functional as F

from sdtune.models.config import StockModel
from sdtune.models.layers import TimestepEmbedding, sinusoid
from sdtune.models.unet_blocks import Conditioning, DownBlock, MidBlock, UpBlock
from sdtune.models.unet_config import PER_LEVEL, SUPPORTED, WHOLE, levels_of, misfits

MASKED = -10000.0  # added to the score of a masked token, as in diffusers; minus infinity would give NaN if all are


@dataclass
class UNet2DConditionOutput(BaseOutput):
    """sample: what the network predicts, (B, out_channels, H, W)."""

    sample: Tensor


class UNet2DConditionModel(StockModel):
    """Predicts the noise (or velocity) in latents; names, configuration and calls are diffusers' class of that name.

    The arguments are the keys of its `config.json`, as in diffusers 0.42. Beware of `attention_head_dim`: it is
    the *number* of heads, one for all levels (SD 1.x) or one a level (SD 2.x, SDXL); the name is a historical error
    that all published files share.

    Raises:
        WeightsError: a key or value that this class would not compute as diffusers does.
    """

    SUPPORTED = SUPPORTED
    WHOLE = WHOLE
    PER_LEVEL = PER_LEVEL
    _supports_gradient_checkpointing = True
    _repeated_blocks = ["BasicTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 4,
        out_channels: int = 4,
        center_input_sample: bool = False,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        down_block_types: tuple[str, ...] = (
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        mid_block_type: str | None = "UNetMidBlock2DCrossAttn",
        up_block_types: tuple[str, ...] = (
            "UpBlock2D",
            "CrossAttnUpBlock2D",
            "CrossAttnUpBlock2D",
            "CrossAttnUpBlock2D",
        ),
        only_cross_attention: bool | tuple[bool, ...] = False,
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        layers_per_block: int | tuple[int, ...] = 2,
        downsample_padding: int = 1,
        mid_block_scale_factor: float = 1,
        dropout: float = 0.0,
        act_fn: str = "silu",
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int | tuple[int, ...] = 1280,
        transformer_layers_per_block: int | tuple[int, ...] = 1,
        reverse_transformer_layers_per_block: None = None,
        encoder_hid_dim: int | None = None,
        encoder_hid_dim_type: str | None = None,
        attention_head_dim: int | tuple[int, ...] = 8,
        num_attention_heads: None = None,
        dual_cross_attention: bool = False,
        use_linear_projection: bool = False,
        class_embed_type: None = None,
        addition_embed_type: str | None = None,
        addition_time_embed_dim: int | None = None,
        num_class_embeds: None = None,
        upcast_attention: bool | None = False,
        resnet_time_scale_shift: str = "default",
        resnet_skip_time_act: bool = False,
        resnet_out_scale_factor: float = 1.0,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        time_embedding_act_fn: None = None,
        timestep_post_act: None = None,
        time_cond_proj_dim: int | None = None,
        conv_in_kernel: int = 3,
        conv_out_kernel: int = 3,
        projection_class_embeddings_input_dim: int | None = None,
        attention_type: str = "default",
        class_embeddings_concat: bool = False,
        mid_block_only_cross_attention: bool | None = None,
        cross_attention_norm: None = None,
        addition_embed_type_num_heads: int = 64,
    ) -> None:
        super().__init__()
        width = block_out_channels[0]
        temb_channels = time_embedding_dim or 4 * width

        self.time_embedding = TimestepEmbedding(width, temb_channels, time_cond_proj_dim)
        if addition_embed_type == "text_time":
            assert projection_class_embeddings_input_dim is not None  # `misfits` has seen to that
            self.add_embedding = TimestepEmbedding(projection_class_embeddings_input_dim, temb_channels)

        if encoder_hid_dim is not None:
            self.encoder_hid_proj = nn.Linear(encoder_hid_dim, cross_attention_dim)  # type: ignore[arg-type]

        levels = levels_of(self.config, temb_channels)
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()

        skips = [width]  # channels of the feature maps that go over to the way up
        for kind, level in zip(down_block_types, levels, strict=True):
            padding = None if level is levels[-1] else downsample_padding
            self.down_blocks.append(DownBlock(skips[-1], level, "CrossAttn" in kind, padding))
            skips += [level.channels] * (level.layers + (padding is not None))

        self.mid_block = None if mid_block_type is None else MidBlock(levels[-1])

        width = levels[-1].channels
        for kind, level in zip(up_block_types, levels[::-1], strict=True):
            taken = [skips.pop() for _ in range(level.layers + 1)]
            self.up_blocks.append(UpBlock(width, taken, level, "CrossAttn" in kind, upsample=level is not levels[0]))
            width = level.channels

        self.conv_norm_out = nn.GroupNorm(norm_num_groups, width, norm_eps)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    @classmethod
    def faults(cls, config: Mapping[str, Any]) -> set[str]:
        return super().faults(config) | misfits(config)

    @apply_lora_scale("cross_attention_kwargs")
    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor | None,
        class_labels: None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predict the noise (or velocity) in `sample`.

        Args:
            sample: noisy latents x_t, (B, in_channels, H, W), any H and W.
            timestep: t, one number for all or one a sample, (B,).
            encoder_hidden_states: tokens of the text, (B, M, cross_attention_dim), or (B, M, encoder_hid_dim) where the
                network adapts their width itself.
            timestep_cond: guidance embedding, (B, time_cond_proj_dim), of models distilled for it (LCM).
            attention_mask: 1 for the pixels that may be attended to, 0 for the others, (B, H * W). Only for models
                whose attention is all at one resolution.
            cross_attention_kwargs: {"scale": s} multiplies the effect of LoRA layers by s for this call.
            added_cond_kwargs: for SDXL, "text_embeds" (B, C_pooled) and "time_ids" (B, 6): original size, crop
                and target size in pixels.
            down_block_additional_residuals, mid_block_additional_residual: what a ControlNet adds to the skips and
                at the bottom.
            encoder_attention_mask: 1 for the tokens of the text that may be attended to, 0 for the others, (B, M).
            return_dict: False gives a tuple of one.
            class_labels, down_intrablock_additional_residuals: only for diffusers' signature; must be None.

        Returns:
            `.sample`, (B, out_channels, H, W).

        Raises:
            ValueError: an argument that this network does not take, or lacks.
        """
        refuse_arguments(
            class_labels=class_labels,
            down_intrablock_additional_residuals=down_intrablock_additional_residuals,
            **{f"cross_attention_kwargs[{key!r}]": value for key, value in (cross_attention_kwargs or {}).items()},
        )
        emb = self.embed(sample, timestep, timestep_cond, added_cond_kwargs)
        if encoder_hidden_states is not None and self.config["encoder_hid_dim"] is not None:
            encoder_hidden_states = self.encoder_hid_proj(encoder_hidden_states)  # (B, M, cross_attention_dim)
        c = Conditioning(
            F.silu(emb),
            encoder_hidden_states,
            mask_bias(attention_mask, sample.dtype),
            mask_bias(encoder_attention_mask, sample.dtype),
        )

        x = self.conv_in(sample)  # (B, C, H, W)
        skips = [x]
        for block in self.down_blocks:
            skips += block(skips[-1], c)
        x = skips[-1]
        if down_block_additional_residuals is not None:
            skips = [skip + extra for skip, extra in zip(skips, down_block_additional_residuals, strict=True)]
        if self.mid_block is not None:
            x = self.mid_block(x, c)
        if mid_block_additional_residual is not None:
            x = x + mid_block_additional_residual
        for block in self.up_blocks:
            x = block(x, skips, c)

        x = self.conv_out(F.silu(self.conv_norm_out(x)))
        return UNet2DConditionOutput(sample=x) if return_dict else (x,)

    def embed(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        timestep_cond: Tensor | None,
        added_cond_kwargs: Mapping[str, Tensor] | None,
    ) -> Tensor:
        """The timestep and, in SDXL, the pooled text and the sizes, as one embedding (B, T)."""
        config = self.config
        wave = {"cos_first": config["flip_sin_to_cos"], "freq_shift": config["freq_shift"]}
        t = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))  # (B,)
        waves = sinusoid(t, config["block_out_channels"][0], **wave)
        emb = self.time_embedding(waves.to(sample.dtype), timestep_cond)  # (B, T)
        if config["addition_embed_type"] is None:
            return emb

        missing = {"text_embeds", "time_ids"} - set(added_cond_kwargs or {})
        if added_cond_kwargs is None or missing:
            raise ValueError(f"this UNet (SDXL) needs added_cond_kwargs with text_embeds and time_ids, lacks {missing}")
        pooled, sizes = added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"]
        waves = sinusoid(sizes.flatten(), config["addition_time_embed_dim"], **wave)  # (B * 6, D)
        waves = waves.reshape(len(pooled), -1)  # (B, 6 * D)
        return emb + self.add_embedding(torch.cat([pooled, waves], dim=-1).to(emb.dtype))


def mask_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask of 1 (keep) and 0 (B, M) as what is added to attention scores, (B, 1, 1, M)."""
    return None if mask is None else ((1 - mask.to(dtype)) * MASKED)[:, None, None, :]


def refuse_arguments(**arguments: Any) -> None:
    """Raise ValueError that names the arguments which are not None: better than computing something without them."""
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise ValueError(f"sdtune's UNet2DConditionModel does not take {', '.join(given)}; pass None")
