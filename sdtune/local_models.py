"""Which of the models that a recipe names are on this machine, and a tokenizer that counts a caption's tokens."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from sdtune.config import ModelSettings, Recipe, resolve_asset
from sdtune.data.check_captions import Reader
from sdtune.data.check_findings import Finding, about
from sdtune.errors import WeightsError
from sdtune.hub_access import unreachable

CLIP = "assets:single_file/sd1/tokenizer"  # that of Stable Diffusion, which comes with sdtune
BERT_LENGTH = 256  # BERT and T5, which say so or more, are given as many tokens at once as CLIP
CLIP_LENGTH = 77  # tokens that its text encoder reads, start and end included
CHUNK = 75


@dataclass(frozen=True)
class NamedModel:
    """A model that a recipe names.

    Attributes:
        key: where in the recipe. name: what is written there.
        folder: where it is on this machine, in whole or in part, or its single file; None where it is not.
        lacks: parts that are not there.
    """

    key: str
    name: str
    folder: Path | None
    lacks: tuple[str, ...] = ()

    @property
    def here(self) -> bool:
        """Whether nothing is left to download."""
        return self.folder is not None and not self.lacks


def named_models(recipe: Recipe) -> list[NamedModel]:
    """All models that a recipe names, looked for in folders and in the cache of the Hub."""
    model, found = recipe.model, []
    if model.base is not None:
        found.append(_base(model, recipe.task))
    if model.vae is not None:
        found.append(_part("model.vae", model.vae, "vae"))
    for part, value in (model.from_config or {}).items():
        if isinstance(value, str):
            found.append(_part(f"model.from_config.{part}", value, part))
    return found


def model_findings(models: Sequence[NamedModel]) -> list[Finding]:
    """What is not here: fatal where it is a folder, or where the Hub does not answer."""
    folders = [each for each in models if not each.here and Path(resolve_asset(each.name)).exists()]
    hub = [each for each in models if not each.here and each not in folders]
    findings = about(
        "fatal",
        "model incomplete",
        [f"{each.key} '{each.name}' lacks {', '.join(each.lacks)}" for each in folders],
        "model folders that lack a part",
        "copy them again",
    )
    if hub:
        fault = _no_hub()
        names = [f"{each.key} '{each.name}'{_lacking(each)}" for each in hub]
        if fault:
            do = f"the Hub cannot be asked ({fault}); on a machine with network: hf download {hub[0].name}"
        else:
            do = f"the run downloads them first; to have them before: hf download {hub[0].name}"
        findings += about("fatal" if fault else "warning", "model", names, "models that are not on this machine", do)
    return findings


def caption_reader(model: ModelSettings | None, max_tokens: int) -> Reader:
    """Counts tokens as the recipe's model does, else as CLIP does, which most models read with.

    Args:
        model: of the recipe; None where there is none.
        max_tokens: of a caption that are read, a multiple of 75.

    Raises:
        WeightsError: the tokenizer's files are damaged.
    """
    chunks = max(1, max_tokens // CHUNK)
    own = _own_tokenizer(model) if model is not None else None
    one = _open(own if own is not None else Path(resolve_asset(CLIP)))
    name = "the model's own tokenizer" if own is not None else "CLIP's tokenizer"
    exact = own is not None or model is None or Path(str(model.base)).is_file()
    return Reader(one.count, chunks * one.limit, name, exact)


def _base(model: ModelSettings, task: str) -> NamedModel:
    from sdtune.families import family_class
    from sdtune.run_folder import model_place  # imports torch

    name, key = str(model.base), "model.base"
    local = Path(model_place(name))
    if local.is_file():
        return NamedModel(key, name, local)
    if local.exists():
        folder: Path | None = local
    else:
        index = _cached(name, "model_index.json", model.revision)
        folder = index.parent if index is not None else None
    if folder is None:
        return NamedModel(key, name, None)
    family: Any = family_class(model.family)
    parts = ("vae",) if task == "autoencoding" else family.parts
    parts = tuple(part for part in parts if part != "vae" or model.vae is None)
    lacks = [part for part in parts if not _is_whole(folder / part, model.variant)]
    if not (folder / "model_index.json").is_file():
        lacks.insert(0, "model_index.json")
    return NamedModel(key, name, folder, tuple(lacks))


def _part(key: str, name: str, part: str) -> NamedModel:
    """A model that is one part, in a folder of its own or in that of a whole model."""
    from sdtune.run_folder import model_place  # imports torch

    local = Path(model_place(name))
    if local.is_file():
        return NamedModel(key, name, local, () if part in ("unet", "vae", "text_encoder") else (part,))
    if local.exists():
        folder = local / part if (local / part).is_dir() else local
        return NamedModel(key, name, folder, () if _is_whole(folder, None, part) else (part,))
    files = {"tokenizer": ("vocab.json", "tokenizer.json"), "scheduler": ("scheduler_config.json",)}
    kind = part.removesuffix("_2")
    for file in files.get(kind, ("config.json",)):
        found = _cached(name, file, None) or _cached(name, f"{part}/{file}", None)
        if found is not None:
            return NamedModel(key, name, found.parent, () if _is_whole(found.parent, None, part) else (part,))
    return NamedModel(key, name, None)


def _is_whole(folder: Path, variant: str | None, part: str | None = None) -> bool:
    """Whether the files of one part of a model are there: for a network its configuration and weights."""
    if not folder.is_dir():
        return False
    names = {file.name for file in folder.iterdir() if file.exists()}  # a link into the cache may lead to nothing
    part = part or folder.name
    if part.startswith("tokenizer"):
        return "tokenizer.json" in names or {"vocab.json", "merges.txt"} <= names
    if part == "scheduler":
        return "scheduler_config.json" in names
    weights = {name for name in names if name.endswith(".safetensors") and (not variant or f".{variant}" in name)}
    return "config.json" in names and bool(weights)


def _own_tokenizer(model: ModelSettings) -> Path | None:
    name = (model.from_config or {}).get("tokenizer", model.base)
    if not isinstance(name, str):
        return None
    found = _part("", name, "tokenizer")
    return found.folder if found.here else None


def _cached(repo: str, file: str, revision: str | None) -> Path | None:
    """A file of a hub model in this machine's cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repo, file, revision=revision)
    except HFValidationError:  # a folder that does not exist, or a web address
        return None
    return Path(found) if isinstance(found, str) else None


def _no_hub() -> str:
    """Why the Hub cannot be asked; empty when it can."""
    from huggingface_hub import constants

    return "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else unreachable(constants.ENDPOINT)


def _lacking(model: NamedModel) -> str:
    return f" (lacks {', '.join(model.lacks)})" if model.folder is not None else ""


def _open(folder: Path) -> Reader:
    """A reader of one chunk, the text encoder's length without start and end."""
    try:
        config = folder / "tokenizer_config.json"
        settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        length = settings.get("model_max_length") or CLIP_LENGTH
        file = folder / "tokenizer.json"
        tokenizer = Tokenizer.from_file(str(file)) if file.is_file() else _from_words(folder)
        tokenizer.no_truncation()
        around = tokenizer.num_special_tokens_to_add(False)
    except Exception as fault:  # json, OS and tokenizers errors
        raise WeightsError(f"'{folder}' cannot be opened as a tokenizer: {' '.join(str(fault).split())}") from fault
    return Reader(partial(_lengths, tokenizer), (length if length < BERT_LENGTH else CLIP_LENGTH) - around, "")


def _from_words(folder: Path) -> Tokenizer:
    """Of a folder with `vocab.json` and `merges.txt` alone, as older models have it."""
    from transformers import CLIPTokenizer  # takes a second

    return CLIPTokenizer.from_pretrained(str(folder)).backend_tokenizer


def _lengths(tokenizer: Tokenizer, captions: Sequence[str]) -> list[int]:
    return [len(each.ids) for each in tokenizer.encode_batch_fast(list(captions), add_special_tokens=False)]
