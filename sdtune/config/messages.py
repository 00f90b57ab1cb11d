"""pydantic's faults in plain words: what was got, what was expected, which key was meant."""

import json
import types
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from sdtune.errors import nearest

Fault = tuple[str, str]


def faults_of(error: ValidationError, model: type[BaseModel]) -> list[Fault]:
    """(dotted key, what is wrong) for each fault, one a key, in the order of the recipe."""
    faults: dict[str, str] = {}
    for fault in error.errors(include_url=False):
        if fault["type"] == "default_factory_not_called":  # a default that follows from a setting that is told of
            continue
        path, field = locate(model, fault["loc"])
        key = ".".join(map(str, path))
        faults.setdefault(key, explain(fault, model, path, field))
    return list(faults.items())


def locate(model: type[BaseModel], loc: Sequence[int | str]) -> tuple[list[int | str], FieldInfo | None]:
    """The part of pydantic's location that is in the file (no union branches), and the field it ends in."""
    path: list[int | str] = []
    field: FieldInfo | None = None
    inside: type[BaseModel] | None = model
    values: Any = None  # type of the values, inside a field with keys of its own such as from_config
    for step in loc:
        if isinstance(step, int):
            path.append(step)
        elif inside is not None:
            path.append(step)
            field = fields_of(inside).get(step)
            inside, values = (section_of(field.annotation), values_of(field.annotation)) if field else (None, None)
        elif values is not None:
            path.append(step)
            field, values = FieldInfo(annotation=values), None
        else:
            break
    return path, field


def fields_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields by the name they have in the file."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, or a list of which it holds; None for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (list, Union, types.UnionType):
        return next((found for part in get_args(annotation) if (found := section_of(part))), None)
    return None


def values_of(annotation: Any) -> Any:
    """What a mapping holds under its keys; None for anything else."""
    if get_origin(annotation) is dict:
        return get_args(annotation)[1]
    if get_origin(annotation) in (Union, types.UnionType):
        return next((found for part in get_args(annotation) if (found := values_of(part))), None)
    return None


def explain(fault: Any, model: type[BaseModel], path: list[int | str], field: FieldInfo | None) -> str:
    """One fault in plain words."""
    got = f"got {show(fault['input'])}"
    if fault["type"] == "extra_forbidden":
        return unknown_key(str(path[-1]), model, path)
    if fault["type"] == "value_error":
        return f"{got}, {fault['ctx']['error']}"
    if field is None:
        return f"{got}: {fault['msg']}"
    annotation, metadata = element(field, path)
    expected = describe(annotation, metadata)
    if fault["type"] == "missing":
        return f"missing; expected {expected}" + "".join(f", for example {show(e)}" for e in (field.examples or [])[:1])
    return f"{got}, expected {expected}"


def element(field: FieldInfo, path: list[int | str]) -> tuple[Any, Iterable[Any]]:
    """Type and bounds of what the path ends in: the field, or an element of its list."""
    annotation, metadata = field.annotation, field.metadata
    if not isinstance(path[-1], int) or get_origin(annotation) is not list:
        return annotation, metadata
    (annotation,) = get_args(annotation)
    return annotation, ()


def unknown_key(key: str, model: type[BaseModel], path: list[int | str]) -> str:
    """The nearest key of the same section, else the section that knows the key, else the keys there are."""
    section = model
    for step in path[:-1]:
        if isinstance(step, str):
            section = section_of(fields_of(section)[step].annotation) or section
    return f"unknown key; {nearest(key, list(fields_of(section)), sections_with(key, model))}"


def sections_with(key: str, model: type[BaseModel]) -> list[str]:
    """Dotted keys of the sections that have such a key."""
    places = []
    for name, field in fields_of(model).items():
        section = section_of(field.annotation)
        if section and key in fields_of(section):
            places.append(f"{name}.0.{key}" if get_origin(field.annotation) is list else f"{name}.{key}")
    return places


def describe(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """A type in plain words: `a whole number of at least 1`."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return describe(parts[0], [m for extra in parts[1:] for m in getattr(extra, "metadata", [extra])])
    if origin in (Union, types.UnionType):
        kinds = [describe(part, metadata) for part in parts if part is not type(None)]
        return " or ".join(kinds + ["null"] * (type(None) in parts))
    if origin is Literal:
        return parts[0] if len(parts) == 1 else f"one of {', '.join(map(str, parts))}"
    if origin is list:
        lengths = [m for m in metadata if hasattr(m, "min_length") or hasattr(m, "max_length")]
        count = f" ({bounds(lengths)})" if lengths else ""
        return f"a list of {plural(parts[0])}{count}"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if annotation is str and any(getattr(m, "min_length", 0) for m in metadata):
        return "text"
    limits = bounds(metadata) if annotation in (int, float) else ""
    return names.get(annotation, "a section of settings") + (f" {limits}" if limits else "")


def plural(annotation: Any) -> str:
    """What a list holds."""
    if get_origin(annotation) is Annotated:
        inner = get_args(annotation)
        limits = bounds(m for extra in inner[1:] for m in getattr(extra, "metadata", [extra]))
        return plural(inner[0]) + (f" {limits}" if limits else "")
    if get_origin(annotation) is Literal:
        return "/".join(map(str, get_args(annotation)))
    return {int: "whole numbers", float: "numbers", str: "texts"}.get(annotation, "sections")


WORDS = {
    "ge": "of at least {}",
    "gt": "greater than {}",
    "le": "of at most {}",
    "lt": "less than {}",
    "min_length": "at least {}",
    "max_length": "at most {}",
}


def bounds(metadata: Iterable[Any]) -> str:
    """`of at least 0 and less than 1`."""
    found = [text.format(getattr(m, name)) for m in metadata for name, text in WORDS.items() if hasattr(m, name)]
    return " and ".join(found)


def show(value: Any) -> str:
    """A value as it stands in YAML, shortened."""
    if value is None:
        return "nothing"
    text = f"'{value}'" if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
