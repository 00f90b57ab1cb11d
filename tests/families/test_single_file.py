"""Checkpoints in one file: the same networks as in a folder."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdtune.errors import WeightsError
from sdtune.families import single_file
from sdtune.families.stable_diffusion import StableDiffusion
from sdtune.opening import open_model
from sdtune.run import Run
from tests.factories import losses, make_recipe, make_sd, weights

CPU = torch.device("cpu")
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
VAE_MIDDLE = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_places(config: dict[str, Any]) -> dict[str, str]:
    """Beginnings of diffusers' parameter names, and those of the original code, which counts blocks without levels."""
    places, levels, layers = dict(ENDS), len(config["block_out_channels"]), config["layers_per_block"]
    number = 1
    for level, kind in enumerate(config["down_block_types"]):
        for layer in range(layers):
            places[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{number}.0"
            if "CrossAttn" in kind:
                places[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        places[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
        number += 1
    for level, kind in enumerate(config["up_block_types"]):
        for layer in range(layers + 1):
            number = level * (layers + 1) + layer
            places[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{number}.0"
            if "CrossAttn" in kind:
                places[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{number}.1"
        after = 1 + ("CrossAttn" in kind)
        places[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{number}.{after}.conv"
    assert levels == len(config["down_block_types"])
    return places


def unet_key(key: str, places: dict[str, str]) -> str:
    """The original name of a UNet's tensor."""
    start = next(start for start in places if key.startswith(f"{start}."))
    rest = key.removeprefix(start)
    if ".resnets." in start:
        rest = re.sub("|".join(RESNET), lambda found: RESNET[found.group()], rest)
    return f"model.diffusion_model.{places[start]}{rest}"


def vae_key(key: str, levels: int) -> str:
    """The original name of a VAE's tensor; its decoder counts levels from the other end."""
    key = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets", lambda found: f"up.{levels - 1 - int(found[1])}.block", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{levels - 1 - int(found[1])}.upsample", key)
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", key)
    if "mid_block.attentions" in key:
        for name, original in VAE_MIDDLE.items():
            key = key.replace(name, original)
    key = key.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_shortcut", "nin_shortcut")
    return "first_stage_model." + key.replace("conv_norm_out", "norm_out")


def write_original(folder: Path, file: Path) -> Path:
    """A diffusers folder as one file in the original layout."""
    unet, vae = (json.loads((folder / part / "config.json").read_text()) for part in ("unet", "vae"))
    places, tensors = unet_places(unet), {}
    for name, tensor in weights(folder).items():
        part, key = re.split("[/\\\\]", name)[0], name.partition(":")[2]
        if part == "unet":
            tensors[unet_key(key, places)] = tensor
        elif part == "vae":
            linear = "mid_block.attentions" in key and tensor.ndim == 2  # 1 x 1 convolutions once
            tensors[vae_key(key, len(vae["block_out_channels"]))] = tensor[:, :, None, None] if linear else tensor
        else:
            whole = key if key.startswith("text_model.") else f"text_model.{key}"
            tensors[f"cond_stage_model.transformer.{whole}"] = tensor
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]  # in old files
    tensors["alphas_cumprod"] = torch.ones(1000)
    save_file(tensors, file)
    return file


def only_configurations(folder: Path, target: Path) -> Path:
    """A diffusers folder without its weights."""
    return shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))


@pytest.fixture
def small(sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small model in one file, with its small configurations in the place of Stable Diffusion 1.5's."""
    layout = only_configurations(sd, tmp_path / "layout")
    monkeypatch.setattr(single_file, "LAYOUTS", {"v1": layout, "inpainting": layout})
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
    from safetensors.torch import load_file

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
        with pytest.raises(WeightsError, match="is a file; expected a diffusers folder"):
            StableDiffusion.load(str(other))


def test_other_kinds_of_checkpoint_are_told_apart(small: Path, tmp_path: Path) -> None:
    file = tmp_path / "xl.safetensors"
    keys = (single_file.FIRST, "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias")
    save_file({key: torch.zeros(4, 4, 3, 3) for key in keys}, file)
    with pytest.raises(WeightsError, match="of kind xl_base.*from_single_file"):
        StableDiffusion.load(str(file))


def test_the_shipped_configurations_are_those_of_stable_diffusion_1_5() -> None:
    folder = single_file.LAYOUTS["v1"]
    tokenizer = StableDiffusion.open("tokenizer", str(folder), "tokenizer")
    assert tokenizer(["a photo of a cat"])["input_ids"] == [[49406, 320, 1125, 539, 320, 2368, 49407]]
    assert tokenizer.pad_token_id == 49407 and tokenizer.model_max_length == 77
    for part, size in (("unet", 859_520_964), ("vae", 83_653_863), ("text_encoder", 123_060_480)):
        kind = StableDiffusion.network_class(part)
        with torch.device("meta"):
            if part == "text_encoder":
                network = kind(kind.config_class.from_pretrained(folder / part))
            else:
                network = kind.from_config(kind.load_config(folder / part))
        assert sum(parameter.numel() for parameter in network.parameters()) == size
    scheduler = StableDiffusion.open("scheduler", str(folder), "scheduler")
    assert scheduler["prediction_type"] == "epsilon" and scheduler["beta_end"] == 0.012
