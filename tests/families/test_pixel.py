"""Family `pixel`: ranges, classes, files, and whole runs under both kinds of schedules."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdtune import checking, estimate
from sdtune.config import dump
from sdtune.config.files import check
from sdtune.data.metadata import write_rows
from sdtune.diffusion.schedule import Prediction
from sdtune.errors import DataError, HubError, UsageError, WeightsError
from sdtune.families.pixel import Pixel
from sdtune.families.schedulers import adjusted
from sdtune.model_code import loading_code
from sdtune.opening import open_model
from sdtune.run import Run
from sdtune.sample import draw_pictures
from tests.factories import losses, make_recipe, weights

CPU = torch.device("cpu")
SCORE = {"prediction_type": "ve_score", "sigma": 25.0}
SMALL = {"kind": "score_concat", "size": 28, "channels": 1, "widths": [8, 8, 16, 16], "embedding": 16}


def make_digits(folder: Path, count: int = 6) -> Path:
    """Grey pictures of 28 px with a bright square each, called "0" and "1" in turn."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(count):
        pixels = np.zeros((28, 28), dtype=np.uint8)
        pixels[4 + number : 14 + number, 6:20] = 255 - number
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": str(number % 2)})
    write_rows(folder, rows)
    return folder


def make_family(scheduler: dict[str, Any] = SCORE, **denoiser: Any) -> Pixel:
    return Pixel.from_config({"denoiser": SMALL | denoiser, "scheduler": scheduler}, seed=0)


def pixel_recipe(tmp_path: Path, scheduler: dict[str, Any] = SCORE, **sections: Any) -> Any:
    if not (tmp_path / "digits").exists():
        make_digits(tmp_path / "digits")
    denoiser = SMALL | sections.pop("denoiser", {})
    model = {"family": "pixel", "from_config": {"denoiser": denoiser, "scheduler": scheduler}}
    common: dict[str, Any] = {"adapter": {"kind": "full"}, "images": {"resolution": 28}}
    return make_recipe("", tmp_path / "digits", tmp_path / "run", model=model, **common | sections)


# --- pictures and classes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheduler", "lowest"), [(SCORE, 0.0), ({"prediction_type": "epsilon"}, -1.0)])
def test_pictures_become_grey_in_the_schedules_range_and_come_back(scheduler: dict[str, Any], lowest: float) -> None:
    family = make_family(scheduler)
    pixels = torch.tensor([-1.0, 0.0, 1.0]).view(1, 1, 1, 3).expand(1, 3, 1, 3)
    mean, std = family.encode_images(pixels)
    torch.testing.assert_close(mean, torch.tensor([[[[lowest, (lowest + 1) / 2, 1.0]]]]))
    assert mean.shape == (1, *family.latent_shape(1, 3)) and not std.any()
    torch.testing.assert_close(family.decode_images(mean), pixels)


def test_colours_are_kept_where_the_network_has_channels_for_them() -> None:
    pixels = torch.rand(2, 3, 28, 28) * 2 - 1
    family = make_family(channels=3)
    torch.testing.assert_close(family.decode_images(family.encode_images(pixels)[0]), pixels)


def test_captions_are_class_numbers_and_an_unknown_one_is_refused() -> None:
    family = make_family(classes=["t-shirt", "ankle boot"])
    assert family.encode_text(["ankle boot", "", "t-shirt"]).text.tolist() == [1, 2, 0]
    with pytest.raises(UsageError, match="'boot' is no class of this model; expected one of t-shirt, ankle boot"):
        family.encode_text(["boot"])
    assert make_family().encode_text(["anything", ""]).text.tolist() == [0, 0]  # an unconditional one reads none


# --- files ------------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_opened_again(tmp_path: Path) -> None:
    family = make_family(classes=["a", "b"])
    family.save(tmp_path / "model")
    opened = open_model(str(tmp_path / "model"), device=CPU)
    assert isinstance(opened, Pixel) and opened.scheduler == family.scheduler and opened.classes == ("a", "b")
    x_t, t, asked = torch.randn(2, 1, 28, 28), torch.rand(2), family.encode_text(["a", ""])
    torch.testing.assert_close(opened.predict(x_t, t, asked), family.predict(x_t, t, asked))
    again = Pixel.from_config({"denoiser": str(tmp_path / "model"), "scheduler": SCORE}, seed=1)
    torch.testing.assert_close(again.predict(x_t, t, asked), family.predict(x_t, t, asked))


def test_rounded_weights_leave_the_frequencies_as_they_were(tmp_path: Path) -> None:
    family = make_family()
    family.save(tmp_path / "model", dtype="bfloat16")
    saved = weights(tmp_path / "model")
    frequencies = saved.pop("denoiser/diffusion_pytorch_model.safetensors:features.frequencies")
    assert torch.equal(frequencies, family.modules["denoiser"].features.frequencies)
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


def test_what_the_objective_predicts_brings_its_sampler() -> None:
    discrete, score = make_family({"prediction_type": "epsilon"}).scheduler, make_family().scheduler
    assert adjusted(discrete, "ve_score")["_class_name"] == "ScoreSampler"
    assert adjusted(score, "v_prediction")["_class_name"] == "DDIMScheduler"
    assert adjusted(score | {"method": "euler-maruyama"}, "ve_score")["method"] == "euler-maruyama"
    with pytest.raises(UsageError, match="objective.zero_terminal_snr: the model predicts ve_score.*; remove it"):
        adjusted(score, zero_terminal_snr=True)


def test_faults_are_told(tmp_path: Path, sd: Path) -> None:
    with pytest.raises(WeightsError, match="got 'unett', expected one of score_concat, score_add"):
        make_family(kind="unett")
    with pytest.raises(WeightsError, match="model.from_config.denoiser.width: unknown key; did you mean 'widths'?"):
        make_family(width=8)
    with pytest.raises(WeightsError, match="scheduler.sgima: unknown key; did you mean 'sigma'?"):
        make_family({"sgima": 25.0})
    with pytest.raises(WeightsError, match="denoiser.channels: got 2, expected 1 .grey. or 3"):
        make_family(channels=2)
    with pytest.raises(WeightsError, match="is a StableDiffusionPipeline; this family opens PixelPipeline"):
        Pixel.load(str(sd))
    with pytest.raises(WeightsError, match="method = 'heun'; expected one of euler-maruyama, predictor"):
        make_family(SCORE | {"method": "heun"}).sampler()
    for parts in ({"denoiser": "me/mine", "scheduler": SCORE}, {"denoiser": SMALL, "scheduler": "me/mine"}):
        with pytest.raises(HubError, match="'me/mine' is no folder here, is not in this machine's cache"):
            Pixel.from_config(parts, seed=0)
    with pytest.raises(UsageError, match="model.clip_skip: a model of family pixel has nothing that it is for"):
        Pixel.from_config({"denoiser": SMALL, "scheduler": SCORE}, seed=0, clip_skip=1)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["euler-maruyama", "predictor-corrector", "probability-flow"])
def test_a_picture_is_the_same_whatever_is_drawn_beside_it(sampler: str) -> None:
    family = make_family()
    options: dict[str, Any] = {"height": 28, "width": 28, "steps": 4, "sampler": sampler}
    (alone,) = draw_pictures(family, [""], [5], **options)
    _, beside = draw_pictures(family, ["", ""], [4, 5], **options)
    assert np.abs(np.asarray(beside, dtype=int) - np.asarray(alone, dtype=int)).max() <= 1


@pytest.mark.parametrize("prediction", ["ve_score", "epsilon", "v_prediction", "sample"])
def test_a_run_learns_is_opened_and_draws(tmp_path: Path, prediction: str) -> None:
    scheduler = {"prediction_type": prediction, "num_train_timesteps": 50}
    recipe = pixel_recipe(
        tmp_path,
        scheduler,
        denoiser={"classes": ["0", "1"]},
        images={"resolution": 28, "caption_dropout": 0.3},
        train={"steps": 4, "batch_size": 3, "ema": 0.9, "precision": "bf16"},
        validate={"fraction": 0.2, "samples": {"prompts": ["1", ""], "steps": 3, "guidance": 2.0}},
    )
    run = Run(recipe)
    assert run.family.schedule.prediction is Prediction(prediction)
    run.complete()
    assert len(losses(run.folder.path)) == 4 and np.isfinite(losses(run.folder.path)).all()
    assert len(list((run.folder.path / "samples").rglob("*.png"))) == 4
    family = open_model(str(run.folder.path), device=CPU)
    assert family.picture_size() == (28, 28)
    first, again = (list(draw_pictures(family, ["0"], [5], height=28, width=28, steps=4)) for _ in range(2))
    assert first[0].size == (28, 28) and np.array_equal(first[0], again[0])


def test_another_size_than_the_network_would_draw_is_refused(tmp_path: Path) -> None:
    recipe = pixel_recipe(tmp_path, images={"resolution": 32})
    with pytest.raises(UsageError, match="got 32 x 32, .* 28 x 28 .*model.from_config.denoiser.size"):
        Run(recipe)
    assert not Path(recipe.output.dir).exists()


def test_it_learns(tmp_path: Path) -> None:
    recipe = pixel_recipe(tmp_path, optimizer={"lr": 5e-3}, train={"steps": 60, "batch_size": 16})
    run = Run(recipe)
    run.complete()
    found = losses(run.folder.path)
    assert np.mean(found[-10:]) < 700 < found[0]  # 784 is what an answer of 0 costs


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    def recipe(out: str, steps: int) -> Any:
        return pixel_recipe(
            tmp_path,
            train={"steps": steps, "batch_size": 2},
            output={"dir": str(tmp_path / out), "checkpoint_every": 2, "trackers": []},
        )

    Run(recipe("whole", 4)).complete()
    Run(recipe("halves", 2)).complete()
    Run(recipe("halves", 4), resume=True).complete()
    assert losses(tmp_path / "whole") == losses(tmp_path / "halves")


def test_settings_of_other_losses_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"objective.snr_gamma: the model predicts ve_score, .* remove objective"):
        Run(pixel_recipe(tmp_path, objective={"snr_gamma": 5.0}))


def test_gradient_checkpointing_is_refused_where_there_is_nothing_for_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="train.gradient_checkpointing: ScoreConcat is too small to have it; remove"):
        Run(pixel_recipe(tmp_path, train={"gradient_checkpointing": True}))


def test_pictures_too_small_for_the_network_are_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="images.resolution: got 24 x 28, .* expected sides of 25 or more"):
        Run(pixel_recipe(tmp_path, images={"resolution": [24, 28]}))
    assert not (tmp_path / "run").exists()


def test_captions_that_are_no_classes_are_refused_before_the_run(tmp_path: Path) -> None:
    recipe = pixel_recipe(tmp_path, denoiser={"classes": ["0", "2"]})
    with pytest.raises(DataError, match="3 of 6 captions are no class of the model, the first is '1'; it knows 0, 2"):
        Run(recipe)
    assert not (tmp_path / "run").exists()


def test_a_check_knows_what_it_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = pixel_recipe(tmp_path, train={"steps": 10, "batch_size": 2}, output={"checkpoint_every": 5})
    (tmp_path / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
    assert checking.command(str(tmp_path / "recipe.yaml"), as_json=True) == 0
    known = json.loads(capsys.readouterr().out)
    assert known["cached_latents_bytes"] == 0 and 0 < known["seconds"] < 60
    network = estimate.make_empty(recipe, estimate.network_config(recipe) or {})
    assert estimate.sample_flops(recipe, network) > 0
    assert known["memory_bytes"] == 16 * sum(p.numel() for p in network.parameters())  # weights, gradients, two means


@pytest.mark.parametrize(("resolution", "family"), [(28, "pixel"), (28, "stable-diffusion"), (4, "pixel")])
def test_sides_are_multiples_of_what_the_family_asks_for(tmp_path: Path, resolution: int, family: str) -> None:
    values = {
        "model": {"base": "tiny", "family": family},
        "data": [{"path": "assets:demo"}],
        "images": {"resolution": resolution},
        "optimizer": {"lr": 1e-4},
        "train": {"steps": 1},
        "output": {"dir": "run", "trackers": []},
    }
    faults = dict(check(values)[1])
    expected = {(28, "pixel"): None, (28, "stable-diffusion"): "multiple of 8", (4, "pixel"): "at least 8"}
    assert (expected[resolution, family] or "") in faults.get("images.resolution", "")
    assert ("images.resolution" in faults) == (expected[resolution, family] is not None)


def test_the_card_draws_with_sdtune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_family().save(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    code = loading_code(pixel_recipe(tmp_path), "model", "7")
    exec(code.replace("steps=50", "steps=2"), {})
    assert Image.open("picture.png").size == (28, 28)


@pytest.mark.parametrize(
    ("section", "values", "what"),
    [
        ("adapter", {"kind": "full", "text_encoder": True}, "text encoder"),
        ("images", {"resolution": 28, "max_tokens": 150}, "text encoder"),
        ("train", {"steps": 1, "cache_dir": "cache"}, "VAE"),
    ],
)
def test_settings_of_what_it_has_not_are_refused(section: str, values: dict[str, Any], what: str) -> None:
    recipe: dict[str, Any] = {
        "model": {"family": "pixel", "from_config": {"denoiser": SMALL, "scheduler": SCORE}},
        "adapter": {"kind": "full"},
        "data": [{"path": "assets:demo"}],
        "optimizer": {"lr": 1e-4},
        "train": {"steps": 1},
        "images": {"resolution": 28},
        "output": {"dir": "run", "trackers": []},
    }
    faults = dict(check(recipe | {section: values})[1])
    key = f"{section}.{list(values)[1]}"
    assert faults == {key: f"a model of family pixel has no {what}; remove it"}


def test_the_folder_names_its_classes(tmp_path: Path) -> None:
    make_family(classes=["a"]).save(tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index == {"_class_name": "PixelPipeline", "denoiser": ["sdtune.models.score", "ScoreConcat"]}
