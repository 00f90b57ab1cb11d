"""Low-rank adaptation through peft.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sdtune.adapters.base import Parameters, learnable
from sdtune.adapters.lora_files import WEIGHTS_NAME
from sdtune.diffusion import draws
from sdtune.errors import UsageError
from sdtune.families.base import Family
from sdtune.families.saving import historical_key

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
FEEDFORWARD = ["ff.net.0.proj", "ff.net.2"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "proj_in", "proj_out", "downsamplers.0.conv", "upsamplers.0.conv"]
DENOISER_TARGETS = {
    "attention": ATTENTION,
    "attention+feedforward": ATTENTION + FEEDFORWARD,
    "all": ATTENTION + FEEDFORWARD + CONVOLUTIONS,
}
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


class Lora:
    """Adapter `lora`.

    Args:
        rank: width of the two factors.
        alpha: the update is scaled by alpha / rank; None means alpha = rank.
        targets: a name of `DENOISER_TARGETS`, or endings of the denoiser's module names.
    """

    writes_base = False

    def __init__(self, rank: int = 16, alpha: float | None = None, targets: str | Sequence[str] = "attention") -> None:
        self.rank, self.alpha = rank, rank if alpha is None else alpha
        self.targets = DENOISER_TARGETS[targets] if isinstance(targets, str) else list(targets)
        self.networks: tuple[str, ...] = ()

    def attach(self, family: Family, networks: Sequence[str], seed: int) -> dict[str, Parameters]:
        """Put a pair of factors beside each target; see `Adapter.attach`.

        Raises:
            UsageError: no module of a network ends in one of the targets.
        """
        from peft import LoraConfig, inject_adapter_in_model

        self.networks = tuple(networks)
        learning: dict[str, Parameters] = {}
        for name in networks:
            targets = self.targets if name == family.denoiser else TEXT_TARGETS
            config = LoraConfig(
                r=self.rank,
                lora_alpha=self.alpha,  # type: ignore[arg-type]
                target_modules=targets,
                init_lora_weights=True,
            )
            network = family.modules[name]
            with draws.seeded_globals(seed, f"weights of the LoRA of {name}"):
                try:
                    inject_adapter_in_model(config, network)
                except ValueError as fault:
                    ends = sorted({ending(key) for key, part in network.named_modules() if is_target(part)})
                    raise UsageError(
                        f"adapter.targets: no linear or convolution layer of {name} ends in {', '.join(targets)}; "
                        f"the endings it has are {', '.join(ends)}, the presets {', '.join(DENOISER_TARGETS)}"
                    ) from fault
            network.train()
            factors = {key: p for key, p in network.named_parameters() if "lora_" in key}
            for parameter in factors.values():
                parameter.data = parameter.data.float()
            learning[name] = learnable(family, name, factors)
        return learning

    def save(self, family: Family, folder: Path) -> None:
        """Write `pytorch_lora_weights.safetensors` as diffusers' `load_lora_weights` reads it."""
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        state: dict[str, Tensor] = {}
        settings: dict[str, Any] = {}
        for name in self.networks:
            network = family.modules[name]
            prefix = "unet" if name == family.denoiser else name
            for key, tensor in get_peft_model_state_dict(network).items():
                key = key if name == family.denoiser else historical_key(key)
                state[f"{prefix}.{key}"] = tensor.contiguous()
            settings |= {
                f"{prefix}.{key}": value for key, value in plain(network.peft_config["default"].to_dict()).items()
            }
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(settings, sort_keys=True)}
        save_file(state, folder / WEIGHTS_NAME, metadata=metadata)


def ending(name: str) -> str:
    """The part of a module's name that tells its kind: to_q, to_out.0, conv1."""
    *_, before, last = f".{name}".split(".")
    return f"{before}.{last}" if last.isdecimal() else last


def is_target(module: nn.Module) -> bool:
    """Whether LoRA can stand beside this layer."""
    return isinstance(module, (nn.Linear, nn.Conv2d))


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """peft's settings as JSON can hold them: only those that say how to rebuild the layers."""
    kept = ("r", "lora_alpha", "target_modules", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "bias")
    values = {key: settings[key] for key in kept if key in settings}
    return {key: sorted(value) if isinstance(value, (set, list)) else value for key, value in values.items()}
