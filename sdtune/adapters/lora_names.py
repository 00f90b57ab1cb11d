"""How LoRA files name the layers and their factors: diffusers, peft, kohya (and LyCORIS), and diffusers' oldest way.

Inside sdtune a layer is called as in a diffusers pipeline, with the historical names of text encoders:
`unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q`, `text_encoder.text_model.encoder.layers.0.mlp.fc1`.
"""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from sdtune.families.original import RESNET, unet_name, unet_places
from sdtune.families.saving import historical_key

NETWORKS = ("unet", "text_encoder", "text_encoder_2")
KOHYA = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
# Parts of module names that hold an underscore of their own, where kohya has one in place of each dot too.
WORDS = re.compile(
    "down_blocks|up_blocks|mid_block|transformer_blocks|to_[qkv]|to_out|proj_in|proj_out|conv_in|conv_out|conv_shortcut"
    "|time_emb_proj|time_embedding|add_embedding|linear_[12]|text_model|self_attn|[qkv]_proj|out_proj|text_projection"
    "|token_embedding|position_embedding|[^_]+"
)
ORIGINAL = re.compile("(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)_[0-9]")
LYCORIS = "hada_[wt][12](?:_[ab])?|lokr_[wt][12](?:_[ab])?"
# What follows the name of a layer, in every style.
PARTS = {
    re.compile(r"\.lora_A(\.default)?\.weight$"): "down",
    re.compile(r"\.lora_B(\.default)?\.weight$"): "up",
    re.compile(r"[._]lora(_linear_layer)?\.down\.weight$"): "down",
    re.compile(r"[._]lora(_linear_layer)?\.up\.weight$"): "up",
    re.compile(r"\.lora_down\.weight$"): "down",
    re.compile(r"\.lora_up\.weight$"): "up",
    re.compile(r"\.lora_magnitude_vector(\.default)?(\.weight)?$"): "magnitude",
    re.compile(r"\.dora_scale$"): "dora_scale",
    re.compile(r"\.alpha$"): "alpha",
    re.compile(rf"\.({LYCORIS})(\.default)?$"): "",  # called as what it is
}
OLD = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out.0": "out_proj"}  # of text encoders


class Place(NamedTuple):
    """Where a tensor of a LoRA file belongs: the layer, and which of its factors it is."""

    layer: str
    part: str


def parse(key: str, unet: Mapping[str, Any]) -> Place | None:
    """The place of a key in any style; None for a key of no style.

    Args:
        unet: config.json of the UNet, for files that count its blocks as the original code does.
    """
    name, part = _split(key)
    if not part:
        return None
    start = next((start for start in KOHYA if key.startswith(start)), None)
    if start is None:
        return Place(_dotted(name), part)
    joined = name.removeprefix(start)
    if start == "lora_unet_" and ORIGINAL.match(joined):
        module = _from_original(joined, unet)
        return None if module is None else Place(f"unet.{module}", part)
    return Place(f"{KOHYA[start]}.{unjoin(joined)}", part)


def style(key: str) -> str:
    """kohya, peft, legacy (diffusers' attention processors) or diffusers: how a file names its tensors."""
    if key.startswith(tuple(KOHYA)):
        return "kohya"
    if key.startswith("base_model.model."):
        return "peft"
    return "legacy" if ".processor." in key or re.search("_lora\\.(up|down)", key) else "diffusers"


def unjoin(name: str) -> str:
    """A module's name from kohya's, with dots again: mid_block_resnets_0_conv1 -> mid_block.resnets.0.conv1."""
    return ".".join(WORDS.findall(name))


def ending(layer: str) -> str:
    """The part of a layer's name that tells its kind: to_q, to_out.0, ff.net.2, 0.conv, conv1."""
    return re.findall(r"ff\.net\.[\w.]+$|\w+\.\d+$|\d+\.conv$|\w+$", layer)[0]


def kohya_name(layer: str, unet: Mapping[str, Any] | None) -> str:
    """kohya's name of a layer.

    Args:
        unet: config.json of an SDXL's UNet, whose blocks kohya counts as the original code does; else None.
    """
    network, _, module = layer.partition(".")
    start = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if unet else "lora_te_", "text_encoder_2": "lora_te2_"}
    if network == "unet" and unet is not None:
        module = unet_name(module, unet_places(unet))
    return start[network] + module.replace(".", "_")


def _split(key: str) -> tuple[str, str]:
    """A key as the layer's name, still in its own style, and the part; the part is empty for unknown ones."""
    for pattern, part in PARTS.items():
        found = pattern.search(key)
        if found:
            return key[: found.start()], part or found[1]
    return key, ""


def _dotted(name: str) -> str:
    """The layer of a name that diffusers or peft wrote."""
    name = name.removeprefix("base_model.model.").replace(".processor.", ".")
    network = next((network for network in NETWORKS if name.startswith(f"{network}.")), None)
    module = name.removeprefix(f"{network}.").removeprefix("base_model.model.")
    if network is None:
        network = "text_encoder" if re.match("(text_model|encoder)\\.", module) else "unet"
    module = re.sub(r"\.to_out$", ".to_out.0", module)
    if network != "unet":
        module = historical_key(f"{module}.").removesuffix(".")
        module = re.sub("|".join(OLD), lambda found: OLD[found.group()], module)
    return f"{network}.{module}"


def _from_original(joined: str, unet: Mapping[str, Any]) -> str | None:
    """diffusers' name of a UNet's layer that is called as in the original code, with underscores."""
    for original, start in _joined_places(tuple(_frozen(unet))):
        if f"{joined}_".startswith(f"{original}_"):
            rest = joined.removeprefix(original).removeprefix("_")
            if ".resnets." in start:
                rest = next((new for new, old in RESNET.items() if old.replace(".", "_") == rest), "?")
            else:
                rest = unjoin(rest)
            return f"{start}.{rest}".rstrip(".")
    return None


@cache
def _joined_places(config: tuple[tuple[str, Any], ...]) -> list[tuple[str, str]]:
    """Beginnings of the original names, with underscores, and diffusers' for them."""
    return [(original.replace(".", "_"), start) for start, original in unet_places(dict(config)).items()]


def _frozen(unet: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What `unet_places` reads of a configuration, so that it can be remembered."""
    names = ("layers_per_block", "down_block_types", "up_block_types")
    return [(name, tuple(unet[name]) if name.endswith("types") else unet[name]) for name in names]
