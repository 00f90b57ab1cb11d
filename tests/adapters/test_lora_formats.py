"""Every style that LoRA files are written in: stock libraries read ours, and we read theirs, with equal answers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdtune.adapters.lora_files import load_lora, named_weights, read_lora
from sdtune.adapters.lora_layers import LoraLayer
from sdtune.adapters.lora_names import kohya_name, parse
from sdtune.adapters.lora_writing import write_diffusers, write_kohya, write_peft
from sdtune.adapters.low_rank import DENOISER_TARGETS
from sdtune.errors import WeightsError
from sdtune.families.sdxl import StableDiffusionXL
from sdtune.families.single_file import LAYOUTS
from sdtune.families.stable_diffusion import StableDiffusion

TARGETS = ["to_q", "to_out.0", "ff.net.0.proj", "conv1", "conv_shortcut", "proj_in", "downsamplers.0.conv"]
TEXT_TARGETS = ["q_proj", "out_proj", "fc1"]
KINDS = {
    "lora": (LoraConfig, {"r": 4, "lora_alpha": 6, "rank_pattern": {"mid_block.*to_q": 2}}),
    "rslora": (LoraConfig, {"r": 4, "lora_alpha": 6, "use_rslora": True}),
    "dora": (LoraConfig, {"r": 4, "lora_alpha": 6, "use_dora": True}),
    "loha": (LoHaConfig, {"r": 4, "alpha": 6}),
    "loha, cores": (LoHaConfig, {"r": 4, "alpha": 6, "use_effective_conv2d": True}),
    "lokr": (LoKrConfig, {"r": 2, "alpha": 3}),
    "lokr, cores": (LoKrConfig, {"r": 2, "alpha": 3, "use_effective_conv2d": True, "decompose_both": True}),
    "lokr, split otherwise": (LoKrConfig, {"r": 64, "alpha": 3, "decompose_factor": 8}),
}


def made(family: Any, folder: Path, kind: str) -> dict[str, LoraLayer]:
    """The layers of an adapter of random weights that peft saved."""
    maker, options = KINDS[kind]
    torch.manual_seed(0)
    for name in ("unet", *family.text_encoders):
        targets = TARGETS if name == "unet" else TEXT_TARGETS
        wrapped: Any = get_peft_model(family.modules[name], maker(target_modules=targets, **options))
        with torch.no_grad():
            for key, parameter in wrapped.named_parameters():
                if parameter.requires_grad:  # an eighth, so that products of four factors stay small
                    parameter.copy_(parameter.abs() * 1.1 if "magnitude" in key else 0.3 * torch.randn_like(parameter))
        wrapped.save_pretrained(folder / name)
    return read_lora(folder).layers


@torch.no_grad()
def answers(pipeline: Any, width: int = 32) -> torch.Tensor:
    """What the networks of a family or pipeline say, in one tensor."""
    modules = pipeline.modules if hasattr(pipeline, "text_encoders") else pipeline.components
    ids = torch.arange(1, 21)[None]
    text = modules["text_encoder"](ids).last_hidden_state
    options: dict[str, Any] = {}
    if "text_encoder_2" in modules:
        second = modules["text_encoder_2"](ids)
        text = torch.cat([text, second.last_hidden_state], dim=-1)
        options = {"added_cond_kwargs": {"text_embeds": second.text_embeds, "time_ids": torch.ones(1, 6)}}
    x_t = torch.linspace(-1, 1, 4 * 16 * 16).reshape(1, 4, 16, 16)
    answer = modules["unet"].eval()(x_t, torch.tensor([300]), encoder_hidden_states=text, return_dict=False, **options)
    return torch.cat([answer[0].flatten(), text.flatten()])


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_saved_is_read_and_written_again(sd: Path, tmp_path: Path, kind: str) -> None:
    """peft's own forward pass is the answer to come to: after reading its folder, and after each style of ours."""
    theirs = StableDiffusion.load(str(sd))
    plain = answers(theirs)
    layers = made(theirs, tmp_path / "peft", kind)
    expected = answers(theirs)
    assert (expected - plain).abs().max() > 0.05
    assert {layer.kind for layer in layers.values()} == {kind.removeprefix("rs").partition(",")[0]}

    write_peft(layers, tmp_path / "again")
    write_kohya(layers, tmp_path / "kohya.safetensors", unet=None, header={"ss_output_name": "it"})
    places = [tmp_path / "peft", tmp_path / "again", tmp_path / "kohya.safetensors"]
    if layers[next(iter(layers))].kind in ("lora", "dora"):
        write_diffusers(layers, tmp_path / "diffusers.safetensors")
        places.append(tmp_path / "diffusers.safetensors")
    for place in places:
        ours = StableDiffusion.load(str(sd))
        load_lora(ours, place)
        close(answers(ours), expected)


@pytest.mark.parametrize("kind", ["lora", "dora", "loha"])
def test_a_weight_is_how_far_to_go_from_the_base(sd: Path, tmp_path: Path, kind: str) -> None:
    made(StableDiffusion.load(str(sd)), tmp_path / "peft", kind)
    base, whole, part, none = (StableDiffusion.load(str(sd)) for _ in range(4))
    for family, weight in ((whole, 1.0), (part, 0.3), (none, 0.0)):
        load_lora(family, tmp_path / "peft", weight)
    before, full, third, same = (named_weights(family.modules) for family in (base, whole, part, none))
    assert any((full[name] - before[name]).abs().max() > 0.01 for name in before)
    for name, weight in before.items():
        torch.testing.assert_close(third[name], weight + 0.3 * (full[name] - weight), atol=1e-5, rtol=1e-4)
        assert torch.equal(same[name], weight)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_opens_what_is_written(sd: Path, tmp_path: Path, kind: str) -> None:
    theirs = StableDiffusion.load(str(sd))
    layers = made(theirs, tmp_path / "peft", kind)
    write_peft(layers, tmp_path / "again")
    stock = StableDiffusionPipeline.from_pretrained(sd)
    PeftModel.from_pretrained(stock.unet, tmp_path / "again" / "unet")
    stock.text_encoder.load_adapter(tmp_path / "again" / "text_encoder")
    close(answers(stock), answers(theirs))


@pytest.mark.parametrize(("kind", "style"), [("lora", "diffusers"), ("dora", "diffusers"), ("lora", "kohya")])
def test_diffusers_opens_what_is_written(sd: Path, tmp_path: Path, kind: str, style: str) -> None:
    theirs = StableDiffusion.load(str(sd))
    layers = made(theirs, tmp_path / "peft", kind)
    file = tmp_path / "lora.safetensors"
    if style == "diffusers":
        write_diffusers(layers, file)
    else:
        write_kohya(layers, file, unet=None, header={})
    stock = StableDiffusionPipeline.from_pretrained(sd)
    stock.load_lora_weights(file)
    close(answers(stock), answers(theirs))


@pytest.mark.parametrize("style", ["diffusers", "kohya"])
def test_sdxl(sdxl: Path, tmp_path: Path, style: str) -> None:
    theirs = StableDiffusionXL.load(str(sdxl))
    layers = made(theirs, tmp_path / "peft", "lora")
    file = tmp_path / "lora.safetensors"
    if style == "diffusers":
        write_diffusers(layers, file)
    else:
        write_kohya(layers, file, unet=theirs.modules["unet"].config, header={})
        assert {key.split("_")[1] for key in load_file(file)} == {"unet", "te1", "te2"}
        assert any(key.startswith("lora_unet_input_blocks_2_0_op.") for key in load_file(file))
    ours = StableDiffusionXL.load(str(sdxl))
    load_lora(ours, file)
    close(answers(ours), answers(theirs))
    stock = StableDiffusionXLPipeline.from_pretrained(sdxl)
    stock.load_lora_weights(file)
    close(answers(stock), answers(theirs))


def legacy(layers: dict[str, LoraLayer], file: Path, unet: str = "") -> Path:
    """A LoRA as diffusers wrote it in early 2023, attention alone."""
    tensors = {}
    for name, layer in layers.items():
        network, _, module = name.partition(".")
        start, _, kind = module.removesuffix(".0").rpartition(".")
        if network == "unet" and ".attn" in module:
            for part in ("down", "up"):
                tensors[f"{unet}{start}.processor.{kind}_lora.{part}.weight"] = layer.baked().factors[part]
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
    return file


@pytest.mark.parametrize("unet", ["", "unet."])
def test_keys_of_attention_processors(sd: Path, tmp_path: Path, unet: str) -> None:
    layers = made(StableDiffusion.load(str(sd)), tmp_path / "peft", "lora")
    lora = read_lora(legacy(layers, tmp_path / "old.safetensors", unet))
    assert lora.style == "legacy" and not lora.strange and len(lora.layers) > 4
    for name, layer in lora.layers.items():
        shape = layers[name].size
        torch.testing.assert_close(layer.delta(shape), layers[name].delta(shape))


def test_diffusers_old_names_of_text_encoders(sd: Path, tmp_path: Path) -> None:
    layers = made(StableDiffusion.load(str(sd)), tmp_path / "peft", "lora")
    text = {name: layer for name, layer in layers.items() if name.endswith(("q_proj", "out_proj"))}
    for old, new in (("{}.lora_linear_layer", ""), ("{}_lora", "to_")):
        tensors = {}
        for name, layer in text.items():
            called = name.replace("q_proj", "to_q").replace("out_proj", "to_out") if new else name
            for part in ("down", "up"):
                tensors[f"{old.format(called)}.{part}.weight"] = layer.baked().factors[part].contiguous()
        save_file(tensors, tmp_path / "old.safetensors")
        lora = read_lora(tmp_path / "old.safetensors")
        assert lora.layers.keys() == text.keys() and not lora.strange


def test_text_encoder_keys_are_written_as_before_transformers_5(sd: Path, tmp_path: Path) -> None:
    layers = made(StableDiffusion.load(str(sd)), tmp_path / "peft", "lora")
    write_diffusers(layers, tmp_path / "d.safetensors")
    write_peft(layers, tmp_path / "p")
    write_kohya(layers, tmp_path / "k.safetensors", unet=None, header={})
    starts = {
        "d.safetensors": "text_encoder.text_model.encoder.layers.",
        "p/text_encoder/adapter_model.safetensors": "base_model.model.text_model.encoder.layers.",
        "k.safetensors": "lora_te_text_model_encoder_layers_",
    }
    for name, start in starts.items():
        keys = [key for key in load_file(tmp_path / name) if "encoder" in key]
        assert keys and all(key.startswith(start) for key in keys)


def test_what_kohya_files_say_of_themselves(sd: Path, tmp_path: Path) -> None:
    layers = made(StableDiffusion.load(str(sd)), tmp_path / "peft", "dora")
    write_kohya(layers, tmp_path / "k.safetensors", unet=None, header={"ss_output_name": "it"})
    with safe_open(tmp_path / "k.safetensors", "pt") as file:
        said = file.metadata()
        down = next(key for key in file.keys() if key.endswith("conv1.lora_down.weight"))  # noqa: SIM118
        alpha = file.get_tensor(down.replace("lora_down.weight", "alpha"))
        scale = file.get_tensor(down.replace("lora_down.weight", "dora_scale"))
    assert said["ss_network_dim"] == "4" and said["ss_network_alpha"] == "6.0" and said["ss_output_name"] == "it"
    assert json.loads(said["ss_network_args"]) == {"dora_wd": "True", "wd_on_output": "True"}
    assert alpha.shape == () and alpha == 6 and scale.shape[1:] == (1, 1, 1)


def test_the_dora_of_an_older_lycoris_is_refused(sd: Path, tmp_path: Path) -> None:
    """It scales the inputs: (1, in) in place of (out, 1)."""
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.lora_down.weight": torch.zeros(2, 32), f"{name}.lora_up.weight": torch.zeros(32, 2)}
    save_file(tensors | {f"{name}.dora_scale": torch.ones(1, 32)}, tmp_path / "old.safetensors")
    with pytest.raises(WeightsError, match="no tensor of the 3 fits.*dora_scale.*scales the inputs"):
        load_lora(StableDiffusion.load(str(sd)), tmp_path / "old.safetensors")


def test_formats_that_have_no_place_for_a_kind(sd: Path, tmp_path: Path) -> None:
    layers = made(StableDiffusion.load(str(sd)), tmp_path / "peft", "lokr")
    with pytest.raises(WeightsError, match="no place for the lokr of unet.*write --format peft, kohya"):
        write_diffusers(layers, tmp_path / "no.safetensors")
    odd = LoraLayer({"lokr_w1": torch.ones(2, 16), "lokr_w2": torch.ones(16, 2)})
    with pytest.raises(WeightsError, match="peft splits no weight as this LoKr does"):
        write_peft({"unet.conv_in": odd}, tmp_path / "no")
    with pytest.raises(WeightsError, match="several kinds"):
        write_peft(layers | {"unet.conv_in": LoraLayer({"down": torch.ones(1, 2), "up": torch.ones(2, 1)})}, tmp_path)


def test_precision(sd: Path, tmp_path: Path) -> None:
    layers = made(StableDiffusion.load(str(sd)), tmp_path / "peft", "dora")
    half = {name: layer.to(torch.float16) for name, layer in layers.items()}
    write_kohya(half, tmp_path / "half.safetensors", unet=None, header={})
    assert {t.dtype for k, t in load_file(tmp_path / "half.safetensors").items() if "alpha" not in k} == {torch.float16}
    family = StableDiffusion.load(str(sd))
    load_lora(family, tmp_path / "half.safetensors")
    assert {weight.dtype for weight in named_weights(family.modules).values()} == {torch.float32}


def test_sdxl_names_are_kohyas() -> None:
    """As kohya's published files for SDXL have them."""
    unet = json.loads((LAYOUTS["SDXL"] / "unet" / "config.json").read_text())
    known = {
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k": (
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k"
        ),
        "unet.mid_block.attentions.0.proj_in": "lora_unet_middle_block_1_proj_in",
        "unet.up_blocks.0.attentions.2.transformer_blocks.9.ff.net.0.proj": (
            "lora_unet_output_blocks_2_1_transformer_blocks_9_ff_net_0_proj"
        ),
        "unet.down_blocks.0.resnets.1.time_emb_proj": "lora_unet_input_blocks_2_0_emb_layers_1",
        "unet.up_blocks.1.upsamplers.0.conv": "lora_unet_output_blocks_5_2_conv",
        "text_encoder.text_model.encoder.layers.3.mlp.fc1": "lora_te1_text_model_encoder_layers_3_mlp_fc1",
        "text_encoder_2.text_model.encoder.layers.3.mlp.fc2": "lora_te2_text_model_encoder_layers_3_mlp_fc2",
    }
    for layer, name in known.items():
        assert kohya_name(layer, unet) == name
        place = parse(f"{name}.lora_down.weight", unet)
        assert place is not None and place.layer == layer


@pytest.mark.parametrize("kind", LAYOUTS)
def test_diffusers_understands_kohyas_names_of_every_layer_of_the_published_models(kind: str) -> None:
    config = UNet2DConditionModel.load_config(LAYOUTS[kind] / "unet")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    targets = DENOISER_TARGETS["all"]
    layers = {name for name, _ in unet.named_modules() if any(f".{name}".endswith(f".{end}") for end in targets)}
    assert len(layers) > 200
    one, state = torch.zeros(1), {}
    for name in layers:
        start = kohya_name(f"unet.{name}", config if kind == "SDXL" else None)
        state |= {f"{start}.lora_down.weight": one, f"{start}.lora_up.weight": one, f"{start}.alpha": one}
    found, alphas = _convert_non_diffusers_lora_to_diffusers(_maybe_map_sgm_blocks_to_diffusers(state, unet.config))
    named = convert_unet_state_dict_to_peft({key.removeprefix("unet."): value for key, value in found.items()})
    wanted = {f"{name}.lora_{side}.weight" for name in layers for side in "AB"}
    assert named.keys() == wanted and len(alphas) == len(layers)
