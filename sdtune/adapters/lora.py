"""Low-rank adaptation through peft, and its two close relatives, rsLoRA and DoRA.

Sources: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; Kalajdzievski 2023, "A Rank Stabilization
Scaling Factor for Fine-Tuning with LoRA"; Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation".
"""

import json
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from sdtune.adapters.lora_files import WEIGHTS_NAME
from sdtune.adapters.low_rank import LowRank
from sdtune.families.base import Family
from sdtune.families.saving import historical_key


class Lora(LowRank):
    """Adapter `lora`: beside a weight (out, in) stands alpha / rank * B A; A (rank, in), B (out, rank), at first 0."""

    name, kind = "LoRA", "lora"
    options: ClassVar[dict[str, bool]] = {}

    def config(self, targets: list[str], ranks: dict[str, int]) -> Any:
        """See `LowRank.config`."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            target_modules=targets,
            rank_pattern=ranks,
            init_lora_weights=True,
            **self.options,  # type: ignore[arg-type]
        )

    def beside(self, layer: nn.Linear | nn.Conv2d) -> int:
        """See `LowRank.beside`."""
        out, into = layer.weight.shape[0], layer.weight[0].numel()
        return self.rank * (into + out)

    def save(self, family: Family, folder: Path) -> None:
        """Write `pytorch_lora_weights.safetensors` as diffusers' `load_lora_weights` reads it."""
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        state: dict[str, Tensor] = {}
        settings: dict[str, Any] = {}
        for name in self.networks:
            network, prefix = family.modules[name], "unet" if name == family.denoiser else name
            for key, tensor in get_peft_model_state_dict(network).items():
                state[f"{prefix}.{key if name == family.denoiser else text_key(key)}"] = tensor.contiguous()
            settings |= {f"{prefix}.{key}": value for key, value in layer_settings(network).items()}
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(settings, sort_keys=True)}
        save_file(state, folder / WEIGHTS_NAME, metadata=metadata)


class RsLora(Lora):
    """Adapter `rslora`: the update is scaled by alpha / sqrt(rank), so that a large rank learns as fast as a small."""

    options: ClassVar[dict[str, bool]] = {"use_rslora": True}

    def alpha_of(self, scale: float) -> float:
        """See `LowRank.alpha_of`."""
        return scale * self.rank**0.5


class Dora(Lora):
    """Adapter `dora`: the length of each output's weights learns apart from their direction."""

    kind = "dora"
    options: ClassVar[dict[str, bool]] = {"use_dora": True}

    def beside(self, layer: nn.Linear | nn.Conv2d) -> int:
        """See `LowRank.beside`: a length an output comes on top."""
        return super().beside(layer) + layer.weight.shape[0]


def text_key(key: str) -> str:
    """The key of a text encoder's tensor that both older transformers and 5 put in its place.

    (peft writes DoRA's lengths without `.weight`; transformers 5 looks for them with it, and passes over the others.)
    """
    return historical_key(f"{key}.weight" if key.endswith("lora_magnitude_vector") else key)


def layer_settings(network: Any) -> dict[str, Any]:
    """peft's settings as JSON can hold them: only those that say how to rebuild the layers.

    rsLoRA is written as the LoRA that it is, of a larger alpha, because not all readers know of its scale.
    """
    config = network.peft_config["default"]
    values: dict[str, Any] = config.to_dict()
    if config.use_rslora:
        values |= {"use_rslora": False, "lora_alpha": config.lora_alpha * config.r**0.5}
        values["alpha_pattern"] = {name: config.lora_alpha * rank**0.5 for name, rank in config.rank_pattern.items()}
    kept = ("r", "lora_alpha", "target_modules", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "bias")
    return {key: sorted(values[key]) if isinstance(values[key], (set, list)) else values[key] for key in kept}
