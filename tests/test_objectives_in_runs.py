"""The settings of `objective` in whole runs: what is drawn, what is saved, what is refused."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdtune import building
from sdtune.config.files import check
from sdtune.data.batches import Batch, collate
from sdtune.diffusion import draws
from sdtune.diffusion.objectives import Objective, pool_mask
from sdtune.errors import UsageError
from sdtune.opening import open_model
from sdtune.run import Run
from sdtune.tasks import DenoisingTask
from tests.factories import make_recipe, make_sd, make_sdxl

Sections = dict[str, Any]


@pytest.fixture(scope="module")
def v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model that predicts v, with the sampler of Stable Diffusion 1.5. Do not write into it."""
    folder = make_sd(tmp_path_factory.mktemp("models") / "v", prediction="v_prediction")
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("DDIMScheduler", "PNDMScheduler"))
    return folder


def finished(recipe: Any) -> Run:
    run = Run(recipe)
    run.complete()
    return run


def faults(objective: Sections, **sections: Any) -> str:
    values: Mapping[str, Any] = {
        "model": {"base": "tiny"}, "data": [{"path": "assets:demo"}], "optimizer": {"lr": 1e-4},
        "train": {"steps": 1}, "output": {"dir": "run", "trackers": []}, "objective": objective,
    }  # fmt: skip
    return "; ".join(f"{key}: {what}" for key, what in check({**values, **sections})[1])


def first_batch(run: Run) -> Batch:
    return collate([run.training[number] for number in range(3)])


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_offset_noise_and_perturbation_are_drawn_for_each_sample_and_channel(sd: Path, photos: Path, tmp_path: Path):
    run = Run(make_recipe(sd, photos, tmp_path / "run"))
    batch = first_batch(run)
    plain = DenoisingTask(run.family).draw(batch, seed=3)
    task = DenoisingTask(run.family, objective=Objective(offset_noise=0.2, input_perturbation=0.1))
    drawn = task.draw(batch, seed=3)
    assert plain.noise is not None and drawn.noise is not None and drawn.shown is not None and plain.shown is None
    levels = (drawn.noise - plain.noise) / 0.2  # (B, C, h, w)
    one = levels[:, :, :1, :1]
    torch.testing.assert_close(levels, one.expand_as(levels), rtol=0, atol=1e-5)
    assert len(set(one.flatten().tolist())) == one.numel()  # no two samples or channels share theirs
    expected = draws.normal((4, 1, 1), 3, "offset noise", 1, 0)  # sample 1, an instance picture
    torch.testing.assert_close(one[1], expected, rtol=0, atol=1e-5)
    more = (drawn.shown - drawn.noise) / 0.1
    assert abs(more.mean()) < 0.1 and abs(more.std() - 1) < 0.1 and not torch.equal(more[0], more[1])

    half = task.draw(collate([run.training[1], run.training[2]]), seed=3)  # whatever stands beside a sample
    assert half.shown is not None and torch.equal(half.shown, drawn.shown[1:])
    held_out = task.draw_fixed(batch, seed=3, total=3)
    assert held_out.shown is None  # perturbation is for training, not for measuring


def test_held_out_pictures_have_timesteps_spread_evenly_in_no_order(sd: Path, photos: Path, tmp_path: Path) -> None:
    run = Run(make_recipe(sd, photos, tmp_path / "run"))
    batch = first_batch(run)
    drawn = [run.task.draw_fixed(replace(batch, numbers=[i, i + 1]), seed=3, total=40).t for i in range(0, 40, 2)]
    found = torch.cat([t for t in drawn if t is not None])
    assert found.sort().values.tolist() == list(range(12, 1000, 25))
    assert torch.corrcoef(torch.stack([found.float(), torch.arange(40.0)]))[0, 1].abs() < 0.5


def test_the_network_sees_the_perturbed_noise_and_is_asked_for_the_other(sd: Path, photos: Path, tmp_path: Path):
    run = Run(make_recipe(sd, photos, tmp_path / "run", train={"cache": False}))
    task = DenoisingTask(run.family, objective=Objective(offset_noise=0.2, input_perturbation=0.1), cache=False)
    batch = first_batch(run)
    drawn = task.draw(batch, seed=0)
    assert drawn.noise is not None and drawn.shown is not None and drawn.t is not None
    with torch.no_grad():
        got = task.losses(batch, drawn)
        mean, std = task.encode_images(batch)
        x0, alpha_bar = mean + std * drawn.posterior, run.family.schedule.alpha_bar[drawn.t].view(-1, 1, 1, 1)
        x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * drawn.shown
        answer = run.family.predict(x_t, drawn.t, run.family.encode_text(batch.captions))
    torch.testing.assert_close(got, (answer - drawn.noise).square().mean(dim=(1, 2, 3)))


def test_masks_weigh_the_loss_at_the_size_of_latents(sd: Path, photos: Path, tmp_path: Path):
    run = Run(make_recipe(sd, photos, tmp_path / "run"))
    masks = torch.zeros(3, 1, 64, 64, dtype=torch.uint8)
    masks[1, :, :31, 9:] = 255
    masks[2] = 255
    batch = replace(first_batch(run), masks=masks)
    objective = Objective(outside_mask=0.1)
    task, plain = DenoisingTask(run.family, objective=objective), DenoisingTask(run.family)
    drawn = task.draw(batch, seed=0)
    assert drawn.noise is not None and drawn.t is not None
    with torch.no_grad():
        got, without = task.losses(batch, drawn), plain.losses(batch, drawn)
        mean, std = task.encode_images(batch)
        x_t = run.family.schedule.add_noise(mean + std * drawn.posterior, drawn.noise, drawn.t)
        error = (run.family.predict(x_t, drawn.t, run.family.encode_text(batch.captions)) - drawn.noise).square()
    assert got[2] == without[2]
    torch.testing.assert_close(got[0], without[0])  # nothing inside: the rest counts alike
    weight = (0.1 + 0.9 * pool_mask(masks, 32, 32)).expand_as(error)[1]
    torch.testing.assert_close(got[1], (weight * error[1]).sum() / weight.sum())
    assert abs(got[1] - without[1]) > 1e-4


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective",
    [
        {"loss": "l1", "offset_noise": 0.1, "debiased": True},
        {"loss": "huber", "huber_delta": 0.2, "input_perturbation": 0.1, "snr_gamma": 5.0},
    ],
    ids=["l1", "huber"],
)
def test_a_run_takes_every_setting(sd: Path, photos: Path, tmp_path: Path, objective: Sections):
    run = finished(make_recipe(sd, photos, tmp_path / "run", objective=objective))
    assert run.task.objective == Objective(**objective)
    assert building.make_objective(make_recipe(sd, photos, tmp_path / "run"), run.family) == Objective()


@pytest.mark.parametrize("adapter", [{"kind": "full"}, {"kind": "lora"}], ids=["full", "lora"])
@pytest.mark.parametrize("prediction", ["auto", "sample"])
def test_zero_terminal_snr_changes_training_sampling_and_what_is_saved(
    v: Path, photos: Path, tmp_path: Path, adapter: Sections, prediction: str
):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    objective = {"zero_terminal_snr": True, "prediction": prediction}
    run = finished(
        make_recipe(
            v, photos, tmp_path / "run", adapter=adapter, objective=objective,
            validate={"samples": {"prompts": ["a dog"], "steps": 2}},
        )
    )  # fmt: skip
    assert run.task.schedule.alpha_bar[-1] == 0
    reopened = open_model(str(tmp_path / "run"), device=torch.device("cpu"), precision="fp32")
    assert reopened.schedule.alpha_bar[-1] == 0
    told = "v_prediction" if prediction == "auto" else "sample"
    for sampler in (run.family.sampler(), reopened.sampler()):
        assert isinstance(sampler, DDIMScheduler) and sampler.alphas_cumprod[-1] == 0
        assert (sampler.config.timestep_spacing, sampler.config.prediction_type) == ("trailing", told)
    if adapter["kind"] == "full":
        saved = json.loads((tmp_path / "run/final/scheduler/scheduler_config.json").read_text())
        assert saved["rescale_betas_zero_snr"] and saved["timestep_spacing"] == "trailing"
        pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "run/final")
        pipeline.set_progress_bar_config(disable=True)
        pipeline("a dog", num_inference_steps=2, output_type="np")


def test_x0_is_predicted_and_drawn_with(sd: Path, photos: Path, tmp_path: Path):
    run = finished(make_recipe(sd, photos, tmp_path / "run", objective={"prediction": "sample"}))
    assert run.family.sampler().config.prediction_type == "sample"
    picture = {"prompts": ["a dog"], "steps": 2}
    finished(
        make_recipe(sd, photos, tmp_path / "drawn", objective={"prediction": "sample"}, validate={"samples": picture})
    )


# --- what is refused --------------------------------------------------------------------------------------------------


def test_settings_that_exclude_each_other_are_refused():
    assert "objective.debiased: got snr_gamma too" in faults({"debiased": True, "snr_gamma": 5.0})
    assert "objective.zero_terminal_snr: epsilon says nothing" in faults(
        {"zero_terminal_snr": True, "prediction": "epsilon"}
    )
    assert "objective.huber_delta: is read by objective.loss: huber only" in faults({"huber_delta": 0.2})
    assert "objective.outside_mask: got 1.5" in faults({"outside_mask": 1.5})
    assert not faults({"debiased": True, "outside_mask": 0.0, "loss": "huber", "huber_delta": 0.2})


@pytest.mark.parametrize("family", ["stable-diffusion", "sdxl"])
def test_zero_terminal_snr_is_refused_where_the_model_predicts_epsilon(
    sd: Path, photos: Path, tmp_path: Path, family: str
):
    base = sd if family == "stable-diffusion" else make_sdxl(tmp_path / "sdxl")
    recipe = make_recipe(
        base, photos, tmp_path / "run", model={"family": family}, objective={"zero_terminal_snr": True}
    )
    with pytest.raises(UsageError, match="predicts epsilon.*objective.prediction=v_prediction"):
        Run(recipe)
    assert not (tmp_path / "run").exists()
