"""Every shipped recipe is well formed, says how it is run, and can be written and read back."""

import re
import shlex
from pathlib import Path

import pytest

from sdtune.config import dump, load, shipped_recipes

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))


def head(path: Path) -> list[str]:
    """The comment lines at the top, without their marks."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return [line.removeprefix("#").strip() for line in lines[:end]]


def commands(path: Path) -> list[list[str]]:
    """The arguments after `train` of every launch command in the head."""
    found = [re.match(r"(?:accelerate launch -m )?sdtune train (.+)", line) for line in head(path)]
    return [shlex.split(match.group(1)) for match in found if match]


def test_all_are_here() -> None:
    expected = {"lora_sd15", "full_sd15", "lora_sdxl", "lora_tiny", "dreambooth_lora_tiny", "style_lora_tiny"}
    assert {path.stem for path in RECIPES} >= expected | {"pretrain_tiny_vae", "pretrain_tiny"}
    assert list(shipped_recipes().values()) == RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_head_says_what_it_is_and_costs(path: Path) -> None:
    first, *rest = head(path)
    assert first.endswith(".") and 20 < len(first) < 118
    assert any("memory class" in line.lower() for line in rest)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_commands_in_the_head_load(path: Path, workplace: Path) -> None:
    (workplace / "recipes").symlink_to(path.parent)
    own = [arguments for arguments in commands(path) if Path(arguments[0]) == Path("recipes") / path.name]
    assert own, "the head holds the command that runs the recipe"
    for arguments in commands(path):
        load(arguments[0], arguments[1:])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_is_written_and_read_back(path: Path, workplace: Path) -> None:
    recipe = load(path)
    (workplace / "run.yaml").write_text(dump(recipe), encoding="utf-8")
    assert load("run.yaml") == recipe


def test_each_run_has_its_own_folder(workplace: Path) -> None:
    folders = [load(path).output.dir for path in RECIPES]
    assert len(set(folders)) == len(folders)
