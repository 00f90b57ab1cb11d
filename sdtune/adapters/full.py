"""Every parameter of the chosen networks learns."""

from collections.abc import Sequence
from pathlib import Path

import torch

from sdtune.adapters.base import Parameters, learnable
from sdtune.families.base import Family


class Full:
    """Adapter `full`: fine-tuning, or training from scratch, of whole networks."""

    writes_base = True

    def attach(self, family: Family, networks: Sequence[str], seed: int) -> dict[str, Parameters]:
        """See `Adapter.attach`. Half-precision weights are turned into float32: small updates would be lost in them."""
        learning: dict[str, Parameters] = {}
        for name in networks:
            network = family.modules[name].train()
            if any(parameter.dtype != torch.float32 for parameter in network.parameters()):
                network.to(torch.float32)
            learning[name] = learnable(family, name, dict(network.named_parameters()))
        return learning

    def save(self, family: Family, folder: Path) -> None:
        """Write the whole model as a diffusers folder."""
        family.save(folder)
