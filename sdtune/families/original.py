"""The names of the original Stable Diffusion code: of single-file checkpoints, and of kohya's LoRA for SDXL.

diffusers counts blocks by level, the original code counts them through; this module knows both.

Source of the names: CompVis/stable-diffusion (UNet, VAE), Stability-AI/generative-models (SDXL) and
mlfoundations/open_clip.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sdtune.families.saving import historical_key, is_clip

State = Mapping[str, Tensor]

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer."  # of Stable Diffusion 1.x
OPEN_CLIP = "cond_stage_model.model."  # of 2.x
CLIP_XL, OPEN_CLIP_XL = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
TEXT = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}


def unet_places(config: Mapping[str, Any]) -> dict[str, str]:
    """Beginnings of the UNet's names, diffusers' and the original, for a UNet of that config.json."""
    places, layers = dict(OUTSIDE), config["layers_per_block"]
    number = 1
    for level, kind in enumerate(config["down_block_types"]):
        for layer in range(layers):
            places[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{number}.0"
            if "CrossAttn" in kind:
                places[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        places[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
        number += 1
    number = 0
    for level, kind in enumerate(config["up_block_types"]):
        attends = "CrossAttn" in kind
        for layer in range(layers + 1):
            places[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{number}.0"
            if attends:
                places[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{number}.1"
            number += 1
        places[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{1 + attends}.conv"
    return places


def unet_name(name: str, places: Mapping[str, str]) -> str:
    """The original name of a UNet's module or parameter, without `UNET` before it. Raises KeyError if it has none."""
    start = next((start for start in places if f"{name}.".startswith(f"{start}.")), None)
    if start is None:
        raise KeyError(name)
    rest = name.removeprefix(start)
    if ".resnets." in start:
        rest = re.sub("|".join(RESNET), lambda found: RESNET[found.group()], rest)
    return places[start] + rest


def vae_name(name: str, levels: int) -> str:
    """The original name of a VAE's parameter, without `VAE` before it; its decoder counts levels from the end."""
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda found: f"up.{levels - 1 - int(found[1])}.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda found: f"up.{levels - 1 - int(found[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    if "mid_block.attentions.0." in name:
        start, part = name.split("mid_block.attentions.0.")
        module, _, kind = part.rpartition(".")
        name = f"{start}mid.attn_1.{VAE_ATTENTION[module]}.{kind}"
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def original_unet(state: State, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """A UNet's tensors under their original names."""
    places = unet_places(config)
    return {UNET + unet_name(name, places): tensor for name, tensor in state.items()}


def original_vae(state: State, levels: int, prefix: str = VAE) -> dict[str, Tensor]:
    """A VAE's tensors under their original names; what diffusers has as linear layers are 1 x 1 convolutions there."""
    tensors = {}
    for name, tensor in state.items():
        convolution = ".attentions." in name and tensor.ndim == 2
        tensors[prefix + vae_name(name, levels)] = tensor[:, :, None, None] if convolution else tensor
    return tensors


def original_clip(state: State, prefix: str) -> dict[str, Tensor]:
    """OpenAI's CLIP keeps the names of transformers, from before version 5."""
    return {prefix + historical_key(name): tensor for name, tensor in state.items()}


def original_open_clip(state: State, prefix: str) -> dict[str, Tensor]:
    """A text encoder in the layout of open_clip, where query, key and value are one matrix."""
    tensors, state = {}, {historical_key(name): tensor for name, tensor in state.items()}
    for name, tensor in state.items():
        layer = re.match(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$", name)
        if name in TEXT:
            tensors[prefix + TEXT[name]] = tensor
        elif name == "text_projection.weight":
            tensors[f"{prefix}text_projection"] = tensor.T
        elif layer and layer[2] == "self_attn.q_proj":
            three = [state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            tensors[f"{prefix}transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}"] = torch.cat(three)
        elif layer and layer[2] not in ("self_attn.k_proj", "self_attn.v_proj"):
            tensors[f"{prefix}transformer.resblocks.{layer[1]}.{LAYER[layer[2]]}.{layer[3]}"] = tensor
        elif not layer:
            raise KeyError(name)
    return tensors


def original_checkpoint(networks: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors of a model in one file's names.

    Args:
        networks: by the name of their folder in a pipeline: unet, vae, text_encoder, for SDXL text_encoder_2; without
            weights of adapters. A VAE alone keeps its names without `VAE` before them.

    Raises:
        KeyError: a tensor of a kind that the original code does not have.
    """
    states = {name: network.state_dict() for name, network in networks.items()}
    levels = len(networks["vae"].config.block_out_channels)
    if set(states) == {"vae"}:
        return original_vae(states["vae"], levels, prefix="")
    if not is_clip(networks["text_encoder"]):
        raise KeyError(next(iter(states["text_encoder"])))
    tensors = original_unet(states["unet"], networks["unet"].config) | original_vae(states["vae"], levels)
    if "text_encoder_2" in states:
        tensors |= original_clip(states["text_encoder"], CLIP_XL)
        tensors |= original_open_clip(states["text_encoder_2"], OPEN_CLIP_XL)
    elif is_open_clip(networks["text_encoder"].config):
        tensors |= original_open_clip(states["text_encoder"], OPEN_CLIP)
    else:
        tensors |= original_clip(states["text_encoder"], CLIP)
    return tensors


def is_open_clip(config: Any) -> bool:
    """Whether a text encoder comes from open_clip, as that of Stable Diffusion 2.x; OpenAI's has another activation."""
    return config.hidden_act == "gelu"
