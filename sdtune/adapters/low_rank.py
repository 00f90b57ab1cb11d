"""What LoRA and its relatives share: peft puts small factors beside frozen layers, and only they learn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sdtune.adapters import peft_folder
from sdtune.adapters.base import Parameters, learnable
from sdtune.adapters.lora_names import ending
from sdtune.adapters.starting import Start
from sdtune.diffusion import draws
from sdtune.errors import UsageError
from sdtune.families.base import Family

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
FEEDFORWARD = ["ff.net.0.proj", "ff.net.2"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "proj_in", "proj_out", "downsamplers.0.conv", "upsamplers.0.conv"]
DENOISER_TARGETS = {
    "attention": ATTENTION,
    "attention+feedforward": ATTENTION + FEEDFORWARD,
    "all": ATTENTION + FEEDFORWARD + CONVOLUTIONS,
}
TEXT_ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]
TEXT_TARGETS = {
    "attention": TEXT_ATTENTION,
    "attention+feedforward": [*TEXT_ATTENTION, "fc1", "fc2"],
    "all": [*TEXT_ATTENTION, "fc1", "fc2"],
}


class LowRank:
    """The settings that LoRA and its relatives have in common.

    Args:
        rank: width of the factors; None means that of `init_from`, else 16.
        alpha: the update is scaled by alpha / rank; None means that of `init_from`, else alpha = rank.
        targets: a name of `DENOISER_TARGETS`, or endings of the denoiser's module names, each of which it has (of text
            encoders the attention then learns).
        init_from: file or folder with the factors to begin with, in any style; None begins with no update.
    """

    writes_base = False
    name = "low-rank adapter"
    kind = ""  # as `LoraLayer.kind` names it

    def __init__(
        self,
        rank: int | None = None,
        alpha: float | None = None,
        targets: str | Sequence[str] = "attention",
        init_from: Path | None = None,
    ) -> None:
        self.asked = rank, alpha
        self.rank = rank or 16
        self.alpha = float(self.rank) if alpha is None else alpha
        self.init_from = init_from
        self.named = not isinstance(targets, str)
        self.targets = DENOISER_TARGETS[targets] if isinstance(targets, str) else list(targets)
        self.text_targets = TEXT_TARGETS[targets] if isinstance(targets, str) else TEXT_ATTENTION
        self.networks: tuple[str, ...] = ()

    def config(self, targets: list[str], ranks: dict[str, int]) -> Any:
        """peft's configuration for layers whose names end in one of `targets`.

        Args:
            ranks: of the layers that have another than `rank`, by name.
        """
        raise NotImplementedError

    def alpha_of(self, scale: float) -> float:
        """The alpha that makes a scale."""
        return scale * self.rank

    def beside(self, layer: nn.Linear | nn.Conv2d) -> int:
        """How many numbers learn beside a layer."""
        raise NotImplementedError

    def numbers(self, network: nn.Module) -> int:
        """See `Adapter.numbers`."""
        ends = tuple(f".{end}" for end in self.targets)
        layers = [layer for name, layer in network.named_modules() if is_target(layer) and f".{name}".endswith(ends)]
        return sum(map(self.beside, layers))

    def attach(self, family: Family, networks: Sequence[str], seed: int) -> dict[str, Parameters]:
        """Put factors beside each target; see `Adapter.attach`.

        Raises:
            UsageError: no layer ends in one of the targets that were named, or `init_from` is of another kind, rank or
                layout. WeightsError: `init_from` cannot be read, or was made for another model.
        """
        self.networks = tuple(networks)
        start = None if self.init_from is None else Start.read(self.init_from, family, self.kind)
        ranks: dict[str, dict[str, int]] = {}
        if start is not None:
            rank, alpha = self.asked
            self.rank, ranks = start.ranks(rank)
            self.alpha = self.alpha_of(start.scale) if alpha is None else alpha
        learning: dict[str, Parameters] = {}
        for name in networks:
            targets = self.targets if name == family.denoiser else self.text_targets
            network = family.modules[name]
            with draws.seeded_globals(seed, f"weights of the {self.name} of {name}"):
                check_targets(network, targets, name, each=self.named and name == family.denoiser)
                inject(network, self.config(targets, ranks.get(name, {})))
            network.train()
            factors = {key: p for key, p in network.named_parameters() if p.requires_grad}
            for parameter in factors.values():
                parameter.data = parameter.data.float()
            learning[name] = learnable(family, name, factors)
        if start is not None:
            start.fill(family, networks)
        return learning

    def save(self, family: Family, folder: Path) -> None:
        """Write a folder for each network in peft's own format, which has a place for all kinds."""
        peft_folder.save(family, self.networks, folder)


def check_targets(network: nn.Module, targets: Sequence[str], name: str, *, each: bool) -> None:
    """Raises UsageError where layers of a network, called `name`, end in none of the targets, or not in each."""
    layers = [key for key, part in network.named_modules() if is_target(part)]
    lacking = [target for target in targets if not any(f".{key}".endswith(f".{target}") for key in layers)]
    if lacking and (each or len(lacking) == len(targets)):
        raise UsageError(
            f"adapter.targets: no linear or convolution layer of {name} ends in {', '.join(lacking)}; the endings it "
            f"has are {', '.join(sorted(set(map(ending, layers))))}, the presets {', '.join(DENOISER_TARGETS)}"
        )


def inject(network: nn.Module, config: Any) -> None:
    """Put an adapter named `default` into a network; only its parameters ask for gradients afterwards.

    Raises:
        UsageError: a target is of a kind that peft knows no factors for.
    """
    from peft import inject_adapter_in_model

    try:
        inject_adapter_in_model(config, network)
    except ValueError as fault:
        raise UsageError(f"adapter.targets: {fault}") from fault


def is_target(module: nn.Module) -> bool:
    """Whether factors can stand beside this layer."""
    return isinstance(module, (nn.Linear, nn.Conv2d))
