"""Class pictures of a recipe: what is drawn, how, and by which model."""

from collections.abc import Sequence
from pathlib import Path

from PIL.Image import Image
from tqdm import tqdm

from sdtune import building
from sdtune.config import DataSource, Drawing, Recipe, resolve_asset
from sdtune.data.class_images import fill_class_folder
from sdtune.families.base import Family
from sdtune.sample import draw_pictures


def class_prompts(settings: DataSource) -> list[str]:
    """What class pictures are drawn of, taken in turn."""
    if settings.prompts is None:
        return [str(settings.prompt)]
    lines = Path(resolve_asset(settings.prompts)).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()]


def draw_class_pictures(recipe: Recipe, settings: DataSource, family: Family) -> None:
    """Let the base draw until the class folder holds `generate` pictures; those that are there stay."""
    height, width = building.picture_size(recipe)
    drawing = settings.drawing or Drawing()
    steps, guidance, count = drawing.steps, drawing.guidance, int(settings.generate or 0)
    model = recipe.model.model_dump(exclude_none=True, exclude_defaults=True)
    made_by = {"model": model, "size": [height, width], "seed": recipe.train.seed, **drawing.model_dump()}

    def draw(prompts: Sequence[str], numbers: Sequence[int]) -> list[Image]:
        seeds = [recipe.train.seed * 1_000_003 + number for number in numbers]
        return list(draw_pictures(family, prompts, seeds, height=height, width=width, steps=steps, guidance=guidance))

    with tqdm(total=count, desc="class pictures", unit="picture", delay=1) as bar:

        def show(there: int, _: int) -> None:
            bar.update(there - bar.n)

        folder = Path(resolve_asset(str(settings.path)))
        key = f"data.{recipe.data.index(settings)}"
        fill_class_folder(folder, class_prompts(settings), count, draw, 16, show, made_by=made_by, key=key)
