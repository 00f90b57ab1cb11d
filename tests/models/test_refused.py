"""Configurations that our networks would not compute as diffusers does are refused, by key and value."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from sdtune.errors import WeightsError
from sdtune.models import AutoencoderKL, UNet2DConditionModel

UNET_VALUES: list[tuple[str, Any]] = [
    ("center_input_sample", True),
    ("down_block_types", ["AttnDownBlock2D", "DownBlock2D", "DownBlock2D", "DownBlock2D"]),
    ("down_block_types", ["DownBlock2D", "DownBlock2D"]),
    ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
    ("mid_block_type", "UNetMidBlock2D"),
    ("up_block_types", ["UpBlock2D", "UpBlock2D", "UpBlock2D", "ResnetUpsampleBlock2D"]),
    ("only_cross_attention", True),
    ("only_cross_attention", [True, True, True, False]),
    ("block_out_channels", [32, 64]),
    ("layers_per_block", [1, 2]),
    ("downsample_padding", 2),
    ("mid_block_scale_factor", 1.4142),
    ("act_fn", "gelu"),
    ("norm_num_groups", None),
    ("cross_attention_dim", [768, 768]),
    ("transformer_layers_per_block", [1, [1, 2], 1, 1]),
    ("transformer_layers_per_block", [1, 2]),
    ("reverse_transformer_layers_per_block", [[1, 1, 1], 1, 1, 1]),
    ("encoder_hid_dim", 1024),
    ("encoder_hid_dim_type", "text_proj"),
    ("attention_head_dim", [5, 10]),
    ("attention_head_dim", 7),
    ("attention_head_dim", None),
    ("num_attention_heads", 8),
    ("dual_cross_attention", True),
    ("class_embed_type", "timestep"),
    ("addition_embed_type", "text"),
    ("addition_embed_type", "image"),
    ("addition_time_embed_dim", 256),
    ("num_class_embeds", 10),
    ("resnet_time_scale_shift", "scale_shift"),
    ("resnet_skip_time_act", True),
    ("resnet_out_scale_factor", 2.0),
    ("time_embedding_type", "fourier"),
    ("time_embedding_act_fn", "silu"),
    ("timestep_post_act", "silu"),
    ("conv_in_kernel", 1),
    ("conv_out_kernel", 1),
    ("projection_class_embeddings_input_dim", 2816),
    ("attention_type", "gated"),
    ("class_embeddings_concat", True),
    ("mid_block_only_cross_attention", True),
    ("cross_attention_norm", "layer_norm"),
    ("addition_embed_type_num_heads", 32),
    ("a_key_of_the_future", "on"),
]
VAE_VALUES: list[tuple[str, Any]] = [
    ("down_block_types", ["AttnDownEncoderBlock2D"]),
    ("up_block_types", ["UpDecoderBlock2D", "UpDecoderBlock2D"]),
    ("block_out_channels", [32, 64]),
    ("act_fn", "gelu"),
    ("norm_num_groups", None),
    ("a_key_of_the_future", "on"),
]


def refused(model: type, key: str, value: Any) -> None:
    with pytest.raises(WeightsError) as error, torch.device("meta"):
        model.from_config({"_class_name": model.__name__, key: value})
    message = str(error.value)
    # A wrong number of levels may be told at the block types.
    assert f"{key}={value!r}" in message or (key == "block_out_channels" and "block_types" in message)
    assert message.count("\n") == 0


@pytest.mark.parametrize("key, value", UNET_VALUES, ids=str)
def test_unet_values(key: str, value: Any) -> None:
    refused(UNet2DConditionModel, key, value)


@pytest.mark.parametrize("key, value", VAE_VALUES, ids=str)
def test_vae_values(key: str, value: Any) -> None:
    refused(AutoencoderKL, key, value)


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "AutoencoderKL"])
def test_defaults_and_keys_are_those_of_diffusers(name: str) -> None:
    import sdtune.models

    with torch.device("meta"):
        theirs, ours = getattr(diffusers, name)(), getattr(sdtune.models, name)()
    hidden = "_use_default_values"
    assert {k: v for k, v in ours.config.items() if k != hidden} == {
        k: v for k, v in theirs.config.items() if k != hidden
    }


def test_all_faults_are_named_together() -> None:
    with pytest.raises(WeightsError, match="act_fn='mish'.*class_embed_type='projection'"), torch.device("meta"):
        UNet2DConditionModel(act_fn="mish", class_embed_type="projection")


def test_a_folder_is_refused_before_its_weights_are_looked_for(tmp_path: Path) -> None:
    config = {"_class_name": "UNet2DConditionModel", "time_embedding_type": "fourier"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="time_embedding_type='fourier'"):
        UNet2DConditionModel.from_pretrained(tmp_path)


def test_another_class_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny"}))
    with pytest.raises(WeightsError, match="AutoencoderTiny"):
        AutoencoderKL.from_pretrained(tmp_path)


def test_bookkeeping_of_training_scripts_is_accepted() -> None:
    with torch.device("meta"):
        UNet2DConditionModel.from_config({"decay": 0.9999, "optimization_step": 100, "_name_or_path": "somewhere"})
