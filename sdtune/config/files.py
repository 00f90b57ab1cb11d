"""Reading and writing recipes."""

import re
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sdtune.config.checks import impossible, unused_keys
from sdtune.config.messages import Fault, faults_of, locate, show
from sdtune.config.recipe import Recipe
from sdtune.config.shipped import shipped_recipes
from sdtune.errors import ConfigError, UsageError, nearest


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a YAML file, or the name of a recipe that ships with sdtune.
        overrides: `dotted.key=value` each, such as `data.0.path=photos`; the value is read as YAML.

    Raises:
        ConfigError: with every fault of the file and the overrides.
        UsageError: there is no such recipe.
    """
    file = find_recipe(path)
    source = _shown(file, path)
    values = read(file, source)
    faults = [fault for text in overrides if (fault := override(values, text))]
    recipe, more = check(values)
    if recipe is None or faults or more:
        raise ConfigError(source, faults + more)
    return recipe


def find_recipe(path: str | Path) -> Path:
    """The file behind a path or a shipped recipe's name. Raises UsageError."""
    shipped = shipped_recipes()
    if Path(path).is_file():
        return Path(path)
    if str(path) in shipped:
        return shipped[str(path)]
    if Path(path).is_dir():
        raise UsageError(f"'{path}' is a folder, expected a recipe: a YAML file, or a name of `sdtune recipes ls`")
    stem = Path(path).stem
    hint = f"did you mean the shipped recipe '{stem}'?" if stem in shipped else nearest(stem, list(shipped))
    stop = "" if hint.endswith("?") else "."
    raise UsageError(
        f"there is no recipe '{path}'; {hint}{stop} Give one of these or a YAML file; `sdtune recipes ls` says what "
        "each does"
    )


def dump(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults included; `load` of it gives an equal recipe."""
    values = recipe.model_dump(by_alias=True)
    for key in unused_keys(recipe):
        *sections, last = key.split(".")
        section = values
        for name in sections:
            section = section[name]
        section.pop(last, None)
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def parse(text: str) -> Recipe:
    """What `dump` wrote, without a look at the files that it names. Raises ValueError when it is no recipe."""
    try:
        return Recipe.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ValueError(f"it is not YAML: {error}") from error
    except ValidationError as error:
        faults = faults_of(error, Recipe)
        raise ValueError("; ".join(f"{key}: {what}" for key, what in faults)) from error


def check(values: dict[str, Any]) -> tuple[Recipe | None, list[Fault]]:
    """The recipe, if its values are well formed, and all faults: of single values and of their combination."""
    try:
        recipe = Recipe.model_validate(values)
        return recipe, impossible(recipe)
    except ValidationError as error:
        faults = faults_of(error, Recipe)
    besides = impossible(_mended(values))  # what would be wrong still, once these are mended
    bad = [key for key, _ in faults]
    return None, faults + [(key, what) for key, what in besides if not any(_related(key, one) for one in bad)]


def _related(key: str, other: str) -> bool:
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _mended(values: dict[str, Any]) -> Recipe:
    """The recipe with faulty values left out, and examples in the place of those that are required."""
    values = deepcopy(values)
    while True:
        try:
            return Recipe.model_validate(values)
        except ValidationError as error:
            path, field = locate(Recipe, error.errors()[0]["loc"])
        while isinstance(path[-1], int):  # a list with a faulty element goes as a whole
            path.pop()
        section: Any = values
        for step in path[:-1]:
            section = section[step]
        section.pop(path[-1], None)
        if field is not None and field.is_required() and field.examples:
            section[path[-1]] = deepcopy(field.examples[0])


def override(values: dict[str, Any], text: str) -> Fault | None:
    """Set one `key=value` in place; the fault, if it cannot be."""
    key, equals, written = text.partition("=")
    if not equals or not key:
        return text, "expected key=value, for example train.steps=100"
    try:
        value = yaml.load(written, Loader=_Loader)
    except yaml.YAMLError:
        return key, f"got {show(written)}, which is not YAML; quotes may help: {key}=\"'...'\""
    section: Any = values
    steps = key.split(".")
    for i, step in enumerate(steps):
        place: Any = step
        if isinstance(section, list):
            if not step.isdecimal() or int(step) > len(section):
                return key, f"got '{step}' for a list of {len(section)}, expected a number from 0 to {len(section)}"
            place = int(step)
            if place == len(section):
                section.append(None)
        elif not isinstance(section, dict):
            return key, f"'{'.'.join(steps[:i])}' is {show(section)}, not a section"
        if i == len(steps) - 1:
            section[place] = value
        elif isinstance(section, list) or section.get(place) is not None:
            section[place] = {} if section[place] is None else section[place]
        else:
            section[place] = [] if steps[i + 1].isdecimal() else {}
        section = section[place]
    return None


def read(file: Path, source: str) -> dict[str, Any]:
    """The values of a YAML file. Raises ConfigError with the line of a syntax fault."""
    try:
        values = yaml.load(file.read_text(encoding="utf-8-sig"), Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}" if error.problem_mark else "YAML"
        raise ConfigError(source, [(line, f"not YAML: {error.problem or error.context}")]) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(source, [("YAML", f"not a text file: {' '.join(str(error).split())}")]) from error
    if not isinstance(values, dict):
        raise ConfigError(source, [("YAML", f"got {show(values)}, expected sections such as model:, data: and train:")])
    return values


def _shown(file: Path, path: str | Path) -> str:
    return str(path) if Path(path).is_file() else f"{path} ({file})"


# --- YAML 1.2 scalars: 1e-4 is a number, `no` and 2024-01-01 are text -------------------------------------------------

_SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
)


class _Loader(yaml.SafeLoader):
    """Safe, with YAML 1.2's scalars; a key that stands twice is a fault."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                what = f"the key '{key.value}' stands twice"
                raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
            seen.add(key.value)
        return {str(key): value for key, value in mapping.items()}


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either version of YAML would read as something else."""


for _name, _pattern, _first in _SCALARS:
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), list(_first))
