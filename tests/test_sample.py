"""`sdtune sample`: from every kind of name to pictures that depend on prompt and seed alone."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from sdtune.cli import app
from sdtune.errors import HubError, RunError, SdtuneError, UsageError, WeightsError
from sdtune.families.stable_diffusion import StableDiffusion
from sdtune.opening import open_model, parted_weight
from sdtune.run import Run
from sdtune.sample import command, draw_pictures, file_name, lengthen
from tests.factories import make_recipe, make_sd

CPU = torch.device("cpu")
QUICK = {"steps": 2}


@pytest.fixture(scope="module")
def runs(sd: Path, sdxl: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Finished runs: a LoRA, a full one with EMA, an SDXL LoRA, a VAE."""
    folder = tmp_path_factory.mktemp("runs")
    rate = {"optimizer": {"lr": 1e-2}}
    recipes = {
        "lora": make_recipe(sd, photos, folder / "lora", adapter={"alpha": 8.0, "text_encoder": True}, **rate),
        "full": make_recipe(
            sd, photos, folder / "full", adapter={"kind": "full"}, train={"steps": 3, "ema": 0.9},
            output={"checkpoint_every": 2}, **rate,
        ),
        "sdxl": make_recipe(
            sdxl, photos, folder / "sdxl", model={"family": "sdxl"}, adapter={"text_encoder": True}, **rate
        ),
        "vae": make_recipe(sd, photos, folder / "vae", task="autoencoding", adapter={"kind": "full"}),
    }  # fmt: skip
    done = {}
    for name, recipe in recipes.items():
        done[name] = Run(recipe)
        done[name].complete()
    return done


def pictures(family: Any, **options: Any) -> np.ndarray:
    """Two pictures of a family, (2, 64, 64, 3)."""
    drawn = draw_pictures(family, ["a photo of dog", "dog"], [1, 2], height=64, width=64, **QUICK | options)
    return np.stack([np.asarray(picture) for picture in drawn]).astype(int)


def assert_same(one: np.ndarray, other: np.ndarray) -> None:
    assert np.abs(one - other).max() <= 1


def test_a_picture_depends_on_its_own_prompt_and_seed_alone(sd: Path) -> None:
    family = StableDiffusion.load(str(sd))
    together = pictures(family)
    (alone,) = draw_pictures(family, ["dog"], [2], height=64, width=64, **QUICK)
    assert_same(np.asarray(alone).astype(int), together[1])
    assert_same(pictures(family, batch_size=1), together)
    torch.manual_seed(7)
    assert (pictures(family) == together).all()
    assert (np.abs(pictures(family, guidance=1.0) - together) > 2).any()
    assert (np.abs(pictures(family, negative_prompt="a cat") - together) > 2).any()


def test_samplers_that_add_noise_are_repeatable(sd: Path) -> None:
    family = StableDiffusion.load(str(sd))
    family.scheduler["_class_name"] = "EulerAncestralDiscreteScheduler"
    together = pictures(family)
    assert (pictures(family) == together).all()
    assert_same(pictures(family, batch_size=1), together)


@pytest.mark.parametrize("name", ["lora", "full", "sdxl"])
def test_a_run_draws_what_it_learned(runs: dict[str, Any], name: str) -> None:
    run = runs[name]
    with run.averaged():
        expected = pictures(run.family)
    assert_same(pictures(open_model(str(run.folder.path), device=CPU)), expected)
    assert_same(pictures(open_model(str(run.folder.final), device=CPU)), expected)
    base = pictures(open_model(run.recipe.model.base, device=CPU))
    assert (np.abs(base - expected) > 5).any()
    if name != "full":
        beside = open_model(run.recipe.model.base, str(run.folder.path), device=CPU)
        assert_same(pictures(beside), expected)


def test_several_loras_add_up_each_with_its_weight(
    runs: dict[str, Any], sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(runs["lora"].folder.path)
    plain, once, halves, less = (
        pictures(open_model(str(sd), *loras, device=CPU))
        for loras in ((), (run,), (f"{run}:0.25", f"{run}:.75"), (f"{run}:0.5",))
    )
    assert_same(halves, once)
    assert all((np.abs(less - other) > 2).any() for other in (plain, once))
    assert_same(pictures(open_model(run, f"{run}:-1", device=CPU)), plain)
    drawn = CliRunner().invoke(
        app,
        ["sample", str(sd), "--prompt", "dog", "--lora", run, "--lora", f"{run}:-1", "--steps", "2"]
        + ["--out", str(tmp_path / "out")],
    )
    assert drawn.exit_code == 0, drawn.stderr
    assert command(str(sd), ["dog"], out=tmp_path / "plain", **QUICK) == 0
    one, other = (np.asarray(Image.open(tmp_path / name / "dog-0.png")).astype(int) for name in ("out", "plain"))
    assert_same(one, other)


def test_only_a_number_after_the_last_colon_is_a_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, place, weight in (
        ("k.safetensors", "k.safetensors", 1.0),
        ("runs/rex:0.7", "runs/rex", 0.7),
        ("a:b.safetensors:-1.5", "a:b.safetensors", -1.5),
        ("C:\\loras\\k.safetensors", "C:\\loras\\k.safetensors", 1.0),
        ("C:\\loras\\k.safetensors:.5", "C:\\loras\\k.safetensors", 0.5),
        ("rex:nan", "rex:nan", 1.0),
    ):
        assert parted_weight(name) == (Path(place), weight)
    (tmp_path / "night:2").mkdir()
    assert parted_weight("night:2") == (Path("night:2"), 1.0)
    assert parted_weight("night:2:0.5") == (Path("night:2"), 0.5)


def test_a_run_that_is_not_finished_draws_with_its_last_checkpoint(
    runs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["full"].folder.path, run)
    shutil.rmtree(run / "final")
    (run / "checkpoints" / "step-000003").rename(tmp_path / "late")
    step = run / "checkpoints" / "step-000002"
    expected = pictures(open_model(str(step / "weights"), device=CPU))
    assert_same(pictures(open_model(str(step), device=CPU)), expected)
    assert "not finished" not in capsys.readouterr().err  # it was named
    assert_same(pictures(open_model(str(run), device=CPU)), expected)
    assert f"{run}: step 2 of 3, the run is not finished\n" in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(WeightsError, match="neither final/ nor a checkpoint yet; .*--resume"):
        open_model(str(run), device=CPU)


def test_the_recipe_of_a_run_holds_when_it_is_drawn_with(sd: Path, photos: Path, tmp_path: Path) -> None:
    recipe = make_recipe(
        sd, photos, tmp_path / "run", model={"clip_skip": 1}, images={"max_tokens": 150},
        objective={"prediction": "v_prediction"},
    )  # fmt: skip
    Run(recipe).complete()
    family: Any = open_model(str(tmp_path / "run"), device=CPU)
    assert (family.clip_skip, family.max_tokens) == (1, 150)
    assert family.scheduler["prediction_type"] == "v_prediction"


def test_a_vae_draws_nothing(runs: dict[str, Any]) -> None:
    with pytest.raises(WeightsError, match="is a VAE, which draws nothing by itself; .*model.vae="):
        open_model(str(runs["vae"].folder.path), device=CPU)


def test_command_writes_pictures_and_never_over_others(
    sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert command(str(sd), ["A photo of dog!", "cat"], seed=3, count=2, out=out, **QUICK) == 0
    first = capsys.readouterr().out.splitlines()
    assert [Path(line).name for line in first] == [
        "a-photo-of-dog-3.png",
        "a-photo-of-dog-4.png",
        "cat-3.png",
        "cat-4.png",
    ]
    with Image.open(first[0]) as picture:
        assert picture.size == (64, 64)
    before = {line: Path(line).read_bytes() for line in first}

    assert command(str(sd), ["cat"], seed=3, out=out, as_json=True, **QUICK) == 0
    (line,) = capsys.readouterr().out.splitlines()
    (row,) = json.loads(line)["pictures"]
    assert row == {"path": str(out / "cat-3-2.png"), "prompt": "cat", "seed": 3}
    assert {path: Path(path).read_bytes() for path in first} == before
    one, other = (np.asarray(Image.open(out / name)).astype(int) for name in ("cat-3.png", "cat-3-2.png"))
    assert_same(one, other)
    assert len(list(out.iterdir())) == 5


def test_long_prompts_are_read_in_chunks_of_equal_number(sd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    family: Any = open_model(str(sd), device=CPU)
    lengthen(family, ["dog", "a photo, " * 30])
    assert family.max_tokens == 150
    drawn = list(draw_pictures(family, ["dog"], [0], height=64, width=64, negative_prompt="a photo, " * 30, **QUICK))
    assert len(drawn) == 1
    lengthen(family, ["dog " * 300])
    assert family.max_tokens == 225
    assert "a prompt has 300 tokens; the first 225 are read" in capsys.readouterr().err


def test_pictures_have_the_models_own_size(tmp_path: Path) -> None:
    wide = make_sd(tmp_path / "wide", sample_size=(16, 24))
    command(str(wide), ["dog"], out=tmp_path / "out", **QUICK)
    with Image.open(tmp_path / "out" / "dog-0.png") as picture:
        assert picture.size == (48, 32)


@pytest.mark.parametrize("prompt", ["", "!!!", "  "])
def test_names_of_prompts_without_letters(prompt: str) -> None:
    assert file_name(prompt) == "picture"


def test_names_are_short_and_safe() -> None:
    assert file_name("../../etc/passwd") == "etc-passwd"
    assert file_name("Ein Bär im Wald") == "ein-bär-im-wald"
    assert len(file_name("dog " * 100)) <= 60


def test_faults_are_told_before_anything_is_written(
    runs: dict[str, Any], sd: Path, tmp_path: Path, photos: Path
) -> None:
    out = tmp_path / "out"
    (tmp_path / "file").touch()
    lora = runs["lora"].folder.path
    cases: list[tuple[list[Any], dict[str, Any], type[SdtuneError], str]] = [
        ([tmp_path / "none"], {}, WeightsError, "does not exist, and is no hub id"),
        ([photos], {}, WeightsError, "is not a diffusers pipeline"),
        ([photos / "0.png"], {}, WeightsError, "is a file; expected a diffusers folder"),
        ([sd / "unet"], {}, WeightsError, "is not a diffusers pipeline"),
        ([sd], {"loras": [str(tmp_path / "none")]}, WeightsError, "the LoRA .* does not exist"),
        ([sd], {"loras": [str(photos)]}, WeightsError, "should hold one LoRA file"),
        ([sd], {"loras": [str(runs["sdxl"].folder.path)]}, WeightsError, "is refused"),
        ([sd], {"loras": [str(runs["full"].folder.path)]}, WeightsError, "should hold one LoRA file"),
        ([sd], {"out": tmp_path / "file"}, UsageError, "is a file; expected a folder"),
        ([sd], {"steps": 2000}, UsageError, "got 2000, but this model knows 1000"),
    ]
    for (model,), options, kind, match in cases:
        with pytest.raises(kind, match=match) as caught:
            command(str(model), ["dog"], **{"out": out, **QUICK} | options)
        assert "\n" not in str(caught.value)
        assert not out.exists()
    assert lora.is_dir()


def test_a_lora_whose_base_is_gone_says_how_to_name_another(runs: dict[str, Any], tmp_path: Path) -> None:
    final = tmp_path / "final"
    shutil.copytree(runs["lora"].folder.final, final)
    notes = json.loads((final / "sdtune.json").read_text())
    (final / "sdtune.json").write_text(json.dumps(notes | {"base": str(tmp_path / "gone")}))
    with pytest.raises(
        WeightsError, match=f"was made for the model '{tmp_path / 'gone'}'.*sdtune sample MODEL --lora {final}"
    ):
        open_model(str(final), device=CPU)
    (final / "sdtune.json").write_text("{")
    with pytest.raises(WeightsError, match="cannot be read"):
        open_model(str(final), device=CPU)
    (final / "sdtune.json").unlink()
    with pytest.raises(WeightsError, match=f"sdtune sample MODEL --lora {final}"):
        open_model(str(final), device=CPU)


def test_a_hub_id_without_network_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        HubError, match="'nobody/nothing' is no folder here.*could not be fetched.*hf download nobody/nothing"
    ):
        command("nobody/nothing", ["dog"], out=tmp_path / "out")


@pytest.mark.parametrize("name", ["runs/mein Hundd", "runs/rexx"])
def test_a_misspelt_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    for run in ("mein Hund", "rex", "other"):
        (tmp_path / "runs" / run).mkdir(parents=True)
    with pytest.raises(SdtuneError) as fault:
        command(name, ["dog"], out=tmp_path / "out")
    assert f"did you mean '{Path(name[:-1])}'?" in str(fault.value)
    assert ("hf download" in str(fault.value)) == (" " not in name)  # no hub id has a space


def test_words_that_were_never_learned_are_told(
    sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"<thing>": torch.randn(2, 32)}, tmp_path / "thing.safetensors")
    for prompt, said in (
        ("a photo of <thing>, <Thing>, 1 < 2 > 1", ""),
        ("<thingy> and <thing>", "<thingy>: no word that this model has learned; .* It has learned <thing>; "),
    ):
        command(str(sd), [prompt], loras=[str(tmp_path / "thing.safetensors")], out=tmp_path / "out", **QUICK)
        assert re.match(said or "$", capsys.readouterr().err)
    command(str(sd), ["dog <lora:rex:0.7>"], negative_prompt="<bad>", out=tmp_path / "out", **QUICK)
    said = capsys.readouterr().err
    assert re.match("<lora:rex:0.7>, <bad>: no word .* It has learned none; .*--lora FILE", said)


def test_a_full_disk_leaves_no_half_picture(sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = builtins.open

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: Any) -> None:
            self.file.close()

        def write(self, content: bytes) -> None:
            self.file.write(content[:10])
            raise OSError(28, "No space left on device")

    def limited(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        opened = real(path, mode, *rest, **options)
        return Full(opened) if mode == "xb" else opened

    monkeypatch.setattr(builtins, "open", limited)
    with pytest.raises(RunError, match="could not be written .No space left on device.; make room"):
        command(str(sd), ["dog"], out=tmp_path / "out", **QUICK)
    assert list((tmp_path / "out").iterdir()) == []
