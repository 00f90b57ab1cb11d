"""Class pictures of a recipe: what is drawn, how, and by which model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image
from tqdm import tqdm

from sdtune import building
from sdtune.config import DataSource, Drawing, Recipe, resolve_asset
from sdtune.data.class_images import ClassFolder, fill_class_folder, look_into
from sdtune.families.base import Family
from sdtune.sample import draw_pictures


def class_prompts(settings: DataSource) -> list[str]:
    """What class pictures are drawn of, taken in turn."""
    if settings.prompts is None:
        return [str(settings.prompt)]
    lines = Path(resolve_asset(settings.prompts)).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()]


def look_into_class_folder(recipe: Recipe, settings: DataSource) -> ClassFolder:
    """What is there of an entry's class pictures, and what the run would draw. Raises DataError as the run would."""
    return look_into(**_wanted(recipe, settings))


def _wanted(recipe: Recipe, settings: DataSource) -> dict[str, Any]:
    """What a class folder shall hold, as `fill_class_folder` takes it."""
    drawing = settings.drawing or Drawing()
    model = recipe.model.model_dump(exclude_none=True, exclude_defaults=True)
    size = list(building.picture_size(recipe))
    return {
        "folder": Path(resolve_asset(str(settings.path))),
        "prompts": class_prompts(settings),
        "count": int(settings.generate or 0),
        "made_by": {"model": model, "size": size, "seed": recipe.train.seed, **drawing.model_dump()},
        "key": f"data.{recipe.data.index(settings)}",
        "without": building.other_folders(recipe, settings),
    }


def draw_class_pictures(recipe: Recipe, settings: DataSource, family: Family) -> None:
    """Let the base draw until the class folder holds `generate` pictures; those that are there stay."""
    height, width = building.picture_size(recipe)
    drawing, wanted = settings.drawing or Drawing(), _wanted(recipe, settings)
    steps, guidance = drawing.steps, drawing.guidance

    def draw(prompts: Sequence[str], numbers: Sequence[int]) -> list[Image]:
        seeds = [recipe.train.seed * 1_000_003 + number for number in numbers]
        return list(draw_pictures(family, prompts, seeds, height=height, width=width, steps=steps, guidance=guidance))

    with tqdm(total=wanted["count"], desc="class pictures", unit="picture", delay=1) as bar:

        def show(there: int, _: int) -> None:
            bar.update(there - bar.n)

        fill_class_folder(draw=draw, batch_size=16, progress=show, **wanted)
