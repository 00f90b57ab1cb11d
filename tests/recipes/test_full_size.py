"""The SD 1.5 recipes at full size: real photographs, a random model of Stable Diffusion 1.5's build, two steps.

Each runs in a process of its own, and its peak memory is printed (`make test-slow`).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from sdtune.config import load
from tests.factories import losses

ROOT = Path(__file__).parents[2]
PHOTOS = ROOT.parent / "shared" / "data" / "dreambooth" / "dog"
CONFIGS = ROOT / "sdtune" / "assets" / "single_file" / "sd1"
RECIPES = [
    "dreambooth_lora_sd15",
    "dreambooth_full_sd15",
    "dreambooth_two_phases_sd15",
    "textual_inversion_sd15",
    "pivotal_sd15",
    "lora_sd15",
]
SMALLER = {
    "data.0.path": str(PHOTOS),
    "optimizer.warmup": 0,
    "train.steps": 2,
    "train.accumulate": 1,
    "train.gradient_checkpointing": True,
    "train.precision": "bf16",
    "validate.samples": None,  # each picture would take minutes
    "validate.every": None,
    "validate.fraction": 0,
    "output.checkpoint_every": None,
}


def part(name: str) -> dict:
    """The configuration of a part of SD 1.5."""
    values = json.loads((CONFIGS / name / "config.json").read_text(encoding="utf-8"))
    return {key: value for key, value in values.items() if not key.startswith(("_", "architectures", "model_type"))}


def full_size(name: str, out: Path) -> Path:
    """A shipped recipe with a random model of full size, cut down to two steps."""
    recipe = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))
    parts = {name: part(name) for name in ("unet", "vae", "text_encoder")}
    scheduler = json.loads((CONFIGS / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    recipe["model"] = {"from_config": {**parts, "tokenizer": str(CONFIGS / "tokenizer"), "scheduler": scheduler}}
    for source in recipe["data"]:
        source.setdefault("prompt", "a photo of sks dog")
        if source.get("generate"):
            source |= {"generate": 1, "drawing": {"steps": 1}, "path": str(out / "class")}
    if recipe["adapter"].get("denoiser_from"):
        recipe["adapter"] |= {"text_encoder_until": 1, "denoiser_from": 1}  # a step for each phase
    if recipe["adapter"]["kind"] == "full":
        recipe["optimizer"]["name"] = "adamw8bit"  # AdamW's state alone would be 8 GB
    file = out / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return file


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_real_photographs_through_a_model_of_full_size(name: str, tmp_path: Path) -> None:
    if not PHOTOS.is_dir():
        pytest.skip("../shared/data/dreambooth is not here")
    file, run = full_size(name, tmp_path), tmp_path / "run"
    overrides = [f"{key}={'null' if value is None else value}" for key, value in SMALLER.items()]
    command = [sys.executable, "-m", "sdtune", "train", str(file), *overrides, f"output.dir={run}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("OMP_NUM_THREADS", None)
    _, status, used = os.wait4(subprocess.Popen(command, env=environment).pid, 0)
    assert status == 0
    print(f"\n{name}: two steps at 512 px, peak memory {used.ru_maxrss / 2**20:.1f} GB")
    assert len(losses(run)) == 2 and torch.tensor(losses(run)).isfinite().all()
    assert any((run / "final").rglob("*.safetensors"))
    assert load(str(run / "run.yaml")).train.steps == 2
