"""Runs as a person starts them: the command, several processes, and stock diffusers reading what they wrote."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from sdtune.config import dump
from sdtune.run import Run
from sdtune.sample import draw_pictures, initial_noise
from tests.factories import losses, make_photos, make_recipe

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


def sdtune(
    *arguments: str | Path, launcher: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """The command, as `python -m sdtune` or under a launcher."""
    line = [sys.executable, *launcher, "-m", "sdtune", *map(str, arguments)]
    return subprocess.run(line, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=600)


def write(recipe: Any, file: Path) -> Path:
    file.write_text(dump(recipe), encoding="utf-8")
    return file


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_two_processes_are_one_with_twice_the_batch(sd: Path, tmp_path: Path, kind: str) -> None:
    make_photos(tmp_path / "a", 3)
    make_photos(tmp_path / "wide", 3, size=(100, 60))
    make_photos(tmp_path / "class", 4, captions=False)
    common: dict[str, Any] = {
        "model": {"clip_skip": 1},  # then a layer of the text encoder gets no gradient
        "adapter": {"kind": kind, "text_encoder": True},
        "data": [
            {"path": str(tmp_path / "a")},
            {"path": str(tmp_path / "wide")},
            {"path": str(tmp_path / "class"), "role": "class", "prompt": "a dog", "weight": 0.4},
        ],
        "images": {"resolution": 64, "flip": True, "caption_dropout": 0.3, "buckets": kind == "lora"},
        "validate": {"every": 2, "fraction": 0.3},
    }
    train = {"steps": 4, "batch_size": 2, "seed": 5, "ema": 0.9}
    one = Run(make_recipe(sd, "", tmp_path / "one", train=train, **common))
    one.complete()
    two = write(make_recipe(sd, "", tmp_path / "two", train=train | {"batch_size": 1}, **common), tmp_path / "two.yaml")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    ran = sdtune("train", two, "--json", launcher=launcher, ACCELERATE_USE_CPU="true")
    assert ran.returncode == 0, ran.stderr

    assert json.loads((tmp_path / "two" / "environment.json").read_text())["processes"] == 2
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert len(losses(tmp_path / "two")) == 4
    result = json.loads(ran.stdout.splitlines()[-1])  # said once, by one of the two
    assert ran.stdout.count("{") == 1 and result["steps"] == 4
    assert "arning" not in ran.stderr
    for file in (tmp_path / "one" / "final").rglob("*.safetensors"):
        got = load_file(tmp_path / "two" / "final" / file.relative_to(tmp_path / "one" / "final"))
        for key, tensor in load_file(file).items():
            # Adam divides by the root of the squared gradient, so that rounding shows where a gradient is almost 0.
            assert (got[key] - tensor).abs().mean() < 1e-4, key


# --- stock diffusers --------------------------------------------------------------------------------------------------

STOCK = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "sdtune":
            raise ImportError("sdtune cannot be imported here")

sys.meta_path.insert(0, Blocked())
import numpy as np, torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

for job in json.load(open(sys.argv[1])):
    pipeline = DiffusionPipeline.from_pretrained(job["model"])
    assert type(pipeline).__module__.startswith("diffusers")
    assert type(pipeline.unet).__module__.startswith("diffusers")
    if job["lora"]:
        pipeline.load_lora_weights(job["lora"])
    noise = load_file(job["noise"])["noise"]
    words = {"prompt": job["prompts"], "negative_prompt": job["negative"]}
    drawn = pipeline(**words, latents=noise, num_inference_steps=3, output_type="np")
    np.save(job["out"], drawn.images)
assert not any(name.partition(".")[0] == "sdtune" for name in sys.modules)
"""
PROMPTS = ["a photo of dog", "a cat"]


@pytest.fixture(scope="module")
def stock(sd: Path, sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pictures of finished runs: (ours, those of stock diffusers in a process that cannot import sdtune)."""
    folder = tmp_path_factory.mktemp("stock")
    photos = make_photos(folder / "photos", 3)
    lora = {"rank": 2, "alpha": 7.0, "targets": "all", "text_encoder": True}
    sections: dict[str, tuple[Path, dict[str, Any]]] = {
        "full": (sd, {"adapter": {"kind": "full", "text_encoder": True}, "train": {"steps": 3, "ema": 0.5}}),
        "lora": (sd, {"adapter": lora}),
        "sdxl": (sdxl, {"adapter": {"kind": "full"}, "model": {"family": "sdxl"}}),
        "sdxl lora": (sdxl, {"adapter": lora, "model": {"family": "sdxl"}}),
    }
    ours, jobs = {}, []
    for name, (base, some) in sections.items():
        run = Run(make_recipe(base, photos, folder / name, optimizer={"lr": 1e-2}, **some))
        run.complete()
        final, whole = str(run.folder.final), some["adapter"].get("kind") == "full"
        negative = None if "sdxl" in name else "a photo"
        with run.averaged():
            guidance = 5.0 if "sdxl" in name else 7.5  # the pipelines' own
            drawn = draw_pictures(
                run.family,
                PROMPTS,
                [3, 4],
                height=64,
                width=64,
                steps=3,
                guidance=guidance,
                negative_prompt=negative or "",
            )
            ours[name] = np.stack([np.asarray(picture) for picture in drawn]) / 255
        noise = folder / f"{name}.safetensors"
        save_file({"noise": initial_noise(run.family, [3, 4], 64, 64)}, noise)
        jobs.append(
            {"model": final if whole else str(base), "lora": None if whole else final, "noise": str(noise),
             "prompts": PROMPTS, "negative": negative and [negative] * 2, "out": str(folder / f"{name}.npy")}
        )  # fmt: skip
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "stock.py").write_text(STOCK)
    environment = ENVIRONMENT | {"PYTHONPATH": ""}
    line = [sys.executable, str(folder / "stock.py"), str(folder / "jobs.json")]
    ran = subprocess.run(line, env=environment, cwd=folder, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    return {name: (ours[name], np.load(folder / f"{name}.npy")) for name in sections}


@pytest.mark.parametrize("name", ["full", "lora", "sdxl", "sdxl lora"])
def test_stock_diffusers_draws_the_same_pictures(stock: dict[str, tuple[np.ndarray, np.ndarray]], name: str) -> None:
    ours, theirs = stock[name]
    assert ours.std() > 0.05
    assert np.abs(ours - theirs).max() < 1.6 / 255  # a PNG has 256 levels


def test_text_encoders_are_saved_under_the_keys_of_every_version(sd: Path, photos: Path, tmp_path: Path) -> None:
    run = Run(make_recipe(sd, photos, tmp_path / "run", adapter={"kind": "full"}))
    run.complete()
    keys = load_file(run.folder.final / "text_encoder" / "model.safetensors").keys()
    assert all(key.startswith("text_model.") for key in keys) and len(keys) == 52
    assert (run.folder.final / "text_encoder" / "model.safetensors").stat().st_mode & 0o044  # others may read it


# --- the command ------------------------------------------------------------------------------------------------------


def test_train_and_sample_say_nothing_but_what_is_theirs(sd: Path, photos: Path, tmp_path: Path) -> None:
    samples = {"prompts": ["a photo of dog"], "steps": 2}
    recipe = make_recipe(
        sd, photos, tmp_path / "run", validate={"samples": samples}, output={"trackers": ["tensorboard"]}
    )
    ran = sdtune("train", write(recipe, tmp_path / "recipe.yaml"), "--json")
    assert ran.returncode == 0, ran.stderr
    said = [line for line in ran.stderr.replace("\r", "\n").splitlines() if line.strip() and "step" not in line]
    assert said == [f"done: {tmp_path / 'run'} (weights in {tmp_path / 'run' / 'final'})"]
    result = json.loads(ran.stdout)
    assert result["run"] == str(tmp_path / "run") and result["steps"] == 2
    assert list((tmp_path / "run" / "logs").rglob("events.*"))

    ran = sdtune("sample", tmp_path / "run", "--prompt", "dog", "--steps", "2", "--out", tmp_path / "out")
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    assert ran.stdout == f"{tmp_path / 'out' / 'dog-0.png'}\n"


def test_faults_are_one_paragraph_and_an_exit_code(sd: Path, photos: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from sdtune.cli import app

    recipe = write(make_recipe(sd, photos, tmp_path / "run"), tmp_path / "recipe.yaml")
    broken = tmp_path / "broken"
    shutil.copytree(photos, broken)
    (broken / "metadata.jsonl").write_text(
        '{"file_name": "0.png", "text": "dog"}\n{"file_name": "lost.png", "text": "dog"}\n'
    )
    cases = [
        (["train", recipe, "model.base=nobody/nothing"], 1, "could not be fetched from the Hub"),
        (["train", recipe, f"data.0.path={tmp_path / 'none'}"], 2, "does not exist"),
        (["train", recipe, f"data.0.path={broken}"], 1, "lost.png"),
        (["train", recipe, "train.stepz=3"], 2, "did you mean 'steps'"),
        (["sample", tmp_path / "none", "--prompt", "dog", "--out", tmp_path / "out"], 1, "does not exist"),
    ]
    for arguments, code, match in cases:
        ran = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert ran.exit_code == code, ran.stderr
        assert ran.stderr.startswith("error: ") and match in ran.stderr and "Traceback" not in ran.stderr
        assert ran.stdout == ""
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()


STARTING = """
import sys
from sdtune.config import load
from sdtune.libraries import prepare
from sdtune.run import Run

prepare()
next(Run(load(sys.argv[1])).steps())
print([name for name in sys.argv[2:] if sys.modules.get(name)])
"""
LATER = ("torch.utils.tensorboard", "diffusers.pipelines.pipeline_utils", "bitsandbytes", "torch._inductor.compile_fx")


def test_what_the_first_step_does_not_need_is_not_imported(sd: Path, photos: Path, tmp_path: Path) -> None:
    recipe = write(make_recipe(sd, photos, tmp_path / "run"), tmp_path / "recipe.yaml")
    line = [sys.executable, "-c", STARTING, str(recipe), *LATER]
    ran = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "[]\n"


def test_ctrl_c_ends_the_step_and_keeps_it(sd: Path, photos: Path, tmp_path: Path) -> None:
    import signal
    import time

    recipe = write(make_recipe(sd, photos, tmp_path / "run", train={"steps": 100_000}), tmp_path / "recipe.yaml")
    line = [sys.executable, "-m", "sdtune", "train", str(recipe)]
    with subprocess.Popen(line, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 300
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "stopping after this step" in said and "Traceback" not in said
    assert re.search(r"stopped after step \d+; go on with: sdtune train .*run.yaml --resume$", said.strip())
    steps = len(losses(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / f"step-{steps:06d}" / "state" / "state.json").is_file()
