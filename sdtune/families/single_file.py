"""Checkpoints in one file, in the layout of the original Stable Diffusion code: diffusers reads, we take the tensors.

What such a file does not hold, configurations and tokenizer, lies in `assets/single_file`: no network is needed.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdtune.errors import WeightsError

ASSETS = Path(__file__).parent.parent / "assets" / "single_file"
# diffusers' names of the kinds of checkpoint, and what they are when opened. (Inpainting has more channels, no more.)
LAYOUTS = {"v1": ASSETS / "sd1", "inpainting": ASSETS / "sd1"}
FIRST = "model.diffusion_model.input_blocks.0.0.weight"  # the UNet's first layer, (320, C, 3, 3)


def find_layout(file: Path) -> Path:
    """The folder with the configurations of a checkpoint.

    Raises:
        WeightsError: not a checkpoint of Stable Diffusion 1.x, or damaged.
    """
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    shapes = read_shapes(file) if file.suffix == ".safetensors" else {}
    if FIRST not in shapes:
        raise WeightsError(
            f"'{file}' is a file; expected a diffusers folder (with model_index.json and unet/), a hub id, or a "
            ".safetensors checkpoint of Stable Diffusion 1.x (whole: UNet, VAE and text encoder)"
        )
    kind = infer_diffusers_model_type(shapes)
    if kind not in LAYOUTS:
        raise WeightsError(
            f"'{file}' is a checkpoint in one file of kind {kind}; of these only Stable Diffusion 1.x is opened yet. "
            "Turn it into a folder with diffusers' StableDiffusionPipeline (for SDXL StableDiffusionXLPipeline)"
            ".from_single_file(FILE).save_pretrained(FOLDER), and name that"
        )
    return LAYOUTS[kind]


def read_shapes(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file without their values, on the meta device. Raises WeightsError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            return {key: torch.empty(tensors.get_slice(key).get_shape(), device="meta") for key in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as fault:
        raise WeightsError(f"'{file}' cannot be read: {fault}; it is damaged, or the download is incomplete") from fault


def open_network(kind: Any, file: Path, part: str) -> nn.Module:
    """A network of a checkpoint, in float32, with every weight in its place.

    Args:
        kind: its class: one of `sdtune.models`, or CLIPTextModel. part: its folder in a diffusers pipeline.

    Raises:
        WeightsError: a tensor is missing or of another shape.
    """
    try:
        stock = open_stock(file, part)
        if any(parameter.is_meta for parameter in stock.parameters()):
            raise ValueError("some tensors are missing")
    except Exception as fault:  # diffusers raises errors of any kind here
        reason = " ".join(str(fault).split())[:300]
        raise WeightsError(
            f"the {part} of '{file}' could not be opened ({reason}); expected a whole checkpoint of Stable Diffusion "
            "1.x: UNet, VAE and text encoder"
        ) from fault
    if type(stock) is kind:
        return stock
    with torch.device("meta"):
        network = kind.from_config(stock.config)
    network.load_state_dict(stock.state_dict(), strict=True, assign=True)
    return network


def open_stock(file: Path, part: str) -> Any:
    """A network of diffusers' or transformers' own class."""
    import diffusers

    options: dict[str, Any] = {"config": str(find_layout(file)), "torch_dtype": torch.float32, "local_files_only": True}
    if part == "unet":
        channels = read_shapes(file)[FIRST].shape[1]
        return diffusers.UNet2DConditionModel.from_single_file(
            str(file), subfolder="unet", in_channels=channels, **options
        )
    if part == "vae":
        return diffusers.AutoencoderKL.from_single_file(str(file), subfolder="vae", **options)
    others = dict.fromkeys(("unet", "vae", "tokenizer", "safety_checker", "feature_extractor"))
    return diffusers.StableDiffusionPipeline.from_single_file(str(file), **options, **others).text_encoder
