"""Small networks of every kind that we support, and a pair of ours and diffusers' with the same random weights."""

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from sdtune import models


def randomise(model: nn.Module) -> None:
    """Give every parameter a random part, so that none is at the zero or one with which it starts."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def make_pair(name: str, config: dict[str, Any]) -> tuple[Any, Any]:
    """Diffusers' and our model `name` with the same random weights."""
    torch.manual_seed(0)
    theirs, ours = getattr(diffusers, name)(**config), getattr(models, name)(**config)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.fixture
def pair() -> Callable[[str, dict[str, Any]], tuple[Any, Any]]:
    return make_pair


@pytest.fixture
def assert_parity() -> Callable[..., None]:
    """Asserts equal outputs (1e-4) and equal gradients of every parameter and input (1e-4, relative)."""

    def check(theirs: nn.Module, ours: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> None:
        torch.manual_seed(2)
        outputs, gradients = [], []
        for model in (theirs, ours):
            x_leaf = x.clone().requires_grad_()
            y = call(model, x_leaf)
            (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
            outputs.append(y.detach())
            gradients.append({"input": x_leaf.grad} | {name: p.grad for name, p in model.named_parameters()})
        torch.testing.assert_close(outputs[1], outputs[0], atol=1e-4, rtol=1e-4)

        theirs_grad, ours_grad = gradients
        assert theirs_grad.keys() == ours_grad.keys()
        largest = max(float(g.norm()) for g in theirs_grad.values() if g is not None)
        for name, expected in theirs_grad.items():
            got = ours_grad[name]
            assert (got is None) == (expected is None), name
            if expected is not None:
                # The gradient of a key's bias is zero but for rounding: hence the second term.
                allowed = 1e-4 * expected.norm() + 1e-7 * largest
                assert (got - expected).norm() <= allowed, f"{name}: {got - expected}"

    return check


DOWN, UP = "DownBlock2D", "UpBlock2D"
CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"


def unet_config(down: str, **others: Any) -> dict[str, Any]:
    """A small UNet; `down` has a letter a level from the top, x with attention and - without."""
    return {
        "down_block_types": [CROSS_DOWN if letter == "x" else DOWN for letter in down],
        "up_block_types": [CROSS_UP if letter == "x" else UP for letter in down[::-1]],
        "block_out_channels": [32, 64, 64, 96][: len(down)],
        "norm_num_groups": 8,
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
        **others,
    }


TEXT_TIME = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 20,
    "use_linear_projection": True,
}

# name: (configuration, batch, height and width of the latents, masks in use)
UNETS: dict[str, tuple[dict[str, Any], int, tuple[int, int], str]] = {
    "two levels of 32": (unet_config("xx", block_out_channels=[32, 32], norm_num_groups=32), 2, (8, 8), ""),
    "sd1, four levels": (unet_config("xxx-"), 1, (24, 40), ""),
    "sd2, linear, heads a level": (
        unet_config("xxx-", use_linear_projection=True, attention_head_dim=[1, 2, 4, 6], upcast_attention=True),
        2,
        (16, 24),
        "text",
    ),
    "sdxl": (
        unet_config("-xx", transformer_layers_per_block=[1, 2, 3], attention_head_dim=[2, 4, 8], **TEXT_TIME),
        2,
        (16, 16),
        "",
    ),
    "sdxl, text mask": (unet_config("-x", transformer_layers_per_block=2, **TEXT_TIME), 3, (10, 6), "text"),
    "inpainting": (unet_config("xx-", in_channels=9), 2, (24, 40), ""),
    "size not divisible": (unet_config("xxx"), 3, (23, 37), "text"),
    "no middle, pixel mask": (unet_config("x-", mid_block_type=None), 2, (8, 12), "text pixels"),
    "no attention": (unet_config("--", mid_block_type=None), 2, (12, 8), ""),
    "one level": (unet_config("x", time_embedding_dim=40), 2, (9, 5), "pixels text"),
    "layers a level": (
        unet_config("xx", layers_per_block=[1, 3], cross_attention_dim=[24, 24], attention_head_dim=[8, 2]),
        1,
        (12, 12),
        "",
    ),
    "16 latent channels": (unet_config("xx", in_channels=16, out_channels=16, layers_per_block=1), 3, (8, 8), ""),
    "sine first, frequency shift": (unet_config("x-", flip_sin_to_cos=False, freq_shift=1), 2, (8, 8), ""),
    "attention differs up and down": (unet_config("x-", up_block_types=[CROSS_UP, UP]), 2, (8, 8), ""),
    "LCM guidance embedding": (unet_config("-x", time_cond_proj_dim=12), 2, (8, 8), ""),
    "text of another width": (
        unet_config("xx", encoder_hid_dim=24, encoder_hid_dim_type="text_proj", cross_attention_dim=16),
        2,
        (8, 8),
        "text",
    ),
    "norm_eps, asymmetric padding": (unet_config("xx", norm_eps=1e-3, downsample_padding=0), 2, (16, 16), ""),
}


def vae_config(levels: int, **others: Any) -> dict[str, Any]:
    return {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [16, 32, 32, 48][:levels],
        "norm_num_groups": 8,
        **others,
    }


# name: (configuration, batch, height and width of the pictures)
VAES: dict[str, tuple[dict[str, Any], int, tuple[int, int]]] = {
    "sd": (vae_config(4, layers_per_block=2), 1, (64, 48)),
    "16 channels, no quant convs": (
        vae_config(
            3, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611,
            shift_factor=0.1159,
        ),
        2,
        (32, 40),
    ),
    "no attention": (vae_config(2, mid_block_add_attention=False, act_fn="swish"), 3, (16, 16)),
    "one level": (vae_config(1, block_out_channels=[32], norm_num_groups=32, use_quant_conv=False), 2, (12, 8)),
    "odd size, means and deviations": (
        vae_config(3, latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0], force_upcast=False),
        1,
        (37, 51),
    ),
    "grey in, colours out": (vae_config(2, in_channels=1, out_channels=3, layers_per_block=3), 1, (16, 24)),
}  # fmt: skip


@pytest.fixture(params=UNETS.values(), ids=UNETS.keys())
def unet_case(request: pytest.FixtureRequest) -> tuple[dict[str, Any], dict[str, Any]]:
    """A configuration, and random arguments for a call."""
    config, batch, (height, width), masks = request.param
    torch.manual_seed(1)
    inputs: dict[str, Any] = {
        "sample": torch.randn(batch, config.get("in_channels", 4), height, width),
        "timestep": torch.randint(0, 1000, (batch,)),
        "encoder_hidden_states": torch.randn(batch, 7, 24),
    }
    if "text" in masks:
        keep = torch.rand(batch, 7) > 0.4
        keep[0] = False  # all masked: must not give NaN
        inputs["encoder_attention_mask"] = keep
    if "pixels" in masks:
        inputs["attention_mask"] = (torch.rand(batch, height * width) > 0.3).long()
    if "addition_embed_type" in config:
        sizes = torch.randint(0, 1024, (batch, 6))
        inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(batch, 20), "time_ids": sizes}
    if "time_cond_proj_dim" in config:
        inputs["timestep_cond"] = torch.randn(batch, 12)
    return config, inputs


@pytest.fixture(params=VAES.values(), ids=VAES.keys())
def vae_case(request: pytest.FixtureRequest) -> tuple[dict[str, Any], Tensor]:
    """A configuration, and random pictures."""
    config, batch, size = request.param
    torch.manual_seed(1)
    return config, torch.rand(batch, config.get("in_channels", 3), *size) * 2 - 1
