"""`adapter.init_from`: the factors that begin to learn are those of a file, in any style that is read."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sdtune.adapters.lora_files import LoraFile, check_fit, read_lora, weight_shapes
from sdtune.adapters.lora_names import parse
from sdtune.errors import UsageError
from sdtune.families.base import Family


@dataclass(frozen=True)
class Start:
    """A LoRA, or a relative of it, to begin with.

    Attributes:
        place: where it was read. lora: what was read.
    """

    place: Path
    lora: LoraFile

    @classmethod
    def read(cls, place: Path, family: Family, kind: str) -> "Start":
        """Open the file or folder for an adapter of that kind, as `LoraLayer.kind` names it.

        Raises:
            WeightsError: it is missing, damaged, no LoRA, or made for another model.
            UsageError: it is of another kind.
        """
        unet: Any = family.modules[family.denoiser]
        lora = read_lora(place, unet.config)
        check_fit(lora, weight_shapes(family.modules), place)
        kinds = sorted({layer.kind for layer in lora.layers.values()})
        if kinds != [kind]:
            raise UsageError(
                f"adapter.init_from: '{place}' is a {' and '.join(kinds)}, and the adapter that learns is a {kind}; "
                f"set adapter.kind={kinds[0]}, or begin with another file"
            )
        return cls(place, lora)

    def ranks(self, asked: int | None) -> tuple[int, dict[str, dict[str, int]]]:
        """The rank, and for each network that of the layers that have another, by their module's name.

        Args:
            asked: adapter.rank; None takes what the file has.

        Raises:
            UsageError: the file has another rank than asked.
        """
        own = {name: layer.rank for name, layer in self.lora.layers.items() if layer.rank is not None}
        usual = Counter(own.values()).most_common(1)[0][0] if own else None
        if asked is not None and set(own.values()) - {asked}:
            have = ", ".join(map(str, sorted(set(own.values()))))
            raise UsageError(
                f"adapter.init_from: '{self.place}' has rank {have}, and adapter.rank asks for {asked}; remove "
                "adapter.rank to go on with the file's, or begin with another file"
            )
        rank = asked or usual or max(layer.peft_rank for layer in self.lora.layers.values())
        others: dict[str, dict[str, int]] = {}
        for name, one in own.items():
            if one != rank:
                network, _, module = name.partition(".")
                others.setdefault(network, {})[module.removeprefix("text_model.")] = one
        return rank, others

    @property
    def scale(self) -> float:
        """The scale that most layers have."""
        return Counter(layer.scale for layer in self.lora.layers.values()).most_common(1)[0][0]

    @torch.no_grad()
    def fill(self, family: Family, networks: Sequence[str]) -> None:
        """Copy the factors into the networks' adapter `default`; where it has another scale, they make up for it.

        Layers that the file does not have keep the start that they have.

        Raises:
            UsageError: the file has a layer that does not learn, or factors of another shape.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer

        left = set(self.lora.layers)
        for network in networks:
            for path, module in family.modules[network].named_modules():
                if isinstance(module, BaseTunerLayer):
                    found: Any = module
                    left -= self.fill_layer(f"{network}.{path}", found)
        if left:
            raise UsageError(
                f"adapter.init_from: '{self.place}' has {len(left)} layers that do not learn here, for instance "
                f"{min(left)}; let them learn (adapter.targets=all, adapter.text_encoder=true), or begin with another "
                "file"
            )

    def fill_layer(self, path: str, module: Any) -> set[str]:
        """Copy one layer's factors; returns its name in the file, if it is there."""
        filled = set()
        for key, parameter in module.named_parameters():
            spot = parse(f"{path}.{key}", {})
            if spot is None or spot.layer not in self.lora.layers:
                continue
            layer = self.lora.layers[spot.layer]
            layer = replace(layer, scale=layer.scale / module.scaling["default"]).baked()
            tensor = layer.magnitude if spot.part == "magnitude" else layer.factors.get(spot.part)
            if tensor is None or tensor.numel() != parameter.numel():
                raise UsageError(
                    f"adapter.init_from: the factors of {spot.layer} in '{self.place}' are split in another way than "
                    "here; set adapter.factor to what it was trained with, or begin with another file"
                )
            parameter.copy_(tensor.reshape(parameter.shape))
            filled.add(spot.layer)
        return filled
