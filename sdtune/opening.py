"""A model from whatever a person names it by: a run, the weights of one, a diffusers folder, a hub id, or tiny."""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sdtune import building
from sdtune.adapters.learned import find_learned, holds_adapter, load_learned
from sdtune.adapters.tokens import is_embedding
from sdtune.config import ModelSettings, resolve_asset
from sdtune.config.checks import could_be_model
from sdtune.errors import UsageError, WeightsError
from sdtune.families import FAMILIES, family_class
from sdtune.families.base import Family
from sdtune.families.loading import read_index
from sdtune.run_folder import NOTES, weights_folder

TRAINED = ("clip_skip", "max_tokens", "prediction", "zero_terminal_snr")  # notes that change what a model draws


def open_model(model: str, *loras: str, device: torch.device, precision: str = "fp32") -> Family:
    """The family behind a name, on its device, with its adapter if it is one, and then with others.

    Args:
        model: run folder, its final/ or a checkpoint, diffusers folder, hub id, or tiny.
        loras: each a file of a LoRA, of a relative of it or of a token, or a folder or run that holds some; with a
            weight as `parted_weight` reads it. The first that is a run's says how a base is read and drawn with.
        precision: of the networks on a GPU, as `building.frozen_dtype` has it.

    Raises:
        WeightsError: no such model, or a LoRA that does not fit it. HubError: the Hub has no answer.
        UsageError: a weight for new words alone, or a word that the model knows already.
    """
    path = weights_folder(Path(resolve_asset(model)))
    notes = read_notes(path)
    given = [(weights_folder(place), weight) for place, weight in map(parted_weight, loras)]
    learned = [(part, weight) for place, weight in given for part in weighted(place, weight)]
    if holds_adapter(path):
        learned = [(part, 1.0) for part in find_learned(path)] + learned
        family = open_base(path, notes, f"sdtune sample MODEL --lora {path}")
    elif notes.get("task") == "autoencoding":
        raise WeightsError(
            f"'{path}' is a VAE, which draws nothing by itself; train a model with it by model.vae={path}"
        )
    else:
        base = str(path) if path.exists() else model
        family = open_other_base(base, next(filter(None, (read_notes(place) for place, _ in given)), {}))
    for part, weight in learned:
        load_learned(family, part, weight)
    building.place(family, device, building.frozen_dtype(device, precision))  # after them, so that it is rounded once
    return family


def parted_weight(name: str) -> tuple[Path, float]:
    """A place and its weight: PLACE:0.7, or PLACE alone, whose weight is 1. A path that exists is whole."""
    found = re.fullmatch(r"(.+):(-?(?:\d+\.?\d*|\.\d+))", name)
    return (Path(found[1]), float(found[2])) if found and not Path(name).exists() else (Path(name), 1.0)


def weighted(place: Path, weight: float) -> list[Path]:
    """As `find_learned`. Raises UsageError for a weight where there are new words alone."""
    learned = find_learned(place)
    if weight != 1 and all(part.is_file() and is_embedding(part) for part in learned):
        raise UsageError(f"'{place}' holds new words and no LoRA, and words have no weight, got {weight}; leave it out")
    return learned


def read_notes(folder: Path) -> dict[str, Any]:
    """What a run noted beside its weights; empty for other folders. Raises WeightsError when it is damaged."""
    try:
        return json.loads((folder / NOTES).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as fault:
        raise WeightsError(
            f"'{folder / NOTES}' cannot be read ({fault}); it says which model the weights belong to"
        ) from fault


def open_base(folder: Path, notes: dict[str, Any], remedy: str) -> Family:
    """The model that a run's adapter or VAE was trained on; `remedy` is how to name it where it is not found."""
    if not notes:
        raise WeightsError(
            f"'{folder}' holds an adapter and no {NOTES} that names its base model; name it yourself: {remedy}"
        )
    try:
        return building.open_facts(notes)
    except WeightsError as fault:
        raise WeightsError(
            f"'{folder}' was made for the model '{notes.get('base')}', which cannot be opened: {fault}. If it is "
            f"elsewhere now: {remedy}"
        ) from fault


def open_other_base(base: str, notes: Mapping[str, Any], vae: str | None = None) -> Family:
    """A model that takes the place of the one that a run noted: read, and drawn with, as the run was trained.

    Args:
        base: a pipeline folder, file or hub id. notes: of the run; empty where there is none.
        vae: in place of the run's.
    """
    own, vae = read_notes(Path(base)) if Path(base).is_dir() else {}, vae or notes.get("vae")
    if vae and not could_be_model(vae):
        print(f"the run's VAE '{vae}' is not here; that of '{base}' takes its place", file=sys.stderr)
        vae = None
    return open_whole(base, own | {key: notes[key] for key in TRAINED if key in notes}, vae)


def open_whole(base: str, notes: Mapping[str, Any], vae: str | None = None) -> Family:
    """A pipeline folder, file or hub id, with another VAE if one is named; model_index.json says which family it is.

    `notes` of a run say how it was trained.
    """
    kind = read_index(base).get("_class_name")
    names = {pipeline: name for name in FAMILIES for pipeline in family_class(name).pipeline_names}
    if kind not in names:
        raise WeightsError(f"'{base}' is a {kind}; sdtune draws with {', '.join(names)}")
    model = ModelSettings(family=names[kind], base=base, vae=vae, clip_skip=notes.get("clip_skip", 0))
    return building.open_family(model, **{key: notes[key] for key in TRAINED[1:] if key in notes})
