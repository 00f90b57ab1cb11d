"""Which configurations of diffusers' UNet2DConditionModel ours computes, and what they say of its levels."""

from collections.abc import Mapping
from typing import Any

from sdtune.models.config import each
from sdtune.models.unet_blocks import Level

# The values that this network computes as diffusers does, for the keys where diffusers knows more of them.
# upcast_attention is free: it has no effect in diffusers either where SDPA (which accumulates in float32) attends.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", None),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "only_cross_attention": (False,),
    "downsample_padding": (0, 1),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "reverse_transformer_layers_per_block": (None,),
    "encoder_hid_dim_type": (None, "text_proj"),
    "num_attention_heads": (None,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "addition_embed_type": (None, "text_time"),
    "num_class_embeds": (None,),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1,),
    "time_embedding_type": ("positional",),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,),
    "addition_embed_type_num_heads": (64,),
}

WHOLE = (
    "in_channels",
    "out_channels",
    "block_out_channels",
    "layers_per_block",
    "norm_num_groups",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "attention_head_dim",
)
PER_LEVEL = (
    "down_block_types",
    "up_block_types",
    "only_cross_attention",
    "layers_per_block",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "attention_head_dim",
)


def misfits(config: Mapping[str, Any]) -> set[str]:
    """Keys that do not fit to the others: heads that do not divide the channels, SDXL's sizes without their use, a
    width of text that no layer changes."""
    wrong, channels, heads = set(), config["block_out_channels"], config["attention_head_dim"]
    context = config["cross_attention_dim"]
    counts = [*each(channels), *each(heads)]
    if all(type(n) is int and n > 0 for n in counts):
        pairs = zip(channels, each(heads, len(channels)), strict=False)
        if any(c % n for c, n in pairs):
            wrong.add("attention_head_dim")
    hid_dim, projected = config["encoder_hid_dim"], config["encoder_hid_dim_type"] is not None
    if (hid_dim is not None) != projected or (projected and not all(type(n) is int for n in (hid_dim, context))):
        wrong |= {"encoder_hid_dim", "encoder_hid_dim_type"}
    text_time = config["addition_embed_type"] == "text_time"
    sizes = ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
    return wrong | {key for key in sizes if (config[key] is not None) != text_time}


def levels_of(config: Mapping[str, Any], temb_channels: int) -> list[Level]:
    """The sizes of the levels, from the full resolution down."""
    n = len(config["block_out_channels"])
    return [
        Level(
            channels=channels,
            layers=layers,
            heads=heads,
            depth=depth,
            context_channels=context,
            linear=config["use_linear_projection"],
            temb_channels=temb_channels,
            groups=config["norm_num_groups"],
            eps=config["norm_eps"],
            dropout=config["dropout"],
        )
        for channels, layers, heads, depth, context in zip(
            config["block_out_channels"],
            each(config["layers_per_block"], n),
            each(config["attention_head_dim"], n),
            each(config["transformer_layers_per_block"], n),
            each(config["cross_attention_dim"], n),
            strict=True,
        )
    ]
