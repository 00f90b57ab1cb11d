"""From settings to objects: each function reads the part of a recipe that it is named after."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sdtune.adapters import adapter_class
from sdtune.adapters.base import Adapter
from sdtune.config import DataSource, Recipe, resolve_asset
from sdtune.data.sources import Source, load_source
from sdtune.families import family_class
from sdtune.families.base import Family
from sdtune.tasks import AutoencodingTask, DenoisingTask, Task

if TYPE_CHECKING:
    from PIL.Image import Image


def make_family(recipe: Recipe) -> Family:
    """Load the base, or make the networks from their configuration."""
    model, kind = recipe.model, family_class(recipe.model.family)
    options: dict[str, Any] = {"clip_skip": model.clip_skip, "max_tokens": recipe.images.max_tokens}
    if model.from_config is not None:
        parts = {name: resolve_asset(part) if isinstance(part, str) else part for name, part in model.from_config.items()}
        family = kind.from_config(parts, seed=recipe.train.seed, **options)
    else:
        options |= {"vae": resolve_asset(model.vae) if model.vae else None}
        options |= {"variant": model.variant, "revision": model.revision}
        parts_needed = ["vae"] if recipe.task == "autoencoding" else None
        family = kind.load(resolve_asset(str(model.base)), parts=parts_needed, **options)
    if recipe.task == "denoising" and recipe.objective.prediction != "auto":
        family.scheduler["prediction_type"] = recipe.objective.prediction
    return family


def make_adapter(recipe: Recipe) -> Adapter:
    """What learns."""
    settings = recipe.adapter
    if settings.kind == "full":
        return adapter_class("full")()
    return adapter_class(settings.kind)(rank=settings.rank, alpha=settings.alpha, targets=settings.targets)


def learning_networks(recipe: Recipe, family: Family) -> list[str]:
    """Names of the networks that the adapter is attached to."""
    if recipe.task == "autoencoding":
        return ["vae"]
    return [family.denoiser, *(family.text_encoders if recipe.adapter.text_encoder else ())]


def make_task(recipe: Recipe, family: Family) -> Task:
    """What is learned; call it after the adapter is attached."""
    if recipe.task == "autoencoding":
        settings = recipe.reconstruction
        return AutoencodingTask(family, l1=settings.l1, l2=settings.l2, kl=settings.kl)
    return DenoisingTask(family, snr_gamma=recipe.objective.snr_gamma, cache=recipe.train.cache)


def make_source(settings: DataSource) -> Source:
    """Find the pictures of one entry of `data`."""
    return load_source(
        path=resolve_asset(settings.path) if settings.path else None,
        hub=settings.hub,
        split=settings.split,
        image_column=settings.image_column,
        text_column=settings.text_column,
        prompt=settings.prompt,
        role=settings.role,
        repeats=settings.repeats,
        weight=settings.weight,
    )


def class_prompts(settings: DataSource) -> list[str]:
    """What class pictures are drawn of, taken in turn."""
    if settings.prompts is None:
        return [str(settings.prompt)]
    lines = Path(resolve_asset(settings.prompts)).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()]


def draw_class_pictures(recipe: Recipe, settings: DataSource, family: Family) -> None:
    """Let the base draw until the class folder holds `generate` pictures; those that are there stay."""
    from sdtune.data.class_images import fill_class_folder
    from sdtune.sample import draw_pictures

    height, width = picture_size(recipe)
    samples = recipe.validation.samples
    steps, guidance = (samples.steps, samples.guidance) if samples else (25, 7.5)

    def draw(prompts: Sequence[str], numbers: Sequence[int]) -> list["Image"]:
        seeds = [recipe.train.seed * 1_000_003 + number for number in numbers]
        return list(
            draw_pictures(family, prompts, seeds, height=height, width=width, steps=steps, guidance=guidance)
        )

    folder = Path(resolve_asset(str(settings.path)))
    fill_class_folder(folder, class_prompts(settings), int(settings.generate or 0), draw, batch_size=16)


def picture_size(recipe: Recipe) -> tuple[int, int]:
    """Height and width of the training pictures, in pixels."""
    size = recipe.images.resolution
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def save_memory(networks: Sequence[nn.Module]) -> None:
    """Gradient checkpointing: activations are computed again in the backward pass instead of kept."""
    for network in networks:
        if hasattr(network, "enable_gradient_checkpointing"):
            network.enable_gradient_checkpointing()  # diffusers' models
        else:
            network.gradient_checkpointing_enable()  # transformers'
