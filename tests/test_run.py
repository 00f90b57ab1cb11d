"""Whole runs on a small random model: what learns, what stays, what is written, and that the way does not matter."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdtune.config import load
from sdtune.errors import ConfigError, DataError, RunError, TrainingError, UsageError, WeightsError
from sdtune.hub_folder import write_hub_folder
from sdtune.run import Run
from sdtune.run_folder import RunFolder, weights_folder
from tests.factories import VAE, losses, make_photos, make_recipe, weights

FULL = {"kind": "full"}
PARTS = {part: f"sd/{part}" for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")}
PAIRS = {"steps": 4, "batch_size": 2, "seed": 5}


def finished(recipe: Any, resume: bool = False) -> Run:
    run = Run(recipe, resume=resume)
    run.complete()
    return run


def assert_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(got[key], tensor), key


# --- what learns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "learning"),
    [
        ({"kind": "lora"}, {"unet"}),
        ({"kind": "lora", "text_encoder": True, "targets": "all"}, {"unet", "text_encoder"}),
        (FULL, {"unet"}),
        (FULL | {"text_encoder": True}, {"unet", "text_encoder"}),
    ],
    ids=["lora", "lora with text encoder", "full", "full with text encoder"],
)
def test_only_what_shall_learn_changes(
    sd: Path, photos: Path, tmp_path: Path, adapter: Any, learning: set[str]
) -> None:
    run = Run(make_recipe(sd, photos, tmp_path / "run", adapter=adapter))
    before = {
        name: {key: tensor.clone() for key, tensor in network.state_dict().items()}
        for name, network in run.family.modules.items()
    }
    run.complete()
    for name, network in run.family.modules.items():
        after = network.state_dict()
        changed = {key for key, tensor in before[name].items() if not torch.equal(after[key], tensor)}
        if adapter["kind"] == "lora":
            assert all(".lora_" in key for key in changed)
        assert bool(changed) == (name in learning), name
        assert all(key in changed for key in before[name] if "lora_B" in key)  # each factor of each target learns


def test_training_lowers_the_loss(sd: Path, tmp_path: Path) -> None:
    one = make_photos(tmp_path / "one", 1)
    recipe = make_recipe(
        sd, one, tmp_path / "run", adapter=FULL, train={"steps": 40}, optimizer={"lr": 3e-3}, validate={"every": 20},
        data=[{"path": str(one)}, {"path": str(one), "role": "validation"}],
    )  # fmt: skip
    finished(recipe)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    held_out = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    assert list(held_out) == [0, 20, 40]
    assert held_out[40] < 0.8 * held_out[0]


def test_a_text_encoder_may_learn_at_its_own_rate(sd: Path, photos: Path, tmp_path: Path) -> None:
    run = Run(
        make_recipe(
            sd, photos, tmp_path / "run",
            adapter={"text_encoder": True}, optimizer={"lr": 1e-3, "text_encoder_lr": 1e-5, "schedule": "linear"},
        )
    )  # fmt: skip
    assert [group["base_lr"] for group in run.optimizer.param_groups] == [1e-3, 1e-5]


# --- the same losses by another way -----------------------------------------------------------------------------------


def class_pairs(folder: Path) -> list[dict[str, Any]]:
    """Two instance sources and a class source, all of unequal weight."""
    make_photos(folder / "a", 3)
    make_photos(folder / "b", 2, size=(80, 64))
    make_photos(folder / "class", 4, captions=False)
    return [
        {"path": str(folder / "a"), "repeats": 2},
        {"path": str(folder / "b"), "weight": 2.0},
        {"path": str(folder / "class"), "role": "class", "prompt": "a dog", "weight": 0.4},
    ]


@pytest.mark.parametrize("adapter", [{"kind": "lora", "text_encoder": True}, FULL], ids=["lora", "full"])
def test_two_accumulated_batches_are_one_of_twice_the_size(sd: Path, tmp_path: Path, adapter: Any) -> None:
    data = class_pairs(tmp_path)
    common = {"adapter": adapter, "data": data, "objective": {"snr_gamma": 5.0}}
    images = {"crop": "random", "flip": True, "caption_dropout": 0.3}
    whole = make_recipe(sd, "", tmp_path / "whole", train=PAIRS, images=images, **common)
    parts = make_recipe(
        sd, "", tmp_path / "parts", train=PAIRS | {"batch_size": 1, "accumulate": 2}, images=images, **common
    )
    expected, got = losses(finished(whole).folder.path), losses(finished(parts).folder.path)
    assert len(got) == 4
    assert got == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "change",
    [{"cache": False}, {"gradient_checkpointing": True}, {"workers": 2}],
    ids=["no cache", "gradient checkpointing", "workers"],
)
def test_losses_do_not_depend_on(sd: Path, photos: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    common = {"adapter": {"kind": "lora", "text_encoder": "cache" not in change, "targets": "all"}}
    plain = make_recipe(sd, photos, tmp_path / "plain", train={"steps": 4}, images={"flip": True}, **common)
    other = make_recipe(sd, photos, tmp_path / "other", train={"steps": 4} | change, images={"flip": True}, **common)
    expected, got = losses(finished(plain).folder.path), losses(finished(other).folder.path)
    assert got == pytest.approx(expected, abs=1e-5)


def test_bf16_trains_to_about_the_same_losses(sd: Path, photos: Path, tmp_path: Path) -> None:
    plain = finished(make_recipe(sd, photos, tmp_path / "fp32"))
    half = finished(make_recipe(sd, photos, tmp_path / "bf16", train={"precision": "bf16"}))
    assert losses(half.folder.path) == pytest.approx(losses(plain.folder.path), rel=0.02)
    assert all(p.dtype == torch.float32 for p in half.parameters.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is refused on the CPU only")
def test_fp16_is_refused_without_a_gpu(sd: Path, photos: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{base: {sd}}}\ndata: [{{path: {photos}}}]\nimages: {{resolution: 64}}\noptimizer: {{lr: 0.001}}\n"
        f"train: {{steps: 1, precision: fp16}}\noutput: {{dir: {tmp_path / 'run'}}}\n"
    )
    with pytest.raises(ConfigError, match="fp16, which needs a GPU"):
        load(recipe)


# --- stopping and going on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sections",
    [
        {"adapter": FULL | {"text_encoder": True}, "train": {"steps": 6, "ema": 0.9}},
        {"adapter": {"kind": "lora", "text_encoder": True}, "images": {"flip": True, "crop": "random"}},
        {"images": {"flip": True, "crop": "random", "resolution": 32, "buckets": True, "tag_shuffle": True}},
    ],
    ids=["full with ema", "lora", "buckets"],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(sd: Path, tmp_path: Path, sections: dict[str, Any]) -> None:
    common = {
        "data": class_pairs(tmp_path),
        "optimizer": {"schedule": "cosine", "warmup": 2},
        "validate": {"every": 2, "fraction": 0.2},
        "train": {"steps": 6},
    } | sections
    whole = finished(make_recipe(sd, "", tmp_path / "whole", **common))

    halves = make_recipe(sd, "", tmp_path / "halves", output={"checkpoint_every": 3}, **common)
    first = Run(halves)
    for info in first.steps():
        if info.step == 4:  # one more than the checkpoint has
            break
    second = Run(halves, resume=True)
    assert second.step == 3
    second.complete()

    assert_equal(weights(tmp_path / "halves" / "final"), weights(tmp_path / "whole" / "final"))
    assert losses(second.folder.path) == losses(whole.folder.path)
    assert_equal(
        {key: p.detach() for key, p in second.parameters.items()},
        {key: p.detach() for key, p in whole.parameters.items()},
    )


def test_a_run_without_a_checkpoint_resumes_at_its_start(sd: Path, photos: Path, tmp_path: Path) -> None:
    recipe = make_recipe(sd, photos, tmp_path / "run", train={"steps": 3})
    next(Run(recipe).steps())
    again = finished(recipe, resume=True)
    assert len(losses(again.folder.path)) == 3 and again.folder.final.is_dir()


def test_a_finished_run_is_neither_repeated_nor_overwritten(sd: Path, photos: Path, tmp_path: Path) -> None:
    recipe = make_recipe(sd, photos, tmp_path / "run", output={"checkpoint_every": 1})
    finished(recipe)
    with pytest.raises(RunError, match="exists already and is never overwritten; go on with it by adding --resume"):
        Run(recipe)
    with pytest.raises(RunError, match="has done 2 steps already.*sdtune sample"):
        Run(recipe, resume=True)
    longer = finished(make_recipe(sd, photos, tmp_path / "run", train={"steps": 4}), resume=True)
    assert len(losses(longer.folder.path)) == 4
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == [
        "step-000002",
        "step-000004",
    ]
    assert load(tmp_path / "run" / "run.yaml").train.steps == 4


def test_a_finished_run_can_be_made_longer_from_its_true_end(sd: Path, photos: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"output": {"checkpoint_every": 2}, "adapter": {"kind": "lora", "text_encoder": True}}
    finished(make_recipe(sd, photos, tmp_path / "run", train={"steps": 3}, **common))
    longer = Run(make_recipe(sd, photos, tmp_path / "run", train={"steps": 5}, **common), resume=True)
    assert longer.step == 3
    longer.complete()
    whole = finished(make_recipe(sd, photos, tmp_path / "whole", train={"steps": 5}, **common))
    assert losses(longer.folder.path) == losses(whole.folder.path)
    assert_equal(weights(tmp_path / "run" / "final"), weights(tmp_path / "whole" / "final"))


def test_a_run_that_was_stopped_and_finished_is_made_longer_from_its_true_end(
    sd: Path, photos: Path, tmp_path: Path
) -> None:
    """Stopping it left a checkpoint, though the recipe asks for none."""
    stopped = Run(make_recipe(sd, photos, tmp_path / "run", train={"steps": 9}))
    next(stopped.steps())
    stopped.keep()
    finished(make_recipe(sd, photos, tmp_path / "run", train={"steps": 3}), resume=True)
    longer = Run(make_recipe(sd, photos, tmp_path / "run", train={"steps": 4}), resume=True)
    assert longer.step == 3
    longer.complete()
    finished(make_recipe(sd, photos, tmp_path / "whole", train={"steps": 4}))
    assert_equal(weights(tmp_path / "run" / "final"), weights(tmp_path / "whole" / "final"))
    assert not (tmp_path / "whole" / "checkpoints").exists()


def test_a_finished_run_that_is_made_longer_and_killed(
    sd: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """final/ is the old one until the new end: the newest weights are taken, and what they are is told."""
    run, every = tmp_path / "run", {"output": {"checkpoint_every": 2, "keep_last": None}}
    finished(make_recipe(sd, photos, run, **every))
    capsys.readouterr()
    assert weights_folder(run) == run / "final" and capsys.readouterr().err == ""
    longer = make_recipe(sd, photos, run, train={"steps": 6}, **every)
    for stop, newest in ((3, "final"), (5, "checkpoints/step-000004/weights")):
        for info in Run(longer, resume=True).steps():
            if info.step == stop:
                break
        capsys.readouterr()
        assert weights_folder(run) == run / newest
        assert capsys.readouterr().err == f"{run}: step {stop - 1} of 6, the run is not finished\n"
        with pytest.raises(RunError, match=f"has not ended: it is at step {stop - 1} of 6.*--resume"):
            write_hub_folder(RunFolder(run), "ann/dog")
    for _ in Run(longer, resume=True).steps():
        pass  # killed between its last step and final/
    again = Run(longer, resume=True)
    assert again.step == 6
    again.complete()
    assert weights_folder(run) == run / "final"
    assert_equal(weights(run / "final"), weights(run / "checkpoints" / "step-000006" / "weights"))


def test_a_finished_run_without_a_checkpoint_is_kept(sd: Path, photos: Path, tmp_path: Path) -> None:
    recipe = make_recipe(sd, photos, tmp_path / "run")
    before = weights(finished(recipe).folder.final)
    for again in (recipe, make_recipe(sd, photos, tmp_path / "run", train={"steps": 9})):
        with pytest.raises(RunError, match="is done and has no checkpoint to go on from.*checkpoint_every.*sdtune sam"):
            Run(again, resume=True)
    assert_equal(weights(tmp_path / "run" / "final"), before)


@pytest.mark.parametrize(
    ("sections", "begins"),
    [
        ({}, "adapter.init_from={run}"),
        ({"adapter": FULL}, "model.base={run}"),
        ({"adapter": FULL, "model": {"from_config": PARTS}}, "model.base={run} model.from_config=null"),
        ({"task": "autoencoding", "adapter": FULL}, "'model={{from_config: {{vae: {run}/final}}}}'"),
    ],
    ids=["lora", "full", "full from parts", "VAE"],
)
def test_the_weights_of_a_finished_run_without_a_checkpoint_can_learn_on_in_another(
    sd: Path, photos: Path, tmp_path: Path, sections: dict[str, Any], begins: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sd.parent)
    recipe, run = make_recipe(sd, photos, tmp_path / "run", **sections), tmp_path / "run"
    finished(recipe)
    with pytest.raises(RunError, match="is done and has no checkpoint") as fault:
        Run(recipe, resume=True)
    command = f"sdtune train {run}/run.yaml {begins.format(run=run)} output.dir=FOLDER"
    assert command in str(fault.value)
    _, _, _, *overrides = shlex.split(command.replace("FOLDER", str(tmp_path / "more")))
    Run(load(run / "run.yaml", overrides))


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"train": {"seed": 9}}, "train.seed was 0 and is 9"),
        ({"optimizer": {"lr": 0.5}}, "optimizer.lr was .* and is 0.5"),
        ({"images": {"flip": True}}, "images.flip was false and is true"),
        ({"validate": {"fraction": 0.5}}, "validate.fraction was 0.0 and is 0.5"),
        ({"train": {"ema": 0.9}}, "train.ema was nothing and is 0.9"),
        ({"data": "more"}, "data.1.path was nothing and is '.*photos'"),
    ],
)
def test_a_run_goes_on_with_its_own_settings_only(
    sd: Path, photos: Path, tmp_path: Path, sections: dict[str, Any], told: str
) -> None:
    recipe = make_recipe(sd, photos, tmp_path / "run", output={"checkpoint_every": 1})
    next(Run(recipe).steps())
    kept = (tmp_path / "run" / "run.yaml").read_text()
    if sections == {"data": "more"}:
        sections = {"data": [{"path": str(photos)}] * 2}
    with pytest.raises(RunError, match=f"was begun with other settings: .*{told}.*run.yaml --resume") as caught:
        Run(make_recipe(sd, photos, tmp_path / "run", **sections), resume=True)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "run" / "run.yaml").read_text() == kept
    with pytest.raises(RunError, match="samples a step .*: 2 then, 4 now"):
        Run(make_recipe(sd, photos, tmp_path / "run", train={"batch_size": 4}), resume=True)
    other = {"steps": 3, "workers": 1, "batch_size": 1, "accumulate": 2}
    finished(make_recipe(sd, photos, tmp_path / "run", train=other, output={"log_every": 2}), resume=True)


def test_nothing_to_resume(sd: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not exist, so there is nothing to resume; start the run without --resume"):
        Run(make_recipe(sd, photos, tmp_path / "run"), resume=True)
    with pytest.raises(RunError, match="not the folder of a run"):
        Run(make_recipe(sd, photos, photos), resume=True)


# --- autoencoding -----------------------------------------------------------------------------------------------------


def test_a_vae_from_scratch_learns_and_gets_its_scaling_factor(photos: Path, tmp_path: Path) -> None:
    config = {
        key: list(value) if isinstance(value, tuple) else value for key, value in VAE.items() if key != "scaling_factor"
    }
    recipe = make_recipe(
        "", photos, tmp_path / "run", task="autoencoding", model={"from_config": {"vae": config}}, adapter=FULL,
        train={"steps": 30, "batch_size": 4, "ema": 0.9}, optimizer={"lr": 3e-3},
        validate={"every": 10, "fraction": 0.2},
    )  # fmt: skip
    run = finished(recipe)
    values = losses(run.folder.path)
    assert values[-1] < 0.7 * values[0]
    saved = json.loads((run.folder.final / "config.json").read_text())
    assert saved["_class_name"] == "AutoencoderKL" and saved["scaling_factor"] != 0.18215

    from diffusers import AutoencoderKL

    from sdtune.data.images import to_float

    vae = AutoencoderKL.from_pretrained(run.folder.final)
    pixels = torch.stack([run.training[number][0].pixels for number in range(len(run.training))])
    with torch.no_grad():
        latents = vae.encode(to_float(pixels)).latent_dist.mean * vae.config.scaling_factor
    assert latents.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("held_out", [True, False])
def test_a_vae_can_be_looked_at(sd: Path, tmp_path: Path, held_out: bool) -> None:
    photos = make_photos(tmp_path / "photos", 4, size=(96, 64))
    recipe = make_recipe(
        sd, photos, tmp_path / "run", task="autoencoding", adapter=FULL, train={"steps": 20}, optimizer={"lr": 3e-3},
        images={"buckets": True}, validate={"fraction": 0.25 if held_out else 0.0, "samples": {"count": 2}},
    )  # fmt: skip
    run = finished(recipe)
    nearness = []
    for step in (0, 20):
        stage = run.folder.path / "samples" / f"step-{step:06d}"
        facts = json.loads((stage / "prompts.json").read_text())
        assert len(list(stage.glob("*.png"))) == len(facts["prompts"]) == (1 if held_out else 2)
        for name, told, number in zip(facts["prompts"], facts["psnr"], range(2), strict=False):
            both = np.asarray(Image.open(stage / f"{number:02d}.png")).astype(float)
            picture, back = np.split(both, 2, axis=1)
            source = np.asarray(Image.open(photos / f"{name.removeprefix('a photo of dog ')}.png"))
            assert source.shape[1] > source.shape[0] and picture.shape[1] > picture.shape[0]
            assert np.abs(picture.mean((0, 1)) - source.mean((0, 1))).max() < 5
            assert told == pytest.approx(10 * np.log10(255**2 / ((picture - back) ** 2).mean()))
        nearness.append(sum(facts["psnr"]) / len(facts["psnr"]))
    rows = [json.loads(line) for line in run.folder.metrics.read_text().splitlines()]
    assert [row["psnr"] for row in rows if "psnr" in row] == nearness and nearness[1] > nearness[0]
    page = (run.folder.path / "report.html").read_text(encoding="utf-8")
    assert "as the VAE gives it back" in page and f"{nearness[0]:.1f} to {nearness[1]:.1f} dB" in page
    assert not list(write_hub_folder(run.folder, "ann/vae").rglob("*.png"))  # they are the user's own pictures


def test_a_vae_from_weights_keeps_its_scaling_factor(sd: Path, photos: Path, tmp_path: Path) -> None:
    recipe = make_recipe(sd, photos, tmp_path / "run", task="autoencoding", adapter=FULL)
    run = finished(recipe)
    assert set(run.family.modules) == {"vae"}
    assert json.loads((run.folder.final / "config.json").read_text())["scaling_factor"] == VAE["scaling_factor"]
    trained = make_recipe(sd, photos, tmp_path / "with", model={"vae": str(run.folder.final)})
    for key, tensor in Run(trained).family.modules["vae"].state_dict().items():
        assert torch.equal(tensor, run.family.modules["vae"].state_dict()[key])


def test_of_a_vae_the_decoder_alone_may_learn(sd: Path, photos: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"task": "autoencoding", "train": {"steps": 20}, "optimizer": {"lr": 1e-3}}
    run = finished(make_recipe(sd, photos, tmp_path / "run", adapter=FULL | {"decoder_only": True}, **common))
    after, before = (weights(folder) for folder in (run.folder.final, sd / "vae"))
    changed = {key.split(":")[1].split(".")[0] for key in before if not torch.equal(after[key], before[key])}
    assert changed == {"decoder", "post_quant_conv"}
    assert losses(run.folder.path)[-1] < losses(run.folder.path)[0]
    assert all(not p.requires_grad for p in run.family.modules["vae"].encoder.parameters())


def test_the_decoder_alone_is_for_autoencoding(sd: Path, photos: Path, tmp_path: Path) -> None:
    decoder = {"adapter.kind": "full", "adapter.decoder_only": "true"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{base: {sd}}}\ndata: [{{path: {photos}}}]\nimages: {{resolution: 64}}\noptimizer: {{lr: 0.001}}\n"
        f"train: {{steps: 1}}\noutput: {{dir: {tmp_path / 'run'}}}\n"
    )
    overrides = [f"{key}={value}" for key, value in decoder.items()]
    with pytest.raises(ConfigError, match="adapter.decoder_only +is read by task: autoencoding only"):
        load(recipe, overrides)
    with pytest.raises(ConfigError, match="reconstruction.kl +the encoder, which it is for, does not learn"):
        load(recipe, [*overrides, "task=autoencoding", "reconstruction.kl=0.1"])
    assert load(recipe, [*overrides, "task=autoencoding"]).adapter.decoder_only


# --- faults -----------------------------------------------------------------------------------------------------------


def test_faults_found_before_training_leave_no_run_folder(sd: Path, sdxl: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    empty = tmp_path / "empty"
    empty.mkdir()
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"data": [{"path": str(empty)}]}, DataError, "holds no pictures"),
        ({"model": {"base": str(sdxl)}}, WeightsError, "is a StableDiffusionXLPipeline.*model.family"),
        ({"model": {"base": str(photos)}}, WeightsError, "has no model_index.json"),
        ({"model": {"base": str(photos / "0.png")}}, WeightsError, "is a file; expected a diffusers folder"),
        (
            {"adapter": {"targets": ["nothing"]}},
            UsageError,
            "no linear or convolution layer of unet ends in nothing.*to_out.0",
        ),
        ({"model": {"base": str(sd), "vae": str(sd / "unet")}}, WeightsError, "unet"),
    ]
    for sections, kind, match in cases:
        with pytest.raises(kind, match=match) as caught:
            Run(make_recipe(sd, photos, out, **sections))
        assert "\n" not in str(caught.value)
        assert not out.exists(), match


def damaged(folder: Path, sd: Path, part: str, content: bytes) -> Path:
    """A copy of a model with another content of one file."""
    import shutil

    shutil.copytree(sd, folder)
    file = folder / part
    assert file.exists()
    file.write_bytes(content)
    return folder


def test_damaged_models_are_refused(sd: Path, sdxl: Path, photos: Path, tmp_path: Path) -> None:
    whole = (sd / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    other = (sdxl / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    name = "unet/diffusion_pytorch_model.safetensors"
    text = "text_encoder/model.safetensors"
    cases = [
        (name, whole[: len(whole) // 2]),
        (name, b"not a model"),
        (name, other),
        (text, (sd / text).read_bytes()[:5000]),
        (text, (sdxl / "text_encoder_2" / "model.safetensors").read_bytes()),
        ("unet/config.json", b"{"),
        ("model_index.json", b"{"),
        ("scheduler/scheduler_config.json", b"[]"),
        ("tokenizer/tokenizer.json", b"{}"),
    ]
    for number, (part, content) in enumerate(cases):
        folder = damaged(tmp_path / str(number), sd, part, content)
        with pytest.raises(WeightsError, match=str(folder)) as caught:
            Run(make_recipe(folder, photos, tmp_path / "run"))
        assert "\n" not in str(caught.value) and not (tmp_path / "run").exists(), part


def test_a_picture_that_breaks_in_the_middle_leaves_a_run_to_resume(sd: Path, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", 4)
    recipe = make_recipe(sd, photos, tmp_path / "run", train={"steps": 8, "batch_size": 1})
    whole = finished(make_recipe(sd, photos, tmp_path / "whole", train={"steps": 8, "batch_size": 1}))
    run = Run(recipe)
    last = whole.training[3][0].key.split("|")[1]
    good = (photos / last).read_bytes()
    (photos / last).write_bytes(good[: len(good) // 2])
    with pytest.raises(DataError, match=f"{last} cannot be read.*stopped after step 3.*--resume"):
        run.complete()
    assert not run.folder.final.exists()
    (photos / last).write_bytes(good)
    again = finished(recipe, resume=True)
    assert losses(again.folder.path) == losses(whole.folder.path)


def test_a_loss_that_is_not_finite_is_told(sd: Path, photos: Path, tmp_path: Path) -> None:
    recipe = make_recipe(
        sd, photos, tmp_path / "run", adapter=FULL, optimizer={"lr": 1e30, "clip": None}, train={"steps": 9}
    )
    with pytest.raises(TrainingError, match="the loss of step .* is (nan|inf).*optimizer.lr"):
        finished(recipe)
    assert not (tmp_path / "run" / "final").exists()


def test_a_full_disk_leaves_nothing_half_written(
    sd: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    recipe = make_recipe(sd, photos, tmp_path / "run", output={"checkpoint_every": 1})
    with monkeypatch.context() as patch:
        patch.setattr("sdtune.run_folder.write_text", full)
        with pytest.raises(RunError, match="could not be made .No space left on device.*output.dir"):
            Run(recipe)
    assert not (tmp_path / "run").exists()

    run = Run(recipe)
    with monkeypatch.context() as patch:
        patch.setattr("sdtune.checkpoint.save_file", full)
        with pytest.raises(
            RunError, match="could not be written .No space left on device.; nothing half-written is left"
        ):
            run.complete()
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert len(losses(finished(recipe, resume=True).folder.path)) == 2


def test_a_resolution_without_whole_latents_is_refused(tmp_path: Path, photos: Path) -> None:
    config = {
        "down_block_types": ["DownEncoderBlock2D"] * 5, "up_block_types": ["UpDecoderBlock2D"] * 5,
        "block_out_channels": [8] * 5, "norm_num_groups": 8, "layers_per_block": 1,
    }  # fmt: skip
    recipe = make_recipe(
        "", photos, tmp_path / "run", task="autoencoding", model={"from_config": {"vae": config}}, adapter=FULL,
        images={"resolution": [64, 72]},
    )  # fmt: skip
    with pytest.raises(UsageError, match="got 64 x 72, but a latent of this VAE stands for 16 x 16 pixels"):
        Run(recipe)
    recipe.images.resolution, recipe.images.buckets, recipe.images.bucket_step = 64, True, 8
    with pytest.raises(UsageError, match=r"bucket_step: got 8, .* stands for 16 x 16 pixels; expected a multiple"):
        Run(recipe)


# --- class pictures ---------------------------------------------------------------------------------------------------


def test_class_pictures_that_are_lost_are_drawn_by_the_base_again(sd: Path, photos: Path, tmp_path: Path) -> None:
    import shutil

    data = [
        {"path": str(photos)},
        {"path": str(tmp_path / "class"), "role": "class", "prompt": "a dog", "generate": 2, "drawing": {"steps": 2}},
    ]
    common: dict[str, Any] = {"data": data, "optimizer": {"lr": 0.1}, "train": {"steps": 3}}
    recipe = make_recipe(sd, "", tmp_path / "run", output={"checkpoint_every": 2}, **common)
    for info in Run(recipe).steps():
        if info.step == 2:
            break
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "class").glob("*.png")}
    shutil.rmtree(tmp_path / "class")
    finished(recipe, resume=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "class").glob("*.png")} == drawn


def test_class_pictures_are_drawn_by_the_base_before_it_learns(sd: Path, photos: Path, tmp_path: Path) -> None:
    data = [
        {"path": str(photos)},
        {"path": str(tmp_path / "class"), "role": "class", "prompt": "a dog", "generate": 3, "drawing": {"steps": 2}},
    ]
    recipe = make_recipe(sd, "", tmp_path / "run", data=data)
    finished(recipe)
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "class").glob("*.png")}
    assert len(drawn) == 3

    # a run of other steps and another adapter draws the same ones, and takes those that are there
    (tmp_path / "class" / "class-000001.png").unlink()
    finished(make_recipe(sd, "", tmp_path / "other", data=data, adapter=FULL))
    again = {path.name: path.read_bytes() for path in (tmp_path / "class").glob("*.png")}
    assert again.keys() == drawn.keys()
    assert again["class-000000.png"] == drawn["class-000000.png"]

    # pictures of another kind are neither mixed in nor taken for the base's own
    data[1]["drawing"] = {"steps": 3}
    with pytest.raises(DataError, match="were drawn otherwise: steps was 2 and is 3. Give an empty folder"):
        Run(make_recipe(sd, "", tmp_path / "third", data=data))


def test_a_run_that_is_refused_for_its_class_pictures_leaves_no_folder(sd: Path, photos: Path, tmp_path: Path) -> None:
    class_data = {"path": str(tmp_path / "class"), "role": "class", "prompt": "a dog", "generate": 2}
    data = [{"path": str(photos)}, class_data | {"drawing": {"steps": 1}}]
    Run(make_recipe(sd, "", tmp_path / "first", data=data))
    data[1] |= {"prompt": "a cat"}
    with pytest.raises(DataError, match="was drawn for 'a dog', but now 'a cat' is asked for.*data.1.path=FOLDER"):
        Run(make_recipe(sd, "", tmp_path / "run", data=data))
    assert not (tmp_path / "run").exists()
    data[1] |= {"prompt": "a dog"}
    (tmp_path / "class" / "class-000001.png").write_bytes(b"broken")
    with pytest.raises(DataError, match="1 picture cannot be read: .*class-000001.png"):
        Run(make_recipe(sd, "", tmp_path / "run", data=data))
    assert not (tmp_path / "run").exists()


def test_a_run_whose_pictures_changed_does_not_go_on(sd: Path, photos: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    import shutil

    shutil.copytree(photos, mine)
    recipe = make_recipe(sd, mine, tmp_path / "run", output={"checkpoint_every": 1}, train={"steps": 3})
    next(Run(recipe).steps())
    rows = (mine / "metadata.jsonl").read_text()
    (mine / "metadata.jsonl").write_text(rows.replace("dog 0", "cat 0"))
    with pytest.raises(RunError, match=r"would not go on as it began: pictures and captions: .* then, .* now"):
        Run(recipe, resume=True)
    (mine / "metadata.jsonl").write_text(rows)
    shutil.copytree(tmp_path / "run" / "checkpoints" / "step-000001", tmp_path / "run" / "checkpoints" / "step-1-mine")
    assert Run(recipe, resume=True).step == 1
    with pytest.raises(RunError, match="has done 3 steps already"):
        finished(recipe, resume=True)
        Run(make_recipe(sd, mine, tmp_path / "run", output={"checkpoint_every": 1}, train={"steps": 2}), resume=True)
    run_yaml = tmp_path / "run" / "run.yaml"
    whole = run_yaml.read_text()
    cut_off = whole[: whole.index("\noutput:")]
    for content, told in ((whole[:30] + ": {", "it is not YAML"), (cut_off, "output: missing")):
        run_yaml.write_text(content)
        with pytest.raises(RunError, match=f"run.yaml' cannot be read .*{told}"):
            Run(recipe, resume=True)


def test_what_is_written_whole_is_not_rounded() -> None:
    from sdtune.adapters.full import Full
    from sdtune.adapters.lora import Lora
    from sdtune.building import frozen_dtype

    gpu, lora = torch.device("cuda"), Lora(4, 4, "attention")
    assert frozen_dtype(gpu, "bf16", lora) == torch.bfloat16 and frozen_dtype(gpu, "fp16") == torch.float16
    assert frozen_dtype(gpu, "bf16", Full()) is frozen_dtype(gpu, "fp32", lora) is None
    assert frozen_dtype(torch.device("cpu"), "bf16", lora) is None
