"""Samplers by name: each draws what stock diffusers draws with that scheduler, or is refused."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from sdtune import evaluate
from sdtune.config.files import check
from sdtune.config.shipped import resolve_asset
from sdtune.diffusion import draws
from sdtune.errors import UsageError
from sdtune.families import SAMPLERS
from sdtune.families.schedulers import make_sampler
from sdtune.families.sdxl import StableDiffusionXL
from sdtune.families.stable_diffusion import StableDiffusion
from sdtune.run import Run
from sdtune.sample import draw_pictures, initial_noise
from tests.factories import make_recipe

SD15 = {
    "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip
OF_DIFFUSERS = [name for name, config in SAMPLERS.items() if config["_class_name"] != "ScoreSampler"]


def pictures(family: Any, sampler: str | None, **options: Any) -> np.ndarray:
    options = {"height": 32, "width": 32, "steps": 2, "guidance": 1.0} | options
    return np.stack([np.asarray(x) for x in draw_pictures(family, ["a dog"] * 2, [1, 2], sampler=sampler, **options)])


@pytest.mark.parametrize("name", OF_DIFFUSERS)
def test_each_draws_what_diffusers_draws_with_it(name: str, sd: Path) -> None:
    family = StableDiffusion.load(str(sd))
    family.scheduler = dict(SD15)
    options = {key: value for key, value in SAMPLERS[name].items() if key != "_class_name"}
    pipeline: Any = family.pipeline()
    kind = getattr(diffusers, SAMPLERS[name]["_class_name"])
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **options, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    (ours,) = draw_pictures(family, ["a dog"], [3], height=32, width=32, steps=3, sampler=name)
    theirs = pipeline(
        "a dog", latents=initial_noise(family, [3], 32, 32), generator=draws.generator(3, "sampler noise"),
        num_inference_steps=3, height=32, width=32,
    ).images[0]  # fmt: skip
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max() <= 1


@pytest.mark.parametrize("name", ["ddpm", "dpm-solver++-sde", "euler-ancestral"])  # those that add noise
def test_a_picture_is_the_same_whatever_stands_beside(name: str, sd: Path) -> None:
    family = StableDiffusion.load(str(sd))
    together, alone = pictures(family, name), pictures(family, name, batch_size=1)
    assert np.abs(together.astype(int) - alone).max() <= 1


def test_sdxl_draws_with_another_sampler(sdxl: Path) -> None:
    family = StableDiffusionXL.load(str(sdxl))
    assert (pictures(family, "dpm-solver++") != pictures(family, "euler-ancestral")).any()


@pytest.mark.parametrize("name", ["dpm-solver++", "euler"])
def test_the_tiny_base_draws_the_right_things_with_each(name: str) -> None:
    """Its betas and its v prediction are kept, or nothing could be seen."""
    names, truths = evaluate.load_thumbnails()
    family = StableDiffusion.load(resolve_asset("tiny"))
    wanted = [40, 80]
    drawn = draw_pictures(
        family, [names[i] for i in wanted], wanted, height=64, width=64, steps=10, guidance=2.0, sampler=name
    )
    assert evaluate.nearest(np.stack([np.asarray(picture) for picture in drawn]), truths).tolist() == wanted


def test_the_models_schedule_is_kept() -> None:
    own = make_sampler(SD15)
    for name in OF_DIFFUSERS:
        sampler = make_sampler(SD15 | {"prediction_type": "v_prediction"}, name)
        assert sampler.config.prediction_type == "v_prediction"
        assert torch.equal(sampler.betas, own.betas)


def test_what_a_sampler_cannot_draw_is_refused_with_those_that_can() -> None:
    x0, zero_snr = SD15 | {"prediction_type": "sample"}, SD15 | {"rescale_betas_zero_snr": True}
    with pytest.raises(UsageError, match="'euler-ancestral' cannot draw .* predicts sample; expected one of "):
        make_sampler(x0, "euler-ancestral")
    with pytest.raises(UsageError, match="predicts epsilon and whose noisiest latents are nothing but.*ddim.*euler"):
        make_sampler(zero_snr, "deis")
    with pytest.raises(UsageError, match="'heun' cannot draw with this model, which predicts v_prediction and whose"):
        make_sampler(StableDiffusion.load(resolve_asset("tiny"), parts=["scheduler"]).scheduler, "heun")
    for config in (x0, zero_snr):
        make_sampler(config, "ddim")
    for config, name, others in (
        (SD15, "probability-flow", "ddpm, .*, heun$"),
        ({"prediction_type": "ve_score"}, "ddim", "euler-maruyama, predictor-corrector, probability-flow$"),
    ):
        with pytest.raises(UsageError, match=f"'{name}' cannot draw with this model, .*; expected one of {others}"):
            make_sampler(config, name)
    with pytest.raises(UsageError, match="'ddimm' is not known; did you mean 'ddim'"):
        make_sampler(SD15, "ddimm")
    with pytest.raises(UsageError, match="'karras' is not known; known here: ddpm, ddim, .*, heun"):
        make_sampler(SD15, "karras")


def test_a_recipe_names_one_for_its_samples() -> None:
    values: dict[str, Any] = {
        "model": {"base": "tiny"}, "data": [{"path": "assets:demo"}], "optimizer": {"lr": 1e-4},
        "train": {"steps": 1}, "output": {"dir": "run", "trackers": []},
        "validate": {"samples": {"prompts": ["a dog"], "sampler": "eulr"}},
    }  # fmt: skip
    faults = dict(check(values)[1])
    assert faults["validate.samples.sampler"].endswith("did you mean 'euler'?")
    values["validate"]["samples"]["sampler"] = "euler"
    assert check(values)[1] == []


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm-solver++", "dpm-solver++-sde", "unipc", "deis"])
def test_dynamic_thresholding_is_the_papers(name: str) -> None:
    """A network that answers x0: what it says is clipped to the quantile of its absolute values, and divided by it."""
    sampler = make_sampler(SD15 | {"prediction_type": "sample"}, name, dynamic_thresholding=0.9)
    x0 = 3 * torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    s = x0.abs().flatten(1).quantile(0.9, dim=1).clamp(min=1).view(-1, 1, 1, 1)
    assert s.min() > 1
    sampler.set_timesteps(1)
    step = sampler.step(x0, sampler.timesteps[0], torch.zeros_like(x0))
    found = getattr(step, "pred_original_sample", step.prev_sample)  # the last step of the others is x0
    assert torch.allclose(found, x0.clamp(-s, s) / s, atol=0.05)


def test_samplers_without_thresholding_are_refused() -> None:
    with pytest.raises(UsageError, match="EulerDiscreteScheduler has none; name a sampler that has: ddpm, ddim, dpm-"):
        make_sampler(SD15, "euler", dynamic_thresholding=0.995)


def test_a_run_draws_its_samples_with_the_one_named(sd: Path, photos: Path, tmp_path: Path) -> None:
    samples = {"prompts": ["a dog"], "steps": 3, "guidance": 1.0, "sampler": "euler-ancestral"}
    recipe = make_recipe(sd, photos, tmp_path / "run", validate={"samples": samples}, train={"steps": 1})
    Run(recipe).complete()
    folder = tmp_path / "run/samples/step-000000"
    assert json.loads((folder / "prompts.json").read_text())["sampler"] == "euler-ancestral"
    options = {"height": 64, "width": 64, "steps": 3, "guidance": 1.0, "sampler": "euler-ancestral"}
    (expected,) = draw_pictures(StableDiffusion.load(str(sd)), ["a dog"], [0], **options)  # type: ignore[arg-type]
    with Image.open(folder / "00.png") as drawn:
        assert np.abs(np.asarray(drawn).astype(int) - np.asarray(expected)).max() <= 1
