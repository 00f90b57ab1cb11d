"""Short digests of networks and tokenizers: what they answer is the same where the digest is."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from sdtune.families.quantization import packed_weights

NO_MATTER = ("_name_or_path", "_diffusers_version", "transformers_version", "architectures")


def fingerprint(*parts: Any) -> str:
    """128 bits of values that `repr` tells apart, in hexadecimal."""
    return blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def of_network(network: nn.Module, part: Callable[[str], bool] = lambda name: True) -> str:
    """Of a network's configuration and weights, in the number format that they have now, packed ones too.

    Args:
        network: one with a config of diffusers or transformers.
        part: which parameters matter, by name.
    """
    config: Any = network.config
    values = dict(config.to_dict() if hasattr(config, "to_dict") else config)
    facts = sorted((name, repr(value)) for name, value in values.items() if name not in NO_MATTER)
    tensors = network.state_dict() | packed_weights(network)
    weights = [(name, tensor) for name, tensor in tensors.items() if part(name)]
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter free
        digests = list(pool.map(_digest, [tensor for _, tensor in weights]))
    return fingerprint(facts, [(name, *one) for (name, _), one in zip(weights, digests, strict=True)])


def of_tokenizer(tokenizer: Any) -> str:
    """Of everything that decides which tokens a text becomes; not of the padding that the last call happened to set."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules |= {"truncation": None, "padding": None}
    return fingerprint(json.dumps(rules, sort_keys=True), tokenizer.model_max_length, tokenizer.special_tokens_map)


def _digest(tensor: Tensor) -> tuple[str, tuple[int, ...], str]:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return str(tensor.dtype), tuple(tensor.shape), blake2b(flat.numpy().data, digest_size=16).hexdigest()
