"""What is special to SDXL and to Stable Diffusion 2.x, in whole runs that stock diffusers then opens."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from sdtune.data.batches import collate
from sdtune.data.images import to_float
from sdtune.local_models import named_models
from sdtune.run import Run
from sdtune.sample import draw_pictures, initial_noise
from tests.factories import SIZE, VAE, make_recipe, make_sd, shake

XL = {"family": "sdxl"}
KINDS = ["full", "lora", "dora"]


def finished(recipe: Any) -> Run:
    run = Run(recipe)
    run.complete()
    return run


def assert_stock_draws_the_same(pipeline: Any, run: Run, *, guidance: float) -> None:
    """A stock pipeline over what was saved, and ours over what was trained."""
    pipeline.set_progress_bar_config(disable=True)
    latents = initial_noise(run.family, [3], SIZE, SIZE)
    theirs = pipeline(["a dog"], latents=latents, num_inference_steps=3, guidance_scale=guidance, output_type="np")
    (ours,) = draw_pictures(run.family, ["a dog"], [3], height=SIZE, width=SIZE, steps=3, guidance=guidance)
    assert np.abs(theirs.images[0] - np.asarray(ours) / 255).max() < 0.02


# --- SDXL -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_both_text_encoders_of_sdxl_learn(sdxl: Path, photos: Path, tmp_path: Path, kind: str) -> None:
    from diffusers import StableDiffusionXLPipeline

    run = Run(
        make_recipe(
            sdxl, photos, tmp_path / "run", model=XL, adapter={"kind": kind, "text_encoder": True},
            optimizer={"lr": 1e-2, "text_encoder_lr": 5e-3},
        )
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in run.parameters.items()}
    assert {name.split(".")[0] for name in before} == {"unet", "text_encoder", "text_encoder_2"}
    run.complete()
    for name, parameter in run.parameters.items():
        if "embed" not in name and "lora_A" not in name:  # most tokens do not come by; A waits for B in the first step
            assert not torch.equal(parameter, before[name]), name
    assert not any("layers.2." in name for name in before if name.startswith("text_encoder."))  # it is not read
    if kind == "full":
        stock = StableDiffusionXLPipeline.from_pretrained(tmp_path / "run/final", add_watermarker=False)
        for name in ("unet", "text_encoder", "text_encoder_2"):
            ours = run.family.modules[name].state_dict()
            assert all(torch.equal(tensor, ours[key]) for key, tensor in getattr(stock, name).state_dict().items())
    else:
        stock = StableDiffusionXLPipeline.from_pretrained(sdxl, add_watermarker=False)
        stock.load_lora_weights(tmp_path / "run/final")
    assert_stock_draws_the_same(stock, run, guidance=5.0)


@pytest.fixture(scope="module")
def other_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE of other weights and another scaling factor than the models'. Do not write into it."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("models") / "other-vae"
    vae = AutoencoderKL(**VAE | {"scaling_factor": 0.5})
    with torch.random.fork_rng():
        torch.manual_seed(9)
        shake(vae)
    vae.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("place", ["folder", "pipeline", "file", "hub", "hub pipeline"])
@pytest.mark.parametrize("family", ["stable-diffusion", "sdxl"])
def test_another_vae_takes_the_place_of_the_bases(
    sd: Path,
    sdxl: Path,
    other_vae: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    place: str,
) -> None:
    from diffusers import AutoencoderKL

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    name: Path | str = other_vae
    scale = 0.5
    if place == "pipeline":
        name = tmp_path / "pipeline"
        shutil.copytree(other_vae, tmp_path / "pipeline" / "vae")
    elif place.startswith("hub"):
        name, cached = "me/mine", tmp_path / "hub" / "models--me--mine"
        commit = "c0ffee" * 6 + "c0ff"  # of 40 digits
        shutil.copytree(other_vae, cached / "snapshots" / commit / ("vae" if "pipeline" in place else ""))
        (cached / "refs").mkdir()
        (cached / "refs/main").write_text(commit)
    elif place == "file":
        name, scale = other_vae / "diffusion_pytorch_model.safetensors", VAE["scaling_factor"]  # as the base has it
    base = sd if family == "stable-diffusion" else sdxl
    model = {"family": family, "vae": str(name)}
    run = finished(make_recipe(base, photos, tmp_path / "run", model=model, adapter={"kind": "full"}))
    pixels = to_float(collate([run.training[0]]).pixels)
    vae = AutoencoderKL.from_pretrained(other_vae)
    with torch.no_grad():
        mean, _ = run.family.encode_images(pixels)
        expected = vae.encode(pixels).latent_dist.mean * scale
    torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5)
    saved = AutoencoderKL.from_pretrained(tmp_path / "run/final/vae")
    assert saved.config.scaling_factor == scale
    assert all(torch.equal(tensor, vae.state_dict()[key]) for key, tensor in saved.state_dict().items())


# --- Stable Diffusion 2.x ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model built as 2.x is: predicts v, linear projections, heads by width. Do not write into it."""
    return make_sd(
        tmp_path_factory.mktemp("models") / "sd2", prediction="v_prediction",
        use_linear_projection=True, attention_head_dim=(2, 4), text={"hidden_act": "gelu"},
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_stable_diffusion_2_learns_v_and_is_drawn_with_by_stock(
    sd2: Path, photos: Path, tmp_path: Path, kind: str
) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    run = Run(
        make_recipe(
            sd2, photos, tmp_path / "run", adapter={"kind": kind, "text_encoder": True}, objective={"snr_gamma": 5.0},
            optimizer={"lr": 1e-2},
        )
    )  # fmt: skip
    batch = collate([run.training[number] for number in range(3)])
    drawn = run.task.draw(batch, 0)
    theirs = DDIMScheduler.from_pretrained(sd2, subfolder="scheduler")
    with torch.no_grad():
        got = run.task.losses(batch, drawn)
        mean, std = run.family.encode_images(to_float(batch.pixels))
        x0 = mean + std * drawn.posterior
        answer = run.family.predict(
            theirs.add_noise(x0, drawn.noise, drawn.t), drawn.t, run.family.encode_text(batch.captions)
        )
        error = (answer - theirs.get_velocity(x0, drawn.noise, drawn.t)).square().mean(dim=(1, 2, 3))
    snr = theirs.alphas_cumprod[drawn.t] / (1 - theirs.alphas_cumprod[drawn.t])
    torch.testing.assert_close(got, error * snr.clamp(max=5.0) / (snr + 1), rtol=1e-4, atol=1e-6)

    run.complete()
    place = tmp_path / "run/final" if kind == "full" else sd2
    stock = StableDiffusionPipeline.from_pretrained(place)
    assert stock.scheduler.config.prediction_type == "v_prediction"
    if kind != "full":
        stock.load_lora_weights(tmp_path / "run/final")
    assert_stock_draws_the_same(stock, run, guidance=7.5)


def test_runs_are_bases_and_vaes_too(sd: Path, photos: Path, tmp_path: Path) -> None:
    vae = {"kind": "full", "decoder_only": True}
    Run(make_recipe(sd, photos, tmp_path / "vae", task="autoencoding", adapter=vae)).complete()
    Run(make_recipe(sd, photos, tmp_path / "full", adapter={"kind": "full"})).complete()
    model = {"base": str(tmp_path / "full"), "vae": str(tmp_path / "vae")}
    recipe = make_recipe(sd, photos, tmp_path / "run", model=model)
    assert all(each.here for each in named_models(recipe))
    run = Run(recipe)
    for part, folder in (("unet", "full/final/unet"), ("vae", "vae/final")):
        kind = type(run.family.modules[part])
        stored = kind.from_pretrained(tmp_path / folder).state_dict()
        own = run.family.modules[part].state_dict()
        kept = [key for key in stored if key in own]  # the LoRA renames its targets
        assert len(kept) > 20 and all(torch.equal(own[key], stored[key]) for key in kept)
