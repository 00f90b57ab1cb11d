"""The card of a model on the Hub: what it is, how to load it in diffusers, what it draws, how it was trained.

    write_card(recipe, "ann/dog", gallery=[("a photo of sks dog", "images/00.png")], ...)

The text stands in `assets/model_card.md`, the head follows https://huggingface.co/docs/hub/model-cards.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdtune.config import Recipe
from sdtune.config.shareable import is_local
from sdtune.config.shipped import ASSET_PREFIX, TINY
from sdtune.model_code import loading_code
from sdtune.report import facts

METHODS = {
    "full": "a full fine-tune",
    "lora": "a LoRA",
    "rslora": "a rank-stabilised LoRA",
    "dora": "a DoRA",
    "lokr": "a LoKr",
    "loha": "a LoHa",
    "textual-inversion": "a textual inversion",
}
FAMILY_TAGS = {"stable-diffusion": "stable-diffusion", "sdxl": "stable-diffusion-xl"}
# Licences of well-known bases; what is trained on one comes under it too.
OPENRAIL, OPENRAIL_PLUS = "creativeml-openrail-m", "openrail++"
LICENCES = {
    TINY: "apache-2.0",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": OPENRAIL,
    "stable-diffusion-v1-5/stable-diffusion-inpainting": OPENRAIL,
    "runwayml/stable-diffusion-v1-5": OPENRAIL,
    "CompVis/stable-diffusion-v1-4": OPENRAIL,
    "stabilityai/stable-diffusion-2": OPENRAIL_PLUS,
    "stabilityai/stable-diffusion-2-base": OPENRAIL_PLUS,
    "stabilityai/stable-diffusion-2-1": OPENRAIL_PLUS,
    "stabilityai/stable-diffusion-2-1-base": OPENRAIL_PLUS,
    "stabilityai/stable-diffusion-2-inpainting": OPENRAIL_PLUS,
    "stabilityai/stable-diffusion-xl-base-1.0": OPENRAIL_PLUS,
    "stabilityai/sd-vae-ft-mse": "mit",
}


def model_card(
    recipe: Recipe,
    repo: str,
    *,
    gallery: Sequence[tuple[str, str]] = (),
    rows: Sequence[Mapping[str, Any]] = (),
    inpaints: bool = False,
    license: str | None = None,
) -> str:
    """The README.md of a model repository.

    Args:
        recipe: of the run, made shareable: what stands in it is shown.
        repo: user/name. gallery: prompts, and where in the repository their pictures are.
        rows: of metrics.jsonl. inpaints: whether the model is one for inpainting.
        license: the Hub's name of the licence; None takes that of the base, where it is known.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "assets"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    triggers = trigger_words(recipe)
    shown = [text for text, _ in gallery]
    learned = [text for text in shown if any(trigger in text for trigger in triggers)]
    prompt = (learned or triggers or shown or ["a photo"])[0]
    code = loading_code(recipe, repo, prompt, inpaints=inpaints)
    facts_of_run = facts(recipe.model_dump(by_alias=True), rows)
    return pages.get_template("model_card.md").render(
        metadata=metadata(recipe, gallery, inpaints, license),
        title=repo.split("/")[1],
        summary=summary(recipe, inpaints),
        triggers=triggers,
        gallery=gallery,
        packages=["diffusers", "transformers", "accelerate", "peft", *(["sdtune"] if "sdtune" in code else [])],
        code=code,
        facts=[(word, cell(value)) for word, value in facts_of_run],
        command=" ".join(["sdtune train run.yaml", *overrides(recipe)]),
        licence=licence_text(recipe, license),
    )


def metadata(
    recipe: Recipe, gallery: Sequence[tuple[str, str]], inpaints: bool, license: str | None = None
) -> str:
    """The head of the card, as YAML that the Hub reads."""
    from huggingface_hub import ModelCardData

    base, triggers = hub_base(recipe), trigger_words(recipe)
    fields: dict[str, Any] = {
        "license": license or licence(recipe),
        "library_name": "diffusers",
        "pipeline_tag": None if recipe.task == "autoencoding" else "image-to-image" if inpaints else drawing(recipe),
        "base_model": base,
        "base_model_relation": base and ("finetune" if recipe.adapter.kind == "full" else "adapter"),
        "instance_prompt": triggers[0] if triggers else None,
        "tags": tags(recipe, inpaints),
        "widget": [{"text": text, "output": {"url": place}} for text, place in gallery] or None,
    }
    return ModelCardData(**fields).to_yaml()


def tags(recipe: Recipe, inpaints: bool) -> list[str]:
    """By which the model is found on the Hub."""
    found = ["diffusers", "diffusers-training", "sdtune", FAMILY_TAGS.get(recipe.model.family, recipe.model.family)]
    if recipe.task == "autoencoding":
        return [*found, "autoencoder"]
    found.append("inpainting" if inpaints else drawing(recipe))
    kind = recipe.adapter.kind
    if kind in ("lora", "rslora", "dora"):
        found += ["lora", "template:sd-lora"]  # the second asks for the page with the gallery
    if kind not in ("lora", "textual-inversion"):
        found.append(kind)
    if recipe.adapter.tokens:
        found.append("textual_inversion")
    if any(source.role == "class" or source.prompt for source in recipe.data):
        found.append("dreambooth")
    return found


def drawing(recipe: Recipe) -> str:
    """What the Hub calls it: from words, the names of classes among them, or from nothing."""
    denoiser = (recipe.model.from_config or {}).get("denoiser")
    asked = not isinstance(denoiser, dict) or denoiser.get("classes")
    return "text-to-image" if asked else "unconditional-image-generation"


def trigger_words(recipe: Recipe) -> list[str]:
    """The tokens that were learned, and the prompts that whole folders of pictures were learned under."""
    tokens = [learned.token for learned in recipe.adapter.tokens or []]
    prompts = [source.prompt for source in recipe.data if source.role == "instance" and source.prompt]
    return list(dict.fromkeys(tokens + prompts))


def summary(recipe: Recipe, inpaints: bool) -> str:
    """What it is, in a sentence or two."""
    base = hub_base(recipe)
    if base is not None:
        origin = f"[{base}](https://huggingface.co/{base})"
    elif recipe.model.base == TINY:
        origin = "the tiny model that comes with sdtune"
    else:
        origin = "a model that is not on the Hub" if recipe.model.base else ""
    if recipe.task == "autoencoding":
        return f"The VAE of {origin}, trained further." if origin else "A VAE, trained from scratch."
    method = METHODS[recipe.adapter.kind]
    what = f"{method[0].upper()}{method[1:]} of {origin}" if origin else "A model trained from scratch"
    return f"{what}. {use(recipe, inpaints)}"


def use(recipe: Recipe, inpaints: bool) -> str:
    """What it is for, in a sentence."""
    denoiser = (recipe.model.from_config or {}).get("denoiser")
    if isinstance(denoiser, dict):  # which is asked for classes, if it has some
        return "It makes pictures of the classes it knows." if denoiser.get("classes") else "It makes pictures."
    return "It fills in the hidden part of a picture from a text." if inpaints else "It makes pictures from text."


def hub_base(recipe: Recipe) -> str | None:
    """The hub id of the base, if it is one."""
    base = recipe.model.base
    return None if base is None or base == TINY or "://" in base or is_local(base) else base


def licence(recipe: Recipe) -> str | None:
    """The Hub's name of the licence; None where it is not known."""
    return LICENCES.get(recipe.model.base or "")


def licence_text(recipe: Recipe, license: str | None = None) -> str:
    """What to know about the use of the weights; `license` is what was chosen."""
    if license:
        return f"`{license}`."
    known, base = licence(recipe), hub_base(recipe)
    if known:
        return f"`{known}`, which is that of the base model."
    origin = f"[{base}](https://huggingface.co/{base})" if base else "the base model"
    return f"That of {origin} binds these weights too." if recipe.model.base else "Not chosen yet."


def overrides(recipe: Recipe) -> list[str]:
    """What someone else says of places that are on this machine alone, and of the pictures."""
    paths = [source.path or TINY for source in recipe.data]
    found = [f"data.{i}.path=FOLDER" for i, path in enumerate(paths) if is_local(path) or path.startswith(ASSET_PREFIX)]
    model = [name for name in ("base", "vae") if is_local(getattr(recipe.model, name) or TINY)]
    return [f"model.{name}=FOLDER" for name in model] + found


def cell(value: str) -> str:
    """A text that can stand in a table."""
    return value.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
