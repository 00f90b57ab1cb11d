"""A small classifier of digits or clothes, which reads what models from scratch have drawn.

    python benchmarks/classifier.py data/mnist                     # about 2 minutes on 2 CPU cores
    python benchmarks/classifier.py data/fashion_mnist

Needs what examples/mnist/build_data.py wrote. Trains on train/ and measures on test/, which it has not seen; prints the
share that is right, then one JSON line; writes the weights to --out, runs/classifier-NAME.safetensors. Another script:

    from classifier import open_classifier
    network, names = open_classifier("runs/classifier-mnist.safetensors")
    numbers = read(network, pictures)                              # names[numbers[i]] is what picture i shows
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

SIZE = 28
BATCH = 128


class Classifier(nn.Module):
    """Two convolutions and two linear layers. Pictures (B, 1, 28, 28) in [0, 1] become scores (B, classes)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2),  # (B, 24, 14, 14)
            nn.Conv2d(24, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(), nn.MaxPool2d(2),  # (B, 48, 7, 7)
            nn.Flatten(), nn.Linear(48 * 7 * 7, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def as_input(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of any size and mode as (N, 1, 28, 28) in [0, 1]."""
    grey = [picture.convert("L").resize((SIZE, SIZE), Image.Resampling.LANCZOS) for picture in pictures]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in grey]))[:, None].float() / 255


def read_split(folder: Path) -> tuple[Tensor, list[str]]:
    """Pictures (N, 1, 28, 28) in [0, 1], and the name of what each shows."""
    table = pyarrow.parquet.read_table(folder / "data.parquet", columns=["image", "text"])
    files = [io.BytesIO(cell["bytes"]) for cell in table["image"].to_pylist()]
    return as_input([Image.open(file) for file in files]), table["text"].to_pylist()


def fit(pictures: Tensor, numbers: Tensor, classes: int, steps: int, seed: int = 0) -> Classifier:
    """A classifier after so many steps: AdamW, one cycle of the learning rate.

    Args:
        pictures: (N, 1, 28, 28) in [0, 1]. numbers: of their classes, (N,).
    """
    torch.manual_seed(seed)
    network = Classifier(classes)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    order = torch.cat([torch.randperm(len(pictures)) for _ in range(steps * BATCH // len(pictures) + 1)])
    for rows in order[: steps * BATCH].split(BATCH):
        loss = F.cross_entropy(network(pictures[rows]), numbers[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def read(network: Classifier, pictures: Tensor) -> Tensor:
    """What pictures (N, 1, 28, 28) in [0, 1] show: numbers of classes, (N,)."""
    return torch.cat([network(some).argmax(1) for some in pictures.split(1000)])


def open_classifier(file: Path | str) -> tuple[Classifier, list[str]]:
    """A classifier that this script wrote, and the names of its classes."""
    with safe_open(file, "pt") as opened:
        names = json.loads(opened.metadata()["classes"])
        state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    network = Classifier(len(names))
    network.load_state_dict(state)
    return network.eval(), names


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="folder with train/ and test/")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=None, help="file for the weights")
    settings = parser.parse_args(arguments)
    out = settings.out or Path(f"runs/classifier-{settings.data.name}.safetensors")

    start = time.perf_counter()
    pictures, texts = read_split(settings.data / "train")
    names = sorted(set(texts))
    network = fit(pictures, torch.tensor([names.index(text) for text in texts]), len(names), settings.steps)
    unseen, truths = read_split(settings.data / "test")
    found = [names[number] for number in read(network, unseen).tolist()]
    right = {name: [a == b for a, b in zip(found, truths, strict=True) if b == name] for name in names}
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), out, metadata={"classes": json.dumps(names)})

    for name, each in right.items():
        print(f"{name:<16}{sum(each) / len(each):>8.1%} of {len(each)}")
    whole = sum(map(sum, right.values())) / len(truths)
    print(f"{'all':<16}{whole:>8.1%} of {len(truths)}")
    result = {
        "data": str(settings.data), "accuracy": round(whole, 4), "steps": settings.steps, "weights": str(out),
        "parameters": sum(p.numel() for p in network.parameters()), "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
