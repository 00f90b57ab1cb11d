"""The folder that goes to the Hub: the weights of a run, a card, pictures, and a run.yaml that anyone may see.

    README.md  run.yaml  images/00.png  sdtune.json  and what final/ holds
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from sdtune.adapters.lora_files import WEIGHTS_NAME, read_lora
from sdtune.adapters.lora_writing import write_diffusers
from sdtune.config import Recipe, dump, parse
from sdtune.config.shareable import shareable, shareable_notes
from sdtune.errors import RunError, UsageError
from sdtune.model_card import model_card
from sdtune.run_folder import NOTES, RunFolder, read_metrics
from sdtune.writing import write_json, write_text, written_aside

FOLDER = "push"  # in the run folder, unless another place is named
CARD = "README.md"
# Where networks and tokenizers note what they were loaded from; nothing reads it again.
ORIGINS = ("_name_or_path", "name_or_path", "base_model_name_or_path")


def write_hub_folder(run: RunFolder, repo: str, out: Path | None = None, license: str | None = None) -> Path:
    """Write all that goes to a repository; returns where it stands.

    Args:
        run: a run that has ended.
        repo: user/name, which the card speaks of.
        out: a new or empty folder; None: push/ in the run folder, in place of an older one.
        license: see `model_card`.

    Raises:
        RunError: the run has not ended, its run.yaml is damaged, or the folder cannot be written.
        UsageError: `run` is not the folder of a run, or `out` holds something.
    """
    recipe = shareable(read_recipe(run), repo.split("/")[1])
    if unfinished := run.unfinished():
        raise RunError(
            f"the run '{run.path}' has not ended: it is at {unfinished}. Go on with it: sdtune train "
            f"{run.path / 'run.yaml'} --resume"
        )
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out: '{out}' exists already and is not overwritten; name a new folder")
    target = out if out is not None else run.path / FOLDER
    with written_aside(target) as aside:
        notes = copy_weights(run.final, aside)
        drawn = recipe.task == "denoising"  # a VAE's samples are the training pictures themselves, and stay here
        gallery = copy_pictures(run.path / "samples", aside) if drawn else []
        rows = read_metrics(run.metrics) if run.metrics.is_file() else []
        inpaints = bool(notes.get("inpaints"))
        card = model_card(recipe, repo, gallery=gallery, rows=rows, inpaints=inpaints, license=license)
        write_text(aside / CARD, card)
        write_text(aside / "run.yaml", dump(recipe))
    return target


def read_recipe(run: RunFolder) -> Recipe:
    """The recipe of a run folder. Raises UsageError, RunError."""
    file = run.path / "run.yaml"
    if not file.is_file():
        raise UsageError(
            f"'{run.path}' is not the folder of a run (it has no run.yaml); name one that `sdtune train` wrote, such "
            "as runs/my-run"
        )
    try:
        return parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise RunError(f"'{file}' cannot be read: {fault}; it says what the run was") from fault


def copy_weights(final: Path, target: Path) -> dict[str, Any]:
    """What final/ holds, large files as hard links where possible, and JSON without places on this machine.

    Returns:
        The notes beside the weights.
    """
    notes: dict[str, Any] = {}
    for file in sorted(path for path in final.rglob("*") if path.is_file()):
        place = target / file.relative_to(final)
        place.parent.mkdir(parents=True, exist_ok=True)
        if file == final / NOTES:
            notes = shareable_notes(json.loads(file.read_text(encoding="utf-8")))
            write_json(place, notes)
        elif file.name.endswith("config.json") or file.name == "model_index.json":
            values = json.loads(file.read_text(encoding="utf-8"))
            write_json(place, {key: value for key, value in values.items() if key not in ORIGINS})
        elif file.name == WEIGHTS_NAME:
            copy_lora(file, place)
        else:
            link(file, place)
    return notes


def copy_lora(file: Path, place: Path) -> None:
    """A LoRA whose scale is multiplied into its factors: many programs pass over the header, where a run notes it."""
    layers = read_lora(file).layers
    if any(layer.scale != 1 for layer in layers.values()):
        write_diffusers(layers, place)
    else:
        link(file, place)


def copy_pictures(samples: Path, target: Path) -> list[tuple[str, str]]:
    """The last pictures that were drawn while training: (prompt, place) of each."""
    stages = sorted((file.parent for file in samples.glob("step-*/prompts.json")), key=lambda stage: stage.name)
    if not stages:
        return []
    gallery = []
    prompts = json.loads((stages[-1] / "prompts.json").read_text(encoding="utf-8"))["prompts"]
    for number, prompt in enumerate(prompts):
        place = f"images/{number:02d}.png"
        (target / "images").mkdir(exist_ok=True)
        link(stages[-1] / f"{number:02d}.png", target / place)
        gallery.append((prompt, place))
    return gallery


def link(file: Path, place: Path) -> None:
    """A hard link, or a copy where the file system knows none."""
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)
