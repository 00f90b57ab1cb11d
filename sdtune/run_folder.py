"""The folder of a run: what stands where, written so that a reader never meets half a file.

    run.yaml  environment.json  metrics.jsonl  samples/step-000100/  checkpoints/step-000100/  final/  report.html
"""

import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtune.checkpoint import all_checkpoints, write_text, written_aside
from sdtune.errors import RunError

if TYPE_CHECKING:
    from PIL.Image import Image

LIBRARIES = ("sdtune", "torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "safetensors", "bitsandbytes")


class RunFolder:
    """Paths and files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metrics = self.path / "metrics.jsonl"
        self.final = self.path / "final"

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint after `step` optimizer steps stands."""
        return self.path / "checkpoints" / f"step-{step:06d}"

    def check_free(self) -> None:
        """Raises RunError when a run is there already."""
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise RunError(
                f"'{self.path}' exists already and is never overwritten; go on with it by adding --resume, "
                "or choose another place with output.dir=FOLDER"
            )

    def start(self, recipe_yaml: str) -> None:
        """Make the folder. Raises RunError when it cannot be made."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            raise RunError(f"'{self.path}' could not be made ({fault.strerror}); choose another place with output.dir=FOLDER") from fault
        write_text(self.path / "run.yaml", recipe_yaml)
        write_text(self.path / "environment.json", json.dumps(environment(), indent=2) + "\n")

    def latest(self) -> Path:
        """The last whole checkpoint. Raises RunError when there is none."""
        found = all_checkpoints(self.path)
        if not found:
            raise RunError(
                f"'{self.path}' has no checkpoint to resume from; start anew under another output.dir, "
                "and set output.checkpoint_every to have some next time"
            )
        return found[-1]

    def log(self, values: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        with open(self.metrics, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(values) + "\n")

    def rewind(self, step: int) -> None:
        """Drop the lines of steps after `step`, and half a line that a crash may have left."""
        if not self.metrics.is_file():
            return
        kept = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except ValueError:
                break
        write_text(self.metrics, "".join(kept))

    def save_samples(self, step: int, pictures: Sequence["Image"], facts: dict[str, Any]) -> None:
        """Write samples/step-.../00.png ... and prompts.json."""
        with written_aside(self.path / "samples" / f"step-{step:06d}") as folder:
            for i, picture in enumerate(pictures):
                picture.save(folder / f"{i:02d}.png")
            (folder / "prompts.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, oldest first; a last half line is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def environment() -> dict[str, Any]:
    """Versions and machine, for environment.json; nothing personal."""
    import torch

    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {
        "arguments": sys.argv[1:],
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "gpus": gpus,
        "versions": versions,
    }
