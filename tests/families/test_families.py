"""Families against the stock diffusers pipelines of the same folders."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdtune import building
from sdtune.config import ModelSettings
from sdtune.data.images import to_float
from sdtune.diffusion.schedule import Prediction
from sdtune.errors import UsageError, WeightsError
from sdtune.families import FAMILIES, family_class
from sdtune.families.loading import tokenize
from sdtune.run import Run
from sdtune.tasks import sizes
from tests.factories import make_inpainting, make_photos, make_recipe, make_sd

PROMPTS = ["a photo of dog", "", "dog " * 40]
LONG = "a photo of dog, " * 30  # 150 tokens and more


def open_one(name: str, folder: Path, **options: Any) -> Any:
    return family_class(name).load(str(folder), **options)


@pytest.fixture(scope="module")
def stock_sd(sd: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(sd)


@pytest.fixture(scope="module")
def stock_sdxl(sdxl: Path) -> Any:
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(sdxl, add_watermarker=False)


@pytest.mark.parametrize("clip_skip", [0, 1, 2])
@torch.no_grad()
def test_sd_text_is_that_of_the_stock_pipeline(sd: Path, stock_sd: Any, clip_skip: int) -> None:
    family = open_one("stable-diffusion", sd, clip_skip=clip_skip)
    # Diffusers 0.42 looks for the last norm where transformers 4 had it.
    stock_sd.text_encoder.text_model = SimpleNamespace(final_layer_norm=stock_sd.text_encoder.final_layer_norm)
    expected, empty = stock_sd.encode_prompt(PROMPTS, "cpu", 1, True, clip_skip=clip_skip or None)
    torch.testing.assert_close(family.encode_text(PROMPTS).text, expected)
    if not clip_skip:  # (the stock pipeline does not skip layers of the negative prompt)
        torch.testing.assert_close(family.encode_text([""] * 3).text, empty)


@pytest.mark.parametrize("clip_skip", [0, 1])
@torch.no_grad()
def test_sdxl_text_is_that_of_the_stock_pipeline(sdxl: Path, stock_sdxl: Any, clip_skip: int) -> None:
    family = open_one("sdxl", sdxl, clip_skip=clip_skip)
    prompts = [PROMPTS[0], PROMPTS[2]]
    text, empty, pooled, empty_pooled = stock_sdxl.encode_prompt(prompts, device="cpu", clip_skip=clip_skip or None)
    ours, nothing = family.encode_text(prompts), family.encode_text(["", ""])
    torch.testing.assert_close(ours.text, text)
    torch.testing.assert_close(ours.pooled, pooled)
    # What captions dropped in training mean is what guidance leads away from: zeros.
    torch.testing.assert_close(nothing.text, empty)
    torch.testing.assert_close(nothing.pooled, empty_pooled)
    assert not empty.any()


@torch.no_grad()
def test_long_prompts_are_encoded_in_chunks(sd: Path) -> None:
    short, family = open_one("stable-diffusion", sd), open_one("stable-diffusion", sd, max_tokens=150)
    text = family.encode_text([LONG, "a photo of dog"]).text
    assert text.shape == (2, 154, 32)
    torch.testing.assert_close(text[:, :77], short.encode_text([LONG, "a photo of dog"]).text)
    torch.testing.assert_close(text[1:, 77:], short.encode_text([""]).text)
    (chunks,) = tokenize(family.tokenizers["tokenizer"], [LONG], 150)
    (whole,) = family.tokenizers["tokenizer"]([LONG], add_special_tokens=False)["input_ids"]
    assert chunks[0][1:-1] + chunks[1][1:-1] == whole[:150]
    assert all(len(chunk) == 77 for chunk in chunks)


@pytest.mark.parametrize("name", ["stable-diffusion", "sdxl"])
@torch.no_grad()
def test_latents_go_there_and_back_as_in_the_stock_pipeline(name: str, request: pytest.FixtureRequest) -> None:
    folder, stock = ("sd", "stock_sd") if name == "stable-diffusion" else ("sdxl", "stock_sdxl")
    family, pipeline = open_one(name, request.getfixturevalue(folder)), request.getfixturevalue(stock)
    pixels = to_float(torch.randint(0, 256, (2, 3, 64, 48), dtype=torch.uint8))
    mean, std = family.encode_images(pixels)
    assert mean.shape == std.shape == (2, *family.latent_shape(64, 48)) == (2, 4, 32, 24)
    posterior = pipeline.vae.encode(pixels).latent_dist
    torch.testing.assert_close(mean, posterior.mean * 0.9)
    torch.testing.assert_close(std, posterior.std * 0.9)
    torch.testing.assert_close(
        family.decode_images(mean), pipeline.vae.decode(mean / 0.9).sample
    )  # as the pipeline does


def test_sdxl_latents_may_have_a_mean_and_deviation_for_each_channel(sdxl: Path) -> None:
    family = open_one("sdxl", sdxl)
    family.modules["vae"].register_to_config(latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[0.5, 1.0, 2.0, 4.0])
    pixels = to_float(torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8))
    with torch.no_grad():
        mean, _ = family.encode_images(pixels)
        z = family.modules["vae"].encode(pixels).latent_dist.mean
        # what StableDiffusionXLPipeline does before it decodes
        std = torch.tensor([0.5, 1.0, 2.0, 4.0]).view(1, 4, 1, 1)
        back = mean * std / 0.9 + torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)
    torch.testing.assert_close(back, z)


def test_sdxl_is_told_the_real_sizes(sdxl: Path, tmp_path: Path, stock_sdxl: Any) -> None:
    photos = make_photos(tmp_path / "photos", 2, size=(200, 100))
    data = [{"path": str(photos)}]
    recipe = make_recipe(
        sdxl,
        "",
        tmp_path / "run",
        model={"family": "sdxl"},
        data=data,
        images={"resolution": [64, 72], "crop": "random"},
    )
    run = Run(recipe)
    seen: list[torch.Tensor] = []
    unet = run.family.modules["unet"]
    unet.register_forward_pre_hook(
        lambda _, args, kw: seen.append(kw["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    run.complete()
    assert len(seen) == 2
    for ids in torch.cat(seen).tolist():
        left = int(ids[3])
        assert ids == [100, 200, 0, left, 64, 72] and 0 <= left <= 56  # resized to 64 x 128
    assert len({ids[3] for ids in torch.cat(seen).tolist()}) > 1


@torch.no_grad()
def test_sdxl_predicts_as_stock(sdxl: Path, stock_sdxl: Any) -> None:
    family = open_one("sdxl", sdxl)
    x_t, t = torch.randn(2, 4, 32, 32), torch.tensor([10, 700])
    rows = [(100, 200, 0, 3, 64, 64), (64, 64, 0, 0, 64, 64)]
    conditioning = family.with_sizes(family.encode_text(["a photo", "dog"]), rows)
    added = {"text_embeds": conditioning.pooled, "time_ids": torch.tensor(rows)}
    expected = stock_sdxl.unet(x_t, t, conditioning.text, added_cond_kwargs=added).sample
    torch.testing.assert_close(family.predict(x_t, t, conditioning), expected, atol=1e-5, rtol=1e-5)


def test_prediction_may_be_overridden_and_is_saved(sd: Path, photos: Path, tmp_path: Path) -> None:
    recipe = make_recipe(
        sd, photos, tmp_path / "run", objective={"prediction": "v_prediction"}, adapter={"kind": "full"}
    )
    run = Run(recipe)
    assert run.task.schedule.prediction is Prediction.V
    run.complete()
    saved = json.loads((run.folder.final / "scheduler" / "scheduler_config.json").read_text())
    assert saved["prediction_type"] == "v_prediction" and saved["_class_name"] == "DDIMScheduler"


def test_from_scratch_is_a_pure_function_of_configuration_and_seed(sd: Path) -> None:
    parts: dict[str, Any] = {name: str(sd) for name in ("vae", "tokenizer")}
    for name in ("unet", "text_encoder"):
        config = json.loads((sd / name / "config.json").read_text())
        parts[name] = {key: value for key, value in config.items() if not key.startswith("_")}
    parts["text_encoder"] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    parts["unet"]["sample_size"] = None
    parts["scheduler"] = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    model = ModelSettings(from_config=parts)
    one, same = (building.open_family(model, seed=3, size=(64, 48)) for _ in range(2))
    other = building.open_family(model, seed=4, size=(64, 48))
    for name in ("unet", "text_encoder"):
        first = next(iter(one.modules[name].parameters()))
        assert torch.equal(first, next(iter(same.modules[name].parameters())))
        assert not torch.equal(first, next(iter(other.modules[name].parameters())))
    assert one.picture_size() == (64, 48)
    assert one.modules["text_encoder"].config.vocab_size == len(one.tokenizers["tokenizer"])
    for key, tensor in open_one("stable-diffusion", sd).modules["vae"].state_dict().items():
        assert torch.equal(one.modules["vae"].state_dict()[key], tensor)


def test_parts_that_do_not_fit_together_are_refused(sd: Path, sdxl: Path, tmp_path: Path) -> None:
    wide = make_sd(tmp_path / "wide", cross_attention_dim=48)
    with pytest.raises(WeightsError, match="reads text of width 48, the text encoder gives 32"):
        open_one("stable-diffusion", wide)
    editing = make_sd(tmp_path / "editing", in_channels=8)
    with pytest.raises(WeightsError, match=r"takes 8 channels and answers 4.*for inpainting, a UNet that takes 9\)"):
        open_one("stable-diffusion", editing)


@pytest.fixture(scope="module")
def inpainting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Stable Diffusion for inpainting, as the Hub has them."""
    return make_inpainting(tmp_path_factory.mktemp("models") / "inpainting")


def test_inpainting_bases_are_opened_and_saved_as_what_they_are(inpainting: Path, sd: Path, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    family = open_one("stable-diffusion", inpainting)
    assert family.inpaints and not open_one("stable-diffusion", sd).inpaints
    family.save(tmp_path / "saved")
    stock = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert type(stock).__name__ == "StableDiffusionInpaintPipeline" and stock.unet.config.in_channels == 9
    assert stock.safety_checker is None
    own = family.modules["unet"].state_dict()
    assert all(torch.equal(tensor, own[key]) for key, tensor in stock.unet.state_dict().items())
    open_one("stable-diffusion", tmp_path / "saved")


def test_a_plain_model_under_the_inpainting_pipeline_is_plain(sd: Path, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(sd, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionInpaintPipeline"}))
    family = open_one("stable-diffusion", folder)
    assert not family.inpaints
    assert type(family.pipeline()).__name__ == "StableDiffusionPipeline"


def test_the_vae_of_an_inpainting_base_trains(inpainting: Path) -> None:
    model = ModelSettings(base=str(inpainting))
    assert list(building.open_family(model, parts=["vae"]).modules) == ["vae"]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_family_is_not_is_said(name: str, tmp_path: Path, sd: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(sd, folder)
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    opens = family_class(name).pipeline_names[0]
    with pytest.raises(WeightsError, match=f"is a FluxPipeline; this family opens {opens}"):
        open_one(name, folder)


def test_half_precision_files_are_half_as_large_and_opened_in_full(sd: Path, tmp_path: Path) -> None:
    family = open_one("stable-diffusion", sd)
    family.save(tmp_path / "half", dtype="float16")
    assert all(network.dtype == torch.float32 for network in family.modules.values())
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        sizes_of = [(folder / part / f"{name}.safetensors").stat().st_size for folder in (tmp_path / "half", sd)]
        assert sizes_of[0] < 0.6 * sizes_of[1]
    again = open_one("stable-diffusion", tmp_path / "half")
    assert all(network.dtype == torch.float32 for network in again.modules.values())


def test_frozen_weights_are_halved_and_those_that_learn_are_not(sd: Path) -> None:
    network = open_one("stable-diffusion", sd).modules["unet"]
    network.conv_out.requires_grad_(True)
    before = network.conv_out.weight
    building.move(network, torch.device("cpu"), torch.bfloat16)
    assert network.conv_out.weight is before and before.dtype == torch.float32
    assert network.conv_in.weight.dtype == torch.bfloat16 and network.dtype == torch.bfloat16
    building.move(network, torch.device("cpu"), None)
    assert network.conv_in.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("clip_skip", [3, 7])
def test_more_layers_cannot_be_skipped_than_there_are(sd: Path, clip_skip: int) -> None:
    with pytest.raises(UsageError, match=f"model.clip_skip: got {clip_skip}, but the text encoder has 3 layers"):
        open_one("stable-diffusion", sd, clip_skip=clip_skip)


def test_time_ids_of_a_batch(sd: Path, photos: Path, tmp_path: Path) -> None:
    from sdtune.data.batches import collate

    run = Run(make_recipe(sd, photos, tmp_path / "run"))
    assert sizes(collate([run.training[0]])) == [(64, 64, 0, 0, 64, 64)]
