"""The folder of a run: what stands where, written so that a reader never meets half a file.

run.yaml  environment.json  metrics.jsonl  samples/step-000100/  checkpoints/step-000100/  final/  report.html
buckets.json, where pictures are trained in several sizes
"""

import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sdtune import distributed
from sdtune.config import resolve_asset
from sdtune.data.buckets import Bucket
from sdtune.errors import RunError, WeightsError
from sdtune.writing import write_text, written_aside

if TYPE_CHECKING:
    from PIL.Image import Image

LIBRARIES = (
    "sdtune",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "safetensors",
    "bitsandbytes",
)

NOTES = "sdtune.json"  # beside weights: which model they belong to


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

    def check_resumable(self) -> None:
        """Raises RunError when there is no run to go on with."""
        if not (self.path / "run.yaml").is_file():
            what = "is not the folder of a run (it has no run.yaml)" if self.path.exists() else "does not exist"
            raise RunError(f"'{self.path}' {what}, so there is nothing to resume; start the run without --resume")

    def start(self, recipe_yaml: str, step: int = 0) -> None:
        """Make the folder, or take it back to `step`. Raises RunError, and leaves no new folder, if it cannot."""
        new = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.path / "run.yaml", recipe_yaml)
            write_text(self.path / "environment.json", json.dumps(environment(), indent=2) + "\n")
            self.rewind(step)
        except (OSError, RunError) as fault:
            if new:
                shutil.rmtree(self.path, ignore_errors=True)
            if isinstance(fault, RunError):
                raise
            message = f"'{self.path}' could not be made ({fault.strerror}); choose another place with output.dir=FOLDER"
            raise RunError(message) from fault

    def save_buckets(self, table: Sequence[Bucket]) -> None:
        """Write buckets.json: the sizes in which pictures are trained, and how many have each."""
        write_text(self.path / "buckets.json", json.dumps([asdict(each) for each in table], indent=2) + "\n")

    def remove(self) -> None:
        """Take away a folder in which nothing was begun."""
        shutil.rmtree(self.path, ignore_errors=True)

    def latest(self) -> Path | None:
        """The last whole checkpoint, if there is one."""
        found = all_checkpoints(self.path)
        return found[-1] if found else None

    def newest(self) -> Path | None:
        """The newest weights: final/, or the last checkpoint's, where a run that is made longer is past its old end."""
        latest = self.latest()
        if latest is None or (self.final.is_dir() and noted_step(latest / "weights") <= noted_step(self.final)):
            return self.final if self.final.is_dir() else None
        return latest / "weights"

    def unfinished(self) -> str:
        """How far the run is, "step 12 of 30"; empty where final/ holds what it was to learn."""
        recipe, newest = yaml.safe_load((self.path / "run.yaml").read_text(encoding="utf-8")), self.newest()
        steps = ((recipe or {}).get("train") or {}).get("steps", 0)
        done = noted_step(newest) if newest else 0
        return "" if newest == self.final and done >= steps else f"step {done} of {steps}"

    def log(self, values: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl. Raises RunError when the disk is full."""
        try:
            with open(self.metrics, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(values) + "\n")
        except OSError as fault:
            raise RunError(
                f"'{self.metrics}' could not be written ({fault.strerror}); free some disk space, then go on with the "
                "same command and --resume"
            ) from fault

    def rewind(self, step: int) -> None:
        """Drop the lines of steps after `step` (at 0 all: it is measured anew), and half a line that a crash left."""
        if self.metrics.is_file():
            kept = [row for row in read_metrics(self.metrics) if 0 < row["step"] <= step or row["step"] == 0 < step]
            write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))

    def save_samples(self, step: int, pictures: Sequence["Image"], facts: dict[str, Any]) -> None:
        """Write samples/step-.../00.png ... and prompts.json."""
        with written_aside(self.path / "samples" / f"step-{step:06d}") as folder:
            for i, picture in enumerate(pictures):
                picture.save(folder / f"{i:02d}.png")
            (folder / "prompts.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")


def all_checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run folder, oldest first."""
    named = [path for path in (run / "checkpoints").glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    whole = [path for path in named if (path / "state" / "state.json").is_file()]
    return sorted(whole, key=lambda path: int(path.name.removeprefix("step-")))


def weights_folder(path: Path) -> Path:
    """Of a run folder its newest weights, of a checkpoint its weights/; any other path as it is.

    stderr says so where the run is not finished.

    Raises:
        WeightsError: the run has no weights yet.
    """
    if all((path / part).is_dir() for part in ("state", "weights")):
        return path / "weights"
    if not (path / "run.yaml").is_file() or (path / NOTES).is_file():  # weights from the Hub have a run.yaml beside
        return path
    run = RunFolder(path)
    newest = run.newest()
    if newest is None:
        raise WeightsError(
            f"the run '{path}' has neither final/ nor a checkpoint yet; go on with it: "
            f"sdtune train {path / 'run.yaml'} --resume"
        )
    if unfinished := run.unfinished():
        tell(f"{path}: {unfinished}, the run is not finished")
    return newest


@cache
def tell(words: str) -> None:
    """Say something on stderr, once."""
    if distributed.is_main():
        print(words, file=sys.stderr)


def noted_step(weights: Path) -> float:
    """After how many optimizer steps weights were written, as stands beside them; infinite where it does not."""
    try:
        return int(json.loads((weights / NOTES).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError):
        return math.inf


def model_place(name: str) -> str:
    """What a recipe names a model by, as libraries open it: of a run its weights, of `tiny` its folder."""
    place = resolve_asset(name)
    return str(weights_folder(Path(place))) if Path(place).is_dir() else place


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
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "arguments": sys.argv[1:],
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "processes": distributed.world(),
        "gpus": gpus,
        "versions": versions,
    }
