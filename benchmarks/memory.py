"""What each saver of memory saves and costs, on the embedded tiny base.

    python benchmarks/memory.py [--steps 8] [--batch 8]

For each row a run is made of the demo pictures. Counted, not estimated: bytes of the weights of the UNet and the text
encoder, of the optimizer's state after a step, and of what the forward pass keeps for the backward pass at its most
(autograd's saved tensors, each storage once, weights left out). The time is CPU seconds of a step, median, of this
process, so that other work on the machine counts little. Prints a table, then one JSON line.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from sdtune.config import load
from sdtune.families.quantization import weight_bytes
from sdtune.run import Run

LORA, FULL = "adapter.kind=lora", "adapter={kind: full}"
ROWS = {
    "LoRA": [LORA],
    "LoRA, gradient checkpointing": [LORA, "train.gradient_checkpointing=true"],
    "LoRA, quantize int8": [LORA, "model.quantize=int8"],
    "LoRA, quantize nf4": [LORA, "model.quantize=nf4"],
    "full, adamw": [FULL],
    "full, adamw, gradient checkpointing": [FULL, "train.gradient_checkpointing=true"],
    "full, adamw8bit": [FULL, "optimizer.name=adamw8bit"],
    "full, lion8bit": [FULL, "optimizer.name=lion8bit"],
    "full, adafactor": [FULL, "optimizer.name=adafactor"],
    "full, prodigy": [FULL, "optimizer.name=prodigy", "optimizer.lr=1.0"],
    "full, schedulefree": [FULL, "optimizer.name=schedulefree"],
}


class Kept:
    """Follows what autograd keeps: use `pack` and `unpack` as its hooks, then read `most`, in bytes."""

    def __init__(self, weights: set[int]) -> None:
        self.weights, self.holders, self.bytes, self.most = weights, dict[int, int](), 0, 0

    def pack(self, tensor: Tensor) -> "Held":
        return Held(self, tensor)

    @staticmethod
    def unpack(held: "Held") -> Tensor:
        return held.tensor

    def count(self, tensor: Tensor, change: int) -> None:
        storage = tensor.untyped_storage()
        pointer, before = storage.data_ptr(), self.holders.get(storage.data_ptr(), 0)
        if pointer in self.weights:
            return
        self.holders[pointer] = before + change
        if not before or not self.holders[pointer]:
            self.bytes += change * storage.nbytes()
            self.most = max(self.most, self.bytes)


class Held:
    """A tensor that autograd keeps, until it lets it go."""

    def __init__(self, kept: Kept, tensor: Tensor) -> None:
        self.kept, self.tensor = kept, tensor
        kept.count(tensor, 1)

    def __del__(self) -> None:
        self.kept.count(self.tensor, -1)


def measure(settings: list[str], steps: int, batch: int) -> dict[str, float]:
    """One row."""
    with tempfile.TemporaryDirectory() as folder:
        common = [f"train.steps={steps + 1}", f"train.batch_size={batch}", f"output.dir={folder}/run"]
        common += ["validate=null", "output.trackers=[]", "optimizer.schedule=constant"]
        run = Run(load("lora_tiny", [*common, *settings]))
        networks = [run.family.modules[name] for name in ("unet", "text_encoder")]
        held = Kept({p.untyped_storage().data_ptr() for network in networks for p in network.parameters()})
        stepping, seconds = run.steps(), []
        with saved_tensors_hooks(held.pack, held.unpack):
            next(stepping)
        for _ in range(steps):
            began = time.process_time()
            next(stepping)
            seconds.append(time.process_time() - began)
        states: list[Any] = [value for state in run.optimizer.state.values() for value in state.values()]
        tables = {t.data_ptr(): t.nbytes for t in states if isinstance(t, Tensor)}  # 8-bit maps are shared
        return {
            "weights_bytes": sum(map(weight_bytes, networks)),
            "learning": sum(parameter.numel() for parameter in run.parameters.values()),
            "state_bytes": sum(tables.values()),
            "kept_bytes": held.most,
            "cpu_seconds": round(statistics.median(seconds), 4),
        }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    print(f"{'':38}{'weights':>10}{'state':>10}{'kept':>10}{'CPU s/step':>12}")
    for name, settings in ROWS.items():
        row = rows[name] = measure(settings, given.steps, given.batch)
        sizes = "".join(f"{row[key] / 2**20:>7.1f} MB" for key in ("weights_bytes", "state_bytes", "kept_bytes"))
        print(f"{name:38}{sizes}{row['cpu_seconds']:>12.3f}", flush=True)
    place = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()}
    print(json.dumps({"rows": rows, "batch": given.batch, "steps": given.steps, **place}))


if __name__ == "__main__":
    main()
