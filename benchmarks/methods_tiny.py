"""What each method does to the embedded tiny model: real training, each effect measured from the same noise.

    python benchmarks/methods_tiny.py                        # all three parts, about 15 minutes on 2 CPU cores
    python benchmarks/methods_tiny.py --part prior --out runs/methods

    prior     DreamBooth, text encoder included, on one thing that the base never saw, as full training and as LoRA,
              with and without class pictures: what becomes of the thing, of its class (animal faces) and of the rest?
    token     a style as a word: textual inversion of 32 Noto pictures; the base draws Fluent ones.
    adapters  full training, LoRA and DoRA for equal steps on the 16 demo things, without class pictures.

A drawing counts as right when, of all pictures, the one that was asked for is the nearest (`sdtune/evaluate.py`).
Prints a table for each part and one JSON line at the end; writes a contact sheet of each part into --out. The part
`token` needs the pictures of `python examples/tiny_base/build_data.py`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from sdtune.config import Recipe, load, resolve_asset
from sdtune.data.metadata import read_rows, write_rows
from sdtune.diffusion import draws
from sdtune.evaluate import Pictures, load_demo, load_thumbnails, nearest, share, square_distances
from sdtune.progress import show_progress
from sdtune.run import Run
from sdtune.sample import draw_pictures

SIZE, COLUMNS, GUIDANCE, STEPS = 64, 16, 2.0, 25  # STEPS of sampling
KEPT = 48  # other things that are drawn
NEW, NEW_PROMPT = "teddy bear", "sks bear face"  # the demo's picture of it is the one that is taught
FACES = ("mouse face", "cow face", "tiger face", "rabbit face", "cat face", "dragon face", "horse face", "monkey face",
         "dog face", "pig face", "frog face", "hamster face", "wolf face", "bear face", "panda face", "fox face",
         "lion face", "koala", "polar bear", "zebra face", "giraffe face", "unicorn face")  # fmt: skip
WORD = "<noto>"


@dataclass(frozen=True)
class Things:
    """What can be drawn: names and pictures of the 285 things of the base and the 16 of the demo, in this order."""

    names: list[str]
    pictures: Pictures

    def numbers(self, names: Sequence[str]) -> list[int]:
        """Where things stand."""
        return [self.names.index(name) for name in names]


def all_things() -> Things:
    """The 301 things."""
    (names, pictures), (new_names, new_pictures) = load_thumbnails(), load_demo()
    return Things(names + new_names, np.concatenate([pictures, new_pictures]))


def draw(run: Run, prompts: Sequence[str]) -> Pictures:
    """One picture of each prompt, each from noise of its own, uint8 (N, 64, 64, 3)."""
    seeds = list(range(len(prompts)))
    options: dict[str, Any] = {"height": SIZE, "width": SIZE, "steps": STEPS, "guidance": GUIDANCE}
    return np.stack([np.asarray(picture) for picture in draw_pictures(run.family, prompts, seeds, **options)])


def right(drawings: Pictures, wanted: Sequence[int], things: Things) -> float:
    """Share of the drawings whose nearest picture is the wanted one."""
    return share(nearest(drawings, things.pictures), list(wanted))


def fresh(recipe: str, out: Path, overrides: Sequence[str]) -> Recipe:
    """A shipped recipe that writes to `out`, whose run of before is removed, and draws no samples."""
    shutil.rmtree(out, ignore_errors=True)
    settings = load(recipe, [*overrides, "validate.samples=null", "validate.every=null"])
    settings.output.dir = str(out)
    return settings


def size_of(folder: Path) -> float:
    """Megabytes of a run's result."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def sheet(columns: Sequence[str], rows: Sequence[tuple[str, Pictures]], out: Path) -> None:
    """Rows of pictures, each with its title above, and what was asked for above the first."""
    band, width = SIZE + 18, len(rows[0][1]) * (SIZE + 4)
    picture = Image.new("RGB", (width, 16 + len(rows) * band), "white")
    pen = ImageDraw.Draw(picture)
    for i, word in enumerate(columns):
        pen.text((i * (SIZE + 4), 2), word[:11], fill="#6a707c")
    for row, (title, pictures) in enumerate(rows):
        pen.text((0, 16 + row * band), title, fill="black")
        for i, each in enumerate(pictures):
            picture.paste(Image.fromarray(each), (i * (SIZE + 4), 16 + row * band + 14))
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(out, optimize=True)


# --- the parts --------------------------------------------------------------------------------------------------------


def prior(out: Path, steps: int) -> list[dict[str, Any]]:
    """One new thing, with and without class pictures."""
    things = all_things()
    rest = [i for i in draws.permutation(285, 0, "rest") if things.names[i] not in FACES][:KEPT]
    faces = things.numbers(FACES)
    asked = {"new": ([NEW_PROMPT] * 16, things.numbers([NEW]) * 16), "class": (list(FACES), faces)}
    asked["rest"] = ([things.names[i] for i in rest], rest)
    photos = out / "thing"
    shutil.rmtree(photos, ignore_errors=True)
    photos.mkdir(parents=True)
    demo = Path(resolve_asset("assets:demo"))
    file = next(row["file_name"] for row in read_rows(demo) if row["text"] == NEW)
    shutil.copyfile(demo / file, photos / file)
    (out / "faces.txt").write_text("\n".join(FACES) + "\n", encoding="utf-8")

    results, shown = [], []
    for name, recipe, lr in (("full", "dreambooth_full_tiny", 2e-4), ("LoRA", "dreambooth_lora_tiny", 1e-3)):
        for with_class in (False, True):
            overrides = ["adapter.text_encoder=true", f"optimizer.lr={lr}", "optimizer.text_encoder_lr=5e-5",
                         f"train.steps={steps}", f"data.0.path={photos}", f"data.0.prompt={NEW_PROMPT}",
                         f"data.1.prompts={out / 'faces.txt'}", f"data.1.path={out / 'class'}",
                         f"data.1.generate={3 * len(FACES)}", f"data.1.drawing.steps={STEPS}"]  # fmt: skip
            folder = out / f"prior-{name.lower()}-{'with' if with_class else 'without'}"
            settings = fresh(recipe, folder, overrides)
            if not with_class:
                settings.data = settings.data[:1]
            run = Run(settings)
            before = {what: draw(run, prompts) for what, (prompts, _) in asked.items()} if not shown else {}
            began = time.perf_counter()
            show_progress(run)
            run.finish()
            seconds = time.perf_counter() - began
            after = {what: draw(run, prompts) for what, (prompts, _) in asked.items()}
            title = f"{name}, {'with' if with_class else 'without'} class pictures"
            for word, drawings in (("base", before), (title, after)):
                if drawings:
                    shares = {what: right(drawings[what], wanted, things) for what, (_, wanted) in asked.items()}
                    trained = 0.0 if word == "base" else round(seconds)
                    results.append({"run": word, **shares, "seconds": trained})
                    shown.append(
                        (word, np.concatenate([drawings[what][: 4 if what == "new" else 6] for what in asked]))
                    )
    words = [NEW_PROMPT] * 4 + list(FACES[:6]) + asked["rest"][0][:6]
    sheet(words, shown, out / "prior.png")
    return results


def token(out: Path, steps: int, data: Path) -> list[dict[str, Any]]:
    """A style as a word."""
    names, fluent = load_thumbnails("fluent")
    _, noto = load_thumbnails("noto")
    unseen = [row["name"] for row in json.loads((data / "style_unseen.json").read_text(encoding="utf-8"))]
    wanted = [names.index(name) for name in unseen]
    photos = out / "noto"
    shutil.rmtree(photos, ignore_errors=True)
    shutil.copytree(data / "style_train", photos)
    write_rows(photos, [{**row, "text": f"{row['text']} {WORD}"} for row in read_rows(photos)])
    tokens = json.dumps([{"token": WORD, "initializer": "face", "vectors": 4}])
    overrides = [f"data.0.path={photos}", "data.0.prompt=null", f"train.steps={steps}", f"adapter.tokens={tokens}"]
    run = Run(fresh("textual_inversion_tiny", out / "token", overrides))
    plain, begun = draw(run, unseen), draw(run, [f"{name} {WORD}" for name in unseen])
    began = time.perf_counter()
    show_progress(run)
    run.finish()
    seconds = time.perf_counter() - began
    after = draw(run, [f"{name} {WORD}" for name in unseen])
    results = []
    for word, drawings in (
        ("the name alone", plain),
        ("with the word, before", begun),
        ("with the word, after", after),
    ):
        distances = square_distances(drawings, np.concatenate([fluent, noto]))  # (N, 570)
        rows = np.arange(len(drawings))
        to_fluent, to_noto = distances[rows, wanted], distances[rows, np.array(wanted) + len(names)]
        results.append({
            "run": word,
            "style": float((to_noto < to_fluent).mean()),
            "identity": share(distances.argmin(1) % len(names), wanted),
            "to Fluent": float(to_fluent.mean()),
            "to Noto": float(to_noto.mean()),
            "seconds": round(seconds) if word.endswith("after") else 0,
        })  # fmt: skip
    some = slice(0, COLUMNS)
    pictures = [
        ("Fluent", fluent[wanted]),
        ("drawn by name", plain),
        (f"drawn with {WORD}", after),
        ("Noto", noto[wanted]),
    ]
    sheet(unseen[some], [(title, each[some]) for title, each in pictures], out / "token.png")
    return results


def adapters(out: Path, steps: int) -> list[dict[str, Any]]:
    """Three ways to learn the same, for equal steps."""
    things = all_things()
    new, old = list(range(285, 301)), draws.permutation(285, 0, "old things")[:KEPT]
    results, shown = [], []
    for name, recipe, lr in (
        ("full", "dreambooth_full_tiny", 2e-4),
        ("lora", "lora_tiny", 1e-3),
        ("dora", "dora_tiny", 1e-3),
    ):
        overrides = [f"train.steps={steps}", f"optimizer.lr={lr}", "train.batch_size=8"]
        if name == "full":
            overrides += ["adapter.text_encoder=false", "optimizer.text_encoder_lr=null"]
        settings = fresh(recipe, out / f"adapters-{name}", overrides)
        settings.data = settings.data[:1]
        run = Run(settings)
        prompts = [things.names[i] for i in new + old]
        if not shown:
            base = draw(run, prompts)
            shown.append(("base", base[:COLUMNS]))
            results.append({"run": "base", "new": right(base[:16], new, things), "old": right(base[16:], old, things),
                            "learned": 0, "MB": 0.0, "seconds": 0})  # fmt: skip
        began = time.perf_counter()
        show_progress(run)
        run.finish()
        seconds, after = time.perf_counter() - began, draw(run, prompts)
        shown.append((name, after[:COLUMNS]))
        results.append({
            "run": name,
            "new": right(after[:16], new, things),
            "old": right(after[16:], old, things),
            "learned": sum(parameter.numel() for parameter in run.parameters.values()),
            "MB": round(size_of(run.folder.final), 1),
            "seconds": round(seconds),
        })  # fmt: skip
    sheet([things.names[i] for i in new], shown, out / "adapters.png")
    return results


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A table for a person and for Markdown."""
    keys = list(rows[0])
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    for row in rows:
        cells = [f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
                 for value in row.values()]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", choices=["prior", "token", "adapters"], action="append", help="all unless told")
    parser.add_argument("--out", type=Path, default=Path("runs/methods-tiny"), help="runs and contact sheets")
    parser.add_argument("--data", type=Path, default=Path("data/tiny_base"), help="what build_data.py wrote")
    parser.add_argument("--steps", type=int, default=None, help="of each run; 160, for adapters 332, for token 400")
    settings = parser.parse_args(arguments)
    from sdtune.libraries import prepare

    prepare()
    results: dict[str, Any] = {}
    for part in settings.part or ["prior", "token", "adapters"]:
        if part == "token" and not settings.data.is_dir():
            sys.exit(f"error: {settings.data} does not exist; make it with: python examples/tiny_base/build_data.py")
        settings.out.mkdir(parents=True, exist_ok=True)
        if part == "prior":
            results[part] = prior(settings.out, settings.steps or 160)
        elif part == "token":
            results[part] = token(settings.out, settings.steps or 400, settings.data)
        else:
            results[part] = adapters(settings.out, settings.steps or 332)
        print(f"\n{part}\n{table(results[part])}\n", flush=True)
    print(json.dumps(results))
    return results


if __name__ == "__main__":
    main()
