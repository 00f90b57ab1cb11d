"""Does a small model from scratch draw COCO's photographs by their captions, and by captions that it never saw?

    python benchmarks/coco_small.py --split data/coco data/coco-known   # a copy without each picture's last caption
    sdtune train recipes/coco_small.yaml data.0.path=data/coco-known
    python benchmarks/coco_small.py --model runs/coco-small

data/coco, runs/coco-vae: as the head of recipes/coco_small.yaml says.
Each photograph's own caption of the training and its held-out one are asked for, and the drawing is right when of all
photographs its own is the nearest; the same beginning with another photograph (img2img). Prints a table and one JSON
line; writes sheet.png into --out, a column a photograph of --show: the photograph, what the VAE keeps of it, asked for
by a known caption, by the held-out one, and begun with the photograph beside it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdtune.data.images import open_rgb, to_float
from sdtune.data.images import prepare as fitted
from sdtune.data.metadata import read_rows, write_rows
from sdtune.evaluate import nearest, share
from sdtune.families.base import Family
from sdtune.libraries import prepare
from sdtune.opening import open_model
from sdtune.sample import draw_pictures

STRENGTH = 0.8


def captions(folder: Path) -> dict[str, list[str]]:
    """File names and their captions, in the order of the rows."""
    found: dict[str, list[str]] = {}
    for row in read_rows(folder):
        found.setdefault(row["file_name"], []).append(row["text"])
    return found


def split(whole: Path, known: Path) -> None:
    """A copy of a data set without the last caption of each picture."""
    known.mkdir(parents=True)
    rows = []
    for name, texts in captions(whole).items():
        shutil.copyfile(whole / name, known / name)
        rows += [{"file_name": name, "text": text} for text in texts[:-1]]
    write_rows(known, rows)


def as_pictures(pixels: Tensor) -> np.ndarray:
    """(N, 3, H, W), about in [-1, 1] -> uint8 (N, H, W, 3)."""
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


class Drawn:
    """What a model draws for the photographs of a folder."""

    def __init__(self, family: Family, folder: Path, names: Sequence[str], **options: Any) -> None:
        self.family, self.options = family, options
        self.height, self.width = family.picture_size()
        self.pixels = torch.stack([fitted(open_rgb(folder / name), self.height, self.width) for name in names])
        self.photographs = self.pixels.permute(0, 2, 3, 1).numpy()  # (N, H, W, 3), uint8

    @torch.no_grad()
    def kept(self) -> np.ndarray:
        """What the VAE gives back."""
        mean, _ = self.family.encode_images(to_float(self.pixels))
        return as_pictures(self.family.decode_images(mean))

    def draw(self, prompts: Sequence[str], **more: Any) -> np.ndarray:
        """A picture a prompt, uint8 (N, H, W, 3)."""
        sizes = {"height": self.height, "width": self.width, "batch_size": 20}
        drawn = draw_pictures(self.family, prompts, range(len(prompts)), **sizes, **self.options, **more)
        return np.stack([np.asarray(picture) for picture in drawn])

    def right(self, pictures: np.ndarray) -> float:
        """Share of the pictures whose nearest photograph is their own."""
        return round(share(nearest(pictures, self.photographs), list(range(len(pictures)))), 4)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--split", type=Path, nargs=2, metavar=("WHOLE", "KNOWN"), help="only make this copy")
    parser.add_argument("--model", default="runs/coco-small", help="run folder")
    parser.add_argument("--whole", type=Path, default=Path("data/coco"), help="all captions")
    parser.add_argument("--known", type=Path, default=Path("data/coco-known"), help="those of the training")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--show", nargs="+", help="file names for the sheet; default: the first eight")
    parser.add_argument("--out", type=Path, default=Path("runs/coco-small-measured"))
    settings = parser.parse_args(arguments)
    if settings.split:
        split(*settings.split)
        return {}
    prepare()
    began = time.process_time()
    known = {name: texts[0] for name, texts in captions(settings.known).items()}
    new = {name: captions_of[-1] for name, captions_of in captions(settings.whole).items()}
    names = list(known)
    family = open_model(settings.model, device=torch.device("cpu"))
    drawn = Drawn(family, settings.whole, names, steps=settings.steps, guidance=settings.guidance)
    begun = drawn.pixels.roll(1, 0)  # the photograph beside it
    lines = {
        "photograph": drawn.photographs,
        "through the VAE": drawn.kept(),
        "a caption of the training": drawn.draw([known[name] for name in names]),
        "a caption never seen": drawn.draw([new[name] for name in names]),
        "begun with another": drawn.draw([known[name] for name in names], begun=begun, strength=STRENGTH),
    }
    result = {name: drawn.right(pictures) for name, pictures in lines.items()}
    columns = [names.index(name) for name in settings.show or names[:8]]
    settings.out.mkdir(parents=True, exist_ok=True)
    sheet = np.concatenate([np.concatenate(pictures[columns], axis=1) for pictures in lines.values()])
    Image.fromarray(sheet).save(settings.out / "sheet.png", optimize=True)
    for name, value in result.items():
        print(f"{name:<28}{value:>8.1%}")
    whole = {
        "model": settings.model, "photographs": len(names), "right": result, "shown": [names[i] for i in columns],
        "steps": settings.steps, "guidance": settings.guidance, "core_seconds": round(time.process_time() - began),
    }  # fmt: skip
    print(json.dumps(whole))
    return whole


if __name__ == "__main__":
    main()
