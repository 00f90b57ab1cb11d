"""Every command of the README is run: on small models and few steps where it names a hub id or trains for long.

Blocks marked ```sh hold commands, one a line; they run from top to bottom in one empty folder. Blocks marked ```json
are lines of metadata.jsonl.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sdtune.config import resolve_asset
from sdtune.data.metadata import read_rows
from tests.factories import make_photos, make_sd

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
HUB_ID = "stable-diffusion-v1-5/stable-diffusion-v1-5"
QUICK = ["train.steps=2", "images.resolution=64", "train.precision=fp32", "validate.samples.steps=2"]


def blocks(kind):
    """The lines of all code blocks of a kind."""
    found = re.findall(rf"^```{kind}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    return [line for block in found for line in block.splitlines() if line.strip()]


COMMANDS = blocks("sh")
MAKE = [command for command in COMMANDS if command.startswith("make ")]
TYPED = [command for command in COMMANDS if command not in MAKE]


def test_there_are_commands_of_every_kind():
    assert {"make demo", "make test"} <= set(MAKE)
    commands = ("caption", "coco", "check", "dedupe", "train", "sample", "recipes")
    for start in (*(f"sdtune {name}" for name in commands), "accelerate launch -m sdtune train", "python "):
        assert any(command.startswith(start) for command in TYPED), start


def test_no_commands_stand_outside_of_sh_blocks():
    assert set(re.findall(r"^```(\w*)$", README, re.MULTILINE)) == {"sh", "json", ""}  # "" closes a block


@pytest.mark.parametrize("command", MAKE)
def test_make_knows_the_target(command):
    subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


def test_the_metadata_shown_can_be_read(tmp_path):
    (tmp_path / "metadata.jsonl").write_text("\n".join(blocks("json")), encoding="utf-8")
    rows = read_rows(tmp_path)
    assert len(rows) > 1
    assert all(row["file_name"] and row["text"] for row in rows)


def words_of(command, base):
    """A command as it is run here: with this Python, few steps, and the small model in place of hub ids."""
    words = [str(base) if word == HUB_ID else word for word in shlex.split(command)]
    if "caption" in words and "--model" not in words:
        words += ["--model", "tiny"]  # for BLIP of the Hub
    if "train" in words:
        words += QUICK
        if "lora_tiny" in words and not Path(resolve_asset("tiny")).is_dir():
            words.append(f"model.base={json.dumps(str(base))}")
    programs = {
        "sdtune": [sys.executable, "-m", "sdtune"],
        "accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli"],
        "python": [sys.executable],
    }
    return programs[words[0]] + words[1:]


def make_coco(folder):
    """captions.json in COCO's form, and the folder pictures."""
    make_photos(folder / "pictures", 4, captions=False)
    images = [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 64} for i in range(4)]
    captions = [{"id": i, "image_id": i // 2, "caption": f"a dog {i}"} for i in range(8)]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}), encoding="utf-8")


def test_the_commands_run_from_top_to_bottom(tmp_path):
    """In an empty folder with `photos`; a recipe that was copied gets a small model, which stands for the hub id."""
    base = make_sd(tmp_path / "model")
    work = tmp_path / "work"
    make_photos(work / "photos", 3, captions=False)
    make_coco(work)
    (work / "examples").symlink_to(ROOT / "examples")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    for command in TYPED:
        words = words_of(command, base)
        if "examples/" in command and not Path(resolve_asset("tiny")).is_dir():
            words.insert(2, str(base))
        answer = subprocess.run(words, cwd=work, env=environment, capture_output=True, text=True)
        assert answer.returncode == 0, f"{command}\n{answer.stderr[-3000:]}"
        for recipe in work.glob("*.yaml"):
            recipe.write_text(recipe.read_text(encoding="utf-8").replace(HUB_ID, str(base)), encoding="utf-8")
    for folder in ("runs/rex", "runs/lora-tiny"):
        assert (work / folder / "final" / "pytorch_lora_weights.safetensors").is_file()
    assert len(list((work / "samples").glob("**/*.png"))) >= 5


def test_pictures_and_links_exist():
    names = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(names) > 3
    assert [name for name in names if "://" not in name and not (ROOT / name).exists()] == []


def test_the_table_of_methods_names_every_recipe():
    table = README.partition("| method |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) == {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
