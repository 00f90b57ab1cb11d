"""Does fashion_text draw the clothes that a sentence asks for, as a classifier reads them?

    python benchmarks/fashion_text.py

Needs runs/fashion-text (recipes/fashion_vae.yaml, then fashion_text.yaml), a classifier that reads what was drawn
(python benchmarks/classifier.py data/fashion_mnist) and the pictures of data/fashion_mnist. Measures sentences of the
training, sentences and names that no caption of it had, drawings that begin with a picture of another class, and what
the VAE keeps of unseen pictures.
Prints a table, then one JSON line; writes sheet.png into --out: a column a class, from the text alone, and below, under
the pictures that they began with, those that were changed at each strength.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from class_agreement import agreement, grid
from classifier import Classifier, open_classifier, read_split
from PIL import Image
from tiny_base import psnr
from torch import Tensor
from torch.nn import functional as F

from sdtune.data.images import to_float
from sdtune.families.base import Family
from sdtune.libraries import prepare
from sdtune.opening import open_model
from sdtune.sample import draw_pictures

CLOTHES = {  # names of the classes with their articles, and other words for them
    "ankle boot": ("an ankle boot", "leather boots"),
    "bag": ("a bag", "a handbag"),
    "coat": ("a coat", "a winter jacket"),
    "dress": ("a dress", "an evening gown"),
    "pullover": ("a pullover", "a warm sweater"),
    "sandal": ("a sandal", "high heels"),
    "shirt": ("a shirt", "a blouse"),
    "sneaker": ("a sneaker", "running shoes"),
    "t-shirt": ("a t-shirt", "a tee"),
    "trouser": ("a trouser", "jeans"),
}
KNOWN, NEW = "a photo of {}", "this is what {} looks like"
UNSEEN = 1000  # pictures that the VAE is measured on
SHOWN = 5  # rows of the sheet that are drawn from text alone


def sentences(template: str, synonym: bool = False) -> list[str]:
    """What is asked for, in the order of `CLOTHES`."""
    return [template.format(words[synonym]) for words in CLOTHES.values()]


class Model:
    """What is measured: a model, how it draws, and who reads its drawings."""

    def __init__(self, family: Family, classifier: tuple[Classifier, list[str]], **options: Any) -> None:
        self.family, (self.network, self.names), self.options = family, classifier, options

    def draw(self, prompts: Sequence[str], count: int, **more: Any) -> list[Image.Image]:
        """`count` pictures of each prompt, the prompts in turn."""
        height, width = self.family.picture_size()
        wanted = list(prompts) * count
        return list(
            draw_pictures(self.family, wanted, range(len(wanted)), height=height, width=width, **self.options, **more)
        )

    def right(self, pictures: Sequence[Image.Image], classes: Sequence[str]) -> float:
        """Share of pictures, the classes in turn, that are read as asked."""
        return round(agreement(self.network, self.names, pictures, list(classes) * (len(pictures) // len(classes))), 4)


def as_drawn(model: Model, pictures: Tensor) -> Tensor:
    """Pictures (N, 1, 28, 28) in [0, 1] in the size and colours of the model's own, uint8, (N, 3, H, W)."""
    larger = F.interpolate(pictures, model.family.picture_size(), mode="bicubic").clamp(0, 1)
    return (larger * 255).round().byte().expand(-1, 3, -1, -1)


@torch.no_grad()
def reconstructed(model: Model, pictures: Tensor, texts: Sequence[str]) -> dict[str, float]:
    """What the VAE keeps of unseen pictures: PSNR, and the share that is read right, before and after."""
    x = to_float(as_drawn(model, pictures))
    y = torch.cat([model.family.decode_images(model.family.encode_images(some)[0]) for some in x.split(50)])
    before, after = (
        [Image.fromarray(each) for each in (part.clamp(-1, 1)[:, 0] * 127.5 + 127.5).round().byte().numpy()]
        for part in (x, y)
    )
    asked = list(texts)
    return {
        "psnr": round(psnr(x, y).mean().item(), 2),
        "real pictures": round(agreement(model.network, model.names, before, asked), 4),
        "reconstructed pictures": round(agreement(model.network, model.names, after, asked), 4),
    }


def from_text(model: Model, count: int) -> tuple[dict[str, Any], list[Image.Image]]:
    """The agreement for known and new words, and the pictures of the known."""
    pictures = model.draw(sentences(KNOWN), count)
    few = max(1, count // 5)
    return {
        "known sentences": model.right(pictures, [*CLOTHES]),
        "each": {name: model.right(pictures[i :: len(CLOTHES)], [name]) for i, name in enumerate(CLOTHES)},
        "new sentences": model.right(model.draw(sentences(NEW), few), [*CLOTHES]),
        "new names": model.right(model.draw(sentences(KNOWN, synonym=True), few), [*CLOTHES]),
    }, pictures


def from_pictures(
    model: Model, pixels: Tensor, texts: Sequence[str], count: int, strengths: Sequence[float]
) -> Iterator[tuple[dict[str, Any], list[Image.Image]]]:
    """For each strength the agreement with the class that is asked for, where pictures of the next one were begun with.

    The first pair holds the pictures themselves. "kept" is the correlation with them, pixel by pixel.
    """
    rows = {name: [i for i, text in enumerate(texts) if text == name] for name in CLOTHES}
    others = [*CLOTHES][1:] + [*CLOTHES][:1]
    begun = pixels[[rows[name][number] for number in range(count) for name in others]]  # (N, 1, 28, 28)
    begun = as_drawn(model, begun)
    shown = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in begun]
    yield {"strength": 0.0, "agreement": model.right(shown, [*CLOTHES]), "kept": 1.0}, shown
    for strength in strengths:
        pictures = model.draw(sentences(KNOWN), count, begun=begun, strength=strength)
        kept = correlation(torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])), begun)
        yield {"strength": strength, "agreement": model.right(pictures, [*CLOTHES]), "kept": kept}, pictures


def correlation(pictures: Tensor, others: Tensor) -> float:
    """Mean over pictures, (N, H, W, 3) and (N, 3, H, W), of the correlation of their pixels."""
    pairs = zip(pictures.float().mean(-1).flatten(1), others.float().mean(1).flatten(1), strict=True)
    return round(float(torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]).nanmean()), 3)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="runs/fashion-text", help="run folder")
    parser.add_argument("--classifier", type=Path, default=Path("runs/classifier-fashion_mnist.safetensors"))
    parser.add_argument("--data", type=Path, default=Path("data/fashion_mnist"))
    parser.add_argument("--count", type=int, default=50, help="pictures of each class")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.4, 0.6, 0.8])
    parser.add_argument("--out", type=Path, default=Path("runs/fashion-text-measured"))
    settings = parser.parse_args(arguments)
    prepare()
    began = time.perf_counter()
    options = {"steps": settings.steps, "guidance": settings.guidance, "batch_size": 50}
    family = open_model(settings.model, device=torch.device("cpu"))
    model = Model(family, open_classifier(settings.classifier), **options)
    pixels, texts = read_split(settings.data / "test")
    result, pictures = from_text(model, settings.count)
    result["vae"] = reconstructed(model, pixels[:UNSEEN], texts[:UNSEEN])
    rows = pictures[: SHOWN * len(CLOTHES)]
    result |= {"count": settings.count, **options, "model": settings.model, "from pictures": []}
    few = max(1, settings.count // 5)
    for measured, changed in from_pictures(model, pixels, texts, few, settings.strengths):
        result["from pictures"].append(measured)
        rows += changed[: len(CLOTHES)]
    settings.out.mkdir(parents=True, exist_ok=True)
    grid(rows, len(CLOTHES), len(rows) // len(CLOTHES)).save(settings.out / "sheet.png", optimize=True)
    result["seconds"] = round(time.perf_counter() - began, 1)
    for name, share in result["each"].items():
        print(f"{name:<20}{share:>8.1%}")
    for name in ("known sentences", "new sentences", "new names"):
        print(f"{name:<20}{result[name]:>8.1%}")
    for name, value in result["vae"].items():
        print(f"{name:<24}{value}")
    for row in result["from pictures"]:
        print(f"strength {row['strength']:<11g}{row['agreement']:>8.1%}   kept {row['kept']:.2f}")
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
