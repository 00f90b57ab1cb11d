"""What a run learned, in the formats of other tools; and the command `sdtune export`."""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from sdtune.adapters.learned import find_learned, holds_adapter
from sdtune.adapters.lora_files import WEIGHTS_NAME as LORA_NAME
from sdtune.adapters.lora_files import LoraFile, check_fit, load_lora, read_lora
from sdtune.adapters.lora_layers import LoraLayer
from sdtune.adapters.tokens import is_embedding, load_embedding, read_embedding
from sdtune.building import base_place
from sdtune.config import resolve_asset
from sdtune.data.atomic import flush
from sdtune.data.captions import first_of
from sdtune.errors import RunError, UsageError, WeightsError
from sdtune.families import family_class
from sdtune.families.base import Family
from sdtune.families.headers import layer_shapes, scheduler_config, unet_config
from sdtune.families.loading import read_index
from sdtune.families.original import original_checkpoint
from sdtune.families.schedulers import adjusted
from sdtune.families.single_file import FIRST, PICKLES, read_shapes
from sdtune.file_headers import kind_of, kohya_header, model_header, model_marks
from sdtune.hub import size
from sdtune.opening import open_base, open_other_base, open_whole, read_notes
from sdtune.run_folder import NOTES, weights_folder
from sdtune.writing import could_not_write, write_json, written_aside

DTYPES = ("float32", "float16", "bfloat16")
NAME_BASE = "add --base MODEL"
STEP = re.compile(r"step-\d+")  # a checkpoint's folder
FAMILY_KINDS = {"sdxl": "SDXL"}  # families of one kind


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        place: a folder, file or hub id.
        lora: the file or folder of its LoRA, or of a relative of one; None where there is none.
        tokens: the files of new tokens' embeddings.
        notes: what the run noted beside its weights (sdtune.json); empty for other models.
        recipe: the run's settings, run.yaml; empty for other models.
        base: where the model of `--base` is, if it was named.
    """

    place: str
    lora: Path | None
    tokens: Sequence[Path]
    notes: Mapping[str, Any]
    recipe: Mapping[str, Any]
    base: str | None

    @property
    def whole(self) -> bool:
        """Whether it is a model with all its weights."""
        return self.lora is None and not self.tokens

    @property
    def is_vae(self) -> bool:
        """Whether it is a VAE, the result of a run that trained one."""
        return self.notes.get("task") == "autoencoding"

    def open(self) -> Family:
        """The whole model, with the LoRA merged in and the tokens known; of a VAE's run the VAE alone."""
        path = Path(self.place)
        if not self.whole:
            noted = self.notes
            family = open_other_base(self.base, noted) if self.base else open_base(path, dict(noted), NAME_BASE)
            for file in self.tokens:
                load_embedding(family, file)
            if self.lora is not None:
                load_lora(family, self.lora)
            return family
        if self.is_vae:
            family_of: Any = family_class(self.notes["family"])
            return family_of({"vae": family_of.open("vae", str(path), None)})
        return open_whole(self.place, self.notes)

    def open_around_vae(self) -> Family:
        """The model that a VAE was trained for, with the new VAE in it; the VAE alone where there is no such model."""
        if self.base:
            return open_other_base(self.base, {}, vae=self.place)
        if self.notes.get("base"):
            return open_base(Path(self.place), {**self.notes, "vae": self.place}, NAME_BASE)
        print(
            f"{self.place}: this VAE was made from scratch, for no model; it is written alone (into a model: --base "
            "MODEL)",
            file=sys.stderr,
        )
        return self.open()

    def layers(self, dtype: str | None) -> tuple[LoraFile, dict[str, LoraLayer], dict[str, Any] | None]:
        """The LoRA, its layers in that precision, and config.json of the base's UNet if the base is here.

        Raises:
            WeightsError: there is no LoRA, or it does not fit its base.
        """
        if self.lora is None:
            raise WeightsError(self._why_no_lora())
        base = self.base or noted_base(self.notes)
        config = unet_config(base) if base else None
        lora = read_lora(self.lora, config)
        shapes = layer_shapes(base) if base else {name: (*layer.size,) for name, layer in lora.layers.items()}
        check_fit(lora, shapes, self.lora)
        layers = {name: layer.to(getattr(torch, dtype)) if dtype else layer for name, layer in lora.layers.items()}
        return lora, layers, config

    def _why_no_lora(self) -> str:
        if self.is_vae:
            return (
                f"'{self.place}' is a VAE, and this format is for LoRA. Take --format diffusers, merged or single-file"
            )
        if self.whole:
            return (
                f"'{self.place}' is a whole model, and this format is for LoRA. Take --format diffusers or "
                "single-file; or make a LoRA of what it learned: sdtune lora extract --base BASE --tuned MODEL --rank "
                "16 --out FILE"
            )
        return (
            f"'{self.place}' holds new tokens and no LoRA; take --format diffusers, whose files A1111 and ComfyUI read "
            "too"
        )

    def scheduler(self) -> dict[str, Any]:
        """scheduler_config.json of what was trained, as far as its base is here."""
        base = self.base or noted_base(self.notes)
        config = scheduler_config(base) if base else None
        if config is None:
            return {}
        return adjusted(config, self.notes.get("prediction", "auto"), self.notes.get("zero_terminal_snr", False))


def noted_base(notes: Mapping[str, Any]) -> str | None:
    """Where the base is that a run was trained on, if it is a folder or file on this machine."""
    base = notes.get("base")
    return base_place(str(base)) if base and Path(resolve_asset(str(base))).exists() else None


def find_source(place: str, base: str | None = None) -> Source:
    """What a path means: a run, its final/, a checkpoint, a LoRA, a model's folder, file or hub id.

    Raises:
        WeightsError: there is none of these, or `base` is an adapter. HubError: the Hub has no answer.
        UsageError: `base` is named for a whole model.
    """
    given = Path(resolve_asset(place))
    path = weights_folder(given)
    notes = read_notes(path)
    settings = [folder / "run.yaml" for folder in (given, *path.parents[:3]) if (folder / "run.yaml").is_file()]
    recipe = yaml.safe_load(settings[0].read_text(encoding="utf-8")) if notes and settings else {}
    learned = _learned(path, notes)
    tokens = [file for file in learned if file.is_file() and is_embedding(file)]
    lora = next((file for file in learned if file not in tokens), None)
    source = Source(str(path) if path.exists() else place, lora, tokens, notes, recipe, base and base_place(base))
    if source.whole and not source.is_vae:
        check_whole(place, path)
        if base:
            raise UsageError(f"--base: '{place}' is a whole model and needs none; leave it out")
    return source


def check_whole(place: str, path: Path) -> None:
    """Raises WeightsError, or HubError, where a folder or name is no model's; `path` is what `place` means."""
    if path.is_dir() and not (path / "model_index.json").is_file():
        found = first_of(sorted(file.name for file in path.iterdir()), 6) or "nothing"
        raise WeightsError(
            f"'{place}' is neither a run, a model nor a LoRA (found: {found}); name the folder of a run, a folder with "
            "model_index.json, or a .safetensors file"
        )
    if not path.exists():
        read_index(place)


def _learned(path: Path, notes: Mapping[str, Any]) -> list[Path]:
    """The files of a LoRA and of tokens that a path means; none of a whole model."""
    if path.is_file():
        return [path] if path.suffix not in PICKLES and FIRST not in read_shapes(path) else []
    some = path.is_dir() and notes.get("task") != "autoencoding" and not (path / "model_index.json").is_file()
    return find_learned(path) if some and (holds_adapter(path) or any(path.glob("*.safetensors"))) else []


# --- the formats ----------------------------------------------------------------------------------------------------


def export_diffusers(source: Source, out: Path, dtype: str | None) -> None:
    """As `pipe.load_lora_weights(OUT)` and `pipe.load_textual_inversion(OUT)` read it; of a whole model its folder."""
    from sdtune.adapters.lora_writing import write_diffusers

    if source.whole:
        write_model(source.open(), out, dtype, source.notes)
        return
    layers = source.layers(dtype)[1] if source.lora else {}
    if out.suffix != ".safetensors":
        with written_aside(out) as aside:
            if layers:
                write_diffusers(layers, aside / LORA_NAME)
            write_tokens(source, aside, dtype)
        return
    if len(source.tokens) + bool(layers) > 1:
        raise UsageError(f"--out: there are several files to write, got the name of one, '{out}'; name a folder")
    with file_aside(out) as aside:
        if layers:
            write_diffusers(layers, aside)
        else:
            write_token(source.tokens[0], aside, dtype)


def write_tokens(source: Source, folder: Path, dtype: str | None) -> None:
    """Copy the files of the tokens into a folder."""
    for file in source.tokens:
        write_token(file, folder / file.name, dtype)


def write_token(file: Path, target: Path, dtype: str | None) -> None:
    """Copy the embeddings of a token, as diffusers, A1111 and ComfyUI read them."""
    from safetensors.torch import save_file

    token, tensors = read_embedding(file)
    save_file(converted(tensors, dtype), target, metadata={"format": "pt", "token": token})


def converted(tensors: Mapping[str, Tensor], dtype: str | None) -> dict[str, Tensor]:
    """The tensors in another precision, or in their own, as safetensors wants them."""
    kept = getattr(torch, dtype) if dtype else None
    return {key: tensor.detach().to(kept or tensor.dtype).contiguous() for key, tensor in tensors.items()}


def export_peft(source: Source, out: Path, dtype: str | None) -> None:
    """A folder for each network, as `PeftModel.from_pretrained(pipe.unet, OUT / "unet")` reads it."""
    from sdtune.adapters.lora_writing import write_peft

    layers = source.layers(dtype)[1]
    with written_aside(out) as aside:
        write_peft(layers, aside)
        write_tokens(source, aside, dtype)


def export_kohya(source: Source, out: Path, dtype: str | None) -> None:
    """A file with kohya's names, alphas and `ss_` header: A1111, ComfyUI, and diffusers; stderr tells of tokens."""
    from sdtune.adapters.lora_writing import write_kohya

    lora, layers, unet = source.layers(dtype)
    kind = kind_of(unet) if unet else FAMILY_KINDS.get(source.notes.get("family", ""), lora.base)
    beside = token_places(source, out)
    header = kohya_header(source.notes, source.recipe, kind, out.stem, source.scheduler())
    with file_aside(out) as aside:
        write_kohya(layers, aside, unet=sdxl_blocks(unet, kind), header=header)
        for place, file in beside.items():
            with file_aside(place) as aside_too:
                write_token(file, aside_too, dtype)
    for place, file in beside.items():
        print(
            f"{place}: the embedding of {read_embedding(file)[0]}, for the folder embeddings/; A1111 writes it "
            f"{place.stem} in prompts, ComfyUI embedding:{place.stem}",
            file=sys.stderr,
        )


def sdxl_blocks(unet: Mapping[str, Any] | None, kind: str | None) -> Mapping[str, Any] | None:
    """config.json with which kohya counts the blocks of an SDXL, the published one if `unet` is not known; else None.

    Args:
        unet: of the base. kind: of the base, where `unet` does not tell it: SD1, SD2 or SDXL.
    """
    kind = kind_of(unet) if unet else kind
    return (unet or unet_config("SDXL")) if kind == "SDXL" else None


def token_places(source: Source, out: Path) -> dict[Path, Path]:
    """Where kohya's format puts the tokens of a LoRA: files beside it, mine-cat.safetensors, by which A1111 calls them.

    Returns:
        For each new file the run's own.

    Raises:
        UsageError: one exists.
    """
    if not source.lora:
        return {}
    words = [re.sub(r"\W+", "", read_embedding(file)[0]) for file in source.tokens]
    if len({*words, ""}) <= len(words):  # two are alike, or one has no letter
        words = [str(number) for number in range(1, len(words) + 1)]
    places = {
        out.with_name(f"{out.stem}-{word}.safetensors"): file for word, file in zip(words, source.tokens, strict=True)
    }
    for place in places:
        if place.exists():
            raise UsageError(f"--out: '{place}', for a new token, exists already; name another file")
    return places


def export_single_file(source: Source, out: Path, dtype: str | None) -> None:
    """A checkpoint in one file with the original names, a LoRA merged in: A1111, ComfyUI, `from_single_file`."""
    from safetensors.torch import save_file

    if source.tokens:
        raise WeightsError(
            f"'{source.place}' has new tokens, and a checkpoint in one file holds no tokenizer to know them. Take "
            "--format merged; or export the base, and put the tokens' files (--format diffusers) beside it"
        )
    family = source.open()
    try:
        tensors = original_checkpoint(family.modules) | model_marks(family.scheduler)
    except KeyError as fault:
        raise WeightsError(
            f"the original code of Stable Diffusion has no place for the tensor {fault} of '{source.place}'; export it "
            "with --format diffusers"
        ) from fault
    with file_aside(out) as aside:
        save_file(converted(tensors, dtype), aside, metadata=model_header(family, out.stem))


def export_merged(source: Source, out: Path, dtype: str | None) -> None:
    """A folder that stock diffusers opens, a LoRA merged in, a VAE in its place."""
    family = source.open_around_vae() if source.is_vae else source.open()
    write_model(family, out, dtype, source.notes)


def write_model(family: Family, out: Path, dtype: str | None, notes: Mapping[str, Any]) -> None:
    """Write what there is of a model as a diffusers folder; `notes` of its run."""
    skip = notes.get("clip_skip")
    with written_aside(out) as aside:
        family.save(aside, dtype)
        if skip:
            write_json(aside / NOTES, {key: notes[key] for key in ("clip_skip", "max_tokens") if key in notes})
    if skip:
        print(f"{out}: was trained with clip skip; draw with it in diffusers by clip_skip={skip}", file=sys.stderr)


FORMATS: dict[str, Callable[[Source, Path, str | None], None]] = {
    "diffusers": export_diffusers,
    "peft": export_peft,
    "kohya": export_kohya,
    "single-file": export_single_file,
    "merged": export_merged,
}
FILES = ("kohya", "single-file")  # those that are one file


def export(source: Source, kind: str, out: Path, dtype: str | None = None) -> None:
    """Write what was learned in another format; see `FORMATS`.

    Args:
        out: a new folder, or a new .safetensors file; what is there is never overwritten.
        dtype: precision of the weights, one of `DTYPES`; None keeps their own.

    Raises:
        UsageError: `out` is not what the format writes, or exists. WeightsError: the format has no place for it.
        RunError: it could not be written.
    """
    if out.exists():
        raise UsageError(f"--out: '{out}' exists already and is not overwritten; name another place")
    if kind in FILES and out.suffix != ".safetensors":
        raise UsageError(
            f"--out: the format {kind} is one file, got '{out}'; expected a name that ends in .safetensors"
        )
    folder = kind in ("peft", "merged") or source.whole
    if folder and kind not in FILES and out.suffix == ".safetensors":
        raise UsageError(
            f"--out: this is a folder in the format {kind}, got '{out}'; expected a name without an ending"
        )
    FORMATS[kind](source, out, dtype)


@contextmanager
def file_aside(target: Path) -> Iterator[Path]:
    """A file to write to, which takes `target`'s place when the block ends well and vanishes when it does not.

    Raises:
        RunError: the disk is full or the folder cannot be written.
    """
    aside = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        flush(aside)
        os.replace(aside, target)
    except Exception as fault:
        if not could_not_write(fault):
            raise
        reason = getattr(fault, "strerror", None) or fault
        raise RunError(f"'{target}' could not be written ({reason}); make room, or name another place") from fault
    finally:
        aside.unlink(missing_ok=True)


def own_name(place: str, kind: str) -> str:
    """What an export of a place is called unless told: runs/rex/final as kohya's file is rex.safetensors."""
    parts = [part for part in Path(place).absolute().parts if part not in ("final", "weights", "checkpoints")]
    while STEP.fullmatch(parts[-1]):
        parts.pop()
    name = Path(parts[-1]).stem if Path(place).is_file() else parts[-1]
    return f"{name}.safetensors" if kind in FILES else f"{name}-{kind}"


# --- the command ----------------------------------------------------------------------------------------------------


def command(
    place: str,
    kind: str,
    out: Path | None = None,
    *,
    dtype: str | None = None,
    base: str | None = None,
    as_json: bool = False,
) -> int:
    """`sdtune export`: write a run or model in another tool's format; returns the exit code.

    Args:
        out: None writes into the current folder, see `own_name`.

    Raises:
        SdtuneError: see `find_source` and `export`.
    """
    from sdtune.libraries import prepare

    for option, got, known in (("--format", kind, list(FORMATS)), ("--dtype", dtype, [*DTYPES, None])):
        if got not in known:
            raise UsageError(f"{option}: got '{got}', expected one of {', '.join(str(k) for k in known if k)}")
    prepare()
    source = find_source(place, base)
    out = out or Path(own_name(place, kind))
    export(source, kind, out, dtype)
    count = sum(file.stat().st_size for file in ([out] if out.is_file() else out.rglob("*")) if file.is_file())
    if as_json:
        print(json.dumps({"out": str(out), "format": kind, "bytes": count}))
    else:
        print(f"{out}: {kind}, {size(count)}", file=sys.stderr)
    return 0
