"""What is done with LoRA files: looking into them, merging, resizing, extracting; the commands `sdtune lora ...`."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdtune.adapters.lora_files import (
    LoraFile,
    check_fit,
    find_lora,
    misfits,
    named_weights,
    read_lora,
)
from sdtune.adapters.lora_layers import LoraLayer
from sdtune.adapters.lora_writing import write_diffusers, write_kohya
from sdtune.config import resolve_asset
from sdtune.errors import UsageError, WeightsError
from sdtune.export import file_aside
from sdtune.families.headers import layer_shapes, unet_config
from sdtune.run_folder import weights_folder

Layers = dict[str, LoraLayer]
FORMATS = ("diffusers", "kohya")


# --- info -----------------------------------------------------------------------------------------------------------


def info(place: str | Path, base: str | None = None) -> dict[str, Any]:
    """What a LoRA file is.

    Args:
        place: a file or folder in any style, or a run.
        base: a model, or a folder with unet/, whose headers and configurations alone are read.

    Returns:
        format (diffusers, peft, kohya, legacy; None where nothing in it is a LoRA's), kind, rank and alpha (a list
        where they differ), targets (endings of the layers' names), networks, base (SD1, SD2, SDXL or None), tensors
        (alphas not counted), applied (how many of them have a place in `base`, None without it), refused (why it would
        not be loaded, or None) and metadata.
    """
    file = find_lora(weights_folder(Path(place)))
    if base:
        path = weights_folder(Path(resolve_asset(base)))
        base = str(path) if path.exists() else base
    lora = read_lora(file, unet_config(base) if base else None)
    layers = lora.layers.values()
    facts: dict[str, Any] = {
        "file": str(file),
        "format": lora.style if lora.layers else None,
        "kind": _one({layer.kind for layer in layers}),
        "rank": _one({layer.rank for layer in layers if layer.rank is not None}),
        "alpha": _one({round(layer.alpha, 6) for layer in layers}),
        "targets": sorted({ending(name) for name in lora.layers}),
        "networks": sorted({name.partition(".")[0] for name in lora.layers}),
        "base": lora.base,
        "tensors": lora.tensors,
        "applied": None,
        "refused": None,
        "metadata": lora.metadata,
    }
    if base:
        shapes = layer_shapes(base)
        facts["applied"] = lora.tensors - len(misfits(lora, shapes))
        try:
            check_fit(lora, shapes, file)
        except WeightsError as fault:
            facts["refused"] = str(fault)
    elif not lora.layers or lora.strange:
        some = ", ".join(sorted(lora.strange)[:3])
        facts["refused"] = f"{len(lora.strange)} of its {lora.tensors} tensors are no LoRA's, for instance {some}"
    return facts


def ending(name: str) -> str:
    """The part of a layer's name that tells its kind: to_q, to_out.0, ff.net.2, conv1."""
    *_, before, last = f".{name}".split(".")
    if before == "net" or (last == "proj" and before.isdecimal()):
        return name[name.rindex("ff.net") :]
    return f"{before}.{last}" if last.isdecimal() or (last == "conv" and before.isdecimal()) else last


def _one(values: set[Any]) -> Any:
    """The value if it is one, else all of them in order; None of none."""
    return next(iter(values), None) if len(values) < 2 else sorted(values)


# --- merge and resize -----------------------------------------------------------------------------------------------


def merge(loras: Sequence[Mapping[str, LoraLayer]], weights: Sequence[float]) -> Layers:
    """The weighted sum of several LoRA, exact: ranks stand side by side.

    Args:
        loras: their layers. weights: as many.

    Raises:
        WeightsError: one is no plain LoRA, or layers of one name differ in size.
    """
    parts: dict[str, list[LoraLayer]] = {}
    for layers, weight in zip(loras, weights, strict=True):
        for name, layer in layers.items():
            layer.require_lora(name, "merging")
            scaled = LoraLayer({part: tensor.float() for part, tensor in layer.factors.items()}, layer.scale * weight)
            parts.setdefault(name, []).append(scaled.baked())
    merged = {}
    for name, some in parts.items():
        if len({layer.size for layer in some}) > 1:
            sizes = " and ".join(str(layer.size) for layer in some)
            raise WeightsError(f"the LoRA are for different models: {name} is of sizes {sizes}")
        down, up = some[0].factors["down"], some[0].factors["up"]
        downs = [layer.factors["down"].reshape(-1, *down.shape[1:]) for layer in some]  # (r, in, ...)
        ups = [layer.factors["up"].reshape(len(up), -1, *up.shape[2:]) for layer in some]  # (out, r, ...)
        merged[name] = LoraLayer({"down": torch.cat(downs), "up": torch.cat(ups, dim=1)})
    return merged


@dataclass
class Energy:
    """How much of what there was is kept: sums of squares of the updates' elements."""

    kept: float = 0.0
    total: float = 0.0

    @property
    def share(self) -> float:
        """Kept, of all; 1 where there was nothing."""
        return self.kept / self.total if self.total else 1.0


def resize(layers: Mapping[str, LoraLayer], rank: int | None = None, fraction: float = 1.0) -> tuple[Layers, Energy]:
    """The nearest LoRA of a smaller rank, by singular values.

    Args:
        rank: at most so many columns a layer; None: no limit.
        fraction: of a layer's energy (sum of squares) to be kept; the smallest rank that keeps it is taken.

    Raises:
        WeightsError: it is no plain LoRA.

    Source: Eckart and Young 1936, "The approximation of one matrix by another of lower rank".
    """
    smaller, energy = {}, Energy()
    for name, layer in layers.items():
        layer.require_lora(name, "resizing")
        down, up = (layer.factors[part].float().flatten(1) for part in ("down", "up"))
        # svd(up down) through the small middle of two QR decompositions: (out, r) (r, r) (r, in)
        q_up, r_up = torch.linalg.qr(up)
        q_down, r_down = torch.linalg.qr(down.T)
        u, s, v = torch.linalg.svd(layer.scale * r_up @ r_down.T, full_matrices=False)
        smaller[name] = truncated(q_up @ u, s, v @ q_down.T, layer.factors["down"].shape, rank, fraction, energy)
    return smaller, energy


def truncated(
    u: Tensor, s: Tensor, v: Tensor, kernel: Sequence[int], rank: int | None, fraction: float, energy: Energy
) -> LoraLayer:
    """The first columns of a singular value decomposition as a LoRA, its singular values shared by both factors.

    Args:
        u, s, v: (out, n), (n,), (n, in). kernel: shape of the new `down` but for its first side.
    """
    squares = s.square()
    total = squares.sum()
    energy.total += total.item()
    enough = int((squares.cumsum(0) < fraction * total * (1 - 1e-6)).sum()) + 1 if fraction < 1 else len(s)
    count = max(1, min(enough, rank or len(s), len(s)))
    energy.kept += squares[:count].sum().item()
    root = s[:count].sqrt()
    ones = [1] * (len(kernel) - 2)
    return LoraLayer(
        {
            "down": (root[:, None] * v[:count]).reshape(count, *kernel[1:]),
            "up": (u[:, :count] * root).reshape(-1, count, *ones),
        }
    )


# --- extract --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def extract(base: Mapping[str, Any], tuned: Mapping[str, Any], rank: int) -> tuple[Layers, Energy]:
    """The difference of two models as a LoRA of that rank.

    Args:
        base, tuned: networks by name; UNet and text encoders are looked at.

    Returns:
        The layers that differ, and what share of the whole difference they keep; biases, norms and embeddings, which a
        LoRA cannot hold, count as lost.

    Raises:
        WeightsError: the models are of different kinds, or equal.
    """
    first, second = _networks(base), _networks(tuned)
    weights, layers, energy = named_weights(second), {}, Energy()
    named = {id(weight): name for name, weight in named_weights(first).items()}
    pairs = dict(_pairs(first, second))
    for parameter, other in pairs.items():
        difference = other.float() - parameter.float()
        name = named.get(id(parameter))
        if name is None or difference.ndim not in (2, 4) or "embedding" in name:
            energy.total += difference.square().sum().item()
        elif difference.any():
            u, s, v = torch.linalg.svd(difference.flatten(1), full_matrices=False)
            layers[name] = truncated(u, s, v, tuple(weights[name].shape), rank, 1.0, energy)
    if not layers:
        raise WeightsError("the two models have equal weights; there is nothing to extract")
    return layers, energy


def _networks(modules: Mapping[str, Any]) -> dict[str, Any]:
    return {name: network for name, network in modules.items() if name != "vae"}


def _pairs(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each parameter of one model with its like of the other. Raises WeightsError."""
    if base.keys() != tuned.keys():
        raise WeightsError(f"the models are of different kinds: one has {', '.join(base)}, one {', '.join(tuned)}")
    for name, network in base.items():
        others = dict(tuned[name].named_parameters())
        for key, parameter in network.named_parameters():
            if key not in others or others[key].shape != parameter.shape:
                raise WeightsError(f"the models are of different kinds: {name}.{key} differs in shape or is missing")
            yield parameter, others[key]


# --- the commands ---------------------------------------------------------------------------------------------------


def info_command(place: str, *, base: str | None = None, as_json: bool = False) -> int:
    """`sdtune lora info`: print what a file is; exit code 1 where it would be refused."""
    facts = info(place, base)
    if as_json:
        print(json.dumps(facts))
    else:
        for name, value in facts.items():
            if value not in (None, []) and name not in ("metadata", "refused"):
                print(f"{name:<9} {', '.join(map(str, value)) if isinstance(value, list) else value}")
        for key, value in sorted(facts["metadata"].items()):
            print(f"  {key}: {value[:100]}{'...' if len(value) > 100 else ''}")
    if facts["refused"]:
        print(f"error: {facts['refused']}", file=sys.stderr)
    return 1 if facts["refused"] else 0


def merge_command(places: Sequence[str], *, weights: Sequence[float], rank: int | None, out: Path, kind: str) -> int:
    """`sdtune lora merge`: write the weighted sum of LoRA files."""
    weights = weights or [1.0] * len(places)
    if len(weights) != len(places):
        raise UsageError(f"--weights: got {len(weights)} for {len(places)} files; expected one for each")
    check_out(out, kind)
    layers = merge([plain(read(place), place) for place in places], weights)
    if rank is not None:
        layers, energy = resize(layers, rank)
        print(f"kept {energy.share:.2%} of the sum at rank {rank}", file=sys.stderr)
    return write(layers, out, kind)


def resize_command(place: str, *, rank: int | None, fraction: float, out: Path, kind: str) -> int:
    """`sdtune lora resize`: write a LoRA of a smaller rank."""
    if rank is None and fraction >= 1:
        raise UsageError("give the new rank with --rank, or the share that is to be kept with --fraction 0.95")
    check_out(out, kind)
    layers, energy = resize(plain(read(place), place), rank, fraction)
    ranks = [layer.rank or 0 for layer in layers.values()]
    print(f"kept {energy.share:.2%}, ranks {min(ranks)} to {max(ranks)}", file=sys.stderr)
    return write(layers, out, kind)


def extract_command(base: str, tuned: str, *, rank: int, out: Path, kind: str) -> int:
    """`sdtune lora extract`: write the difference of two models as LoRA."""
    from sdtune.libraries import prepare
    from sdtune.opening import open_model

    check_out(out, kind)
    prepare()
    first, second = (open_model(model, device=torch.device("cpu")) for model in (base, tuned))
    layers, energy = extract(first.modules, second.modules, rank)
    print(f"kept {energy.share:.2%} of the difference, in {len(layers)} layers of rank {rank}", file=sys.stderr)
    return write(layers, out, kind)


def read(place: str) -> LoraFile:
    """The LoRA of a file, folder or run."""
    return read_lora(weights_folder(Path(place)))


def plain(lora: LoraFile, place: str) -> Layers:
    """Its layers. Raises WeightsError where a tensor of the file is not understood."""
    if lora.strange or not lora.layers:
        raise WeightsError(
            f"'{place}': {len(lora.strange)} of its {lora.tensors} tensors are no LoRA's, for instance "
            f"{', '.join(sorted(lora.strange)[:3])}"
        )
    return lora.layers


def check_out(out: Path, kind: str) -> None:
    """Raises UsageError where the new file could not be written."""
    if kind not in FORMATS:
        raise UsageError(f"--format: got '{kind}', expected one of {', '.join(FORMATS)}")
    if out.suffix != ".safetensors":
        raise UsageError(f"--out: got '{out}', expected a file that ends in .safetensors")
    if out.exists():
        raise UsageError(f"--out: '{out}' exists already and is not overwritten; name another file")


def write(layers: Layers, out: Path, kind: str) -> int:
    """Write a LoRA in one of `FORMATS`."""
    with file_aside(out) as aside:
        if kind == "kohya":
            lora = LoraFile(layers, {}, [], kind)
            unet = unet_config("SDXL") if lora.base == "SDXL" else None
            write_kohya(layers, aside, unet=unet, header={"ss_output_name": out.stem})
        else:
            write_diffusers(layers, aside)
    print(f"{out}: {len(layers)} layers", file=sys.stderr)
    return 0
