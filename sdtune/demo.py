"""`sdtune demo`: teaches the embedded tiny model 16 new things, and measures what it learned and what it kept.

The pictures are captioned first, by the embedded tiny BLIP, and what it got wrong is mended, as a person would. The
training is the shipped recipe `dreambooth_lora_tiny`, run as `sdtune train` runs it. Around it every new thing and
some of the old ones are drawn twice, before and after, from the same noise. A picture counts as right when, among the
285 things that the base knows and the 16 new ones, the nearest is the one that was asked for (`sdtune/evaluate.py`).
"""

import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from sdtune import evaluate
from sdtune.adapters.lora_files import WEIGHTS_NAME
from sdtune.config import Recipe, load, resolve_asset
from sdtune.contact_sheet import contact_sheet
from sdtune.data.metadata import read_rows, write_rows
from sdtune.diffusion import draws
from sdtune.libraries import prepare
from sdtune.progress import show_progress
from sdtune.report import Case, Comparison, percent, write_report
from sdtune.run import Run
from sdtune.sample import draw_pictures

RECIPE = "dreambooth_lora_tiny"
OLD = 64  # of the 285 things, drawn by lot
NEW_BEFORE, NEW_AFTER, OLD_FALL = 0.1, 0.95, 0.07  # at most, at least, at most
SIZE = 64  # pixels of a thumbnail


@dataclass
class Clock:
    """Seconds spent on each part of the work."""

    parts: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the block's time for `name`, and says that it begins."""
        print(f"{name} ...", file=sys.stderr, flush=True)
        began = time.perf_counter()
        yield
        self.parts[name] = time.perf_counter() - began


@dataclass(frozen=True)
class Outcome:
    """What the demo found: shares in [0, 1], the captioner's words for each thing, seconds of each part, its files."""

    new: Comparison
    old: Comparison
    captions: dict[str, str]
    parts: dict[str, float]
    report: Path
    lora: Path

    def values(self) -> dict[str, float | str]:
        """The result for `--json`."""
        return {
            "new_before": self.new.share_before,
            "new_after": self.new.share_after,
            "old_before": self.old.share_before,
            "old_after": self.old.share_after,
            "seconds": round(sum(self.parts.values()), 1),
            "report": str(self.report),
            "lora": str(self.lora),
            "captions_right": sum(named_right(self.captions)) / len(self.captions),
        }


def command(out: Path, *, prior: bool = True, as_json: bool = False) -> int:
    """`sdtune demo`; returns the exit code, which does not depend on the shares measured.

    Args:
        out: run folder; if it is in use, the next free one: runs/demo-2, runs/demo-3 ...
        prior: train on class pictures too. as_json: end with one JSON object on stdout.
    """
    prepare()
    folder = free_folder(out)
    if folder != out:
        print(f"'{out}' holds an earlier run and is kept; this one goes to '{folder}'", file=sys.stderr)
    outcome = run_demo(folder, prior=prior)
    print(table(outcome), file=sys.stderr)
    if as_json:
        print(json.dumps(outcome.values()))
    return 0


def free_folder(out: Path) -> Path:
    """`out`, or `out`-2, `out`-3 ...: the first that is missing or an empty folder."""
    number, folder = 1, out
    while not all(not each.exists() or each.is_dir() and not any(each.iterdir()) for each in (folder, taught(folder))):
        number += 1
        folder = out.with_name(f"{out.name}-{number}")
    return folder


def run_demo(folder: Path, *, prior: bool = True, old: int = OLD, overrides: Sequence[str] = ()) -> Outcome:
    """Draw, train, draw again, measure, and write the report.

    Args:
        folder: run folder, which must not exist.
        prior: whether half of each batch are class pictures.
        old: how many of the 285 things are drawn, too.
        overrides: changes to the recipe, key=value each.
    """
    clock = Clock()
    with clock.part("captioning the new pictures"):
        captions = caption_pictures(taught(folder))
    with clock.part("loading the model" + " and drawing class pictures with it" * prior):
        recipe = demo_recipe(folder, prior, overrides)
        run = Run(recipe)
        names, references, wanted = things(old)
    with clock.part("drawing before"):
        before = draw(run, [names[i] for i in wanted])
    with clock.part("training"):
        show_progress(run)
        run.finish()
    with clock.part("drawing after"):
        after = draw(run, [names[i] for i in wanted])
    with clock.part("measuring and writing the report"):
        cases = compare(names, references, wanted, before, after)
        new, kept = judge(cases[:-old], cases[-old:])
        intro = (
            "The tiny text-to-image model that comes with sdtune was taught 16 things that it had never seen, from one "
            "picture each. Every thing was drawn from the same noise before and after. A drawing counts as right when, "
            f"of {len(names)} pictures, the one asked for is the nearest to it. Before, the pictures were captioned by "
            f"the tiny BLIP that comes along. {told(captions)}"
        )
        report = write_report(run.folder, title="What the demo learned", intro=intro, comparisons=[new, kept])
        contact_sheet([new, kept]).save(run.folder.path / "before_after.png", optimize=True)
    return Outcome(new, kept, captions, clock.parts, report, run.folder.final / WEIGHTS_NAME)


def taught(folder: Path) -> Path:
    """Where the pictures with their captions stand, beside the run folder."""
    return folder.with_name(f"{folder.name}-pictures")


def caption_pictures(folder: Path) -> dict[str, str]:
    """Captions the bundled pictures into `folder`, then puts the right names where the captioner was wrong.

    Returns:
        What it said of each thing, by its name.
    """
    from data_tools.caption import caption_folder

    bundled = Path(resolve_asset("assets:demo"))
    names = {row["file_name"]: row["text"] for row in read_rows(bundled)}
    with TemporaryDirectory() as place:
        for name in names:
            shutil.copyfile(bundled / name, Path(place) / name)  # without the names that stand beside them
        caption_folder(place, out=folder, model="tiny")
    said = {row["file_name"]: row["text"] for row in read_rows(folder)}
    write_rows(folder, [{"file_name": name, "text": names[name], "caption": said[name]} for name in names])
    return {names[name]: said[name] for name in names}


def named_right(captions: Mapping[str, str]) -> list[bool]:
    """Whether each caption is the thing's name."""
    return [caption.strip().lower() == name.lower() for name, caption in captions.items()]


def told(captions: Mapping[str, str]) -> str:
    """How good the captions were, in words."""
    right = named_right(captions)
    wrong = " The right names were put in place of the others, as a person would." if not all(right) else ""
    return f"It named {sum(right)} of {len(right)} right; it knows these things in another style only.{wrong}"


def demo_recipe(folder: Path, prior: bool, overrides: Sequence[str]) -> Recipe:
    """The shipped recipe, with all that it writes inside the run folder."""
    recipe = load(RECIPE, overrides)
    recipe.output.dir = str(folder)
    for source in recipe.data:
        if source.role == "instance":
            source.path = str(taught(folder))
        if source.role == "class":
            source.path = str(folder / "class_pictures")
    if not prior:
        recipe.data = [source for source in recipe.data if source.role == "instance"]
    return recipe


def things(old: int) -> tuple[list[str], evaluate.Pictures, list[int]]:
    """What can be drawn and what will be.

    Returns:
        The names (N) and pictures, uint8 (N, 64, 64, 3), of all things, old ones first; and the numbers of those to
        draw: every new one, then `old` old ones.
    """
    names, pictures = evaluate.load_thumbnails()
    new_names, new_pictures = evaluate.load_demo()
    lot = draws.permutation(len(names), 0, "old things of the demo")[:old]
    new = list(range(len(names), len(names) + len(new_names)))
    return names + new_names, np.concatenate([pictures, new_pictures]), new + lot


def draw(run: Run, prompts: Sequence[str]) -> evaluate.Pictures:
    """A picture of each prompt, from noise of its own, as the run's sample pictures are drawn: uint8 (N, 64, 64, 3)."""
    from tqdm import tqdm

    settings = run.recipe.validation.samples
    assert settings is not None, f"{RECIPE} says how samples are drawn"
    seeds = [settings.seed + i for i in range(len(prompts))]
    with run.accelerator.autocast():
        pictures = draw_pictures(
            run.family,
            prompts,
            seeds,
            height=run.height,
            width=run.width,
            steps=settings.steps,
            guidance=settings.guidance,
        )
        shown = tqdm(pictures, total=len(prompts), unit="picture", mininterval=0.5)
        return np.stack([np.asarray(picture.convert("RGB").resize((SIZE, SIZE))) for picture in shown])


def compare(
    names: Sequence[str],
    references: evaluate.Pictures,
    wanted: Sequence[int],
    before: evaluate.Pictures,
    after: evaluate.Pictures,
) -> list[Case]:
    """Which drawings are nearest to the picture of the thing that was asked for.

    Args:
        names, references: of all things, (N). wanted: the numbers of those that were drawn, (M).
        before, after: the drawings, uint8 (M, 64, 64, 3).
    """
    found_before, found_after = evaluate.nearest(before, references), evaluate.nearest(after, references)
    return [
        Case(
            name=names[number],
            truth=Image.fromarray(references[number]),
            before=Image.fromarray(before[i]),
            after=Image.fromarray(after[i]),
            right_before=bool(found_before[i] == number),
            right_after=bool(found_after[i] == number),
        )
        for i, number in enumerate(wanted)
    ]


def judge(new: Sequence[Case], old: Sequence[Case]) -> tuple[Comparison, Comparison]:
    """New and old things, each held against its bar."""
    learned = Comparison(
        f"{len(new)} new things",
        "Left the picture that was taught, then the drawings from the same noise before and after training.",
        new,
        f"at most {percent(NEW_BEFORE)} before, at least {percent(NEW_AFTER)} after",
        reached=False,
    )
    kept = Comparison(
        f"{len(old)} old things",
        "Things that the model knew before, drawn by lot from its 285: were they kept?",
        old,
        f"a fall of at most {percent(OLD_FALL)}",
        reached=False,
    )
    good_new = learned.share_before <= NEW_BEFORE and learned.share_after >= NEW_AFTER
    good_old = kept.share_before - kept.share_after <= OLD_FALL
    return replace(learned, reached=good_new), replace(kept, reached=good_old)


def table(outcome: Outcome) -> str:
    """The result for a person."""
    lines = [f"\nThe tiny BLIP captioned the pictures. {told(outcome.captions)}"]
    lines += [f"\n{'right drawings':<16}{'before':>8}{'after':>8}   expected"]
    for each in (outcome.new, outcome.old):
        word = "reached" if each.reached else "not reached"
        before, after = percent(each.share_before), percent(each.share_after)
        lines.append(f"{each.title:<16}{before:>8}{after:>8}   {each.bar}: {word}")
    lines.append("\n" + "\n".join(f"{seconds:6.1f} s  {name}" for name, seconds in outcome.parts.items()))
    lines.append(f"{sum(outcome.parts.values()):6.1f} s  in all")
    lines.append(f"\nreport: {outcome.report}\nLoRA:   {outcome.lora}")
    lines.append(f'try it: sdtune sample {outcome.report.parent} --prompt "{outcome.new.cases[-1].name}"')
    return "\n".join(lines)
