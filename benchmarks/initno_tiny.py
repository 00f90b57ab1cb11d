"""Does initial noise optimisation bring both subjects of a prompt into the picture? Measured on the tiny base.

    python benchmarks/initno_tiny.py                                # the embedded base, which draws single things

    python benchmarks/initno_tiny.py --make-pairs runs/initno/pairs # 888 pictures of pairs of 32 things, for a copy
    sdtune train dreambooth_full_tiny "data=[{path: runs/initno/pairs}]" train.steps=800 train.batch_size=16 \\
        optimizer.lr=5e-4 optimizer.text_encoder_lr=2e-4 validate=null output.dir=runs/pairs-tiny
    python benchmarks/initno_tiny.py --model runs/pairs-tiny        # the copy, on pairs that it was not shown

Prompts of two things, drawn by lot: "a tiger and an octopus". Each is drawn from the same seed without and with
optimisation, with the authors' maps and with maps among the prompt's words alone (end and padding left out). A subject
counts as there when, of the 285 things, it is the nearest to some part of the drawing: the whole, or a square of half
its side, enlarged; `lesser` is the median number of things that are nearer than the subject which is there less. A CLIP
score, the paper's measure, needs weights that are not at hand offline. Prints a table and one JSON line; writes
sheet.png, a row for each way, into --out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from sdtune.data.metadata import write_rows
from sdtune.diffusion import draws
from sdtune.evaluate import Pictures, load_thumbnails, square_distances
from sdtune.families.base import Family
from sdtune.init_noise import Found, Settings, optimised_noise
from sdtune.opening import open_model
from sdtune.sample import draw_pictures, initial_noise

SIZE, STEPS, GUIDANCE = 64, 25, 3.0
PICTURES = 1200  # of pairs that a copy learns
WAYS = {"without": None, "optimised": False, "optimised, words only": True}  # the value is `words_only` of Scorer


def pairs(things: int, count: int, held_out: bool) -> list[tuple[int, int]]:
    """Numbers of two different things of the first `things` of a lot, `count` times; held out: one in ten of all."""
    lot = draws.permutation(285, 0, "things of pairs")[:things]
    every = [(a, b) for a in lot for b in lot if a != b]
    some = [pair for i, pair in enumerate(sorted(every)) if held_out == (draws.integer(10, 0, "held out", i) == 0)]
    return [some[i] for i in draws.permutation(len(some), 0, "order of pairs")[:count]]


def prompt_of(names: Sequence[str], pair: tuple[int, int]) -> str:
    """Both things with their articles."""
    return " and ".join(f"{'an' if names[i][0] in 'aeiou' else 'a'} {names[i]}" for i in pair)


def make_pairs(out: Path, things: int, count: int) -> None:
    """A data set of pictures in which two things stand side by side, each half as large, in either order."""
    names, pictures = load_thumbnails()
    rows = []
    out.mkdir(parents=True)
    for number, pair in enumerate(pairs(things, count, held_out=False)):
        picture = Image.new("RGB", (SIZE, SIZE), "white")
        swap = draws.integer(2, 0, "side", number)
        for i, thing in enumerate(pair):
            top = draws.integer(3, 0, "height", number, i) * SIZE // 4
            thumbnail = Image.fromarray(pictures[thing]).resize((SIZE // 2, SIZE // 2), Image.Resampling.LANCZOS)
            picture.paste(thumbnail, ((i ^ swap) * SIZE // 2, top))
        picture.save(out / f"{number:04d}.png")
        rows.append({"file_name": f"{number:04d}.png", "text": prompt_of(names, pair)})
    write_rows(out, rows)


def parts(pictures: Pictures) -> list[Pictures]:
    """The pictures, uint8 (N, 64, 64, 3), and nine squares of each of half its side, enlarged."""
    half, found = SIZE // 2, [pictures]
    for top in (0, SIZE // 4, half):
        for left in (0, SIZE // 4, half):
            crops = torch.from_numpy(pictures[:, top : top + half, left : left + half].copy()).permute(0, 3, 1, 2)
            large = F.interpolate(crops.float(), size=(SIZE, SIZE), mode="bilinear", antialias=True)
            found.append(large.round().byte().permute(0, 2, 3, 1).numpy())
    return found


def ranks(drawings: Pictures, references: Pictures, wanted: Sequence[tuple[int, int]]) -> np.ndarray:
    """How many things are nearer than each subject, in the part of its drawing where they are fewest: (N, 2)."""
    distances = np.stack([square_distances(piece, references) for piece in parts(drawings)])  # (pieces, N, things)
    asked = np.take_along_axis(distances, np.array(wanted)[None], axis=2)  # (pieces, N, 2)
    return (distances[..., None, :] < asked[..., None]).sum(-1).min(0)


def first_noise(
    family: Family, prompts: Sequence[str], seeds: Sequence[int], words_only: bool | None, settings: Settings
) -> tuple[torch.Tensor, list[Found]]:
    """The noise that drawing begins with, (N, C, h, w), and what optimisation found, if it was asked for."""
    if words_only is None:
        return initial_noise(family, seeds, SIZE, SIZE), []
    options: dict[str, Any] = {"words_only": words_only, "settings": settings}
    found = optimised_noise(family, prompts, seeds, SIZE, SIZE, len(family.schedule) - 1, **options)
    return torch.stack([each.noise for each in found]), found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny", help="folder or run of a model, or tiny")
    parser.add_argument("--count", type=int, default=48, help="prompts")
    parser.add_argument("--things", type=int, default=32, help="how many things the pairs are of")
    parser.add_argument("--make-pairs", type=Path, default=None, metavar="OUT", help="write the data set and stop")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rounds", type=int, default=Settings.rounds, help="noises that are tried at most")
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--out", type=Path, default=Path("runs/initno"), help="folder for sheet.png")
    settings = parser.parse_args(arguments)
    if settings.make_pairs is not None:
        make_pairs(settings.make_pairs, settings.things, PICTURES)
        return {}

    family = open_model(settings.model, device=torch.device("cpu"))
    names, references = load_thumbnails()
    wanted = pairs(settings.things, settings.count, held_out=True)
    prompts = [prompt_of(names, pair) for pair in wanted]
    seeds = list(range(len(prompts)))
    result: dict[str, Any] = {"model": settings.model, "prompts": len(prompts), "steps": settings.steps}
    result |= {"guidance": settings.guidance, "ways": {}, "torch": torch.__version__}
    rows = []
    for way, words_only in WAYS.items():
        began = time.perf_counter()
        noise, found = first_noise(family, prompts, seeds, words_only, Settings(rounds=settings.rounds))
        options: dict[str, Any] = {"steps": settings.steps, "guidance": settings.guidance, "noise": noise}
        drawn = draw_pictures(family, prompts, seeds, height=SIZE, width=SIZE, **options)
        pictures = np.stack([np.asarray(picture.convert("RGB")) for picture in drawn])
        rank = ranks(pictures, references, wanted)  # (N, 2)
        there = rank == 0
        rows.append((way, pictures))
        result["ways"][way] = {
            "both": float(there.all(1).mean()),
            "at_least_one": float(there.any(1).mean()),
            "rank_of_the_lesser": float(np.median(rank.max(1))),
            "seconds": round(time.perf_counter() - began, 1),
            "moved": float((noise - initial_noise(family, seeds, SIZE, SIZE)).square().mean().sqrt()),
        }
        if found:
            result["ways"][way] |= {
                "response_before": float(np.mean([each.before[0] for each in found])),
                "response": float(np.mean([each.response for each in found])),
                "conflict_before": float(np.mean([each.before[1] for each in found])),
                "conflict": float(np.mean([each.conflict for each in found])),
                "reached": float(np.mean([each.reached for each in found])),
            }
    settings.out.mkdir(parents=True, exist_ok=True)
    sheet(prompts, rows).save(settings.out / "sheet.png", optimize=True)
    show(result)
    return result


def sheet(prompts: Sequence[str], rows: Sequence[tuple[str, Pictures]], columns: int = 12) -> Image.Image:
    """The first drawings of each way, one below the other."""
    head, band = 30, SIZE + 18
    picture = Image.new("RGB", (columns * (SIZE + 8), head + len(rows) * band), "white")
    pen = ImageDraw.Draw(picture)
    for i, prompt in enumerate(prompts[:columns]):
        for line, name in enumerate(prompt.split(" and ")):
            pen.text((i * (SIZE + 8), 2 + 12 * line), name[:12], "#6a707c")
    for row, (title, pictures) in enumerate(rows):
        pen.text((0, head + row * band), title, fill="black")
        for i, each in enumerate(pictures[:columns]):
            picture.paste(Image.fromarray(each), (i * (SIZE + 8), head + 16 + row * band))
    return picture


def show(result: dict[str, Any]) -> None:
    """The table, then the JSON line."""
    print(f"{'':<24}{'both there':>12}{'one at least':>14}{'lesser':>8}", end="")
    print(f"{'response':>18}{'conflict':>18}{'bars met':>10}{'seconds':>9}")
    for way, found in result["ways"].items():
        line = f"{way:<24}{found['both']:>12.1%}{found['at_least_one']:>14.1%}{found['rank_of_the_lesser']:>8.0f}"
        if "response" in found:
            for score in ("response", "conflict"):
                line += f"{found[f'{score}_before']:>9.3f} -> {found[score]:.3f}"
            line += f"{found['reached']:>10.1%}"
        print(f"{line}{found['seconds']:>9}" if "response" in found else f"{line}{'':>46}{found['seconds']:>9}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
