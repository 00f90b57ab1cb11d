"""What ours saves, stock diffusers opens where sdtune is not installed, and the reverse; LoRA files fit both."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sdtune.errors import WeightsError
from sdtune.models import AutoencoderKL, UNet2DConditionModel
from tests.factories import make_sd, make_sdxl

# Opens two pipeline folders with stock diffusers where sdtune cannot be imported, and writes what they compute.
ELSEWHERE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "sdtune":
            raise ImportError("sdtune is not installed here")

sys.meta_path.insert(0, Absent())

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel

results = {}
for folder in sys.argv[2:]:
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe.unet) is UNet2DConditionModel and type(pipe.vae) is AutoencoderKL
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    name = type(pipe).__name__
    arguments = {"num_inference_steps": 2, "height": 64, "width": 64, "generator": generator}
    results[name] = pipe("a dog", output_type="np", **arguments).images
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    pixels = torch.linspace(-1, 1, 768).reshape(1, 3, 16, 16)
    with torch.no_grad():
        results[name + " vae"] = vae(pixels).sample.numpy()
np.savez(sys.argv[1], **results)
"""


def picture(pipe: Any, **arguments: Any) -> np.ndarray:
    """A picture of two steps with a fixed seed, (1, 64, 64, 3) in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)} | arguments
    if "image" not in arguments:
        arguments |= {"height": 64, "width": 64}
    return pipe("a dog", output_type="np", **arguments).images


def with_ours(folder: Path) -> Any:
    """The pipeline of a folder with our networks in it."""
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, unet=unet, vae=vae)
    assert pipe.unet is unet and pipe.vae is vae
    return pipe


def close(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert float(expected.std()) > 0.01, "a picture of one colour shows nothing"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pipelines written by stock diffusers."""
    root = tmp_path_factory.mktemp("stock")
    return {"sd": make_sd(root / "sd"), "sdxl": make_sdxl(root / "sdxl")}


def test_stock_diffusers_opens_what_ours_saves_without_sdtune(folders: dict[str, Path], tmp_path: Path) -> None:
    pipes = [with_ours(folder) for folder in folders.values()]
    ours = [tmp_path / name for name in folders]
    for pipe, folder in zip(pipes, ours, strict=True):
        pipe.save_pretrained(folder)
        index = json.loads((folder / "model_index.json").read_text())
        assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
        assert index["vae"] == ["diffusers", "AutoencoderKL"]
    command = [sys.executable, "-I", "-c", ELSEWHERE, str(tmp_path / "results.npz"), *map(str, ours)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    results = np.load(tmp_path / "results.npz")
    pixels = torch.linspace(-1, 1, 768).reshape(1, 3, 16, 16)
    for pipe in pipes:
        name = type(pipe).__name__
        close(results[name], picture(pipe))
        with torch.no_grad():
            close(results[name + " vae"], pipe.vae(pixels).sample.numpy())


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_ours_open_what_stock_diffusers_saves(name: str, folders: dict[str, Path]) -> None:
    stock = diffusers.DiffusionPipeline.from_pretrained(folders[name])
    close(picture(with_ours(folders[name])), picture(stock))


@pytest.mark.parametrize("kind", ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"])
def test_other_stock_pipelines_run_on_ours(kind: str, folders: dict[str, Path]) -> None:
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    arguments = {"image": image, "num_inference_steps": 4}
    if kind == "StableDiffusionInpaintPipeline":
        arguments["mask_image"] = (torch.arange(64) > 32).float().expand(1, 1, 64, 64)
    results = []
    for pipe in (with_ours(folders["sd"]), diffusers.DiffusionPipeline.from_pretrained(folders["sd"])):
        results.append(picture(getattr(diffusers, kind)(**pipe.components, requires_safety_checker=False), **arguments))
    close(*results)


def test_memory_switches_of_pipelines_change_nothing(folders: dict[str, Path]) -> None:
    pipe = with_ours(folders["sd"])
    expected = picture(pipe, num_images_per_prompt=2)
    pipe.enable_attention_slicing()
    pipe.vae.enable_slicing()
    close(picture(pipe, num_images_per_prompt=2), expected)


@pytest.fixture(scope="module")
def lora(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA file with linear layers and convolutions, written by stock diffusers."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(5)
    unet = diffusers.UNet2DConditionModel.from_pretrained(folders["sd"], subfolder="unet")
    names = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "conv1", "time_emb_proj"]
    unet.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=names, init_lora_weights=False))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    folder = tmp_path_factory.mktemp("lora")
    diffusers.StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return folder


def test_a_stock_pipeline_loads_lora_weights_into_ours(folders: dict[str, Path], lora: Path) -> None:
    ours, stock = with_ours(folders["sd"]), diffusers.DiffusionPipeline.from_pretrained(folders["sd"])
    plain = picture(ours)
    for pipe in (ours, stock):
        pipe.load_lora_weights(lora)
    full, half = picture(ours), picture(ours, cross_attention_kwargs={"scale": 0.5})
    close(full, picture(stock))
    close(half, picture(stock, cross_attention_kwargs={"scale": 0.5}))
    assert abs(full - plain).max() > 0.01 and abs(half - full).max() > 0.01

    ours.set_adapters(["default_0"], [0.5])
    close(picture(ours), half)
    ours.fuse_lora()
    close(picture(ours), half)
    ours.unfuse_lora()
    ours.unload_lora_weights()
    close(picture(ours), plain)


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "AutoencoderKL"])
def test_shards_variants_and_dtypes(name: str, tmp_path: Path, pair: Any) -> None:
    theirs, ours = pair(name, {"block_out_channels": [32]} if name == "AutoencoderKL" else SMALL)
    for source, target in ((ours, type(theirs)), (theirs, type(ours))):
        folder = tmp_path / type(source).__module__
        source.save_pretrained(folder, max_shard_size="60KB", variant="fp16")
        assert len(list(folder.glob("*fp16-0*"))) > 1
        loaded = target.from_pretrained(folder, variant="fp16", torch_dtype=torch.float16)
        assert loaded.dtype == torch.float16
        for key, value in source.state_dict().items():
            torch.testing.assert_close(loaded.state_dict()[key], value.half(), atol=0, rtol=0)


SMALL = {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
}


def test_the_first_stable_diffusion_files_open(tmp_path: Path) -> None:
    """Their VAE calls the parts of its attention by other names."""
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=[32])
    vae.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        weights = {key.replace(new, old): value for key, value in weights.items()}
    assert weights.keys() != vae.state_dict().keys()
    save_file(weights, file)
    x = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(AutoencoderKL.from_pretrained(tmp_path)(x).sample, vae(x).sample)


@pytest.mark.parametrize("change, named", [("drop", "1 tensors are missing.*conv_in.bias"), ("add", "no place.*extra")])
def test_weights_that_do_not_fit_are_refused(change: str, named: str, tmp_path: Path) -> None:
    UNet2DConditionModel(**SMALL).save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    if change == "drop":
        del weights["conv_in.bias"]
    else:
        weights["extra"] = torch.zeros(1)
    save_file(weights, file)
    with pytest.raises(WeightsError, match=named):
        UNet2DConditionModel.from_pretrained(tmp_path)


def test_pickled_weights_are_opened_only_on_request(tmp_path: Path) -> None:
    vae = AutoencoderKL(block_out_channels=[32])
    vae.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(OSError, match="safetensors"):
        AutoencoderKL.from_pretrained(tmp_path)
    loaded = AutoencoderKL.from_pretrained(tmp_path, use_safetensors=False)
    torch.testing.assert_close(loaded.state_dict(), vae.state_dict(), atol=0, rtol=0)


def test_loading_info_on_request(tmp_path: Path) -> None:
    AutoencoderKL(block_out_channels=[32]).save_pretrained(tmp_path)
    model, info = AutoencoderKL.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, AutoencoderKL) and not info["missing_keys"]


def test_copies_and_pickles_are_still_ours() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=[32])
    for twin in (copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
        assert type(twin) is AutoencoderKL
        torch.testing.assert_close(twin.state_dict(), vae.state_dict(), atol=0, rtol=0)
