"""`sdtune export`: each method in each format that has a place for it, opened by stock libraries: equal answers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from sdtune.adapters.lora_arithmetic import extract
from sdtune.adapters.lora_files import WEIGHTS_NAME
from sdtune.cli import app
from sdtune.errors import UsageError, WeightsError
from sdtune.export import command, export, find_source
from sdtune.families import single_file
from sdtune.families.stable_diffusion import StableDiffusion
from sdtune.file_headers import kohya_header
from sdtune.lora_tools import info
from sdtune.opening import open_model
from sdtune.run import Run
from tests.adapters.test_lora_formats import answers, close
from tests.factories import make_photos, make_recipe, make_sd, weights
from tests.families.test_single_file import only_configurations

CPU = torch.device("cpu")


def train(base: Path, photos: Path, out: Path, **adapter: Any) -> Path:
    """A run of two large steps; the folder's name says of what."""
    family = {"family": "sdxl"} if base.name == "sdxl" else {}
    full = adapter.get("kind") == "full"
    shape = {} if full else {"rank": 4, "alpha": 6.0, "targets": "all"}
    recipe = make_recipe(
        base,
        photos,
        out,
        model={"base": str(base), **family},
        adapter={"text_encoder": True, **shape, **adapter},
        optimizer={"lr": 3e-2 if not full else 1e-3},
        output={"dir": str(out), "trackers": [], "checkpoint_every": 1},
    )
    Run(recipe).complete()
    return out


@pytest.fixture(scope="module")
def runs(sd: Path, sdxl: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run for each method."""
    place = tmp_path_factory.mktemp("runs")
    made = {"full": train(sd, photos, place / "full", kind="full")}
    # not `all`: in so small an SDXL diffusers takes the upsampler of a block without attention for one
    made["sdxl"] = train(sdxl, photos, place / "sdxl", targets="attention+feedforward")
    return made | {kind: train(sd, photos, place / kind, kind=kind) for kind in METHODS}


METHODS = ("lora", "rslora", "dora", "lokr", "loha")


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_diffusers(runs: dict[str, Path], sd: Path, tmp_path: Path, method: str) -> None:
    export(find_source(str(runs[method])), "diffusers", tmp_path / "folder")
    export(find_source(str(runs[method])), "diffusers", tmp_path / "file.safetensors")
    expected = answers(open_model(str(runs[method]), device=CPU))
    for place in (tmp_path / "folder", tmp_path / "file.safetensors"):
        stock = StableDiffusionPipeline.from_pretrained(sd)
        plain = answers(stock)
        stock.load_lora_weights(place)
        close(answers(stock), expected)
        assert (plain - expected).abs().max() > 0.05


@pytest.mark.parametrize("method", METHODS)
def test_peft(runs: dict[str, Path], sd: Path, tmp_path: Path, method: str) -> None:
    export(find_source(str(runs[method])), "peft", tmp_path / "peft")
    stock = StableDiffusionPipeline.from_pretrained(sd)
    PeftModel.from_pretrained(stock.unet, tmp_path / "peft" / "unet")
    stock.text_encoder.load_adapter(tmp_path / "peft" / "text_encoder")
    close(answers(stock), answers(open_model(str(runs[method]), device=CPU)))


@pytest.mark.parametrize("method", ["dora", "lokr", "loha"])
def test_kohya_of_what_diffusers_does_not_read_there(
    runs: dict[str, Path], sd: Path, tmp_path: Path, method: str
) -> None:
    """A1111 and ComfyUI do; diffusers drops kohya's dora_scale, and knows no LyCORIS for Stable Diffusion."""
    file = tmp_path / "kohya.safetensors"
    export(find_source(str(runs[method])), "kohya", file)
    with safe_open(file, "pt") as opened:
        said = opened.metadata()
    assert said["ss_network_module"] == ("networks.lora" if method == "dora" else "lycoris.kohya")
    close(answers(open_model(str(sd), str(file), device=CPU)), answers(open_model(str(runs[method]), device=CPU)))
    if method != "dora":
        with pytest.raises(WeightsError, match=f"no place for the {method}.*write --format peft"):
            export(find_source(str(runs[method])), "diffusers", tmp_path / "no")


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_kohya(runs: dict[str, Path], sd: Path, tmp_path: Path, method: str) -> None:
    file = tmp_path / "kohya.safetensors"
    export(find_source(str(runs[method])), "kohya", file)
    with safe_open(file, "pt") as opened:
        said = opened.metadata()
    assert (
        said["ss_network_dim"] == "4"
        and said["ss_network_alpha"] == ("6.0" if method == "lora" else "12.0")
        and said["ss_output_name"] == "kohya"
    )
    assert said["ss_sd_model_name"] == str(sd) and said["ss_steps"] == "2" and said["ss_learning_rate"] == "0.03"
    stock = StableDiffusionPipeline.from_pretrained(sd)
    stock.load_lora_weights(file)
    close(answers(stock), answers(open_model(str(runs[method]), device=CPU)))


def test_sdxl_as_kohya_has_it(runs: dict[str, Path], sdxl: Path, tmp_path: Path) -> None:
    file = tmp_path / "kohya.safetensors"
    export(find_source(str(runs["sdxl"])), "kohya", file)
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["ss_base_model_version"] == "sdxl_base_v1-0"
    stock = StableDiffusionXLPipeline.from_pretrained(sdxl)
    stock.load_lora_weights(file)
    close(answers(stock), answers(open_model(str(runs["sdxl"]), device=CPU)))


@pytest.mark.parametrize("method", [*METHODS, "full", "sdxl"])
def test_merged_and_single_file(
    runs: dict[str, Path], sd: Path, sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    family = open_model(str(runs[method]), device=CPU)
    expected = answers(family)
    kind, base = (StableDiffusionXLPipeline, sdxl) if method == "sdxl" else (StableDiffusionPipeline, sd)
    export(find_source(str(runs[method])), "merged", tmp_path / "merged")
    close(answers(kind.from_pretrained(tmp_path / "merged")), expected)

    file = tmp_path / "one.safetensors"
    export(find_source(str(runs[method])), "single-file", file)
    close(answers(kind.from_single_file(file, config=str(base))), expected)
    monkeypatch.setattr(
        single_file, "LAYOUTS", dict.fromkeys(("SD1", "SDXL"), only_configurations(base, tmp_path / "c"))
    )
    back = open_model(str(file), device=CPU)
    for name, network in back.modules.items():
        state = family.modules[name].state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in network.state_dict().items()), name


def predicting(base: Path, folder: Path, **scheduler: Any) -> Path:
    """The base, with another `scheduler_config.json`."""
    shutil.copytree(base, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | scheduler))
    return folder


@pytest.mark.parametrize("rescaled", [False, True])
def test_a_single_file_says_what_its_unet_predicts(
    sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rescaled: bool
) -> None:
    base = predicting(sd, tmp_path / "v", prediction_type="v_prediction", rescale_betas_zero_snr=rescaled)
    file = tmp_path / "one.safetensors"
    export(find_source(str(base)), "single-file", file)
    with safe_open(file, "pt") as opened:
        assert "v_pred" in opened.keys() and ("ztsnr" in opened.keys()) is rescaled  # noqa: SIM118
    monkeypatch.setattr(single_file, "LAYOUTS", {"SD1": only_configurations(sd, tmp_path / "c")})
    back = open_model(str(file), device=CPU).scheduler
    assert back["prediction_type"] == "v_prediction" and bool(back.get("rescale_betas_zero_snr")) is rescaled
    assert (back["timestep_spacing"] == "trailing") is rescaled
    StableDiffusionPipeline.from_single_file(file, config=str(sd))


def test_a_single_file_cannot_say_that_its_unet_predicts_the_picture(sd: Path, tmp_path: Path) -> None:
    base = predicting(sd, tmp_path / "x0", prediction_type="sample")
    with pytest.raises(WeightsError, match="cannot say that its UNet predicts 'sample'.*--format merged"):
        export(find_source(str(base)), "single-file", tmp_path / "one.safetensors")


def test_kohyas_header_counts_layers_and_predictions_as_kohya_does() -> None:
    v = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    said = kohya_header({"clip_skip": 1, "base": "b"}, {}, "SD2", "mine", v)
    assert said["ss_clip_skip"] == "2"
    assert said["ss_base_model_version"] == "sd_v2_v" and said["ss_zero_terminal_snr"] == "True"
    plain = kohya_header({"clip_skip": 0}, {}, "SDXL", "mine", v)
    assert "ss_clip_skip" not in plain and plain["ss_base_model_version"] == "sdxl_base_v1-0"


@pytest.fixture(scope="module")
def with_tokens(sd: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run that taught a token, one that taught two and a LoRA."""
    place = tmp_path_factory.mktemp("tokens")
    photos = make_photos(place / "photos", 2)
    rows = [{"file_name": f"{number}.png", "text": "a photo of <cat> <rug>"} for number in range(2)]
    (photos / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cat = {"token": "<cat>", "initializer": "dog"}
    adapters = {
        "textual-inversion": {"kind": "textual-inversion", "tokens": [cat]},
        "pivotal": {"kind": "lora", "rank": 2, "tokens": [cat, {"token": "<rug>", "vectors": 2}]},
    }
    for name, adapter in adapters.items():
        Run(make_recipe(sd, photos, place / name, adapter=adapter, optimizer={"lr": 1e-2, "token_lr": 0.1})).complete()
    return {name: place / name for name in adapters}


@torch.no_grad()
def reads(pipeline: Any) -> torch.Tensor:
    """What a pipeline's text encoder makes of the new token."""
    return pipeline.encode_prompt("a photo of <cat>", CPU, 1, False)[0]


@pytest.mark.parametrize("method", ["textual-inversion", "pivotal"])
def test_tokens(with_tokens: dict[str, Path], sd: Path, tmp_path: Path, method: str) -> None:
    source = find_source(str(with_tokens[method]))
    expected = reads(open_model(str(with_tokens[method]), device=CPU).pipeline())
    export(source, "diffusers", tmp_path / "folder")
    export(source, "merged", tmp_path / "merged")
    stock = StableDiffusionPipeline.from_pretrained(sd)
    for file in sorted((tmp_path / "folder").glob("learned_embeds*")):
        stock.load_textual_inversion(file)
    close(reads(stock), expected)
    merged = StableDiffusionPipeline.from_pretrained(tmp_path / "merged")
    close(reads(merged), expected)
    if method == "pivotal":
        stock.load_lora_weights(tmp_path / "folder" / WEIGHTS_NAME)
        close(answers(stock), answers(merged))
        export(source, "peft", tmp_path / "peft")
        assert sorted(path.name for path in (tmp_path / "peft").iterdir())[-1] == "unet"
        kohya_with_tokens(with_tokens["pivotal"], sd, tmp_path / "kohya" / "mine.safetensors", expected)
        with pytest.raises(UsageError, match="several files to write.*name a folder"):
            export(source, "diffusers", tmp_path / "a.safetensors")
    else:
        export(source, "diffusers", tmp_path / "cat.safetensors", "float16")
        assert [tensor.dtype for tensor in load_file(tmp_path / "cat.safetensors").values()] == [torch.float16]
        export(find_source(str(tmp_path / "cat.safetensors"), str(sd)), "merged", tmp_path / "again")
        with pytest.raises(WeightsError, match="new tokens and no LoRA"):
            export(source, "kohya", tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="in one file holds no tokenizer"):
        export(source, "single-file", tmp_path / "a.safetensors")


def kohya_with_tokens(run: Path, sd: Path, out: Path, expected: torch.Tensor) -> None:
    """Each token has a file beside the LoRA, and the command says so."""
    words = ["export", str(run), "--format", "kohya", "--out", str(out)]
    said = CliRunner().invoke(app, words).stderr
    assert sorted(file.name for file in out.parent.iterdir()) == [
        "mine-cat.safetensors",
        "mine-rug.safetensors",
        "mine.safetensors",
    ]
    assert "mine-rug.safetensors: the embedding of <rug>" in said
    stock = StableDiffusionPipeline.from_pretrained(sd)
    stock.load_textual_inversion(out.with_name("mine-cat.safetensors"))
    close(reads(stock), expected)
    out.unlink()
    assert "mine-cat.safetensors', for a new token, exists already" in CliRunner().invoke(app, words).stderr
    base, tuned = (open_model(str(model), device=CPU).modules for model in (sd, run))
    with pytest.raises(WeightsError, match="the tuned model has new tokens .3 more.*sdtune export RUN"):
        extract(base, tuned, 2)


@pytest.mark.parametrize("what", [["merge"], ["resize", "--rank", "1"]])
def test_arithmetic_never_leaves_tokens_out(with_tokens: dict[str, Path], tmp_path: Path, what: list[str]) -> None:
    run, out = with_tokens["pivotal"], tmp_path / "new.safetensors"
    answer = CliRunner().invoke(app, ["lora", *what, str(run), "--out", str(out)])
    alone = run / "final" / WEIGHTS_NAME
    assert answer.exit_code == 2 and not out.exists()
    assert "new tokens (<cat>, <rug>) beside its LoRA" in answer.stderr and f"alone, {alone}," in answer.stderr
    assert CliRunner().invoke(app, ["lora", *what, str(alone), "--out", str(out)]).exit_code == 0


def test_half_precision(runs: dict[str, Path], tmp_path: Path) -> None:
    for method, kind, name in (
        ("lora", "diffusers", "a"),
        ("lora", "peft", "b"),
        ("lora", "kohya", "c.safetensors"),
        ("full", "single-file", "d.safetensors"),
        ("full", "diffusers", "e"),
    ):
        out = tmp_path / name
        export(find_source(str(runs[method])), kind, out, "float16")
        tensors = load_file(out) if out.is_file() else weights(out)
        kinds = {tensor.dtype for key, tensor in tensors.items() if "alpha" not in key and tensor.is_floating_point()}
        assert kinds == {torch.float16}


def test_final_checkpoints_and_files_are_sources_too(runs: dict[str, Path], sd: Path, tmp_path: Path) -> None:
    final = runs["lora"] / "final"
    early = runs["lora"] / "checkpoints" / "step-000001" / "weights"
    for number, (place, base) in enumerate([(final, None), (final / WEIGHTS_NAME, str(sd)), (early, None)]):
        out = tmp_path / str(number)
        export(find_source(str(place), base), "merged", out)
        there = open_model(str(runs["lora"]) if place != early else str(early), device=CPU)
        close(answers(StableDiffusion.load(str(out))), answers(there))
    with pytest.raises(WeightsError, match="no sdtune.json that names its base.*name it yourself: add --base MODEL"):
        export(find_source(str(final / WEIGHTS_NAME)), "merged", tmp_path / "no")


def test_a_vae(sd: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "vae"
    recipe = make_recipe(sd, photos, run, task="autoencoding", adapter={"kind": "full"}, train={"cache": False})
    Run(recipe).complete()
    trained = AutoencoderKL.from_pretrained(run / "final").state_dict()
    export(find_source(str(run)), "diffusers", tmp_path / "folder")
    export(find_source(str(run)), "single-file", tmp_path / "vae.safetensors")
    for opened in (
        AutoencoderKL.from_pretrained(tmp_path / "folder"),
        AutoencoderKL.from_single_file(str(tmp_path / "vae.safetensors"), config=str(sd), subfolder="vae"),
        StableDiffusion.load(str(sd), vae=str(tmp_path / "vae.safetensors")).modules["vae"],
    ):
        assert all(torch.equal(tensor, trained[key]) for key, tensor in opened.state_dict().items())
    for kind, name in (("kohya", "no.safetensors"), ("peft", "no")):
        with pytest.raises(WeightsError, match="is a VAE, .*for LoRA. Take --format diffusers, merged or single-file$"):
            export(find_source(str(run)), kind, tmp_path / name)
    other = make_sd(tmp_path / "other", seed=1)
    export(find_source(str(run)), "merged", tmp_path / "merged")
    export(find_source(str(run), str(other)), "merged", tmp_path / "elsewhere")
    for base, merged in ((sd, tmp_path / "merged"), (other, tmp_path / "elsewhere")):
        opened = StableDiffusionPipeline.from_pretrained(merged)
        unet = StableDiffusionPipeline.from_pretrained(base).unet.state_dict()
        assert all(torch.equal(tensor, trained[key]) for key, tensor in opened.vae.state_dict().items())
        assert all(torch.equal(tensor, unet[key]) for key, tensor in opened.unet.state_dict().items())
    notes = run / "final" / "sdtune.json"
    notes.write_text(json.dumps(json.loads(notes.read_text()) | {"base": None, "from_config": {"vae": {}}}))
    export(find_source(str(run)), "merged", tmp_path / "alone")
    assert "made from scratch, for no model; it is written alone" in capsys.readouterr().err
    assert (tmp_path / "alone" / "config.json").is_file()


def test_a_run_is_a_base_of_what_is_exported(runs: dict[str, Path], tmp_path: Path) -> None:
    """The layers of a LoRA are looked up in the newest weights of the run that it was trained on."""
    final = shutil.copytree(runs["lora"] / "final", tmp_path / "final")
    notes = json.loads((final / "sdtune.json").read_text())
    (final / "sdtune.json").write_text(json.dumps(notes | {"base": str(runs["full"])}))
    export(find_source(str(final)), "kohya", tmp_path / "a.safetensors")
    assert info(tmp_path / "a.safetensors", str(runs["full"]))["refused"] is None


def test_an_adapter_is_no_base(runs: dict[str, Path], sd: Path, photos: Path, tmp_path: Path) -> None:
    match = f"not a whole model; .*: sdtune export {runs['lora']} --format merged --out FOLDER"
    with pytest.raises(WeightsError, match=match):
        Run(make_recipe(runs["lora"], photos, tmp_path / "run"))
    with pytest.raises(WeightsError, match=match):
        find_source(str(runs["dora"] / "final" / WEIGHTS_NAME), str(runs["lora"]))


def test_what_cannot_be_exported_is_told(runs: dict[str, Path], sd: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for method, kind, out, match in (
        ("lora", "merged", "there", "exists already and is not overwritten"),
        ("lora", "kohya", "folder", "is one file.*ends in .safetensors"),
        ("lora", "peft", "a.safetensors", "a folder in the format peft"),
        ("full", "diffusers", "a.safetensors", "a folder in the format diffusers"),
    ):
        with pytest.raises(UsageError, match=match):
            export(find_source(str(runs[method])), kind, tmp_path / out)
    for kind, out in (("kohya", "a.safetensors"), ("peft", "a")):
        with pytest.raises(WeightsError, match="is a whole model.*sdtune lora extract"):
            export(find_source(str(runs["full"])), kind, tmp_path / out)
    (tmp_path / "there" / "0.jpg").touch()
    with pytest.raises(WeightsError, match=r"is neither a run, a model nor a LoRA \(found: 0.jpg\)"):
        find_source(str(tmp_path / "there"))
    with pytest.raises(UsageError, match="is a whole model and needs none"):
        find_source(str(runs["full"]), str(sd))
    with pytest.raises(WeightsError, match="does not exist"):
        find_source(str(tmp_path / "nothing"))
    for options in ({"kind": "onnx"}, {"kind": "kohya", "dtype": "int3"}):
        with pytest.raises(UsageError, match="expected one of"):
            command(str(sd), out=tmp_path / "b", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def test_the_command(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.safetensors"
    assert command(str(runs["lora"]), "kohya", out, as_json=True) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"out": str(out), "format": "kohya", "bytes": out.stat().st_size}
    assert command(str(runs["lora"]), "diffusers", tmp_path / "folder") == 0
    size = (tmp_path / "folder" / WEIGHTS_NAME).stat().st_size
    assert size < 1e6 and capsys.readouterr().err == f"{tmp_path / 'folder'}: diffusers, {size / 1e3:.1f} kB\n"


def test_an_export_is_called_as_its_run_unless_told(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = runs["lora"] / "checkpoints" / "step-000001" / "weights"
    for place, kind, name in ((runs["lora"], "kohya", "lora.safetensors"), (checkpoint, "diffusers", "lora-diffusers")):
        assert command(str(place), kind) == 0 and (tmp_path / name).exists()
    with pytest.raises(UsageError, match="exists already"):
        command(str(runs["lora"] / "final"), "kohya")


def test_a_base_named_anew_is_read_and_drawn_with_as_the_run_was(sd: Path, photos: Path, tmp_path: Path) -> None:
    """The base elsewhere; what the run changed of it is in its notes."""
    vae = tmp_path / "vae"
    other = StableDiffusion.load(str(sd)).modules["vae"]
    with torch.no_grad():
        other.decoder.conv_out.bias += 1
    other.save_pretrained(vae)
    recipe = make_recipe(
        sd,
        photos,
        tmp_path / "run",
        model={"base": str(sd), "vae": str(vae), "clip_skip": 1},
        objective={"prediction": "v_prediction", "zero_terminal_snr": True},
    )
    Run(recipe).complete()
    expected = open_model(str(recipe.output.dir), device=CPU)
    moved = tmp_path / "moved"
    shutil.copytree(sd, moved)
    named = open_model(str(moved), str(recipe.output.dir), device=CPU)
    merged = tmp_path / "merged"
    export(find_source(recipe.output.dir, str(moved)), "merged", merged)
    for family in (named, open_model(str(merged), device=CPU)):
        assert (family.clip_skip, family.scheduler["prediction_type"]) == (1, "v_prediction")  # type: ignore[attr-defined]
        assert family.scheduler["rescale_betas_zero_snr"] and family.scheduler["timestep_spacing"] == "trailing"
        close(answers(family), answers(expected))
        state = family.modules["vae"].state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in expected.modules["vae"].state_dict().items())
