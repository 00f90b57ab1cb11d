"""Checkpoints in one file: the same networks as in a folder."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders import single_file_utils as utils
from safetensors.torch import load_file, save_file

from sdtune.errors import WeightsError
from sdtune.families import single_file
from sdtune.families.original import original_checkpoint
from sdtune.families.saving import historical_key
from sdtune.families.sdxl import StableDiffusionXL
from sdtune.families.stable_diffusion import StableDiffusion
from sdtune.opening import open_model, open_whole
from sdtune.run import Run
from tests.factories import losses, make_recipe, make_sd, shake

CPU = torch.device("cpu")


def write_original(folder: Path, file: Path, **header: str) -> Path:
    """A diffusers folder as one file in the original layout, with what old files also hold."""
    tensors = original_checkpoint(networks(folder))
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    tensors["alphas_cumprod"] = torch.ones(1000)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata=header)
    return file


def networks(folder: Path) -> Any:
    """The networks of a diffusers folder."""
    family = open_whole(str(folder), {})
    return family.modules


def only_configurations(folder: Path, target: Path) -> Path:
    """A diffusers folder without its weights."""
    return shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))


@pytest.fixture
def small(sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small model in one file, with its small configurations in the place of Stable Diffusion 1.5's."""
    layout = only_configurations(sd, tmp_path / "layout")
    monkeypatch.setattr(single_file, "LAYOUTS", {"SD1": layout})
    return write_original(sd, tmp_path / "small.safetensors")


def assert_equal(one: Any, other: Any) -> None:
    for name, network in one.modules.items():
        states = network.state_dict(), other.modules[name].state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items()), name


def test_the_networks_are_those_of_the_folder(small: Path, sd: Path) -> None:
    family, folder = StableDiffusion.load(str(small)), StableDiffusion.load(str(sd))
    assert type(family.modules["unet"]).__module__.startswith("sdtune")
    assert type(family.modules["vae"]).__module__.startswith("sdtune")
    assert_equal(family, folder)
    assert family.scheduler == folder.scheduler and family.picture_size() == folder.picture_size()
    assert list(StableDiffusion.load(str(small), parts=["vae"]).modules) == ["vae"]
    with torch.no_grad():
        texts = [one.encode_text(["a photo of dog"]) for one in (family, folder)]
        x_t, t = torch.randn(1, 4, 32, 32), torch.tensor([7])
        ours, theirs = (one.predict(x_t, t, text) for one, text in zip((family, folder), texts, strict=True))
    torch.testing.assert_close(ours, theirs)


def test_old_checkpoints_call_the_text_encoders_layers_otherwise(small: Path, sd: Path, tmp_path: Path) -> None:
    old = {key.replace("transformer.text_model.", "transformer."): tensor for key, tensor in load_file(small).items()}
    save_file(old, tmp_path / "old.safetensors")
    assert_equal(StableDiffusion.load(str(tmp_path / "old.safetensors")), StableDiffusion.load(str(sd)))


def test_inpainting_checkpoints_are_told_by_their_channels(small: Path, tmp_path: Path) -> None:
    file = write_original(make_sd(tmp_path / "nine", in_channels=9), tmp_path / "nine.safetensors")
    family = StableDiffusion.load(str(file))
    assert family.inpaints and family.modules["unet"].config.in_channels == 9


def test_a_lora_trains_on_one_file(small: Path, photos: Path, tmp_path: Path) -> None:
    run = Run(make_recipe(small, photos, tmp_path / "run"))
    run.complete()
    assert len(losses(tmp_path / "run")) == 2
    open_model(str(tmp_path / "run"), device=CPU)  # the base once more, and its LoRA
    open_model(str(small), device=CPU)


def test_what_is_no_whole_checkpoint_is_refused(small: Path, photos: Path, tmp_path: Path) -> None:
    tensors = load_file(small)
    for part, start in (("vae", "first_stage_model."), ("text_encoder", "cond_stage_model.")):
        file = tmp_path / f"no-{part}.safetensors"
        save_file({key: tensor for key, tensor in tensors.items() if not key.startswith(start)}, file)
        with pytest.raises(WeightsError, match=f"the {part} of .* could not be opened"):
            StableDiffusion.load(str(file))
    file = tmp_path / "one-less.safetensors"
    save_file(
        {key: tensor for key, tensor in tensors.items() if not key.endswith("middle_block.0.in_layers.2.bias")}, file
    )
    with pytest.raises(WeightsError, match="the unet of .* could not be opened"):
        StableDiffusion.load(str(file))
    file.write_bytes(small.read_bytes()[:5000])
    with pytest.raises(WeightsError, match="cannot be read.*incomplete"):
        StableDiffusion.load(str(file))
    save_file({"lora_unet.weight": torch.zeros(2)}, file)
    for other in (file, photos / "0.png"):
        with pytest.raises(WeightsError, match="is a file.*; expected a diffusers folder"):
            StableDiffusion.load(str(other))


def test_other_kinds_of_checkpoint_are_told_apart(small: Path, tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    first = {single_file.FIRST: torch.zeros(4, 4, 3, 3)}
    assert single_file.kind_of(first) == "SD1"
    assert single_file.kind_of(first | {"cond_stage_model.model.ln_final.bias": torch.zeros(1)}) == "SD2"
    assert single_file.kind_of(first | {"conditioner.embedders.1.model.ln_final.bias": torch.zeros(1)}) == "SDXL"
    refiner = first | {"conditioner.embedders.0.model.ln_final.bias": torch.zeros(1)}
    upscaler = {single_file.FIRST: torch.zeros(4, 7, 3, 3)}
    for tensors in (refiner, upscaler):
        save_file(tensors, file)
        with pytest.raises(WeightsError, match="no whole checkpoint of a kind that is known.*1.x, 2.x or XL"):
            StableDiffusion.load(str(file))


@pytest.fixture
def small_xl(sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small SDXL in one file."""
    layout = only_configurations(sdxl, tmp_path / "layout-xl")
    monkeypatch.setattr(single_file, "LAYOUTS", {"SDXL": layout})
    return write_original(sdxl, tmp_path / "small-xl.safetensors")


def test_sdxl_in_one_file(small_xl: Path, sdxl: Path) -> None:
    family, folder = StableDiffusionXL.load(str(small_xl)), StableDiffusionXL.load(str(sdxl))
    assert_equal(family, folder)
    assert isinstance(open_model(str(small_xl), device=CPU), StableDiffusionXL)
    stock = StableDiffusionXLPipeline.from_single_file(str(small_xl), config=str(small_xl.parent / "layout-xl"))
    assert_equal_states(stock, folder)


def test_stable_diffusion_2_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = {"hidden_act": "gelu", "num_hidden_layers": 2}
    folder = make_sd(tmp_path / "two", prediction="v_prediction", text=text, use_linear_projection=True)
    layout = only_configurations(folder, tmp_path / "layout")
    monkeypatch.setattr(single_file, "LAYOUTS", {"SD2": layout})
    file = write_original(folder, tmp_path / "two.safetensors")
    family = StableDiffusion.load(str(file))
    assert_equal(family, StableDiffusion.load(str(folder)))
    assert family.scheduler["prediction_type"] == "v_prediction"
    assert_equal_states(StableDiffusionPipeline.from_single_file(str(file), config=str(layout)), family)


def test_what_the_header_says_of_the_prediction_is_believed(small: Path, sd: Path, tmp_path: Path) -> None:
    file = write_original(sd, tmp_path / "v.safetensors", **{"modelspec.prediction_type": "v"})
    assert StableDiffusion.load(str(file)).scheduler["prediction_type"] == "v_prediction"


def test_stock_diffusers_opens_what_is_written(small: Path, sd: Path, tmp_path: Path) -> None:
    stock = StableDiffusionPipeline.from_single_file(str(small), config=str(tmp_path / "layout"))
    assert_equal_states(stock, StableDiffusion.load(str(sd)))


def assert_equal_states(stock: Any, family: Any) -> None:
    """The networks of a stock pipeline hold the same tensors."""
    for name, network in family.modules.items():
        states = getattr(stock, name).state_dict(), network.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items()), name


def test_a_pickle_is_opened_only_when_that_is_said(small: Path, sd: Path, tmp_path: Path) -> None:
    file = tmp_path / "small.ckpt"
    torch.save({"state_dict": load_file(small), "epoch": 3}, file)
    with pytest.raises(WeightsError, match="harmful code.*model.allow_pickle=true"):
        StableDiffusion.load(str(file))
    assert_equal(StableDiffusion.load(str(file), allow_pickle=True), StableDiffusion.load(str(sd)))
    torch.save({"state_dict": load_file(small), "callback": pytest.raises}, file)  # more than tensors
    with pytest.raises(WeightsError, match="cannot be opened as weights alone"):
        StableDiffusion.load(str(file), allow_pickle=True)


@pytest.mark.parametrize("names", ["original", "whole checkpoint", "diffusers"])
def test_a_vae_in_one_file_takes_the_place_of_the_bases(small: Path, sd: Path, tmp_path: Path, names: str) -> None:
    vae = AutoencoderKL.from_pretrained(sd, subfolder="vae")
    shake(vae)
    state = vae.state_dict() if names == "diffusers" else original_checkpoint({"vae": vae})
    start = "first_stage_model." if names == "whole checkpoint" else ""
    file = tmp_path / "vae.safetensors"
    save_file({start + key: tensor.contiguous() for key, tensor in state.items()}, file)
    for base in (sd, small):
        family = StableDiffusion.load(str(base), vae=str(file))
        opened = family.modules["vae"].state_dict()
        assert all(torch.equal(tensor, opened[key]) for key, tensor in vae.state_dict().items())
    if names == "original":
        stock = AutoencoderKL.from_single_file(str(file), config=str(sd), subfolder="vae").state_dict()
        assert all(torch.equal(tensor, stock[key]) for key, tensor in vae.state_dict().items())


def test_a_file_that_is_no_vae_is_refused(sd: Path, tmp_path: Path) -> None:
    save_file({"lora": torch.zeros(1)}, tmp_path / "no.safetensors")
    with pytest.raises(WeightsError, match="model.vae: .* holds no VAE"):
        StableDiffusion.load(str(sd), vae=str(tmp_path / "no.safetensors"))
    save_file({"decoder.conv_in.weight": torch.zeros(1)}, tmp_path / "half.safetensors")
    with pytest.raises(WeightsError, match="does not fit the base's VAE"):
        StableDiffusion.load(str(sd), vae=str(tmp_path / "half.safetensors"))


SIZES = {
    "SD1": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "SD2": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "SDXL": {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
}
KNOWN_AS = {"SD1": "v1", "SD2": "v2", "SDXL": "xl_base"}


@pytest.mark.parametrize("kind", SIZES)
def test_the_shipped_configurations_and_names_are_those_of_the_published_models(kind: str) -> None:
    """Their sizes are, and diffusers turns the names that are written back into all of the networks' own."""
    layout = single_file.LAYOUTS[kind]
    family = StableDiffusionXL if kind == "SDXL" else StableDiffusion
    networks = {}
    for part, size in SIZES[kind].items():
        network = family.network_class(part)
        with torch.device("meta"):
            if part.startswith("text_encoder"):
                networks[part] = network(network.config_class.from_pretrained(layout / part))
            else:
                networks[part] = network.from_config(network.load_config(layout / part))
        assert sum(parameter.numel() for parameter in networks[part].parameters()) == size, part
    tensors = original_checkpoint(networks)
    assert utils.infer_diffusers_model_type(tensors) == KNOWN_AS[kind] and single_file.kind_of(tensors) == kind
    back: dict[str, Any] = {
        "unet": utils.convert_ldm_unet_checkpoint(tensors, networks["unet"].config),
        "vae": utils.convert_ldm_vae_checkpoint(tensors, networks["vae"].config),
    }
    if kind == "SD2":
        back["text_encoder"] = utils.convert_open_clip_checkpoint(networks["text_encoder"], tensors)
    else:
        back["text_encoder"] = utils.convert_ldm_clip_checkpoint(tensors)
    if kind == "SDXL":
        start = "conditioner.embedders.1.model."
        back["text_encoder_2"] = utils.convert_open_clip_checkpoint(networks["text_encoder_2"], tensors, prefix=start)
    for part, network in networks.items():
        state = {key: tensor.shape for key, tensor in network.state_dict().items()}
        wanted = {historical_key(key): shape for key, shape in state.items()} if "text" in part else state
        assert {key: tensor.shape for key, tensor in back[part].items()} == wanted
    scheduler = family.open("scheduler", str(layout), "scheduler")
    assert scheduler["prediction_type"] == ("v_prediction" if kind == "SD2" else "epsilon")


def test_the_shipped_tokenizers() -> None:
    for kind, part, padding in (("SD1", "tokenizer", 49407), ("SD2", "tokenizer", 0), ("SDXL", "tokenizer_2", 0)):
        tokenizer = single_file.open_tokenizer(single_file.LAYOUTS[kind], part)
        assert tokenizer(["a photo of a cat"])["input_ids"] == [[49406, 320, 1125, 539, 320, 2368, 49407]]
        assert tokenizer.pad_token_id == padding and tokenizer.model_max_length == 77
