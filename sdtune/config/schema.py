"""The recipe as a JSON schema, with which editors complete and check the YAML, and the page with all settings.

    sdtune recipes schema > sdtune.schema.json                  # for editors
    python -m sdtune.config.schema > docs/settings.md           # `make docs`
"""

from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo

from sdtune.config.advice import WHEN
from sdtune.config.checks import known_names
from sdtune.config.messages import describe, fields_of, section_of, show
from sdtune.config.recipe import TARGET_PRESETS, Recipe, Section

DRAFT = "https://json-schema.org/draft/2020-12/schema"
HEAD = """# Every setting

This page is made by `make docs`, from `sdtune/config/recipe.py` and `advice.py` beside it; it is not edited by hand.

A recipe is a YAML file with these sections. `key=value` after `sdtune train RECIPE` replaces a single setting, such as
`train.steps=500` or `data.0.path=photos`. What is not in the file has its default. A setting that a run would not read
is refused.

Editors complete and check recipes when they know the schema:

```sh
sdtune recipes schema > sdtune.schema.json
```

and the first line of a recipe names the file, which works in VS Code (with the YAML extension) and whatever else uses
yaml-language-server:

```yaml
# yaml-language-server: $schema=sdtune.schema.json
```
"""


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe: types, bounds, names, and the descriptions that an editor shows."""
    schema = Recipe.model_json_schema(by_alias=True)
    schema = {"$schema": DRAFT, "$id": "sdtune.schema.json", **schema, "title": "sdtune recipe"}
    parts = schema["$defs"]
    for key, names in known_names().items():
        section, _, name = key.rpartition(".")
        described = parts[definition(section)]["properties"][name]
        text = described["anyOf"][0] if "anyOf" in described else described  # the other of the two is null
        text["enum"] = names
    text, a_list = parts[definition("adapter")]["properties"]["targets"]["anyOf"]
    parts[definition("adapter")]["properties"]["targets"]["anyOf"] = [text | {"enum": list(TARGET_PRESETS)}, a_list]
    for name, field in fields_of(Recipe).items():
        if field.default_factory is not None:  # null is the default there
            described = schema["properties"][name]
            reference = described.pop("$ref")
            schema["properties"][name] = {"anyOf": [{"$ref": reference}, {"type": "null"}], **described}
    return schema


def definition(section: str) -> str:
    """The name of a section's class, under which the schema defines it; `section` may be within another: a.b."""
    kind: type[Section] = Recipe
    for name in section.split("."):
        inner = section_of(fields_of(kind)[name].annotation)
        assert inner is not None
        kind = inner  # type: ignore[assignment]
    return kind.__name__


def settings(model: type[Section] = Recipe, key: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted key, field) of every setting; an entry of a list has an N in it: data.N.path."""
    inner = []
    for name, field in fields_of(model).items():
        section, dotted = section_of(field.annotation), f"{key}.{name}".lstrip(".")
        if section is None:
            yield dotted, field
        else:
            inner.append((section, f"{dotted}.N" if "list[" in str(field.annotation) else dotted))
    for section, dotted in inner:
        yield from settings(section, dotted)  # type: ignore[arg-type]


def reference_page() -> str:
    """docs/settings.md."""
    lines, open_section = [HEAD], None
    for key, field in settings():
        section = key.rpartition(".")[0]
        if section != open_section:
            lines += ["", f"## {section}" if section else "## The recipe itself", ""]
            lines += ["| setting | what it is | default | when to change it |", "|---|---|---|---|"]
            open_section = section
        names = known_names().get(key)
        kind = f"one of {', '.join(names)}" if names else describe(field.annotation, field.metadata)
        what = f"{field.description} *({kind})*"
        cells = (f"`{key}`", what, default(field), WHEN.get(key, ""))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def default(field: FieldInfo) -> str:
    """A setting's default as it stands in YAML."""
    if field.is_required():
        return "must be given"
    if field.default_factory_takes_validated_data:
        return "follows from others"
    value = field.get_default(call_default_factory=True)
    return "`null`" if value is None else f"`{show(value)}`"


if __name__ == "__main__":
    print(reference_page(), end="")
