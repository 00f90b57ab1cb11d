"""What a score model learned: its loss on what it was trained on and on held-out pictures, and what it draws.

    python benchmarks/score_models.py runs/score-concat-mnist --out runs/score-concat-mnist/measured

The training loss is the mean over the last epoch of the batches' losses, which the run wrote down. The held-out loss is
that of the validation source, at 4 times a picture, evenly spread and in an order that has nothing to do with the
pictures', of the averaged weights and of those that the optimizer left. An answer of 0 would score 784 at 28 x 28 px.

Prints one JSON line; writes it as table.json, and SAMPLER.png with --samples pictures of each sampler, into --out.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from class_agreement import grid
from safetensors.torch import load_file

from sdtune import building
from sdtune.config import Recipe, load
from sdtune.data.images import to_float
from sdtune.diffusion import draws
from sdtune.diffusion.objectives import denoising_loss
from sdtune.families.base import Conditioning, Family
from sdtune.opening import open_model
from sdtune.sample import draw_pictures

TIMES, BATCH = 4, 250  # times a held-out picture, pictures at once
SAMPLERS = {"euler-maruyama": 500, "predictor-corrector": 250, "probability-flow": 50}  # and their steps
COLUMNS = 16  # of a sheet


def last_epoch_loss(run: Path, pictures: int, batch_size: int) -> tuple[float, int]:
    """Mean of the losses of the last epoch's steps, and how many steps these are."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    steps = min(len(losses), -(-pictures // batch_size))
    return float(np.mean(losses[-steps:])), steps


@torch.no_grad()
def held_out_loss(family: Family, pixels: torch.Tensor, captions: list[str], seed: int = 0) -> tuple[float, float]:
    """Mean loss of pictures, uint8, (N, 3, H, W), at TIMES times each, and the standard error of that mean."""
    count = len(pixels) * TIMES
    x0 = family.encode_images(to_float(pixels))[0].repeat(TIMES, 1, 1, 1)  # (TIMES * N, C, H, W)
    labels = family.encode_text(captions * TIMES)
    order = draws.permutation(count, seed, "held-out times")
    t = torch.tensor([family.schedule.time((place + 0.5) / count) for place in order])
    eps = draws.normal(x0.shape, seed, "held-out noise")
    losses = []
    for some in torch.arange(count).split(BATCH):
        predict = partial(family.predict, conditioning=Conditioning(labels.text[some]))
        losses.append(denoising_loss(predict, x0[some], eps[some], t[some], family.schedule))
    found = torch.cat(losses)
    return found.mean().item(), (found.std() / count**0.5).item()


def held_out(recipe: Recipe) -> tuple[torch.Tensor, list[str]]:
    """The pictures that the run measures, uint8, (N, 3, H, W), and their captions."""
    sources = [building.make_source(recipe, each) for each in recipe.data if each.role == "validation"]
    batches = building.make_held_out(recipe, sources, recipe.validation.count, BATCH)
    pixels = [batch.pixels for batch in batches if batch.pixels is not None]
    return torch.cat(pixels), [caption for batch in batches for caption in batch.captions]


def as_trained(run: Path, family: Family) -> Family | None:
    """The family with the weights that the optimizer left in the last checkpoint, not averaged; None without one."""
    states = sorted(run.glob("checkpoints/step-*/state/trainable.safetensors"))
    if not states:
        return None
    network = family.modules[family.denoiser]
    prefix = f"{family.denoiser}."
    network.load_state_dict(
        {name.removeprefix(prefix): tensor for name, tensor in load_file(states[-1]).items()}, strict=False
    )
    return family


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="run folder of a score recipe")
    parser.add_argument("--out", type=Path, required=True, help="folder for the table and the sheets")
    parser.add_argument("--samples", type=int, default=64, help="pictures of each sampler")
    parser.add_argument("--samplers", nargs="*", choices=SAMPLERS, default=list(SAMPLERS))
    settings = parser.parse_args(arguments)
    recipe, device = load(str(settings.run / "run.yaml")), torch.device("cpu")
    family = open_model(str(settings.run), device=device)
    learnt = [building.make_source(recipe, each) for each in recipe.data if each.role == "instance"]
    pictures = sum(len(each.pictures) for each in learnt)
    loss, steps = last_epoch_loss(settings.run, pictures, recipe.train.batch_size)
    pixels, captions = held_out(recipe)
    averaged, error = held_out_loss(family, pixels, captions)
    result: dict[str, Any] = {
        "training_loss": round(loss, 2),
        "steps_of_last_epoch": steps,
        "held_out_loss_averaged": round(averaged, 2),
        "standard_error": round(error, 2),
        "held_out_pictures": len(pixels),
        "learnt_pictures": pictures,
        "epochs": round(recipe.train.steps * recipe.train.batch_size / pictures, 2),
        "parameters": sum(p.numel() for p in family.modules[family.denoiser].parameters()),
        "seconds_to_draw": {},
    }
    settings.out.mkdir(parents=True, exist_ok=True)
    height, width = family.picture_size()
    for name in settings.samplers:
        began, count = time.process_time(), settings.samples
        options: dict[str, Any] = {"steps": SAMPLERS[name], "sampler": name, "guidance": 1.0, "batch_size": count}
        drawn = draw_pictures(family, [""] * count, list(range(count)), height=height, width=width, **options)
        whole = grid(list(drawn), COLUMNS, -(-count // COLUMNS))
        whole.convert("L").save(settings.out / f"{name}.png", optimize=True)
        result["seconds_to_draw"][name] = round(time.process_time() - began, 1)
    raw = as_trained(settings.run, family)
    if raw is not None:
        result["held_out_loss"] = round(held_out_loss(raw, pixels, captions)[0], 2)
    (settings.out / "table.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
