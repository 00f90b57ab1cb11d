"""The JSON schema and the page of settings are those of the models; editors get what `load` would say."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from sdtune.cli import app
from sdtune.config.advice import WHEN
from sdtune.config.files import read
from sdtune.config.schema import recipe_schema, reference_page, settings

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
GOOD: dict[str, Any] = {
    "model": {"base": "tiny"},
    "data": [{"path": "photos"}],
    "optimizer": {"lr": 1e-4},
    "train": {"steps": 10},
    "output": {"dir": "runs/x"},
}


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    answer = CliRunner().invoke(app, ["recipes", "schema"])
    assert answer.exit_code == 0
    printed = json.loads(answer.stdout)
    assert printed == recipe_schema()
    jsonschema.Draft202012Validator.check_schema(printed)
    return jsonschema.Draft202012Validator(printed)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_fit_the_schema(path: Path, schema: jsonschema.Draft202012Validator) -> None:
    assert [fault.message for fault in schema.iter_errors(read(path, str(path)))] == []


def test_a_section_may_be_empty(schema: jsonschema.Draft202012Validator) -> None:
    schema.validate(GOOD | {"objective": None, "validate": None})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("adapter.rnk", 4),
        ("adapter.kind", "lroa"),
        ("adapter.targets", "atention"),
        ("adapter.rank", "16"),
        ("model.family", "sd15"),
        ("train.steps", -5),
        ("train.steps", 2.5),
        ("optimizer.schedule", "cosin"),
        ("data.0.role", "klass"),
        ("images.caption_dropout", 2),
        ("data", []),
        ("optimizer", None),
        ("output", {}),
        ("extra", 1),
    ],
)
def test_wrong_recipes_do_not(key: str, value: Any, schema: jsonschema.Draft202012Validator) -> None:
    schema.validate(GOOD)
    recipe = deepcopy(GOOD)
    section: Any = recipe
    *outer, last = key.split(".")
    for step in outer:
        section = section[int(step)] if step.isdecimal() else section.setdefault(step, {})
    section[last] = value
    assert not schema.is_valid(recipe)


def test_the_page_of_settings_is_up_to_date() -> None:
    written = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert written == reference_page(), "the settings have changed: run `make docs`"


def test_each_setting_is_described_and_says_when_to_change_it() -> None:
    keys = dict(settings())
    assert len(keys) > 80
    assert [key for key, field in keys.items() if not field.description] == []
    assert [key for key in keys if key not in WHEN] == [], "write in sdtune/config/advice.py when to change these"
    assert [key for key in WHEN if key not in keys] == [], "remove these from sdtune/config/advice.py"
