"""What the optimizers and the other savers of memory demand of a recipe and of this machine."""

from collections.abc import Iterator
from importlib.machinery import PathFinder

from sdtune.config.messages import Fault
from sdtune.config.recipe import Recipe

# The package and module of an optimizer that does not come along.
LIBRARIES = {
    "adamw8bit": "bitsandbytes",
    "lion8bit": "bitsandbytes",
    "prodigy": "prodigyopt",
    "schedulefree": "schedulefree",
}
NOT_READ_BY = {"lion8bit": ("optimizer.eps",), "adafactor": ("optimizer.betas", "optimizer.eps")}
SMALLEST_PRODIGY_RATE = 0.1


def is_installed(module: str) -> bool:
    """Whether a top-level module could be imported, though it be left out for now (`libraries.leave_out`)."""
    return PathFinder.find_spec(module) is not None


def needs_bitsandbytes(recipe: Recipe) -> bool:
    """Whether a run will import it."""
    return recipe.model.quantize is not None or LIBRARIES.get(recipe.optimizer.name) == "bitsandbytes"


def unread_by_optimizer(recipe: Recipe) -> dict[str, str]:
    """See `checks.unused_keys`."""
    name = recipe.optimizer.name
    return dict.fromkeys(NOT_READ_BY.get(name, ()), f"{name} has no such setting; remove it")


def saving_memory(recipe: Recipe) -> Iterator[Fault]:
    """All faults of these settings."""
    for check in (_optimizer, _quantized, _attention):
        yield from check(recipe)


def _optimizer(recipe: Recipe) -> Iterator[Fault]:
    settings = recipe.optimizer
    library = LIBRARIES.get(settings.name)
    if library and not is_installed(library):
        yield "optimizer.name", f"{settings.name} needs {library}, which is not installed: pip install {library}"
    if settings.name == "prodigy":
        yield from _prodigy(recipe)
    if settings.name == "schedulefree":
        if settings.schedule != "constant":
            what = f"got {settings.schedule}, but schedulefree averages instead of lowering the rate; expected constant"
            yield "optimizer.schedule", what
        if recipe.train.ema is not None:
            yield "train.ema", "schedulefree averages the weights itself; remove train.ema, or take another optimizer"


def _quantized(recipe: Recipe) -> Iterator[Fault]:
    kind = recipe.model.quantize
    if kind is None:
        return
    if not is_installed("bitsandbytes"):
        yield "model.quantize", f"{kind} needs bitsandbytes, which is not installed: pip install bitsandbytes"
    if recipe.adapter.kind == "full":
        what = f"got {kind}, but with adapter.kind: full all weights learn, and those of few bits cannot"
        yield "model.quantize", f"{what}; remove it, or take adapter.kind=lora"


def _attention(recipe: Recipe) -> Iterator[Fault]:
    if recipe.train.attention != "xformers":
        return
    instead = "or set train.attention=sdpa, which saves as much"
    if not is_installed("xformers"):
        yield "train.attention", f"xformers is not installed: pip install xformers, {instead}"
    import torch

    if not torch.cuda.is_available():
        yield "train.attention", f"xformers has kernels for NVIDIA GPUs only, and this machine has none; {instead[3:]}"


def _prodigy(recipe: Recipe) -> Iterator[Fault]:
    settings = recipe.optimizer
    if settings.lr < SMALLEST_PRODIGY_RATE:
        expected = "expected about 1.0: prodigy finds the rate itself, and lr multiplies it"
        yield "optimizer.lr", f"got {settings.lr:g}, {expected}; set optimizer.lr=1.0"
    for key in ("text_encoder_lr", "token_lr"):
        rate = getattr(settings, key, None)
        if rate not in (None, settings.lr):
            why = "prodigy finds one rate for all that learns; remove it, or take another optimizer"
            yield f"optimizer.{key}", f"got {rate:g}, and optimizer.lr is {settings.lr:g}: {why}"
