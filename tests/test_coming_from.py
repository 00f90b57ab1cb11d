"""docs/coming-from.md and docs/choosing.md: every setting that they name exists and takes the value shown."""

import re
import shlex
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from sdtune.config.files import check, find_recipe, override, read
from sdtune.config.recipe import Recipe
from sdtune.config.schema import recipe_schema, settings

DOCS = Path(__file__).parent.parent / "docs"
PAGES = ("coming-from", "choosing")
SECTIONS = "|".join(field.alias or name for name, field in Recipe.model_fields.items())


def rows(section: str) -> list[tuple[str, str]]:
    """(flag, what to do here) of a table in coming-from; several flags in a cell count one by one."""
    text = (DOCS / "coming-from.md").read_text(encoding="utf-8")
    (table,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    cells = re.findall(r"^\| (`--.*?) \| (.*) \|$", table, re.MULTILINE)
    return [(flag, here) for flags, here in cells for flag in re.findall(r"`(--\w+)`", flags)]


@pytest.mark.parametrize(
    ("section", "count"),
    [("ShivamShrirao's train_dreambooth.py", 51), ("diffusers' scripts", 65), ("kohya-ss/sd-scripts", 110)],
)
def test_each_flag_stands_once_with_its_answer(section: str, count: int) -> None:
    found = rows(section)
    flags = [flag for flag, _ in found]
    assert len(flags) == len(set(flags))
    assert len(flags) == 51 if count == 51 else len(flags) >= count
    assert [flag for flag, here in found if len(here) < 8] == []


def mentions(page: str) -> list[tuple[str, str]]:
    """(dotted key, value or nothing) of every setting that a page names."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    text = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)  # whole commands have a test of their own
    pattern = rf"(?<![\w.-])((?:{SECTIONS})\.\w[\w.]*)(?:=(\"[^\"]*\"|\[[^\]]*\]|[^\s`|,;)]+))?"
    return [(key.rstrip("."), value) for key, value in re.findall(pattern, text) if not key.endswith((".py", ".txt"))]


@pytest.mark.parametrize("page", PAGES)
def test_each_setting_named_exists(page: str) -> None:
    known = {key for key, _ in settings()}
    known |= {key.rpartition(".")[0].removesuffix(".N") for key in known}
    found = mentions(page)
    assert len(found) > 10
    names = {re.sub(r"\.\d+", ".N", key) for key, _ in found}
    assert sorted(name for name in names if name not in known) == []


@pytest.mark.parametrize("page", PAGES)
def test_each_value_shown_is_taken(page: str) -> None:
    schema = jsonschema.Draft202012Validator(recipe_schema())
    for key, value in mentions(page):
        if not value:
            continue
        recipe: dict[str, Any] = {
            "model": {"base": "tiny"},
            "data": [{"path": "photos"}, {"path": "class_pictures"}],
            "adapter": {"tokens": [{"token": "<cat>"}]},
            "optimizer": {"lr": 1e-4},
            "train": {"steps": 10},
            "output": {"dir": "runs/x"},
        }
        assert override(recipe, f"{key}={value.strip(chr(34))}") is None
        assert [fault.message for fault in schema.iter_errors(recipe)] == [], f"{key}={value}"


@pytest.mark.parametrize("base", ["tiny", "sd15", "sdxl"])
def test_the_relatives_differ_from_lora_in_the_adapter_alone(base: str) -> None:
    """As choosing.md says of them, so that results can be compared."""

    def rest(kind: str) -> dict[str, Any]:
        values = read(find_recipe(f"{kind}_{base}"), kind)
        return {key: value for key, value in values.items() if key not in ("adapter", "output")}

    assert [kind for kind in ("rslora", "dora", "lokr", "loha") if rest(kind) != rest("lora")] == []


def test_each_thing_that_is_learned_is_named_in_its_command() -> None:
    """No command of choosing.md trains the recipe's own dog on other photographs."""
    text = (DOCS / "choosing.md").read_text(encoding="utf-8")
    for name, *words in (shlex.split(command)[2:] for command in re.findall(r"^    (sdtune train .*)$", text, re.M)):
        for number, source in enumerate(read(find_recipe(name), name)["data"]):
            if "prompt" in source:
                assert any(word.startswith(f"data.{number}.prompt=") for word in words), name


def test_each_command_of_choosing_is_one_that_loads(workplace: Path) -> None:
    """The recipe exists, and with the settings given it has no fault but a base that is not here."""
    text = (DOCS / "choosing.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    (sdtune train .*)$", text, re.MULTILINE)
    assert len(commands) >= 8
    for folder in ("photos", "class_pictures"):
        (workplace / folder).mkdir(exist_ok=True)
    schema = jsonschema.Draft202012Validator(recipe_schema())
    for command in commands:
        name, *words = shlex.split(command)[2:]
        values = deepcopy(read(find_recipe(name), name))
        assert [fault for word in words if (fault := override(values, word))] == []
        assert [fault.message for fault in schema.iter_errors(values)] == [], command
        assert check(values)[1] == [], command
