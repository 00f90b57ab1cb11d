"""Opening and making the parts of a diffusers pipeline, with errors that say what to do."""

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdtune.diffusion import draws
from sdtune.errors import HubError, SdtuneError, WeightsError, nearest
from sdtune.families.single_file import find_layout
from sdtune.hub_access import hub_fault, looks_like_hub_id


def read_index(base: str, revision: str | None = None, allow_pickle: bool = False) -> dict[str, Any]:
    """`model_index.json` of a diffusers folder, hub id or single file: the pipeline's parts and their classes.

    Raises:
        WeightsError: `base` is a file of another kind, or a folder without model_index.json.
        HubError: the Hub could not be reached or has no such model.
    """
    place = Path(base)
    if place.is_file():
        place = find_layout(place, allow_pickle)
    if place.is_dir():
        index = place / "model_index.json"
        if not index.is_file():
            found = ", ".join(sorted(p.name for p in place.iterdir())[:6]) or "nothing"
            raise WeightsError(
                f"'{base}' is not a diffusers pipeline: it has no model_index.json (found: {found}). "
                "Name the folder that holds unet/, vae/, text_encoder/ and model_index.json"
            )
        return read_json(index)
    if not looks_like_hub_id(base):
        raise WeightsError(
            f"'{base}' does not exist{near(base)}, and is no hub id (user/name). Name a diffusers folder, a hub id, "
            "or 'tiny' for the small model that comes with sdtune"
        )
    return read_json(hub_file(base, "model_index.json", revision))


def near(name: str) -> str:
    """What a missing path may mean, " (did you mean 'runs/rex'?)"; empty where nothing beside it is called alike."""
    path = Path(name)
    close = get_close_matches(path.name, [other.name for other in path.parent.glob("*")], n=1)
    return f" (did you mean '{path.with_name(close[0])}'?)" if close else ""


def hub_file(repo: str, filename: str, revision: str | None = None) -> Path:
    """One file of a hub model, downloaded or from the cache. Raises HubError."""
    from huggingface_hub import hf_hub_download

    require_hub(repo)
    try:
        return Path(hf_hub_download(repo, filename, revision=revision))
    except Exception as fault:  # the library raises requests', httpx's, its own and OS errors here
        raise hub_error(repo, fault) from fault


def vae_subfolder(place: str) -> str | None:
    """Where the VAE lies in a folder or hub model: in vae/, as in a pipeline, or, as None tells, at the top."""
    if Path(place).is_dir():
        return part_folder(place, "vae")
    try:
        hub_file(place, "vae/config.json")
    except HubError:
        return None
    return "vae"


def part_folder(place: str, part: str) -> str | None:
    """Where a part lies that a recipe names by its place: in a folder of that name, or, as None tells, at the top."""
    return part if (Path(place) / part).is_dir() else None


def require_hub(repo: str) -> None:
    """Raises HubError when a model is not in the cache and the Hub cannot be asked for it."""
    if fault := hub_fault(repo):
        raise HubError(
            f"'{repo}' is no folder here{near(repo)}, is not in this machine's cache, and could not be fetched from "
            f"the Hub ({fault}). On a machine with network: `hf download {repo}`, then copy the folder here and name "
            "its path; the model `tiny` needs no network"
        )


def hub_error(repo: str, fault: Exception) -> HubError:
    """One paragraph for whatever went wrong between here and the Hub."""
    lines = str(fault).strip().splitlines()
    reason = f"{type(fault).__name__}: {lines[0]}" if lines else type(fault).__name__
    return HubError(
        f"'{repo}' is no folder here{near(repo)} and could not be fetched from the Hub ({reason}). Check the name and "
        "the network; a gated model needs `hf auth login`"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises WeightsError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"expected an object, got {type(value).__name__}")
        return value
    except (OSError, ValueError) as fault:
        raise WeightsError(f"'{path}' cannot be read: {fault}") from fault


def read_settings(base: str, subfolder: str | None, name: str, revision: str | None = None) -> dict[str, Any]:
    """A JSON file of a folder or hub model, or of one of its parts. Raises WeightsError, HubError."""
    name = f"{subfolder}/{name}" if subfolder else name
    return read_json(Path(base) / name if Path(base).is_dir() else hub_file(base, name, revision))


def open_part(kind: Any, base: str, subfolder: str | None, **options: Any) -> Any:
    """`kind.from_pretrained` with errors in plain words.

    Args:
        kind: a class with `from_pretrained`: a network, tokenizer or configuration.
        base: folder or hub id. subfolder: the part's folder in it, or None when `base` is the part itself.
        options: passed on; None values are left out.
    """
    place = f"{base}/{subfolder}" if subfolder else base
    options = {key: value for key, value in options.items() if value is not None}
    if subfolder:
        options["subfolder"] = subfolder
    local = Path(base).exists()
    if local and not Path(place).is_dir():
        raise WeightsError(f"'{place}' does not exist; expected a folder with a {kind.__name__}")
    if not local:
        require_hub(base)
    try:
        return kind.from_pretrained(base, **options)
    except SdtuneError:
        raise
    except Exception as fault:  # safetensors, json, OS, hub and shape errors of three libraries
        if not local:
            raise hub_error(base, fault) from fault
        reason = " ".join(str(fault).split())[:400]
        raise WeightsError(f"'{place}' could not be opened as a {kind.__name__}: {reason}") from fault


def open_network(kind: Any, base: str, subfolder: str | None, *, is_part: bool = False, **options: Any) -> nn.Module:
    """A network with every weight in its place.

    Args:
        is_part: of a larger model, so that weights may be left over.

    Raises:
        WeightsError: a tensor is missing, left over or of another shape, or the files are damaged.
    """
    network, report = open_part(kind, base, subfolder, output_loading_info=True, dtype=torch.float32, **options)
    missing, extra = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    extra = [key for key in extra if not key.endswith("position_ids")]  # a buffer that older transformers saved
    if missing or (extra and not is_part):
        place = f"{base}/{subfolder}" if subfolder else base
        raise WeightsError(
            f"'{place}' does not fit its config.json: {len(missing)} tensors missing {missing[:3]}, {len(extra)} are "
            f"left over {extra[:3]}. The folder holds another model's weights, or the download is incomplete"
        )
    return network


def make_network(kind: Any, config: Mapping[str, Any], seed: int, purpose: str) -> nn.Module:
    """A network with fresh weights, a pure function of `config`, `seed` and `purpose`.

    Raises:
        WeightsError: a setting that the network does not have, or a value that it cannot be made with.
    """
    known = [name for name in signature(kind).parameters if name not in ("args", "kwargs")]
    for key in config:
        if key not in known and not key.startswith("_"):
            raise WeightsError(f"model.from_config.{purpose}.{key}: unknown key; {nearest(key, known)}")
    with draws.seeded_globals(seed, f"weights of {purpose}"):
        try:
            return kind(**config)
        except (TypeError, ValueError) as fault:
            raise WeightsError(f"model.from_config.{purpose}: {fault}") from fault


def freeze(modules: Mapping[str, nn.Module]) -> None:
    """No gradients, evaluation mode: adapters switch on what learns."""
    for module in modules.values():
        module.requires_grad_(False).eval()


def tokenize(
    tokenizer: Any,
    captions: Sequence[str],
    max_tokens: int,
    length: int = 77,
    around: tuple[str | None, str] = ("bos_token_id", "eos_token_id"),
) -> list[list[list[int]]]:
    """Token ids of captions, in chunks of what the text encoder reads at once.

    Args:
        tokenizer: of the text encoder. captions: any texts.
        max_tokens: tokens kept of a caption, a multiple of 75; longer captions are cut.
        length: how many tokens the text encoder reads at once, start and end token included.
        around: what the tokenizer calls the start token (None: there is none) and the end token.

    Returns:
        For each caption `max_tokens / 75` chunks of `length` ids, each with its own start and end token.
    """
    start, end = ([getattr(tokenizer, name)] if name else [] for name in around)
    width = length - len(start) - len(end)
    chunks = max(1, max_tokens // 75)
    rows = []
    for ids in token_ids(tokenizer, captions):
        row = []
        for c in range(chunks):
            part = ids[c * width : (c + 1) * width]
            padding = [tokenizer.pad_token_id] * (width - len(part))
            row.append([*start, *part, *end, *padding])
        rows.append(row)
    return rows


def token_ids(tokenizer: Any, captions: Sequence[str]) -> list[list[int]]:
    """Ids of captions, without start and end. A learned token of several vectors, `<cat>`, is followed by its others,
    `<cat>_1` and so on, if the tokenizer has some."""
    found = tokenizer(list(captions), add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    added, others = tokenizer.get_added_vocab(), dict[int, list[int]]()
    for token, number in added.items():
        while (name := f"{token}_{len(others.get(number, ())) + 1}") in added:
            others.setdefault(number, []).append(added[name])
    return [[i for number in ids for i in (number, *others.get(number, ()))] for ids in found] if others else found
