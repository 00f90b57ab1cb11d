"""Several adapters in one run, such as new tokens and a LoRA: pivotal tuning."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from sdtune.adapters.base import Adapter, Parameters
from sdtune.families.base import Family


class Together:
    """What each of the adapters does.

    Args:
        parts: attached in this order; no two of them make the same group of parameters.
    """

    def __init__(self, parts: Sequence[Adapter]) -> None:
        self.parts = list(parts)
        self.writes_base = any(part.writes_base for part in parts)

    def attach(self, family: Family, networks: Sequence[str], seed: int) -> dict[str, Parameters]:
        """See `Adapter.attach`."""
        learning: dict[str, Parameters] = {}
        for part in self.parts:
            learning |= part.attach(family, networks, seed)
        return learning

    def numbers(self, network: nn.Module) -> int:
        """See `Adapter.numbers`."""
        return sum(part.numbers(network) for part in self.parts)

    def save(self, family: Family, folder: Path) -> None:
        """All of them write into one folder."""
        for part in self.parts:
            part.save(family, folder)
