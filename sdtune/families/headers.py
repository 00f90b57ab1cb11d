"""The layers of a model and their shapes, without its weights: from file headers and configurations alone."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sdtune.config import resolve_asset
from sdtune.errors import WeightsError
from sdtune.families.loading import hub_file, near, read_json
from sdtune.families.saving import historical_key
from sdtune.families.single_file import FIRST, LAYOUTS, find_layout, read_prediction, read_shapes
from sdtune.families.text_encoders import KINDS, network_class
from sdtune.hub_access import looks_like_hub_id

Shape = tuple[int, ...]
PARTS = ("unet", "text_encoder", "text_encoder_2")


def unet_config(base: str) -> dict[str, Any] | None:
    """config.json of a model's UNet; None for a folder that has no such file.

    Args:
        base: a diffusers folder, a folder with unet/ alone, a checkpoint in one file, a hub id, a name of `LAYOUTS`.

    Raises:
        WeightsError: there is no such model. HubError: the Hub has no answer.
    """
    place = _place(base)
    if isinstance(place, Path) and not (place / "unet" / "config.json").is_file():
        return None
    return read_json(_config(place, "unet"))


def scheduler_config(base: str) -> dict[str, Any] | None:
    """scheduler_config.json of a model, which says what its UNet predicts; None for a folder that has no such file.

    Args and errors: as of `unet_config`.
    """
    place, name = _place(base), "scheduler/scheduler_config.json"
    if isinstance(place, str):
        return read_json(hub_file(place, name))
    if not (place / name).is_file():
        return None
    file = Path(resolve_asset(base))
    return read_json(place / name) | (read_prediction(file) if file.is_file() else {})


def layer_shapes(base: str) -> dict[str, Shape]:
    """The shape of each weight of a model's UNet and text encoders, by names such as `unet.conv_in`.

    Args:
        base: see `unet_config`. Weights are never read: a folder may hold configurations alone.

    Raises:
        WeightsError: there is no UNet, or a file is damaged. HubError: the Hub has no answer.
    """
    place = _place(base)
    shapes: dict[str, Shape] = {}
    for part in PARTS:
        found = _from_headers(place / part) if isinstance(place, Path) else {}
        if not found and _has(place, part):
            found = _from_config(part, read_json(_config(place, part)))
        shapes |= {f"{part}.{name}": shape for name, shape in found.items()}
    file = Path(resolve_asset(base))
    if file.is_file():  # an inpainting model has more channels than the configuration of its kind
        shapes["unet.conv_in"] = tuple(read_shapes(file)[FIRST].shape)
    if not shapes:
        raise WeightsError(f"'{base}' has no unet/ and no text_encoder/; name a model's folder, file or hub id")
    return shapes


def read_header(file: Path) -> dict[str, Shape]:
    """The shapes of a safetensors file's tensors; what follows its header is not looked at. Raises WeightsError."""
    try:
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length if length < 100_000_000 else 0))
        return {key: tuple(value["shape"]) for key, value in header.items() if key != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise WeightsError(f"the header of '{file}' cannot be read: {fault}; fetch the file again") from fault


def _place(base: str) -> Path | str:
    """The folder of a model, for a file that of its kind's configurations; else the hub id."""
    if base in LAYOUTS:
        return LAYOUTS[base]
    path = Path(resolve_asset(base))
    if path.is_file():
        return find_layout(path)
    if path.is_dir():
        return path
    if not looks_like_hub_id(base):
        raise WeightsError(
            f"'{base}' does not exist{near(base)}, and is no hub id (user/name); name a model's folder or file"
        )
    return base


def _config(place: Path | str, part: str) -> Path:
    name = f"{part}/config.json"
    return place / name if isinstance(place, Path) else hub_file(place, name)


def _has(place: Path | str, part: str) -> bool:
    """Whether a model has this part: told by its folder, on the Hub by its model_index.json."""
    if isinstance(place, Path):
        return (place / part / "config.json").is_file()
    return read_json(hub_file(place, "model_index.json")).get(part, [None])[0] is not None


def _from_headers(folder: Path) -> dict[str, Shape]:
    """Of the weights in a part's folder, by the layer's historical name."""
    found: dict[str, Shape] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for key, shape in read_header(file).items():
            if key.endswith(".weight"):
                found[_name(folder.name, key)] = shape
    return found


def _from_config(part: str, config: Mapping[str, Any]) -> dict[str, Shape]:
    """Of a network that is made without memory for its weights."""
    with torch.device("meta"):
        if part == "unet":
            from sdtune.models import UNet2DConditionModel

            network: Any = UNet2DConditionModel.from_config(dict(config))
        else:
            known = ("CLIPTextModelWithProjection",) if part == "text_encoder_2" else tuple(KINDS)
            kind = network_class(config, known, part)
            network = kind(kind.config_class.from_dict(dict(config)))
    parameters = network.named_parameters()
    return {_name(part, key): tuple(value.shape) for key, value in parameters if key.endswith(".weight")}


def _name(part: str, key: str) -> str:
    name = re.sub(r"weight$", "", key)
    return (historical_key(name) if part.startswith("text_encoder") else name).removesuffix(".")
