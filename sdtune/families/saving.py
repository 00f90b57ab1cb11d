"""Writing networks the way diffusers and older transformers read them."""

import copy
from pathlib import Path
from typing import Any

import torch


def save_network(network: Any, folder: Path, dtype: str | None = None) -> None:
    """Write a network's config.json and weights.

    Args:
        folder: made when missing.
        dtype: "float16", "bfloat16", "float32", or None for the network's own.
    """
    kept = network if dtype is None else rounded(network, getattr(torch, dtype))
    if is_clip(network):
        save_text_encoder(kept, folder)
    else:
        kept.save_pretrained(folder)


def rounded(network: Any, dtype: torch.dtype) -> Any:
    """A copy with its weights in that type; buffers stay, such as the frequencies of Fourier features, up to 100."""
    kept = copy.deepcopy(network)
    for parameter in kept.parameters():
        parameter.data = parameter.data.to(dtype)
    return kept


def is_clip(network: Any) -> bool:
    """Whether a network is one of transformers' CLIP text encoders."""
    return type(network).__name__.startswith("CLIPText")


def save_text_encoder(network: Any, folder: Path) -> None:
    """Write a CLIP text encoder under the keys that every version of transformers knows.

    transformers 5 dropped the `text_model.` prefix of CLIPTextModel; older versions, and other tools, expect it.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    network.config.architectures = [type(network).__name__]
    network.config.dtype = network.dtype
    network.config.save_pretrained(folder)
    state = {historical_key(key): tensor.contiguous() for key, tensor in network.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def historical_key(key: str) -> str:
    """The name of a CLIP text encoder's tensor before transformers 5."""
    if key.startswith(("embeddings.", "encoder.", "final_layer_norm.")):
        return f"text_model.{key}"
    return key
