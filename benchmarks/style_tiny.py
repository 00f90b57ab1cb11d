"""Does a style LoRA carry a style to things that it never saw? For `style_lora_tiny`: from Fluent to Noto emoji.

    python examples/tiny_base/build_data.py
    sdtune train recipes/style_lora_tiny.yaml
    python benchmarks/style_tiny.py                              # runs/style-lora-tiny on the shipped base
    python benchmarks/style_tiny.py --lora FILE --base FOLDER --out FOLDER

Every concept that was not trained on is drawn without and with the LoRA, from the same noise. Two shares, by mean
square difference of the pixels, mirror allowed:
    style      the drawing is nearer to the concept's Noto picture than to its Fluent picture
    identity   of all 570 pictures, both styles, the nearest one shows the right concept
Prints a table, then one JSON line; writes style.png, some things as Fluent, drawn without, drawn with, and Noto.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from sdtune.adapters.lora_files import find_lora, load_lora
from sdtune.config import resolve_asset
from sdtune.evaluate import Pictures, load_thumbnails, share, square_distances
from sdtune.families.stable_diffusion import StableDiffusion
from sdtune.sample import draw_pictures

SIZE, COLUMNS, SHOWN = 64, 12, 48


def measure(samples: Pictures, wanted: list[int], fluent: Pictures, noto: Pictures) -> dict[str, float]:
    """Style and identity, each in [0, 1].

    Args:
        samples: drawings, uint8 (N, 64, 64, 3). wanted: the number of the concept of each, (N).
        fluent, noto: pictures of all concepts in both styles, uint8 (M, 64, 64, 3), in the same order.
    """
    distances = square_distances(samples, np.concatenate([fluent, noto]))  # (N, 2 M)
    rows, count = np.arange(len(samples)), len(fluent)
    nearer_to_noto = distances[rows, np.array(wanted) + count] < distances[rows, wanted]
    return {"style": float(nearer_to_noto.mean()), "identity": share(distances.argmin(1) % count, wanted)}


def draw(family: StableDiffusion, names: list[str], settings: argparse.Namespace) -> Pictures:
    """A drawing of each name from noise of its own, uint8 (N, 64, 64, 3)."""
    seeds = [settings.seed + i for i in range(len(names))]
    options = {"steps": settings.steps, "guidance": settings.guidance, "batch_size": 32}
    return np.stack([np.asarray(p) for p in draw_pictures(family, names, seeds, height=SIZE, width=SIZE, **options)])


def sheet(names: list[str], rows: list[Pictures]) -> Image.Image:
    """The first things below each other: each name, then one picture of each of `rows`."""
    bands, height = -(-min(SHOWN, len(names)) // COLUMNS), 14 + len(rows) * SIZE
    picture = Image.new("RGB", (COLUMNS * (SIZE + 4), bands * (height + 6)), "white")
    pen = ImageDraw.Draw(picture)
    for i, name in enumerate(names[:SHOWN]):
        left, top = i % COLUMNS * (SIZE + 4), i // COLUMNS * (height + 6)
        pen.text((left, top), name[:11], fill="black")
        for row, pictures in enumerate(rows):
            picture.paste(Image.fromarray(pictures[i]), (left, top + 14 + row * SIZE))
    return picture


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lora", type=Path, default=Path("runs/style-lora-tiny/final"), help="file or folder")
    parser.add_argument("--base", default="tiny", help="diffusers folder")
    parser.add_argument("--unseen", type=Path, default=Path("data/tiny_base/style_unseen.json"), help="what to draw")
    parser.add_argument("--out", type=Path, default=Path("runs/style_tiny_benchmark"), help="folder for style.png")
    parser.add_argument("--limit", type=int, default=None, help="only the first N concepts")
    parser.add_argument("--seed", type=int, default=0, help="concept number i is drawn from seed + i")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    settings = parser.parse_args(arguments)
    if not settings.unseen.is_file():
        sys.exit(f"error: {settings.unseen} does not exist; make it with: python examples/tiny_base/build_data.py")
    lora = find_lora(settings.lora)

    all_names, fluent = load_thumbnails("fluent")
    _, noto = load_thumbnails("noto")
    names = [row["name"] for row in json.loads(settings.unseen.read_text(encoding="utf-8"))][: settings.limit]
    wanted = [all_names.index(name) for name in names]
    family = StableDiffusion.load(resolve_asset(settings.base))
    for network in family.modules.values():
        network.float()
    start = time.perf_counter()
    without = draw(family, names, settings)
    load_lora(family, lora)
    drawn = draw(family, names, settings)

    result: dict[str, Any] = {}
    print(f"{'':<14}{'style':>8}{'identity':>10}")
    for word, samples in (("without LoRA", without), ("with LoRA", drawn)):
        found = measure(samples, wanted, fluent, noto)
        print(f"{word:<14}{found['style']:>8.3f}{found['identity']:>10.3f}")
        result |= {f"{key}_{word.split()[0]}": value for key, value in found.items()}
    settings.out.mkdir(parents=True, exist_ok=True)
    shown = settings.out / "style.png"
    sheet(names, [fluent[wanted], without, drawn, noto[wanted]]).save(shown)
    result |= {"concepts": len(names), "lora": str(lora), "base": settings.base, "sheet": str(shown)}
    result |= {key: getattr(settings, key) for key in ("seed", "steps", "guidance")}
    result |= {"seconds": round(time.perf_counter() - start, 1), "torch": torch.__version__}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
