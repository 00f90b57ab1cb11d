"""What is done with LoRA files: looking into them, merging, resizing, extracting; the commands `sdtune lora ...`."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdtune.adapters.lora_arithmetic import Layers, extract, merge, resize
from sdtune.adapters.lora_files import (
    LoraFile,
    check_fit,
    find_lora,
    misfits,
    read_lora,
    unknown_kind,
)
from sdtune.adapters.lora_names import ending
from sdtune.adapters.lora_writing import kohya_names, write_diffusers, write_kohya
from sdtune.adapters.tokens import embedding_files, read_embedding
from sdtune.building import base_place
from sdtune.errors import UsageError, WeightsError
from sdtune.export import file_aside, noted_base, sdxl_blocks
from sdtune.families.headers import layer_shapes, unet_config
from sdtune.file_headers import kind_of, kohya_header
from sdtune.opening import read_notes
from sdtune.run_folder import weights_folder

FORMATS = ("diffusers", "kohya")


# --- info -----------------------------------------------------------------------------------------------------------


def info(place: str | Path, base: str | None = None) -> dict[str, Any]:
    """What a LoRA file is.

    Args:
        place: a file or folder in any style, or a run.
        base: a model, or a folder with unet/, whose headers and configurations alone are read.

    Returns:
        format (diffusers, peft, kohya, legacy; None where nothing in it is a LoRA's), kind, rank and alpha (a list
        where they differ), targets (endings of the layers' names), networks, base (see `LoraFile.base`), tensors
        (alphas not counted), applied (how many of them have a place in `base`, None without it), refused (why it would
        not be loaded, or None) and metadata.
    """
    file = find_lora(weights_folder(Path(place)))
    base = base and base_place(base)
    lora = read_lora(file, unet_config(base) if base else None)
    layers = lora.layers.values()
    facts: dict[str, Any] = {
        "file": str(file),
        "format": lora.style if lora.layers else None,
        "kind": _one({layer.kind for layer in layers}),
        "rank": _one({layer.rank for layer in layers if layer.rank is not None}),
        "alpha": _one({round(layer.alpha, 6) for layer in layers if layer.rank is not None}),
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
        facts["refused"] = strangers(lora, file)
    return facts


def strangers(lora: LoraFile, file: str | Path) -> str:
    """What is not understood of a file, and what to do."""
    if "token" in lora.metadata or lora.strange and set(lora.strange) <= {"emb_params", "clip_l", "clip_g"}:
        token = read_embedding(Path(file))[0]
        return f"it holds the token '{token}' and no LoRA; draw with it: sdtune sample MODEL --lora {file}"
    told = f"{len(lora.strange)} of its {lora.tensors} tensors are no LoRA's, for instance "
    told += ", ".join(sorted(lora.strange)[:3])
    if foreign := unknown_kind(lora.strange):
        return f"{told}; {foreign}"
    counted = any(key.startswith("lora_unet_") for key in lora.strange)
    return f"{told}; if it is for an SDXL of other blocks, name that with --base MODEL" if counted else told


def _one(values: set[Any]) -> Any:
    """The value if it is one, else all of them in order; None of none."""
    return next(iter(values), None) if len(values) < 2 else sorted(values)


# --- the commands ---------------------------------------------------------------------------------------------------


def info_command(place: str, *, base: str | None = None, as_json: bool = False) -> int:
    """`sdtune lora info`: print what a file is; exit code 1 where it would be refused."""
    from sdtune.libraries import prepare

    prepare()
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


def merge_command(
    places: Sequence[str], *, weights: Sequence[float], rank: int | None, out: Path, kind: str, base: str | None = None
) -> int:
    """`sdtune lora merge`: write the weighted sum of LoRA files; `base` as for `read`."""
    weights = weights or [1.0] * len(places)
    if len(weights) != len(places):
        raise UsageError(f"--weights: got {len(weights)} for {len(places)} files; expected one for each")
    check_out(out, kind)
    loras, target = read(places, base, kind)
    layers = merge(loras, weights)
    if rank is not None:
        layers, energy = resize(layers, rank)
        print(f"kept {energy.share:.2%} of the sum at rank {rank}", file=sys.stderr)
    return write(layers, out, kind, target)


def resize_command(
    place: str, *, rank: int | None, fraction: float, out: Path, kind: str, base: str | None = None
) -> int:
    """`sdtune lora resize`: write a LoRA of a smaller rank; `base` as for `read`."""
    if rank is None and fraction >= 1:
        raise UsageError("give the new rank with --rank, or the share that is to be kept with --fraction 0.95")
    check_out(out, kind)
    (whole,), target = read([place], base, kind)
    layers, energy = resize(whole, rank, fraction)
    ranks = [layer.rank or 0 for layer in layers.values()]
    print(f"kept {energy.share:.2%}, ranks {min(ranks)} to {max(ranks)}", file=sys.stderr)
    return write(layers, out, kind, target)


def extract_command(base: str, tuned: str, *, rank: int, out: Path, kind: str) -> int:
    """`sdtune lora extract`: write the difference of two models as LoRA."""
    from sdtune.libraries import prepare
    from sdtune.opening import open_model

    check_out(out, kind)
    prepare()
    first, second = (open_model(model, device=torch.device("cpu")) for model in (base, tuned))
    target = Target(dict(first.modules["unet"].config))
    layers, energy = extract(first.modules, second.modules, rank)
    print(f"kept {energy.share:.2%} of the difference, in {len(layers)} layers of rank {rank}", file=sys.stderr)
    return write(layers, out, kind, target)


@dataclass(frozen=True)
class Target:
    """The model that LoRA are for, as far as it is known.

    Attributes:
        unet: config.json of its UNet. guess: what the files themselves tell: SD1, SD2, SDXL, or that it is unsure.
    """

    unet: Mapping[str, Any] | None = None
    guess: str | None = None

    @property
    def kind(self) -> str | None:
        """SD1, SD2 or SDXL."""
        return kind_of(self.unet) if self.unet else self.guess

    @property
    def blocks(self) -> Mapping[str, Any] | None:
        """See `sdxl_blocks`."""
        return sdxl_blocks(self.unet, self.guess)


def read(places: Sequence[str], base: str | None, kind: str) -> tuple[list[Layers], Target]:
    """The LoRA of files, folders or runs, and what `write` needs to write their like.

    Args:
        base: the model that they are for; None takes the first that a run noted and that is here, else the published.
        kind: one of `FORMATS`; what it has no name for is refused now, before the work.

    Raises:
        WeightsError: a file is no LoRA, does not fit `base`, or has layers that kohya has no name for.
        UsageError: a folder has new tokens too.
    """
    folders = [weights_folder(Path(place)) for place in places]
    for folder in folders:
        check_no_tokens(folder)
    known = base_place(base) if base else None
    if not base and kind == "kohya":
        known = next(filter(None, (noted_base(read_notes(folder)) for folder in folders)), None)
    unet = unet_config(known) if known else None
    files = [read_lora(folder, unet) for folder in folders]
    loras = [plain(*pair) for pair in zip(files, places, strict=True)]
    if base and known:
        for file, place in zip(files, places, strict=True):
            check_fit(file, layer_shapes(known), place)
    target = Target(unet, next((file.base for file in files if file.base), None))
    if kind == "kohya":
        kohya_names((name for layers in loras for name in layers), target.blocks)
    return loras, target


def check_no_tokens(folder: Path) -> None:
    """Raises UsageError where new tokens, for which a LoRA file has no place, stand beside a LoRA."""
    if files := embedding_files(folder):
        tokens = ", ".join(read_embedding(file)[0] for file in files)
        raise UsageError(
            f"'{folder}' holds new tokens ({tokens}) beside its LoRA, and a LoRA file has no place for them; name the "
            f"LoRA alone, {find_lora(folder)}, and hand on the tokens' files, {', '.join(map(str, files))}, with the "
            "new one"
        )


def plain(lora: LoraFile, place: str) -> Layers:
    """Its layers. Raises WeightsError where a tensor of the file is not understood."""
    if lora.strange or not lora.layers:
        raise WeightsError(f"'{place}': {strangers(lora, place)}")
    return lora.layers


def check_out(out: Path, kind: str) -> None:
    """Raises UsageError where the new file could not be written."""
    if kind not in FORMATS:
        raise UsageError(f"--format: got '{kind}', expected one of {', '.join(FORMATS)}")
    if out.suffix != ".safetensors":
        raise UsageError(f"--out: got '{out}', expected a file that ends in .safetensors")
    if out.exists():
        raise UsageError(f"--out: '{out}' exists already and is not overwritten; name another file")


def write(layers: Layers, out: Path, kind: str, target: Target) -> int:
    """Write a LoRA for that model in one of `FORMATS`."""
    with file_aside(out) as aside:
        if kind == "kohya":
            write_kohya(layers, aside, unet=target.blocks, header=kohya_header({}, {}, target.kind, out.stem))
        else:
            write_diffusers(layers, aside)
    print(f"{out}: {len(layers)} layers", file=sys.stderr)
    return 0
