"""Writing LoRA and its relatives in the styles of other tools: diffusers, peft and kohya."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sdtune.adapters.lora_files import PEFT_CONFIG, PEFT_NAME
from sdtune.adapters.lora_layers import LoraLayer
from sdtune.adapters.lora_names import NETWORKS, kohya_name
from sdtune.errors import WeightsError

Layers = Mapping[str, LoraLayer]
PEFT_FACTORS = {"down": "lora_A.weight", "up": "lora_B.weight"}
KOHYA_FACTORS = {"down": "lora_down.weight", "up": "lora_up.weight"}


def write_diffusers(layers: Layers, file: Path) -> None:
    """Write one file as `pipe.load_lora_weights` reads it.

    Scales are multiplied in and alpha is the rank: older versions of diffusers, and other tools, read no alpha here.

    Raises:
        WeightsError: a layer is a LoHa or LoKr, for which this format has no place.
    """
    for name, layer in layers.items():
        if layer.kind not in ("lora", "dora"):
            raise WeightsError(
                f"diffusers' LoRA format has no place for the {layer.kind} of {name}; write --format peft, kohya (as "
                "LyCORIS), or merged into its base"
            )
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for network, some in _by_network(layers).items():
        tensors |= {f"{network}.{key}": tensor for key, tensor in _peft_tensors(network, some).items()}
        settings |= {f"{network}.{key}": value for key, value in _lora_settings(network, some).items()}
    _save(tensors, file, {"format": "pt", "lora_adapter_metadata": json.dumps(settings, sort_keys=True)})


def write_peft(layers: Layers, folder: Path) -> None:
    """Write a folder for each network, `PeftModel.from_pretrained(pipe.unet, folder / "unet")`; all kinds have a place.

    Raises:
        WeightsError: the layers of a network are of several kinds.
    """
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    for network, some in _by_network(layers).items():
        kinds = {layer.kind for layer in some.values()}
        if len(kinds) > 1:
            raise WeightsError(
                f"the layers of {network} are of several kinds ({', '.join(sorted(kinds))}); peft has one"
            )
        place, kind = folder / network, kinds.pop()
        tensors = {f"base_model.model.{key}": tensor for key, tensor in _peft_tensors(network, some).items()}
        config: Any
        if kind in ("lora", "dora"):
            config = LoraConfig(**_lora_settings(network, some))
        else:
            config = (LoHaConfig if kind == "loha" else LoKrConfig)(**_lycoris_settings(network, some))
        _save(tensors, place / PEFT_NAME, {"format": "pt"})
        config.save_pretrained(place)
        assert (place / PEFT_CONFIG).is_file()


def write_kohya(layers: Layers, file: Path, *, unet: Mapping[str, Any] | None, header: Mapping[str, str]) -> None:
    """Write one file with kohya's names and alphas, as A1111, ComfyUI and diffusers read it; LoHa and LoKr as LyCORIS.

    Args:
        unet: config.json of an SDXL's UNet, whose blocks are counted as in the original code; None for SD 1.x and 2.x.
        header: what is said about training, `ss_...`; rank and alpha are added.

    Raises:
        WeightsError: see `kohya_names`.
    """
    tensors: dict[str, Tensor] = {}
    names = kohya_names(layers, unet)
    for name, layer in layers.items():
        start = names[name]
        if layer.rank is None:  # a pair of whole factors, which LyCORIS does not scale
            layer = layer.baked()
        tensors |= {f"{start}.{KOHYA_FACTORS.get(part, part)}": tensor for part, tensor in layer.factors.items()}
        tensors[f"{start}.alpha"] = torch.tensor(layer.alpha)
        if layer.magnitude is not None:
            sides = (-1, *[1] * (layer.factors["down"].ndim - 1))  # (out, 1), of a convolution (out, 1, 1, 1)
            tensors[f"{start}.dora_scale"] = layer.magnitude.reshape(sides)
    kinds = {layer.kind for layer in layers.values()}
    lycoris = kinds - {"lora", "dora"}
    narrow = [layer for layer in layers.values() if layer.rank is not None]  # a pair of whole factors has no rank
    facts = {
        **({"ss_network_dim": str(_most(layer.rank for layer in narrow))} if narrow else {}),
        **({"ss_network_alpha": str(_most(layer.alpha for layer in narrow))} if narrow else {}),
        "ss_network_module": "lycoris.kohya" if lycoris else "networks.lora",
        "ss_network_args": json.dumps(_lycoris_args(kinds)),
    }
    _save(tensors, file, {"format": "pt"} | facts | dict(header))


def kohya_names(layers: Iterable[str], unet: Mapping[str, Any] | None) -> dict[str, str]:
    """kohya's name of each layer; `unet` as for `write_kohya`. Raises WeightsError where `unet` has no such layer."""
    try:
        return {name: kohya_name(name, unet) for name in layers}
    except KeyError as fault:
        raise WeightsError(
            f"kohya's format counts the blocks of an SDXL's UNet, and {fault} is in none of those that are known; name "
            "the model that the LoRA is for with --base MODEL, or write --format diffusers"
        ) from fault


def _by_network(layers: Layers) -> dict[str, dict[str, LoraLayer]]:
    """The layers of each network that has some, by the module's own name."""
    found: dict[str, dict[str, LoraLayer]] = {}
    for name, layer in layers.items():
        network, _, module = name.partition(".")
        found.setdefault(network, {})[module] = layer
    return {network: found[network] for network in NETWORKS if network in found}


def _peft_tensors(network: str, layers: Layers) -> dict[str, Tensor]:
    """The tensors of a network's layers under peft's names, scales multiplied in."""
    tensors: dict[str, Tensor] = {}
    for module, layer in layers.items():
        layer = layer.baked()
        tensors |= {f"{module}.{PEFT_FACTORS.get(part, part)}": tensor for part, tensor in layer.factors.items()}
        if layer.magnitude is not None:
            convolution = layer.factors["down"].ndim == 4
            magnitude = layer.magnitude.reshape((1, -1, 1, 1) if convolution else -1)
            # transformers 5 looks for the name with `.weight` and passes over the other
            ending = ".weight" if network.startswith("text_encoder") else ""
            tensors[f"{module}.lora_magnitude_vector{ending}"] = magnitude
    return tensors


def _lora_settings(network: str, layers: Layers) -> dict[str, Any]:
    """peft's LoraConfig of a network's layers; alpha is the rank everywhere."""
    settings = _settings({_module(network, name): layer.rank or 0 for name, layer in layers.items()})
    return settings | {"use_dora": any(layer.kind == "dora" for layer in layers.values())}


def _settings(ranks: Mapping[str, int]) -> dict[str, Any]:
    """What peft's configurations have in common, for layers of these ranks."""
    rank = _most(ranks.values())
    others = {name: own for name, own in ranks.items() if own != rank}
    return {
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": others,
    }


def _lycoris_settings(network: str, layers: Layers) -> dict[str, Any]:
    """peft's LoHaConfig or LoKrConfig of a network's layers; alpha is the rank everywhere."""
    ranks = {_module(network, name): layer.peft_rank for name, layer in layers.items()}
    settings = _settings(ranks)
    settings["alpha"] = settings.pop("lora_alpha")
    settings["use_effective_conv2d"] = any("_t" in part for layer in layers.values() for part in layer.factors)
    pairs = [pair for layer in layers.values() if layer.kind == "lokr" for pair in _lokr_sides(layer)]
    if pairs:
        settings["decompose_both"] = any("lokr_w1_a" in layer.factors for layer in layers.values())
        settings["decompose_factor"] = _decompose_factor(pairs)
    return settings


def _lokr_sides(layer: LoraLayer) -> list[tuple[int, int]]:
    """How a LoKr splits the outputs and the inputs of its weight: (first, second) each."""
    f = layer.factors
    first = f["lokr_w1"].shape if "lokr_w1" in f else (len(f["lokr_w1_a"]), f["lokr_w1_b"].shape[1])
    if "lokr_w2" in f:
        second = f["lokr_w2"].shape[:2]
    elif "lokr_t2" in f:
        second = torch.Size((f["lokr_w2_a"].shape[1], f["lokr_w2_b"].shape[1]))
    else:  # of a convolution the inputs hold the kernel too: known from the outputs alone
        second = torch.Size((len(f["lokr_w2_a"]), f["lokr_w2_b"].shape[1]))
        return [(first[0], second[0])]
    return [(first[0], second[0]), (first[1], second[1])]


def _decompose_factor(pairs: list[tuple[int, int]]) -> int:
    """peft's decompose_factor, for which it splits as these pairs do. Raises WeightsError where there is none."""
    from peft.tuners.lokr.layer import factorization

    for factor in (-1, *sorted({first for first, _ in pairs}), *sorted({second for _, second in pairs})):
        if all(factorization(first * second, factor) == (first, second) for first, second in pairs):
            return factor
    raise WeightsError("peft splits no weight as this LoKr does; write --format kohya, or merged into its base")


def _module(network: str, name: str) -> str:
    """A module's name as peft matches its end, in a text encoder of any version of transformers."""
    return name.removeprefix("text_model.") if network.startswith("text_encoder") else name


def _lycoris_args(kinds: set[str]) -> dict[str, str]:
    if kinds == {"dora"}:
        return {"dora_wd": "True", "wd_on_output": "True"}
    return {"algo": min(kinds)} if kinds <= {"loha", "lokr"} else {}


def _most(values: Any) -> Any:
    """The value that comes most often."""
    return Counter(values).most_common(1)[0][0]


def _save(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, file, metadata=metadata)
