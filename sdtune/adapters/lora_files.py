"""Reading LoRA files of all styles, and putting them into a model: every tensor has its place there, or none is used.

diffusers applies what it recognises of a file and passes over the rest, up to all of it, without a word. So each layer
is looked up in the model first, and a file that does not fit as a whole is refused.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sdtune.adapters import lora_names
from sdtune.adapters.lora_layers import LoraLayer, Shape
from sdtune.errors import WeightsError
from sdtune.families.base import Family
from sdtune.families.loading import read_json
from sdtune.families.quantization import QuantizedLinear
from sdtune.families.saving import historical_key
from sdtune.families.single_file import LAYOUTS, NAMES

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for in a folder
PEFT_NAME, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
WIDTHS = {768: "SD1", 1024: "SD2", 2048: "SDXL"}  # of the text that a UNet reads: it tells the base models apart
READS_TEXT = re.compile(r"^unet\..*\.attn2\.to_[kv]$")
FOREIGN = {  # parts that LyCORIS writes and that are not read here
    "dora_scale": "its DoRA scales the inputs (LyCORIS without wd_on_output), and only scales of the outputs are known",
    "lora_mid": "it is a LoCon with a core between its factors (use_tucker), which is not read; train it without",
    ".diff": "it holds whole differences of weights (.diff: LyCORIS' full, or its norm layers), which are not read; "
    "merge it into its base with the program that made it",
}



@dataclass(frozen=True)
class LoraFile:
    """What a LoRA file holds.

    Attributes:
        layers: the updates, by the layer's name as in `lora_names`.
        keys: for each layer the keys of its tensors, without alphas.
        strange: keys that belong to no layer, for their style is not known or a part of the layer is missing; without
            alphas too.
        style: diffusers, peft, kohya or legacy.
        metadata: what its header says.
    """

    layers: dict[str, LoraLayer]
    keys: dict[str, list[str]]
    strange: list[str]
    style: str
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def tensors(self) -> int:
        """How many tensors it holds, alphas not counted."""
        return sum(map(len, self.keys.values())) + len(self.strange)

    @property
    def base(self) -> str | None:
        """SD1, SD2 or SDXL, told by names and widths of its layers; SD1 or SD2 if it is not SDXL; None if unsure."""
        sizes = {name: layer.size for name, layer in self.layers.items()}
        keys = (key for keys in self.keys.values() for key in keys)
        if any(name.startswith("text_encoder_2.") for name in sizes) or any(
            key.startswith("lora_te1_") for key in keys
        ):
            return "SDXL"
        width = text_width(sizes)
        if width is not None:
            return WIDTHS.get(width)
        first = (size for name, size in sizes.items() if name.startswith("unet.down_blocks.0.attentions."))
        return "SD1 or SD2" if any(inputs == 320 for _, inputs in first) else None  # SDXL attends from level 1 on


def find_lora(place: str | Path) -> Path:
    """Where the LoRA is that a path means: itself, or a file in a folder; of peft's format the folder.

    Raises:
        WeightsError: there is none, or it is not a safetensors file.
    """
    path = Path(place)
    if path.is_dir():
        if peft_parts(path):
            return path
        files = sorted(path.glob("*.safetensors"))
        named = [file for file in files if file.name in (WEIGHTS_NAME, PEFT_NAME)]
        if not named and len(files) != 1:
            found = ", ".join(file.name for file in files) or "none"
            raise WeightsError(
                f"'{path}' should hold one LoRA file (.safetensors), found: {found}; name the file itself"
            )
        return named[0] if named else files[0]
    if not path.exists():
        raise WeightsError(
            f"the LoRA '{path}' does not exist; name a .safetensors file, or a folder or run that holds one"
        )
    if path.suffix != ".safetensors":
        raise WeightsError(
            f"the LoRA '{path}' is not a .safetensors file; other kinds (.bin, .pt, .ckpt) can hold harmful code "
            "and are not opened"
        )
    return path


def peft_parts(folder: Path) -> list[Path]:
    """The files of a folder in peft's format, one for each network: unet/adapter_model.safetensors and so on."""
    files = [folder / network / PEFT_NAME for network in lora_names.NETWORKS]
    return [file for file in files if file.is_file()]


def read_lora(place: str | Path, unet: Mapping[str, Any] | None = None) -> LoraFile:
    """Read a LoRA, or one of its relatives, in any style.

    Args:
        place: a file, or a folder as `find_lora` looks into it.
        unet: config.json of the UNet that it is for, with which the original names of its blocks are understood; None
            takes that of the published model of its kind.

    Raises:
        WeightsError: the file is missing or damaged. (Whether it is a LoRA at all is seen in `layers`.)
    """
    place = find_lora(place)
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for file in peft_parts(place) if place.is_dir() else [place]:
        start = f"{file.parent.name}." if place.is_dir() else ""
        found, header = read_tensors(file)
        tensors |= {start + key: tensor for key, tensor in found.items()}
        metadata |= header
        settings |= read_settings(file, header, start)
    parts: dict[str, dict[str, Tensor]] = {}
    keys: dict[str, list[str]] = {}
    strange = []
    config = unet or published_unet(tensors)
    for key, tensor in tensors.items():
        spot = lora_names.parse(key, config)
        if spot is None:
            strange += [] if key.endswith(".alpha") else [key]
            continue
        parts.setdefault(spot.layer, {})[spot.part] = tensor
        if spot.part != "alpha":
            keys.setdefault(spot.layer, []).append(key)
    layers = {}
    for name, some in parts.items():
        layer = make_layer(some, settings_of(name, settings))
        if layer is None:
            strange += keys.pop(name, [])
        else:
            layers[name] = layer
    style = lora_names.style(next(iter(tensors), ""))
    return LoraFile(layers, keys, strange, "peft" if place.is_dir() else style, metadata)


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and what its header says. Raises WeightsError."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as fault:
        raise WeightsError(
            f"the LoRA '{file}' cannot be read as safetensors ({fault}); it is damaged or another kind of file: "
            "fetch it again"
        ) from fault


def read_settings(file: Path, header: Mapping[str, str], start: str) -> dict[str, Any]:
    """peft's settings of a LoRA, from diffusers' header or from peft's file beside it. Raises WeightsError."""
    beside = file.parent / PEFT_CONFIG
    try:
        if "lora_adapter_metadata" in header:
            return dict(json.loads(header["lora_adapter_metadata"]))
        if file.name == PEFT_NAME and beside.is_file():
            return {start + key: value for key, value in json.loads(beside.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError) as fault:
        raise WeightsError(f"the settings of the LoRA '{file}' cannot be read: {fault}; fetch it again") from fault
    return {}


def settings_of(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """rank and alpha of a layer by peft's settings: those of its network, with the exceptions that patterns name."""
    network, _, module = name.partition(".")
    own = {key.removeprefix(f"{network}."): value for key, value in settings.items()}

    def exception(patterns: Mapping[str, Any] | None, otherwise: Any) -> Any:
        return next((v for p, v in (patterns or {}).items() if re.match(rf"(.*\.)?({p})$", module)), otherwise)

    alpha = exception(own.get("alpha_pattern"), own.get("lora_alpha", own.get("alpha")))
    return {"r": exception(own.get("rank_pattern"), own.get("r")), "alpha": alpha, "root": own.get("use_rslora", False)}


def make_layer(parts: Mapping[str, Tensor], settings: Mapping[str, Any]) -> LoraLayer | None:
    """A layer from its tensors; None where one is missing, or a scale is of a kind that is not known."""
    named = ("alpha", "magnitude", "dora_scale")
    factors = {name: tensor for name, tensor in parts.items() if name not in named}
    whole = ({"down", "up"}, {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
    first, second = ({f"lokr_w{i}"} & factors.keys() or {f"lokr_w{i}_a", f"lokr_w{i}_b"} for i in (1, 2))
    cores = {name for name in factors if name[:-1].endswith("_t")}
    if factors.keys() - cores not in (*whole, first | second):
        return None
    layer = LoraLayer(factors)
    magnitude = parts.get("magnitude")
    if "dora_scale" in parts:
        if layer.kind != "lora" or len(parts["dora_scale"]) != len(factors["up"]):
            return None  # the length of each input's weights, which an older LyCORIS learns
        magnitude = parts["dora_scale"]
    alpha = parts["alpha"].item() if "alpha" in parts else settings["alpha"]
    if alpha is None or (layer.rank is None and settings["r"] is None):  # LyCORIS scales no pair of whole factors
        return LoraLayer(factors, 1.0, magnitude)
    rank = layer.rank if layer.rank is not None else settings["r"]
    return LoraLayer(factors, alpha / (rank**0.5 if settings["root"] else rank), magnitude)


def published_unet(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """config.json of the published UNet that reads text of the same width as a LoRA does; that of SDXL if unsure."""
    widths = {t.shape[1] for key, t in tensors.items() if re.search(r"attn2.*to_[kv].*(down|lora_A)", key)}
    kind = next((WIDTHS[width] for width in widths if width in WIDTHS), "SDXL")
    return read_json(LAYOUTS[kind] / "unet" / "config.json")


# --- into a model ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def load_lora(family: Family, place: str | Path, weight: float = 1.0) -> None:
    """Put a LoRA, or one of its relatives, into the weights of the networks, added to what is there.

    Args:
        family: its networks are changed in place.
        place: a file or folder in any style, see `read_lora`.
        weight: how far to go from what is there: 0 is not at all, 1 as it was learned; more or less than that too.

    Raises:
        WeightsError: the file is missing, damaged, no LoRA, or does not fit the model in every tensor.
    """
    unet: Any = family.modules[family.denoiser]
    lora = read_lora(place, unet.config)
    check_fit(lora, weight_shapes(family.modules), place)
    weights = named_weights(family.modules)
    for name, layer in lora.layers.items():
        weights[name].data = weights[name].data.lerp(layer.merged(weights[name].data), weight)


def named_weights(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The weight of each layer by its name as in `lora_names`, without adapters that are there already."""
    return dict(_named_weights(modules))


def weight_shapes(modules: Mapping[str, nn.Module]) -> dict[str, Shape]:
    """The shape of each layer's weight by its name as in `lora_names`, of packed ones as of any."""
    shapes: dict[str, Shape] = {name: tuple(weight.shape) for name, weight in named_weights(modules).items()}
    for network, module in modules.items():
        for key, layer in module.named_modules():
            if isinstance(layer, QuantizedLinear):
                name = f"{network}.{_historical(network, key.removesuffix('.base_layer'))}"
                shapes[name] = layer.out_features, layer.in_features
    return shapes


def _named_weights(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    for network, module in modules.items():
        for key, parameter in module.named_parameters():
            if key.endswith(".weight") and ".lora_" not in key:
                name = key.removesuffix(".weight").removesuffix(".base_layer")
                yield f"{network}.{_historical(network, name)}", parameter


def _historical(network: str, name: str) -> str:
    return historical_key(f"{name}.").removesuffix(".") if network.startswith("text_encoder") else name


def check_fit(lora: LoraFile, shapes: Mapping[str, Shape], place: str | Path) -> None:
    """Raises WeightsError unless every tensor of a LoRA has its layer, of its shape, in a model.

    Args:
        shapes: of the model's weights, by the layers' names.
    """
    wrong = misfits(lora, shapes)
    if not lora.tensors:
        raise WeightsError(f"the LoRA '{place}' is refused: it holds no tensors of a LoRA; fetch it again")
    if not wrong:
        return
    count, total = len(wrong), lora.tensors
    what = f"no tensor of the {total} fits" if count >= total else f"{count} of its {total} tensors do not fit"
    raise WeightsError(
        f"the LoRA '{place}' is refused: {what} this model, for instance {', '.join(wrong[:3])}; {_why(lora, shapes)}"
    )


def _why(lora: LoraFile, shapes: Mapping[str, Shape]) -> str:
    """What may be the matter with a LoRA that does not fit, and what to do."""
    if not lora.layers and not any("lora" in key for key in lora.strange):
        return "it does not look like a LoRA (no key has 'lora' in it)"
    width, expected = text_width({name: layer.size for name, layer in lora.layers.items()}), text_width(shapes)
    if width is not None and expected is not None and width != expected:
        this = f"is {base_of(expected)}" if expected in WIDTHS else f"reads text of width {expected}"
        return f"it is for {base_of(width)}, this model {this}; name a base of its kind"
    if foreign := unknown_kind(lora.strange):
        return foreign
    missing = sorted({name.partition(".")[0] for name in lora.layers} - {name.partition(".")[0] for name in shapes})
    if missing:
        return f"this model has no {' and no '.join(missing)}; name a base of its kind"
    return "it was made for another model, or in a format that is not known"


def unknown_kind(keys: Iterable[str]) -> str | None:
    """What a file's keys that are not understood belong to, where that has a name; else None."""
    return next((what for mark, what in FOREIGN.items() if any(mark in key for key in keys)), None)


def misfits(lora: LoraFile, shapes: Mapping[str, Shape]) -> list[str]:
    """The keys of a LoRA's tensors, alphas not counted, that have no place in a model of these shapes."""
    lost = [name for name, layer in lora.layers.items() if not (name in shapes and layer.fits(shapes[name]))]
    return sorted(lora.strange + [key for name in lost for key in lora.keys[name]])


def text_width(shapes: Mapping[str, Shape]) -> int | None:
    """The width of the text that a UNet of these layers reads, if one of them tells."""
    return next((shape[1] for name, shape in shapes.items() if READS_TEXT.match(name)), None)


def base_of(width: int) -> str:
    """The kind of model that reads text of this width."""
    kind = WIDTHS.get(width)
    return f"{NAMES[kind]} ({kind}, text of width {width})" if kind else f"a model that reads text of width {width}"
