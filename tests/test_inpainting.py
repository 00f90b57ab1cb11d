"""Inpainting: what is hidden, what the UNet is given, and that what was trained opens in stock pipelines."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdtune import building, sample
from sdtune.config import ModelSettings
from sdtune.config.files import check
from sdtune.data.batches import Batch, collate
from sdtune.data.images import to_float
from sdtune.data.random_masks import EVERYTHING, random_mask
from sdtune.errors import DataError, UsageError
from sdtune.export import export, find_source
from sdtune.families.inpainting import hidden_and_rest
from sdtune.run import Run
from tests.factories import SIZE, losses, make_inpainting, make_photos, make_recipe

FAMILIES = ["stable-diffusion", "sdxl"]
PIPELINES = {"stable-diffusion": "StableDiffusionInpaintPipeline", "sdxl": "StableDiffusionXLInpaintPipeline"}
FULL = {"kind": "full"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small random inpainting model of each family. Do not write into them."""
    folder = tmp_path_factory.mktemp("models")
    return {family: make_inpainting(folder / family, family) for family in FAMILIES}


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    """Four pictures; all but the last have a mask, white in the left part of the picture."""
    photos = make_photos(tmp_path / "masked", 4)
    rows = [json.loads(line) for line in (photos / "metadata.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows[:3]):
        mask = np.zeros((SIZE, SIZE), np.uint8)
        mask[:, : 16 * (i + 1)] = 255
        Image.fromarray(mask).save(photos / f"mask-{i}.png")
        row["mask_file_name"] = f"mask-{i}.png"
    (photos / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return photos


def finished(recipe: Any, resume: bool = False) -> Run:
    run = Run(recipe, resume=resume)
    run.complete()
    return run


def first_batch(run: Run, count: int = 3) -> Batch:
    return collate([run.training[number] for number in range(count)])


def stock(family: str, base: Path) -> Any:
    import diffusers

    pipeline = getattr(diffusers, PIPELINES[family]).from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def paint(pipeline: Any, photos: Path) -> Any:
    """A picture painted by a stock pipeline, given as its users give it."""
    mask = Image.new("L", (SIZE, SIZE))
    mask.paste(255, (16, 16, 48, 48))
    return pipeline(
        prompt="a dog", image=Image.open(photos / "1.png"), mask_image=mask, height=SIZE, width=SIZE,
        num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np",
    ).images  # fmt: skip


# --- what is hidden ---------------------------------------------------------------------------------------------------


def test_random_masks_are_pure_and_of_three_kinds() -> None:
    masks = torch.stack([random_mask(48, 64, 0, "mask", number) for number in range(200)])
    assert masks.shape == (200, 1, 48, 64) and masks.dtype == torch.uint8
    assert set(masks.unique().tolist()) == {0, 255}
    assert torch.equal(masks[7], random_mask(48, 64, 0, "mask", 7))
    assert not torch.equal(masks[7], random_mask(48, 64, 1, "mask", 7))
    assert len({mask.numpy().tobytes() for mask in masks}) > 100
    shares = masks.float().mean(dim=(1, 2, 3)) / 255
    everything = (shares == 1).float().mean().item()
    assert abs(everything - EVERYTHING) < 0.08
    rest = shares[shares < 1]
    assert (rest > 0).all() and 0.1 < rest.mean() < 0.6  # neither specks nor everything
    runs = [(mask[0].int().diff(dim=1) != 0).any(dim=1).float().mean() for mask in masks]
    assert len({round(float(each), 2) for each in runs}) > 10  # of many shapes


@pytest.mark.parametrize("family", FAMILIES)
def test_the_unet_is_given_what_the_stock_pipeline_prepares(bases: dict[str, Path], family: str, photos: Path) -> None:
    ours = building.open_family(ModelSettings(base=str(bases[family]), family=family))
    theirs = stock(family, bases[family])
    picture = Image.open(photos / "1.png").convert("RGB")
    mask = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE), np.uint8))
    image = theirs.image_processor.preprocess(picture, SIZE, SIZE)
    condition = theirs.mask_processor.preprocess(mask, SIZE, SIZE)
    small, rest = theirs.prepare_mask_latents(
        condition,
        image * (condition < 0.5),
        1,
        SIZE,
        SIZE,
        torch.float32,
        "cpu",
        torch.Generator().manual_seed(3),
        False,
    )

    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    masks = torch.from_numpy(np.array(mask))[None, None]
    posterior = torch.randn(rest.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        beside = hidden_and_rest(ours, to_float(pixels), masks, posterior)
    assert torch.equal(beside[:, :1], small)
    torch.testing.assert_close(beside[:, 1:], rest, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_noise_mask_and_rest(
    bases: dict[str, Path], family: str, photos: Path, tmp_path: Path
) -> None:
    run = Run(make_recipe(bases[family], photos, tmp_path / "run", model={"family": family}))
    batch = first_batch(run)
    drawn = run.task.draw(batch, 0)
    assert torch.equal(drawn.hidden[2], random_mask(SIZE, SIZE, 0, "mask", 2, 0))
    assert not torch.equal(drawn.rest, drawn.posterior)
    model = run.family
    with torch.no_grad():
        got = run.task.losses(batch, drawn)
        mean, std = model.encode_images(to_float(batch.pixels))
        x_t = model.schedule.add_noise(mean + std * drawn.posterior, drawn.noise, drawn.t)
        words = model.with_sizes(model.encode_text(batch.captions), [(*size, SIZE, SIZE) for size in batch.sizes])
        beside = hidden_and_rest(model, to_float(batch.pixels), drawn.hidden, drawn.rest)
        plain = replace(words, beside=None)
        answer = model.predict(torch.cat([x_t, beside], dim=1), drawn.t, plain)  # all nine channels by hand
    torch.testing.assert_close(got, (answer - drawn.noise).square().mean(dim=(1, 2, 3)))


def test_given_masks_are_what_is_hidden(bases: dict[str, Path], masked: Path, tmp_path: Path) -> None:
    base = bases["stable-diffusion"]
    recipe = make_recipe(base, masked, tmp_path / "run", images={"masks": "given", "flip": True, "crop": "random"})
    run = Run(recipe)
    batch = first_batch(run, 8)
    hidden = run.task.draw(batch, 0).hidden
    assert torch.equal(hidden, batch.masks)
    shares = {round(float(mask.float().mean()) / 255, 2) for mask in hidden}
    assert shares == {0.25, 0.5, 0.75, 1.0}  # without a mask of its own everything
    run.complete()


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [FULL, {"kind": "lora", "targets": "all"}], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_trained_opens_in_the_stock_inpainting_pipeline(
    bases: dict[str, Path], photos: Path, tmp_path: Path, family: str, adapter: dict[str, Any]
) -> None:
    run = finished(
        make_recipe(
            bases[family], photos, tmp_path / "run", model={"family": family}, adapter=adapter,
            optimizer={"lr": 0.01}, validate={"fraction": 0.2, "samples": {"prompts": ["a dog", "a cat"], "steps": 2}},
        )
    )  # fmt: skip
    before = paint(stock(family, bases[family]), photos)
    if adapter == FULL:
        pipeline = stock(family, tmp_path / "run/final")
        for key, tensor in pipeline.unet.state_dict().items():
            assert torch.equal(tensor, run.family.modules["unet"].state_dict()[key])
    else:
        pipeline = stock(family, bases[family])
        pipeline.load_lora_weights(tmp_path / "run/final")
    after = paint(pipeline, photos)
    assert np.isfinite(after).all() and not np.allclose(after, before)
    assert len(list((tmp_path / "run/samples/step-000002").glob("*.png"))) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_of_an_inpainting_model_goes_into_its_base(
    bases: dict[str, Path], family: str, photos: Path, tmp_path: Path
) -> None:
    import diffusers

    base = bases[family]
    adapter = {"rank": 4, "alpha": 8.0, "targets": "attention"}
    recipe = make_recipe(
        base, photos, tmp_path / "run", model={"family": family}, adapter=adapter, optimizer={"lr": 3e-2}
    )
    finished(recipe)
    source = find_source(recipe.output.dir)
    export(source, "diffusers", tmp_path / "lora")
    export(source, "merged", tmp_path / "merged")
    export(source, "single-file", tmp_path / "one.safetensors")
    beside = stock(family, base)
    plain = paint(beside, photos)
    beside.load_lora_weights(tmp_path / "lora")
    expected = paint(beside, photos)
    assert np.abs(expected - plain).max() > 1e-2
    one = getattr(diffusers, PIPELINES[family]).from_single_file(tmp_path / "one.safetensors", config=str(base))
    one.set_progress_bar_config(disable=True)
    for pipeline in (stock(family, tmp_path / "merged"), one):
        np.testing.assert_allclose(paint(pipeline, photos), expected, atol=2e-3)


def test_accumulation_and_caching_hide_the_same(bases: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    base = bases["stable-diffusion"]
    ways = {"whole": {"batch_size": 2}, "parts": {"batch_size": 1, "accumulate": 2}, "fresh": {"cache": False}}
    got = [
        losses(finished(make_recipe(base, photos, tmp_path / name, train=way)).folder.path)
        for name, way in ways.items()
    ]
    assert got[1] == pytest.approx(got[0], abs=1e-5) and got[2] == pytest.approx(got[0], abs=1e-5)


def test_samples_show_the_picture_where_it_is_not_hidden(bases: dict[str, Path], masked: Path, tmp_path: Path) -> None:
    """The stock pipeline, given the latents of what is shown, answers as `draw_pictures`."""
    base = bases["stable-diffusion"]
    recipe = make_recipe(base, masked, tmp_path / "run", images={"masks": "given"})
    run = Run(recipe)
    pixels, masks = building.make_shown(recipe, run.sources, 3)
    assert pixels.shape == (3, 3, SIZE, SIZE) and masks.shape == (3, 1, SIZE, SIZE)
    options: dict[str, Any] = {"height": SIZE, "width": SIZE, "steps": 2}
    shown = list(sample.draw_pictures(run.family, ["a dog"] * 3, [0, 1, 2], **options, shown=(pixels, masks)))
    alone = list(sample.draw_pictures(run.family, ["a dog"], [1], **options, shown=(pixels[1:2], masks[1:2])))
    blind = list(sample.draw_pictures(run.family, ["a dog"], [1], **options))
    assert np.abs(np.asarray(shown[1]).astype(int) - np.asarray(alone[0])).max() <= 1
    assert not np.array_equal(np.asarray(blind[0]), np.asarray(alone[0]))

    random = building.make_shown(make_recipe(base, masked, tmp_path / "other"), run.sources, 2)[1]
    assert random[0, 0, 20, 20] == 255 and random[0, 0, 0, 0] == 0 and random.float().mean() == 255 / 4


def test_an_inpainting_model_draws_from_text_alone(bases: dict[str, Path], tmp_path: Path) -> None:
    assert sample.command(str(bases["stable-diffusion"]), ["a dog"], steps=2, out=tmp_path / "pictures") == 0
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1


# --- from a base of text to image -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_of_text_to_image_becomes_one_for_inpainting(
    sd: Path, sdxl: Path, photos: Path, tmp_path: Path, family: str
) -> None:
    base = sd if family == "stable-diffusion" else sdxl
    model = {"family": family, "inpaint": True}
    run = Run(make_recipe(base, photos, tmp_path / "run", model=model, adapter=FULL))
    plain = building.open_family(ModelSettings(base=str(base), family=family))
    batch = first_batch(run)
    drawn = run.task.draw(batch, 0)
    words = plain.with_sizes(plain.encode_text(batch.captions), [(*size, SIZE, SIZE) for size in batch.sizes])
    beside = torch.randn(3, 5, 32, 32)
    with torch.no_grad():
        before = plain.predict(drawn.noise, drawn.t, words)
        after = run.family.predict(drawn.noise, drawn.t, replace(words, beside=beside))
    torch.testing.assert_close(after, before)
    run.complete()
    assert run.family.modules["unet"].conv_in.weight[:, 4:].abs().sum(dim=(0, 2, 3)).min() > 0
    pipeline = stock(family, tmp_path / "run/final")
    assert pipeline.unet.config.in_channels == 9
    assert json.loads((tmp_path / "run/final/model_index.json").read_text())["_class_name"] == PIPELINES[family]
    paint(pipeline, photos)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_masks_that_nobody_reads_or_that_are_not_there_are_refused(
    bases: dict[str, Path], sd: Path, photos: Path, tmp_path: Path
) -> None:
    base = bases["stable-diffusion"]
    with pytest.raises(UsageError, match="images.masks says what an inpainting model does not see.*model.inpaint=true"):
        Run(make_recipe(sd, photos, tmp_path / "run", images={"masks": "random"}))
    with pytest.raises(DataError, match="images.masks is set, and no picture has a mask.*mask_file_name"):
        Run(make_recipe(base, photos, tmp_path / "run", images={"masks": "given"}))
    with pytest.raises(DataError, match="objective.outside_mask is set, and no picture has a mask"):
        Run(make_recipe(sd, photos, tmp_path / "run", objective={"outside_mask": 0.1}))
    assert not (tmp_path / "run").exists()
    values: dict[str, Any] = {
        "model": {"base": "tiny", "inpaint": True}, "data": [{"path": "assets:demo"}], "optimizer": {"lr": 1e-4},
        "train": {"steps": 1}, "output": {"dir": "run", "trackers": []},
    }  # fmt: skip
    assert [key for key, _ in check(values)[1]] == ["model.inpaint"]
    assert not check(values | {"adapter": FULL})[1]


def test_the_masked_loss_runs_on_given_masks(sd: Path, masked: Path, tmp_path: Path) -> None:
    plain = finished(make_recipe(sd, masked, tmp_path / "plain"))
    inside = finished(make_recipe(sd, masked, tmp_path / "inside", objective={"outside_mask": 0.0}))
    assert losses(plain.folder.path) != losses(inside.folder.path)
    whole = shutil.copytree(masked, tmp_path / "whole")
    for file in whole.glob("mask-*.png"):
        Image.new("L", (SIZE, SIZE), 255).save(file)
    everything = finished(make_recipe(sd, whole, tmp_path / "everything", objective={"outside_mask": 0.0}))
    assert losses(everything.folder.path) == losses(plain.folder.path)


def test_a_base_whose_latents_no_inpainting_pipeline_takes_is_refused() -> None:
    with pytest.raises(UsageError, match="latents of this base have 16 channels.*take latents of 4"):
        building.open_family(ModelSettings(base="tiny", inpaint=True), size=(64, 64))
