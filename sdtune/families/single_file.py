"""Checkpoints in one file, in the layout of the original Stable Diffusion code: diffusers renames the tensors.

What such a file does not hold, configurations and tokenizer, lies in `assets/single_file`: no network is needed.
Writing one is `original.py`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdtune.errors import WeightsError
from sdtune.families.original import CLIP
from sdtune.families.saving import historical_key
from sdtune.families.schedulers import SAMPLER

ASSETS = Path(__file__).parent.parent / "assets" / "single_file"
LAYOUTS = {"SD1": ASSETS / "sd1", "SD2": ASSETS / "sd2", "SDXL": ASSETS / "sdxl"}  # with their configurations
NAMES = {"SD1": "Stable Diffusion 1.x", "SD2": "Stable Diffusion 2.x", "SDXL": "Stable Diffusion XL"}
TOKENIZER = ASSETS / "sd1" / "tokenizer"  # its words are those of all three
FIRST = "model.diffusion_model.input_blocks.0.0.weight"  # the UNet's first layer, (320, C, 3, 3)
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}  # prediction_type, and what a header calls it
V_PRED, ZERO_SNR = "v_pred", "ztsnr"  # tensors by which A1111, ComfyUI and Forge know a checkpoint
VAE_MARKS = ("decoder.conv_in.weight", "first_stage_model.decoder.conv_in.weight")

EXPECTED = (
    "a diffusers folder (with model_index.json and unet/), a hub id, or a .safetensors checkpoint of Stable Diffusion "
    "1.x, 2.x or XL (whole: UNet, VAE and text encoder)"
)


def find_layout(file: Path, allow_pickle: bool = False) -> Path:
    """The folder with the configurations of a checkpoint.

    Args:
        allow_pickle: whether a .ckpt is opened; only tensors are taken from it (`weights_only`).

    Raises:
        WeightsError: not a checkpoint of Stable Diffusion 1.x, 2.x or XL, or damaged.
    """
    if file.suffix not in (".safetensors", *PICKLES):
        raise WeightsError(f"'{file}' is a file; expected {EXPECTED}")
    kind = kind_of(read_shapes(file, allow_pickle))
    if kind is None:
        raise WeightsError(
            f"'{file}' is a file, and no whole checkpoint of a kind that is known; expected {EXPECTED}. A LoRA goes "
            "with its base: sdtune sample BASE --lora FILE"
        )
    return LAYOUTS[kind]


def kind_of(shapes: Mapping[str, Tensor]) -> str | None:
    """A name of `LAYOUTS`, told by the text encoders of a checkpoint; None for all other files.

    (The refiner of SDXL has one text encoder, the upscaler and the depth model a UNet of other channels.)
    """
    if FIRST not in shapes or shapes[FIRST].shape[1] not in (4, 9):
        return None
    if any(key.startswith("conditioner.embedders.") for key in shapes):
        return "SDXL" if any(key.startswith("conditioner.embedders.1.") for key in shapes) else None
    return "SD2" if any(key.startswith("cond_stage_model.model.") for key in shapes) else "SD1"


def read_shapes(file: Path, allow_pickle: bool = False) -> dict[str, Tensor]:
    """The tensors of a file without their values, on the meta device. Raises WeightsError."""
    if file.suffix in PICKLES:
        return {key: tensor.to("meta") for key, tensor in read_tensors(file, allow_pickle).items()}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            return {key: torch.empty(tensors.get_slice(key).get_shape(), device="meta") for key in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as fault:
        raise WeightsError(f"'{file}' cannot be read: {fault}; it is damaged, or the download is incomplete") from fault


def read_tensors(file: Path, allow_pickle: bool = False) -> dict[str, Tensor]:
    """All tensors of a file, mapped into memory. Raises WeightsError: damaged, or a pickle that is not allowed."""
    if file.suffix not in PICKLES:
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except Exception as fault:  # safetensors and OS errors
            raise WeightsError(f"'{file}' cannot be read: {fault}; it is damaged, or not whole") from fault
    if not allow_pickle:
        raise WeightsError(
            f"'{file}' is a pickle, which can hold harmful code, and is not opened; take the .safetensors file of that "
            "model, or, if you trust where it comes from: model.allow_pickle=true (only tensors are read from it)"
        )
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as fault:  # pickle, zip and torch errors
        reason = " ".join(str(fault).split())[:200]
        raise WeightsError(
            f"'{file}' cannot be opened as weights alone ({reason}); take the .safetensors file of that model"
        ) from fault
    content = content.get("state_dict", content)
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}


def open_network(kind: Any, file: Path, part: str, allow_pickle: bool = False) -> nn.Module:
    """A network of a checkpoint, in float32, with every weight in its place.

    Args:
        kind: its class: one of `sdtune.models`, or a CLIP of transformers. part: its folder in a diffusers pipeline.

    Raises:
        WeightsError: a tensor is missing or of another shape.
    """
    layout = find_layout(file, allow_pickle)
    tensors = read_tensors(file, allow_pickle)
    try:
        if part.startswith("text_encoder"):
            return _text_encoder(kind, tensors, layout, part)
        config = kind.load_config(layout / part)
        if part == "unet":
            config["in_channels"] = tensors[FIRST].shape[1]
        return _network(kind, tensors, config)
    except Exception as fault:  # what diffusers' renaming stumbles over, and torch's strict loading
        reason = " ".join(str(fault).split())[:300]
        raise WeightsError(
            f"the {part} of '{file}' could not be opened ({reason}); expected a whole checkpoint of Stable Diffusion "
            "1.x, 2.x or XL: UNet, VAE and text encoder"
        ) from fault


def open_vae(kind: Any, file: Path, config: Mapping[str, Any], allow_pickle: bool = False) -> nn.Module:
    """A VAE in one file, with the original names or diffusers', or that of a whole checkpoint.

    Args:
        kind: its class. config: of the VAE that it takes the place of; such a file has none of its own.

    Raises:
        WeightsError: the file holds no VAE of that configuration.
    """
    tensors = read_tensors(file, allow_pickle)
    if not any(mark in tensors for mark in VAE_MARKS):
        some = ", ".join(sorted(tensors)[:2])
        raise WeightsError(
            f"model.vae: '{file}' holds no VAE ({len(tensors)} tensors, for instance {some}); expected a VAE's folder, "
            "or a file with the tensors encoder. and decoder."
        )
    try:
        if any(".up_blocks." in key for key in tensors):
            return _strictly(kind, tensors, config)
        return _network(kind, tensors, config)
    except Exception as fault:  # as in `open_network`
        reason = " ".join(str(fault).split())[:300]
        raise WeightsError(
            f"model.vae: '{file}' does not fit the base's VAE, whose place it takes ({reason}); take one for that base"
        ) from fault


def open_tokenizer(layout: Path, part: str) -> Any:
    """CLIP's tokenizer, padded as the kind of model wants it."""
    from transformers import CLIPTokenizer

    own = layout / part
    settings = json.loads((own / "tokenizer_config.json").read_text(encoding="utf-8"))
    words = own if any((own / name).is_file() for name in ("tokenizer.json", "vocab.json")) else TOKENIZER
    return CLIPTokenizer.from_pretrained(str(words), pad_token=settings["pad_token"])


def read_prediction(file: Path) -> dict[str, Any]:
    """What a file says about its UNet's answer, as a scheduler's configuration has it; empty where it says nothing.

    The header may name it (`modelspec.prediction_type`, epsilon or v); some files have a tensor called v_pred, and one
    called ztsnr where the noise schedule ends in pure noise.
    """
    if file.suffix in PICKLES:
        return {}
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        names, said = set(opened.keys()), (opened.metadata() or {}).get("modelspec.prediction_type")
    said = PREDICTIONS["v_prediction"] if V_PRED in names else said
    known = {name: kind for kind, name in PREDICTIONS.items()}
    found: dict[str, Any] = {"prediction_type": known[said]} if said in known else {}
    ends_in_noise = said == PREDICTIONS["v_prediction"] and ZERO_SNR in names
    return found | ({"rescale_betas_zero_snr": True} | SAMPLER if ends_in_noise else {})


def _network(kind: Any, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    """A UNet or VAE from tensors with original names."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    convert = convert_ldm_vae_checkpoint if "latent_channels" in config else convert_ldm_unet_checkpoint
    return _strictly(kind, convert(dict(tensors), dict(config)), config)


def _strictly(kind: Any, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"):
        network = kind.from_config(dict(config))
    network.load_state_dict({key: tensor.float() for key, tensor in state.items()}, strict=True, assign=True)
    return network


def _text_encoder(kind: Any, tensors: dict[str, Tensor], layout: Path, part: str) -> nn.Module:
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm

    # some old checkpoints lack a part of the names of OpenAI's CLIP
    renamed = {CLIP + historical_key(key.removeprefix(CLIP)) if key.startswith(CLIP) else key: tensor
               for key, tensor in tensors.items()}  # fmt: skip
    network = create_diffusers_clip_model_from_ldm(
        kind, renamed, subfolder=part, config=str(layout), torch_dtype=torch.float32, local_files_only=True
    )
    if any(parameter.is_meta for parameter in network.parameters()):
        raise ValueError("some tensors are missing")
    return network
