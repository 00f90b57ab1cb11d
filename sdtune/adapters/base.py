"""What the loop asks of an adapter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch import nn

from sdtune.families.base import Family

Parameters = dict[str, nn.Parameter]
TOKENS = "tokens"  # the group of parameters that are rows of new tokens


def learnable(family: Family, name: str, parameters: Parameters) -> Parameters:
    """Those that get a gradient; the others are frozen. (Processes would wait for the gradients of all.)"""
    unread = family.unread(name)
    frozen = {key for key in parameters if any(part in key for part in unread)}
    for key, parameter in parameters.items():
        parameter.requires_grad_(key not in frozen)
    return {key: parameter for key, parameter in parameters.items() if key not in frozen}


class Adapter(Protocol):
    """Chooses, and if need be adds, the parameters that learn; writes and reads them.

    A run folder's `final/` and each checkpoint's `weights/` hold what `save` writes.

    Attributes:
        writes_base: whether `save` writes the whole model, so that what is frozen must not be rounded.
    """

    writes_base: bool

    def attach(self, family: Family, networks: Sequence[str], seed: int) -> dict[str, Parameters]:
        """Make parameters of those networks learn; all others stay frozen.

        Args:
            family: its networks are changed in place.
            networks: names of `family.modules`.
            seed: new parameters start as a pure function of it.

        Returns:
            For each network, and for `TOKENS`, the learning parameters by name, in float32.
        """
        ...

    def numbers(self, network: nn.Module) -> int:
        """How many numbers would learn in a denoiser (or VAE), told by its shapes before it is attached."""
        ...

    def save(self, family: Family, folder: Path) -> None:
        """Write what was learned, in the format that other tools read."""
        ...
