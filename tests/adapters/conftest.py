"""A run of each kind of adapter, and what stock libraries make of what it wrote."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdtune.config import dump
from sdtune.run import Run
from tests.factories import make_recipe

ROOT = Path(__file__).parents[2]
LOW_RANK = ("lora", "rslora", "dora", "lokr", "loha")


def settings(kind: str) -> dict[str, Any]:
    """The adapter section for a kind: everywhere, in text encoders too, with alpha != rank."""
    return {"kind": kind, "rank": 4, "alpha": 6.0, "targets": "all", "text_encoder": True}


@torch.no_grad()
def answers(family: Any, caption: str = "a photo of dog") -> torch.Tensor:
    """What the networks say in evaluation mode, in one tensor."""
    for network in family.modules.values():
        network.eval()
    conditioning = family.with_sizes(family.encode_text([caption]), [(64, 64, 0, 0, 64, 64)])
    x_t = torch.linspace(-1, 1, 4 * 32 * 32).reshape(1, 4, 32, 32)
    return family.predict(x_t, torch.tensor([300]), conditioning)


def processes(code: str, *arguments: str | Path, count: int = 1, folder: Path) -> None:
    """Run Python code in a process of its own, without sdtune, or in several, with it."""
    file = folder / "code.py"
    file.write_text(code, encoding="utf-8")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)) if count > 1 else ()
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    environment |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT) if count > 1 else "",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
    }
    line = [sys.executable, *launcher, str(file), *map(str, arguments)]
    ran = subprocess.run(line, env=environment, cwd=folder, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr


@pytest.fixture(scope="session")
def trained(sd: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """A finished run of a kind of `LOW_RANK`, each made once."""
    folder, runs = tmp_path_factory.mktemp("adapters"), dict[str, Run]()

    def run(kind: str) -> Run:
        if kind not in runs:
            recipe = make_recipe(sd, photos, folder / kind, adapter=settings(kind), optimizer={"lr": 1e-2})
            runs[kind] = Run(recipe)
            runs[kind].complete()
        return runs[kind]

    return run


TOGETHER = """
import sys
from sdtune.config import load
from sdtune.run import Run

for recipe in sys.argv[1:]:
    Run(load(recipe)).complete()
"""


def run_in_two_processes(recipes: list[Any], folder: Path) -> None:
    """Complete recipes one after the other, each in two processes."""
    files = [folder / f"{number}.yaml" for number in range(len(recipes))]
    for file, recipe in zip(files, recipes, strict=True):
        file.write_text(dump(recipe), encoding="utf-8")
    processes(TOGETHER, *files, count=2, folder=folder)


def stock_answers(jobs: list[dict[str, Any]], code: str, folder: Path) -> dict[str, torch.Tensor]:
    """What `code` saves under each job's name, in a process that cannot import sdtune."""
    from safetensors.torch import load_file

    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    processes(code, folder / "jobs.json", folder / "answers.safetensors", folder=folder)
    return load_file(folder / "answers.safetensors")
