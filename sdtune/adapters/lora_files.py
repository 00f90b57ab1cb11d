"""Reading LoRA files: is it one, does it fit the model, and only then diffusers' own loader.

diffusers applies what it recognises of a file and passes over the rest, up to all of it, without a word. So each tensor
is looked up in the model first, and a file that does not fit as a whole is refused.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdtune.errors import WeightsError
from sdtune.families.base import Family
from sdtune.families.saving import historical_key

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for in a folder

# The width of the text that a UNet reads tells the base models apart.
BASES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
CROSS_ATTENTION = re.compile(r"attn2.*to_[kv].*(lora_A|down)\.weight$")
FACTOR = re.compile(r"\.(lora_[AB])\.weight$")


def find_lora(place: str | Path) -> Path:
    """The LoRA file that a path means: itself, or the one in a folder.

    Raises:
        WeightsError: there is none, or it is not a safetensors file.
    """
    path = Path(place)
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        named = [file for file in files if file.name == WEIGHTS_NAME]
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


def load_lora(family: Family, file: Path) -> None:
    """Put a LoRA beside the networks' layers, added to those that are there.

    Args:
        family: its networks are changed in place.
        file: a LoRA in a format that diffusers reads (its own, peft's, kohya's).

    Raises:
        WeightsError: the file is missing, damaged, no LoRA, or does not fit the model in every tensor.
    """
    tensors = read_tensors(file)
    pipeline: Any = family.pipeline()
    check_fit(family, pipeline, tensors, file)
    names = sorted({name for network in family.modules.values() for name in getattr(network, "peft_config", {})})
    name = f"lora_{len(names)}"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are meant to be there
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    if names:
        pipeline.set_adapters([*names, name])


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises WeightsError."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as fault:
        raise WeightsError(
            f"the LoRA '{file}' cannot be read as safetensors ({fault}); it is damaged or another kind of file: "
            "fetch it again"
        ) from fault


def check_fit(family: Family, pipeline: Any, tensors: Mapping[str, Tensor], file: Path) -> None:
    """Raises WeightsError unless every tensor of a LoRA has its layer, of its shape, in the family's networks."""
    wrong = misfits(family, pipeline, tensors)
    if not wrong:
        return
    count, total = len(wrong), len(tensors)
    what = f"no tensor of the {total} fits" if count >= total else f"{count} of its {total} tensors do not fit"
    width = next((t.shape[1] for key, t in tensors.items() if CROSS_ATTENTION.search(key) and t.ndim > 1), None)
    unet: Any = family.modules[family.denoiser]
    expected = unet.config.cross_attention_dim
    hint = "it was made for another model, or in a format that diffusers does not know and would pass over"
    if width is not None and width != expected:
        hint = f"it is for {base_of(width)}, this model is {base_of(expected)}; name a base of its kind"
    elif not any("lora" in key for key in tensors):
        hint = "it does not look like a LoRA (no key has 'lora' in it)"
    raise WeightsError(f"the LoRA '{file}' is refused: {what} this model, for instance {', '.join(wrong[:3])}; {hint}")


def base_of(width: int) -> str:
    """The kind of model that reads text of this width."""
    return f"{BASES.get(width, 'a model')} (text of width {width})"


def misfits(family: Family, pipeline: Any, tensors: Mapping[str, Tensor]) -> list[str]:
    """Keys, as diffusers would look them up, for which the networks have no layer of that shape."""
    try:
        found, _ = pipeline.lora_state_dict(dict(tensors), unet_config=family.modules[family.denoiser].config)
    except Exception:  # the converters of many formats raise what they stumble over
        return sorted(tensors)
    lost = [key for key in tensors if "dora_scale" in key and key not in found]  # dropped by diffusers, with a warning
    places = {
        f"{name}.{key}": part for name, network in family.modules.items() for key, part in named_layers(network).items()
    }
    return lost + [key for key, tensor in found.items() if not fits(places, key, tensor)]


def named_layers(network: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each weight by the historical name of its layer, without adapters that are there already."""
    shapes = {}
    for key, parameter in network.named_parameters():
        if key.endswith(".weight") and ".lora_" not in key:
            name = key.removesuffix(".weight").removesuffix(".base_layer")
            shapes[historical_key(f"{name}.").removesuffix(".")] = tuple(parameter.shape)
    return shapes


def fits(places: Mapping[str, tuple[int, ...]], key: str, tensor: Tensor) -> bool:
    """Whether a factor, under the key that diffusers gives it, belongs to one of the layers."""
    name = peft_key(key)
    factor = FACTOR.search(name)
    if factor is None:
        return False
    shape = places.get(name[: factor.start()])
    if shape is None:
        return False
    if factor[1] == "lora_A":
        return tuple(tensor.shape[1:]) == shape[1:]
    return tensor.shape[0] == shape[0] and all(side == 1 for side in tensor.shape[2:])


def peft_key(key: str) -> str:
    """peft's name of a factor that is given in one of diffusers' own styles."""
    from diffusers.utils.state_dict_utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    if FACTOR.search(key):
        return key
    one = {key: None}
    if key.startswith("unet."):
        return next(iter(convert_unet_state_dict_to_peft(one)))
    try:
        return next(iter(convert_state_dict_to_peft(convert_state_dict_to_diffusers(one))))
    except ValueError:  # not a style that it knows
        return key
