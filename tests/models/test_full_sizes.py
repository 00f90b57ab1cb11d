"""The published models: exact sizes and names, and (slow) their outputs."""

from typing import Any

import diffusers
import pytest
import torch

import sdtune.models

SD1 = {"cross_attention_dim": 768, "sample_size": 64}
SD2 = {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "dual_cross_attention": False,
    "upcast_attention": True,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "transformer_layers_per_block": [1, 2, 10],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "upcast_attention": None,
}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "sample_size": 512,
}
UNET, KL = "UNet2DConditionModel", "AutoencoderKL"

# name: (class, configuration, parameters, tensors)
FULL: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "SD 1.5": (UNET, SD1, 859_520_964, 686),
    "SD 1.5 inpainting": (UNET, SD1 | {"in_channels": 9}, 859_535_364, 686),
    "SD 2.1": (UNET, SD2, 865_910_724, 686),
    "SDXL": (UNET, SDXL, 2_567_463_684, 1680),
    "SD VAE": (KL, VAE, 83_653_863, 248),
    "SDXL VAE": (KL, VAE | {"scaling_factor": 0.13025, "sample_size": 1024, "force_upcast": True}, 83_653_863, 248),
}


def on_meta(library: Any, name: str, config: dict[str, Any]) -> Any:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return getattr(library, name)(**config)


@pytest.mark.parametrize("name", FULL)
def test_sizes_and_names_are_exact(name: str) -> None:
    kind, config, parameters, tensors = FULL[name]
    ours = on_meta(sdtune.models, kind, config)
    assert sum(p.numel() for p in ours.parameters()) == parameters
    assert len(ours.state_dict()) == tensors
    theirs = on_meta(diffusers, kind, config)
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SD 1.5", "SD 2.1", "SDXL", "SD VAE"])
def test_full_models_compute_the_same(name: str) -> None:
    """One set of weights, assigned to both: two copies of SDXL would need 20 GB."""
    kind, config, _, _ = FULL[name]
    theirs, ours = on_meta(diffusers, kind, config), on_meta(sdtune.models, kind, config)
    torch.manual_seed(0)
    weights = {}
    for key, value in theirs.state_dict().items():
        fan_in = value[0].numel() if value.ndim > 1 else 1
        weights[key] = torch.randn(value.shape).mul_(fan_in**-0.5 if value.ndim > 1 else 0.05)
        if "norm" in key and key.endswith("weight"):
            weights[key] += 1
    for model in (theirs, ours):
        model.load_state_dict(weights, assign=True)
        model.eval()

    with torch.no_grad():
        if kind == KL:
            x = torch.rand(1, 3, 64, 96) * 2 - 1
            expected, got = (model(x).sample for model in (theirs, ours))
        else:
            batch, size = 2, (16, 16) if name != "SD 1.5" else (24, 40)
            x, text = torch.randn(batch, 4, *size), torch.randn(batch, 77, config["cross_attention_dim"])
            extra = {"text_embeds": torch.randn(batch, 1280), "time_ids": torch.randint(0, 1024, (batch, 6))}
            extra = {"added_cond_kwargs": extra} if name == "SDXL" else {}
            t = torch.tensor([10, 900])
            expected, got = (model(x, t, text, **extra).sample for model in (theirs, ours))
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)
