"""Every parameter of the chosen networks learns, or of a VAE only its decoder."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from sdtune.adapters.base import Parameters, learnable
from sdtune.families.base import Family

DECODER = ("decoder.", "post_quant_conv.")


class Full:
    """Adapter `full`: fine-tuning, or training from scratch, of whole networks.

    Args:
        decoder_only: of a VAE only what turns latents into pictures learns; its latents stay what denoisers know.
    """

    writes_base = True

    def __init__(self, decoder_only: bool = False) -> None:
        self.decoder_only = decoder_only

    def attach(self, family: Family, networks: Sequence[str], seed: int) -> dict[str, Parameters]:
        """See `Adapter.attach`. Half-precision weights are turned into float32: small updates would be lost in them."""
        learning: dict[str, Parameters] = {}
        for name in networks:
            network = family.modules[name].train()
            if any(parameter.dtype != torch.float32 for parameter in network.parameters()):
                network.to(torch.float32)
            parameters = dict(network.named_parameters())
            if self.decoder_only:
                parameters = {key: p for key, p in parameters.items() if key.startswith(DECODER)}
            learning[name] = learnable(family, name, parameters)
        return learning

    def numbers(self, network: nn.Module) -> int:
        """See `Adapter.numbers`."""
        named = network.named_parameters()
        return sum(p.numel() for name, p in named if not self.decoder_only or name.startswith(DECODER))

    def save(self, family: Family, folder: Path) -> None:
        """Write the whole model as a diffusers folder."""
        family.save(folder)
