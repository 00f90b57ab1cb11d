"""`sdtune check`: a data set, or all that a recipe needs, looked at before any training."""

import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sdtune.config import Recipe, load, resolve_asset, shipped_recipes
from sdtune.config.checks import doubtful
from sdtune.data.captions import setting
from sdtune.data.check import Identity, Report, check
from sdtune.data.check_captions import Reader, holds
from sdtune.data.check_entries import Entry, data_set_entries
from sdtune.data.check_findings import Finding, about, worst_first
from sdtune.data.check_reading import Reading
from sdtune.data.check_report import as_text, as_values
from sdtune.data.check_sizes import Frame
from sdtune.data.check_watch import watch
from sdtune.errors import DataError, UsageError
from sdtune.local_models import NamedModel, caption_reader, model_findings, named_models

RESOLUTION, MAX_TOKENS = 512, 75  # where no recipe says otherwise
Facts = list[tuple[str, str]]


def command(
    target: str,
    overrides: Sequence[str] = (),
    *,
    trigger: str | None = None,
    resolution: int | None = None,
    prompt: str | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    fix: Path | None = None,
    as_json: bool = False,
) -> int:
    """`sdtune check`; returns the exit code: 1 where training would fail, with `fix` where the copy would.

    Args:
        target: folder or other path of a data set, hub id, recipe, or name of a shipped recipe.
        overrides: `key=value` in place of the recipe's.
        trigger: what each caption must hold.
        resolution, prompt, image_column, text_column: of a data set; a recipe has its own.
        fix: new folder for a cleaned copy.
        as_json: print one JSON object instead of the table.

    Raises:
        UsageError: nothing is called `target`, or options that do not go with it.
    """
    given = {"resolution": resolution, "prompt": prompt, "image-column": image_column, "text-column": text_column}
    if is_recipe(target):
        _refuse_options(target, [name for name, value in given.items() if value is not None], fix)
        return _end(*check_recipe(target, overrides, trigger), target, as_json)
    if overrides:
        raise UsageError(f"'{overrides[0]}' is for a recipe, and '{target}' is a data set; {_as_option(overrides[0])}")
    entries = data_set_entries(target, prompt, image_column, text_column)
    side = resolution or RESOLUTION
    reader = _remembered(lambda: caption_reader(None, MAX_TOKENS))
    report = check(entries, Frame(side, side), reader=reader, trigger=trigger, watch=watch)
    if fix is None:
        return _end(report, [_reading_fact(reader())], {}, target, as_json)
    from sdtune.data.fix import write_fixed

    written = write_fixed(report, fix)
    for entry in data_set_entries(str(fix), prompt, image_column, text_column):
        entry.load()  # training takes the copy, or this says why not
    copy = f"{written['kept']} pictures, {written['dropped']} left out"
    facts = [_reading_fact(reader()), ("cleaned copy", copy)]
    _end(report, facts, {"fixed": {"out": str(fix), **written}}, target, as_json)
    if not as_json:
        print(f"training takes the cleaned copy: {fix}")
    return 0


def is_recipe(target: str) -> bool:
    """Whether a name is that of a recipe, and not of a data set."""
    return Path(target).suffix in (".yaml", ".yml") or (target in shipped_recipes() and not Path(target).exists())


def check_recipe(target: str, overrides: Sequence[str], trigger: str | None) -> tuple[Report, Facts, dict[str, Any]]:
    """A recipe's data sets and models. Raises ConfigError with all its faults."""
    from sdtune.libraries import prepare

    prepare()  # before the next lines import what imports bitsandbytes
    from sdtune.building import make_buckets, make_source, other_folders, picture_size, reads_masks, unused_masks
    from sdtune.class_pictures import look_into_class_folder
    from sdtune.estimate import disk_findings, estimate, latents_of, recipe_facts
    from sdtune.families import PARTS

    recipe = load(target, overrides)
    entries, to_draw, refused = [], 0, []
    for number, settings in enumerate(recipe.data):
        path = Path(resolve_asset(settings.path)) if settings.path is not None else None
        if settings.generate:
            try:
                drawn = look_into_class_folder(recipe, settings)
                to_draw += len(drawn.missing)
                if not drawn.is_readable:
                    continue  # the run draws them
            except DataError as fault:
                refused.append(Finding("fatal", "refused", 1, f"data.{number}: training refuses it", str(fault)))
        entries.append(
            Entry(
                partial(make_source, recipe, settings),
                f"data.{number}" if len(recipe.data) > 1 else "",
                path,
                settings.split,
                settings.image_column,
                settings.text_column,
                settings.prompt,
                settings.role,
                other_folders(recipe, settings),
                key=f"data.{number}",
            )
        )
    trigger = trigger or rare_word(recipe)
    reader = _remembered(lambda: caption_reader(recipe.model, recipe.images.max_tokens))
    text = recipe.task == "denoising" and "tokenizer" in PARTS[recipe.model.family]
    report = check(
        entries,
        Frame(*picture_size(recipe), make_buckets(recipe, latents_of(recipe)[1])),
        reader=reader if text else None,
        trigger=trigger,
        held_out=partial(set_aside, recipe),
        masks=reads_masks(recipe),
        watch=watch,
    )
    models = named_models(recipe)
    masks = unused_masks(recipe, [reading.source for reading in report.readings if reading.source is not None])
    more = [*refused, *_doubtful(recipe), *masks, *model_findings(models), *_samples_without(recipe, trigger)]
    report = replace(report, findings=worst_first([*report.findings, *more]))
    known = estimate(recipe, report, to_draw)
    report = replace(report, findings=worst_first([*report.findings, *disk_findings(known)]))
    facts = [*([_reading_fact(reader())] if text else []), *recipe_facts(recipe, known), _model_fact(models)]
    values = [{"key": each.key, "name": each.name, "here": each.here, "lacks": list(each.lacks)} for each in models]
    return report, facts, {"models": values, "trigger": trigger, **known}


def rare_word(recipe: Recipe) -> str | None:
    """The words of the instance prompt that no class prompt has, such as sks; None without prompts of both."""
    from sdtune.class_pictures import class_prompts

    instance = [each.prompt for each in recipe.data if each.role == "instance" and each.prompt]
    classes = [each for each in recipe.data if each.role == "class" and (each.prompt or each.prompts)]
    if not instance or not classes:
        return None
    known = {word.lower() for each in classes for prompt in class_prompts(each) for word in prompt.split()}
    rare = [word for word in str(instance[0]).split() if word.lower() not in known]
    return " ".join(rare) or None


def set_aside(recipe: Recipe, readings: Sequence[Reading]) -> set[Identity]:
    """The pictures of instance sources that the run holds out for validation."""
    sources = [reading.source for reading in readings if reading.source is not None]
    if recipe.validation.fraction == 0 or not sources:
        return set()
    from sdtune.data.dataset import held_out

    _, aside = held_out(sources, recipe.validation.fraction, recipe.train.seed)
    return {(picture.origin, picture.name) for picture in aside.pictures}


def _doubtful(recipe: Recipe) -> Iterator[Finding]:
    for key, said in doubtful(recipe):
        what, _, do = said.rpartition("; ")
        yield Finding("warning", "settings", 1, f"{key} {what}", do)


def _samples_without(recipe: Recipe, trigger: str | None) -> list[Finding]:
    prompts = recipe.validation.samples.prompts if recipe.validation.samples is not None else []
    if trigger is None or any(holds(prompt, trigger) for prompt in prompts):
        return []
    what = f"sample prompts, none with '{trigger}': samples will not show what is learnt"
    return about("note", "samples", prompts, what, "write it into one of validate.samples.prompts")


def _model_fact(models: Sequence[NamedModel]) -> tuple[str, str]:
    words = [f"{each.key} {each.name} {'is here' if each.here else 'is not here'}" for each in models]
    return "models", ",  ".join(words) or "none is named"


def _reading_fact(reader: Reader) -> tuple[str, str]:
    return "captions", f"{reader.limit} tokens are read of each, counted by {reader.name}"


def _remembered(make: Callable[[], Reader]) -> Callable[[], Reader]:
    """Makes it once, when it is first asked for."""
    made: list[Reader] = []

    def get() -> Reader:
        if not made:
            made.append(make())
        return made[0]

    return get


def _refuse_options(target: str, options: Sequence[str], fix: Path | None) -> None:
    if options:
        raise UsageError(
            f"--{options[0]} is for a data set, and '{target}' is a recipe, which has its own; change it with a "
            "key=value, such as images.resolution=768 or data.0.prompt='a photo of sks dog'"
        )
    if fix is not None:
        raise UsageError(
            f"--fix cleans a data set, and '{target}' is a recipe; name the folder: sdtune check FOLDER --fix {fix}"
        )


def _as_option(override: str) -> str:
    """What to write for a data set in place of a recipe's `key=value`."""
    key, _, value = override.partition("=")
    name = key.rpartition(".")[2]
    if name not in ("prompt", "image_column", "text_column", "resolution"):
        return "expected options only"
    return f"write: {setting('', name, shlex.quote(value))}"


def _end(report: Report, facts: Facts, values: dict[str, Any], title: str, as_json: bool) -> int:
    """Prints the report; the exit code."""
    print(json.dumps(as_values(report, values), ensure_ascii=False) if as_json else as_text(report, title, facts))
    return int(report.fatal)
