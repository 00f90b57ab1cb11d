"""How often does a model of family pixel draw the class that it was asked for, as a classifier reads it?

    python benchmarks/class_agreement.py runs/score-class-mnist --classifier runs/classifier-mnist.safetensors \
        --sampler predictor-corrector --steps 250 --guidance 1 2 4

The classifier comes from benchmarks/classifier.py. Prints a line for each guidance, then one JSON line; writes
guidance-G.png, a column a class, into --out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from classifier import Classifier, as_input, open_classifier, read
from PIL import Image

from sdtune.families.base import Family
from sdtune.libraries import prepare
from sdtune.opening import open_model
from sdtune.sample import draw_pictures

BATCH = 100
ROWS, ZOOM = 8, 2  # of the grid, and the size of its pixels


def draw(family: Family, count: int, **options: Any) -> tuple[list[Image.Image], list[str]]:
    """`count` pictures, the classes in turn, and the class that each was asked for.

    Args:
        options: of `draw_pictures`: steps, guidance, sampler.
    """
    classes = family.modules[family.denoiser].config.classes
    asked = [classes[i % len(classes)] for i in range(count)]
    height, width = family.picture_size()
    drawn = draw_pictures(family, asked, range(count), height=height, width=width, batch_size=BATCH, **options)
    return list(drawn), asked


def agreement(
    network: Classifier, names: Sequence[str], pictures: Sequence[Image.Image], asked: Sequence[str]
) -> float:
    """Share of the pictures in which the classifier reads what was asked for."""
    right = is_right(network, names, pictures, asked)
    return sum(right) / len(right)


def is_right(
    network: Classifier, names: Sequence[str], pictures: Sequence[Image.Image], asked: Sequence[str]
) -> list[bool]:
    """For each picture, whether the classifier reads what was asked for."""
    found = [names[number] for number in read(network, as_input(pictures)).tolist()]
    return [a == b for a, b in zip(found, asked, strict=True)]


def by_class(
    network: Classifier, names: Sequence[str], pictures: Sequence[Image.Image], asked: Sequence[str]
) -> dict[str, float]:
    """The same share for each class that was asked for."""
    right: dict[str, list[bool]] = {}
    for name, found in zip(asked, is_right(network, names, pictures, asked), strict=True):
        right.setdefault(name, []).append(found)
    return {name: round(sum(of) / len(of), 3) for name, of in right.items()}


def grid(pictures: Sequence[Image.Image], columns: int, rows: int = ROWS) -> Image.Image:
    """The first pictures, row after row, enlarged."""
    width, height = ZOOM * pictures[0].width, ZOOM * pictures[0].height
    whole = Image.new("RGB", (columns * width, rows * height))
    for i, picture in enumerate(pictures[: columns * rows]):
        enlarged = picture.resize((width, height), Image.Resampling.NEAREST)
        whole.paste(enlarged, (i % columns * width, i // columns * height))
    return whole


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="run folder")
    parser.add_argument("--classifier", type=Path, required=True)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0])
    parser.add_argument("--sampler", default=None, help="default: the model's own")
    parser.add_argument("--out", type=Path, default=Path("runs/class_agreement"))
    settings = parser.parse_args(arguments)
    prepare()
    network, names = open_classifier(settings.classifier)
    family = open_model(settings.model, device=torch.device("cpu"))
    settings.out.mkdir(parents=True, exist_ok=True)
    results = []
    for guidance in settings.guidance:
        began = time.perf_counter()
        options = {"steps": settings.steps, "guidance": guidance, "sampler": settings.sampler}
        pictures, asked = draw(family, settings.count, **options)
        share = agreement(network, names, pictures, asked)
        seconds = round(time.perf_counter() - began)
        each = by_class(network, names, pictures, asked)
        results.append(options | {"agreement": round(share, 4), "each": each, "seconds": seconds})
        grid(pictures, len(names)).save(settings.out / f"guidance-{guidance:g}.png", optimize=True)
        least = min(each, key=lambda name: each[name])
        print(f"guidance {guidance:g}: {share:.1%} of {settings.count} read as asked; least {least}: {each[least]:.0%}")
    whole = {"model": settings.model, "count": settings.count, "results": results}
    print(json.dumps(whole))
    return whole


if __name__ == "__main__":
    main()
