"""Every shipped recipe is run, for two small steps; small random models stand where it names a large one."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sdtune import building
from sdtune.config import DataSource, Recipe, load, resolve_asset
from sdtune.data.metadata import read_rows, write_rows
from sdtune.families.inpainting import masked_channels
from sdtune.opening import open_model
from sdtune.run import Run
from tests.factories import (
    VAE,
    losses,
    make_bert,
    make_inpainting,
    make_photos,
    make_sd,
    make_sdxl,
    make_tokenizer,
    text_config,
)

ROOT = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(ROOT.rglob("*.yaml"))
SMALL = {
    "images.resolution": 64,
    "optimizer.warmup": 0,
    "train.steps": 2,
    "train.batch_size": 1,
    "train.accumulate": 1,
    "train.precision": "fp32",
    "output.dir": "run",
}


def make_base(folder: Path, recipe: Recipe) -> Path:
    """A small random model of the recipe's family, with files of the variant that it asks for."""
    from diffusers import DiffusionPipeline

    if not folder.exists():
        if "inpainting" in str(recipe.model.base):
            make_inpainting(folder, recipe.model.family)
        elif recipe.model.family == "sdxl":
            make_sdxl(folder)
        else:
            make_sd(folder, prediction="v_prediction" if "2-1" in str(recipe.model.base) else "epsilon")
        if recipe.model.variant:
            pipeline = DiffusionPipeline.from_pretrained(folder)
            for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
                for file in (folder / part).glob("*.safetensors"):
                    file.unlink()
            pipeline.save_pretrained(folder, variant=recipe.model.variant)
    return folder


def make_part(folder: Path, part: str, latents: int) -> None:
    """What a part of `from_config` names by its place: a text encoder, a tokenizer, the VAE of the recipe before."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    if part == "vae":
        made = [load(path) for path in RECIPES if path.stem.endswith("_vae")]
        before = [recipe.model.from_config for recipe in made if Path(recipe.output.dir) in folder.parents]
        own = before[0]["vae"] if before and before[0] else VAE | {"latent_channels": latents}
        AutoencoderKL(**own).save_pretrained(folder)  # type: ignore[arg-type]
    elif re.search("bert|minilm", str(folder)):
        make_bert(folder)
    elif part == "text_encoder":
        CLIPTextModel(text_config(make_tokenizer())).save_pretrained(folder)
    else:
        make_tokenizer().save_pretrained(folder)


def latents_of(recipe: Recipe) -> int:
    """Channels of the latents that the recipe's UNet takes."""
    unet = (recipe.model.from_config or {}).get("unet", {})
    return unet.get("in_channels", 4) if isinstance(unet, dict) else 4


def make_source(source: DataSource, masks: bool, classes: Sequence[str] = ()) -> None:
    """A folder of pictures where the recipe's own is not here. (Class pictures are for the base to draw.)"""
    assert source.path is not None
    place = Path(resolve_asset(source.path))
    there = any(file.is_file() for folder in (place, place / source.split) for file in folder.glob("*"))
    if not source.generate and not there:
        folder = make_photos(place / source.split, 3)
        if classes:
            write_rows(folder, [{**row, "text": classes[0]} for row in read_rows(folder)])
        if masks:
            Image.linear_gradient("L").resize((64, 64)).save(folder / "mask.png")
            write_rows(folder, [{**row, "mask_file_name": "mask.png"} for row in read_rows(folder)])


def classes_of(recipe: Recipe) -> Sequence[str]:
    """The only captions that the recipe's model knows; empty where it reads any."""
    denoiser = (recipe.model.from_config or {}).get("denoiser", {})
    return denoiser.get("classes", ()) if isinstance(denoiser, dict) else ()


def small(path: Path) -> Recipe:
    """A recipe with all that it names put in the current folder, cut down to two steps of one picture."""
    recipe, changes = load(path), dict[str, Any](SMALL)
    if recipe.model.family == "pixel":
        del changes["images.resolution"]  # the network is made for its own
    if recipe.model.base and not Path(resolve_asset(recipe.model.base)).exists():
        changes["model.base"] = make_base(Path("base"), recipe)
    if recipe.model.vae:
        changes["model.vae"] = make_sd(Path("vae"))
    if recipe.adapter.denoiser_from:
        changes |= {"adapter.text_encoder_until": 1, "adapter.denoiser_from": 1}
    for part, value in (recipe.model.from_config or {}).items():
        if isinstance(value, str):
            make_part(Path(value), part, latents_of(recipe))
        elif max(widths := value.get("block_out_channels", [0])) > 256:
            changes[f"model.from_config.{part}.block_out_channels"] = [32 for _ in widths]
    if recipe.train.compile:
        changes["train.compile"] = False  # it takes minutes; tests/test_compile.py has it
    for number, source in enumerate(recipe.data):
        make_source(source, recipe.objective.outside_mask is not None, classes_of(recipe))
        if source.generate:
            changes |= {f"data.{number}.generate": 2, f"data.{number}.drawing.steps": 2}
    if recipe.validation.samples and recipe.task == "autoencoding":
        changes["validate.samples.count"] = 1
    elif recipe.validation.samples:
        word = " ".join(token.token for token in recipe.adapter.tokens or [])
        prompt = next(iter(classes_of(recipe)), f"a dog {word}")
        changes |= {"validate.samples.prompts": f"['{prompt}']", "validate.samples.steps": 2}
    return load(path, [f"{key}={value}" for key, value in changes.items()])


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem.startswith("cars")], ids=lambda path: path.stem)
def test_stanford_cars_as_they_are_downloaded_are_taken(path: Path, workplace: Path) -> None:
    """A folder of 00001.jpg, 00002.jpg ... and nothing beside them."""
    Path("cars").mkdir()
    Image.new("RGB", (80, 60)).save("cars/00001.jpg")
    recipe = load(path, ["data.0.path=cars"])
    source = building.make_source(recipe, recipe.data[0])
    assert [picture.captions for picture in source.pictures] == [("",)]


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 40


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_runs(path: Path, workplace: Path) -> None:
    run = Run(small(path))
    before = {name: tensor.detach().clone() for name, tensor in run.parameters.items()}
    run.complete()
    assert len(losses(run.folder.path)) == 2 and torch.tensor(losses(run.folder.path)).isfinite().all()
    still = [name for name, tensor in run.parameters.items() if torch.equal(tensor, before[name])]
    assert not still, f"{len(still)} of {len(before)} did not learn"
    if run.recipe.validation.samples:
        assert len(list((run.folder.path / "samples").rglob("*.png"))) == 2  # before and after
    with run.averaged():
        assert_opens(run)


@torch.no_grad()
def assert_opens(run: Run) -> None:
    """What was written computes what the run's own networks do."""
    from diffusers import AutoencoderKL

    if run.recipe.task == "autoencoding":
        saved, own = AutoencoderKL.from_pretrained(run.folder.final).state_dict(), run.family.modules["vae"]
        assert all(torch.equal(saved.pop(key), tensor) for key, tensor in own.state_dict().items()) and not saved
        return
    if run.recipe.model.quantize:  # it is opened with its base as it was
        return
    opened, answers = open_model(str(run.folder.path), device=torch.device("cpu")), []
    channels, height, width = run.family.latent_shape(64, 64)
    if run.family.inpaints:
        channels = masked_channels(channels)
    x_t = torch.randn(1, channels, height, width)
    t = torch.tensor([run.family.schedule.time(0.5)])
    prompt = next(iter(classes_of(run.recipe)), "a dog")
    for family in (run.family, opened):
        for network in family.modules.values():
            network.eval()
        conditioning = family.with_sizes(family.encode_text([prompt]), [(64, 64, 0, 0, 64, 64)])
        answers.append(family.predict(x_t, t, conditioning))
    torch.testing.assert_close(*answers, atol=1e-5, rtol=1e-4)
